"""Which remat settings and batches fit a slice: the RL update compiled under each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.planning.sheet import ProgramSheet

REMATS = ("nothing", "attention", "dots")
FACTORS = (1, 4)  # times the configuration's prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """The RL update under other settings.

    Attributes:
        remat, prompts: the settings.
        update: what becomes of the program.
    """

    remat: str
    prompts: int
    update: ProgramSheet

    @property
    def prompt_seconds(self) -> float:
        """The compiler's estimate for one prompt; what a larger batch saves shows here."""
        return self.update.estimate / self.prompts


def alternatives(config: RunConfig, update: Callable[[RunConfig], ProgramSheet]) -> Iterator[Alternative]:
    """Every remat setting with every batch; once one does not fit, larger batches are not tried.

    Args:
        config: the configuration the others are made from.
        update: plans the RL update of a configuration.
    """
    for remat in REMATS:
        for factor in FACTORS:
            prompts = factor * config.rl.prompts_per_step
            model = dataclasses.replace(config.model, remat=remat)
            rl = dataclasses.replace(config.rl, prompts_per_step=prompts)
            sheet = update(dataclasses.replace(config, model=model, rl=rl))
            yield Alternative(remat=remat, prompts=prompts, update=sheet)
            if not sheet.fits:
                break
