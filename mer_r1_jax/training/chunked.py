"""Rollouts decoded in chunks of a fixed number of tokens, between which completions that have ended make room.

The host learns after every chunk how many rows the running completions need at each size a batch can have, a handful of
integers that every process sees alike, and goes on with the smallest that will do. These are the programs of it;
`rl_step.RlPrograms` jits them and holds the loop. Shape letters are those of `mer_r1_jax.omni.batch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mer_r1_jax.kernels.placement import Placement, device
from mer_r1_jax.omni.batch import Array, Prompts
from mer_r1_jax.omni.text import Cache, PromptCache
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.rules import DECODE_RULES, on
from mer_r1_jax.rl import compaction
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.rl.compaction import Kept, Size
from mer_r1_jax.rl.rollout import Completions, RolloutState, Sampled, advance, finish, start
from mer_r1_jax.rl.sampling import SamplingConfig


class Chunks(NamedTuple):
    """How rollouts are cut; static.

    Attributes:
        tokens: decoded at once.
        devices: parts that the mesh cuts the rows into while they are decoded.
    """

    tokens: int
    devices: int

    @classmethod
    def on(cls, mesh: Mesh, tokens: int) -> Chunks:
        """Chunks of so many tokens on a mesh."""
        return cls(tokens, row_cut(mesh, DECODE_RULES))

    def sizes(self, rows: int, sampling: SamplingConfig) -> tuple[Size, ...]:
        """The sizes a batch of so many rows can shrink through, rows counted on each device."""
        return compaction.sizes(rows // self.devices, sampling.num_generations)


def begin(
    model: BoundModel, prompts: Prompts, key: Array, sampling: SamplingConfig, chunks: Chunks
) -> tuple[RolloutState, Array]:
    """Prefill and the first chunk. Arguments as of `rl.rollout.rollout`.

    Returns:
        The state, and int32 [sizes]: the rows that the running completions need at each size (`rows_needed`).
    """
    sizes = chunks.sizes(prompts.uid_B.shape[0], sampling)
    return go_on(model, start(model, prompts, key, sampling), sampling, chunks, sizes)


def go_on(
    model: BoundModel, state: RolloutState, sampling: SamplingConfig, chunks: Chunks, sizes: tuple[Size, ...]
) -> tuple[RolloutState, Array]:
    """One chunk more of a batch that began with the first of the sizes; returns what `begin` does."""
    state = advance(model, state, sampling, chunks.tokens)
    # The host may skip sizes, so the need is reported for all of them.
    return state, compaction.rows_needed(state, sizes, chunks.devices, sampling.max_completion_length)


def compact(mesh: Mesh, state: RolloutState, kept: Kept | None, size: Size) -> tuple[RolloutState, Kept]:
    """`compaction.compact` to a smaller size, each device its own rows."""
    result = (_STATE, Kept(sampled=_STATE.sampled, place_BG=0))
    return _on_each_device(mesh, functools.partial(compaction.compact, size=size), (state, kept), result)


def end(mesh: Mesh, sampled: Sampled, kept: Kept | None, sampling: SamplingConfig) -> Completions:
    """The completions, from what the last batch sampled and what was kept before it."""
    whole = _on_each_device(mesh, compaction.brought_back, (sampled, kept), _STATE.sampled)
    return finish(whole, sampling.forced_ids)


def _on_each_device(mesh: Mesh, call: Callable[..., Any], arguments: tuple[Any, ...], result: Any) -> Any:
    """`call` on every device's own rows; `result` has the result's structure."""
    if mesh.size == 1:
        return call(*arguments)
    # Each device regroups its own rows, so nothing is sent; the compiler could not know that.
    specs = dict(in_specs=_specs(arguments, mesh), out_specs=_specs(result, mesh))
    return jax.shard_map(call, mesh=mesh, check_vma=False, **specs)(*arguments)


def state_shardings(mesh: Mesh) -> RolloutState:
    """Where a state lives between two chunks."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        _specs(_STATE, mesh),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def state_formats(mesh: Mesh) -> RolloutState:
    """The same, and on TPUs how it lies there: caches head by head, as the kernel reads them.

    Left to itself a program would take them token by token, and copy all of them at its beginning and its end.
    """
    shardings = state_shardings(mesh)
    if device(_placement(mesh)).platform != "tpu":
        return shardings

    def one(path: Any, sharding: NamedSharding) -> Any:
        letters = _letters(path)
        if not letters.endswith("Kh"):
            return sharding
        # [..., C, K, h] lies as [..., K, C, h].
        order = [*range(len(letters) - 3), len(letters) - 2, len(letters) - 3, len(letters) - 1]
        return Format(Layout(major_to_minor=tuple(order)), sharding)

    return jax.tree_util.tree_map_with_path(one, shardings)


def _placement(mesh: Mesh) -> Placement:
    rules = on(mesh, DECODE_RULES)
    return Placement(mesh, rules["batch"], rules["kv_heads"])


def _specs(tree: Any, mesh: Mesh) -> Any:
    """Where the arrays of a rollout live, by the shape letters of their names."""
    place = _placement(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, _: place.spec(_letters(path)), tree)


# A state's structure, for what depends on the names of its arrays alone.
_STATE = RolloutState(
    step=0,
    sampled=Sampled(id_BGC=0, logprob_BGC=0, sampling_logprob_BGC=0, length_BG=0, stop_BG=0),
    cache=Cache(k_LBGCKh=0, v_LBGCKh=0),
    prompt_cache=PromptCache(k_LBTKh=0, v_LBTKh=0, valid_BT=0),
    uniform_BGC=0,
    position_B=0,
)


def _letters(path: tuple[Any, ...]) -> str:
    """Shape letters of a field; none for a scalar."""
    _, found, letters = path[-1].name.rpartition("_")
    return letters if found else ""
