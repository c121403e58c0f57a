"""What is to be evaluated, as the command line says it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from mer_r1_jax.evaluation.benchmarks.errors import BenchmarkError
from mer_r1_jax.evaluation.benchmarks.sets import BENCHMARKS, GROUPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated, and how it is scored.

    Attributes:
        benchmarks: names, in order.
        modes: in which clips are asked: slow, fast or both. Whatever has been answered is scored.
        out: folder of answers, scores and report.
        root: folder of the sets' official folders.
        limit: first so many clips of each; 0 = all.
        words, polarity: of the protocol.
        wheel_dir, variant: wheels to score with; "" = the model's own.
    """

    benchmarks: tuple[str, ...]
    modes: tuple[str, ...]
    out: pathlib.Path
    root: str = ""
    limit: int = 0
    words: str = "answer"
    polarity: str = "wheels"
    wheel_dir: str = ""
    variant: str = ""


def benchmark_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of benchmarks, groups spelled out.

    Raises:
        BenchmarkError: an unknown name, or none.
    """
    names: list[str] = []
    for text in texts:
        if text not in BENCHMARKS and text not in GROUPS:
            raise BenchmarkError(f"--benchmark: got {text!r}, expected some of {', '.join((*GROUPS, *BENCHMARKS))}")
        names += GROUPS.get(text, (text,))
    if not names:
        raise BenchmarkError(f"--benchmark is empty, expected some of {', '.join((*GROUPS, *BENCHMARKS))}")
    return tuple(dict.fromkeys(names))
