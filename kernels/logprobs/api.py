"""Log-probabilities as the model asks for them: arguments are checked here and an implementation is chosen.

Three implementations compute the same numbers: `pallas` (TPU kernels), `xla` (a scan over the vocabulary) and `direct`
(whole logits, a chunk of rows at a time). When which is used, and why, stands in this folder's README.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mer_r1_jax.kernels.logprobs import direct, one_pass
from mer_r1_jax.kernels.logprobs.one_pass import Partition, Plan
from mer_r1_jax.kernels.logprobs.reference import FLOOR
from mer_r1_jax.kernels.logprobs.tiles import Tiles, tiles_for

IMPLEMENTATIONS = ("pallas", "xla", "direct")
DIRECT_VOCAB = 65536  # off TPU, vocabularies up to here are scored from whole logits
CHUNK_BYTES = 2**23  # logits that `direct` holds at once: on CPUs, what passes from one core's cache to the next step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What was asked for, float32 in nats; None for the rest.

    Attributes:
        logprob: [...] log-probability of the token.
        entropy: [...] of the distribution the token is scored under.
        sets: [..., K] log of the probability that the next token is one of each candidate set's, never below
            log(1e-10), which is also the value of an empty or absent set.
    """

    logprob: jax.Array | None = None
    entropy: jax.Array | None = None
    sets: jax.Array | None = None


def gather_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    token: jax.Array | None = None,
    *,
    sets: jax.Array | None = None,
    candidate_ids_ZY: Any = None,
    mask: jax.Array | None = None,
    temperature: float = 1.0,
    vocab_first: bool = False,
    entropy_gradient: bool = True,
    partition: Partition | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
    device_kind: str | None = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Scores:
    """Scores under softmax(hidden . unembedding / temperature), without the logits of all rows in memory.

    Rows cost a pass over the vocabulary each: to score a few positions only, gather their hidden states first.

    Args:
        hidden: [..., D], bfloat16 or float32.
        unembedding: [D, V], or [V, D] with vocab_first (a tied embedding table), of the same dtype.
        token: int32 [...], the tokens to score, from 0 to V - 1.
        sets: int32 [..., K], candidate sets to score, rows of candidate_ids_ZY; negative for none.
        candidate_ids_ZY: int32, token ids of each candidate set, -1 where a set has fewer.
        mask: bool [...], rows that count. The others get logprob 0, entropy 0, sets log(1e-10) and no gradient.
        temperature: above 0.
        vocab_first: see unembedding.
        entropy_gradient: whether a gradient flows through the entropy.
        partition: how the arrays are cut over a mesh; None on one device.
        chunk: rows whose whole logits `direct` holds at once on a device; None chooses by their size.
        implementation: one of IMPLEMENTATIONS; None chooses.
        device_kind: the device to choose for (jax's name); None takes the partition's mesh or the default device.
        tiles: of the Pallas kernels; None chooses.
        interpret: run the Pallas kernels interpreted, as pallas_call takes it.

    Returns:
        Scores; logprob and entropy where a token was given, sets where sets were.

    Raises:
        ValueError: shapes, dtypes or settings that do not belong together.
    """
    _check(hidden, unembedding, token, sets, candidate_ids_ZY, mask, temperature, vocab_first)
    device_kind = device_kind or _device_kind(partition)
    D, V = unembedding.shape[::-1] if vocab_first else unembedding.shape
    N = hidden.size // D
    if implementation != "direct" and implementation != "xla" and tiles is None:
        Z = 0 if sets is None else len(candidate_ids_ZY)
        tiles = _tiles(N, D, V, Z, hidden.dtype.itemsize, device_kind, partition)
    implementation = _choose(implementation, tiles, V, device_kind)
    candidate_ids_ZY = None if sets is None else jnp.asarray(candidate_ids_ZY)
    if implementation == "direct":
        logprob, entropy, set_logprob = direct.scores(
            hidden,
            unembedding,
            token,
            sets,
            candidate_ids_ZY,
            temperature=temperature,
            vocab_first=vocab_first,
            partition=partition,
            chunk=chunk or max(1, CHUNK_BYTES // (4 * V)),
        )
    else:
        plan = Plan(
            temperature=float(temperature),
            vocab_first=vocab_first,
            tiles=tiles if implementation == "pallas" else None,
            partition=partition,
            interpret=interpret,
        )
        leading = hidden.shape[:-1]
        # The pass scores a token in any case; -1 is in no vocabulary, and what it gives is dropped below.
        token_N = jnp.full(N, -1, jnp.int32) if token is None else token.reshape(N).astype(jnp.int32)
        set_NK = None if sets is None else sets.reshape(N, sets.shape[-1])
        results = one_pass.scores(plan, hidden.reshape(N, D), unembedding, token_N, set_NK, candidate_ids_ZY)
        logprob, entropy, set_logprob = jax.tree.map(lambda a: a.reshape(*leading, *a.shape[1:]), results)
        if token is None:
            logprob = entropy = None
    if entropy is not None and not entropy_gradient:
        entropy = jax.lax.stop_gradient(entropy)
    if mask is not None:
        # Chosen by where(), ignored rows get cotangents of 0 and add nothing to either gradient.
        logprob = logprob if logprob is None else jnp.where(mask, logprob, 0.0)
        entropy = entropy if entropy is None else jnp.where(mask, entropy, 0.0)
        set_logprob = set_logprob if set_logprob is None else jnp.where(mask[..., None], set_logprob, jnp.log(FLOOR))
    return Scores(logprob=logprob, entropy=entropy, sets=set_logprob)


def _device_kind(partition: Partition | None) -> str:
    device = jax.devices()[0] if partition is None else partition.mesh.devices.flat[0]
    return device.device_kind


def _tiles(N: int, D: int, V: int, Z: int, itemsize: int, device_kind: str, partition: Partition | None):
    """Tiles for one device's share of rows and vocabulary."""
    if partition is not None:
        N, V = -(-N // partition.size(partition.rows)), V // partition.size(partition.vocab)
    return tiles_for(N, D, V, Z, itemsize, device_kind)


def _choose(implementation: str | None, tiles: Tiles | None, V: int, device_kind: str) -> str:
    if implementation is None:
        if tiles is not None:
            return "pallas"
        return "direct" if V <= DIRECT_VOCAB else "xla"
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"log-probability implementation {implementation!r}: expected one of {known}")
    if implementation == "pallas" and tiles is None:
        raise ValueError(
            f"the Pallas kernels of log-probabilities do not apply to these shapes on {device_kind!r}: they need a TPU "
            "they know, a width that is a multiple of 128 and a vocabulary above 1024; use implementation='xla', or "
            "name the device with device_kind"
        )
    return implementation


def _check(hidden, unembedding, token, sets, candidate_ids, mask, temperature, vocab_first) -> None:
    wrong = []
    if hidden.ndim < 2 or unembedding.ndim != 2:
        raise ValueError(
            f"hidden states {hidden.shape} and unembedding {unembedding.shape}: expected [..., D] and "
            f"{'[V, D]' if vocab_first else '[D, V]'}"
        )
    leading, D = hidden.shape[:-1], hidden.shape[-1]
    width = unembedding.shape[1 if vocab_first else 0]
    if width != D:
        hint = "; is vocab_first set right?" if D in unembedding.shape else ""
        wrong.append(f"unembedding {unembedding.shape} has width {width}, expected {D}{hint}")
    if hidden.dtype != unembedding.dtype:
        wrong.append(f"unembedding is {unembedding.dtype} and hidden states are {hidden.dtype}; cast one of them")
    if not temperature > 0:
        wrong.append(f"temperature is {temperature}, expected one above 0 (rl.temperature)")
    if token is None and sets is None:
        wrong.append("neither a token nor candidate sets are given, so there is nothing to score")
    for name, array, want in (("token", token, leading), ("mask", mask, leading)):
        if array is not None and array.shape != want:
            wrong.append(f"{name} has shape {array.shape}, expected {want}")
    if sets is not None:
        if candidate_ids is None:
            wrong.append("sets are given without candidate_ids_ZY, the table they are rows of")
        elif jnp.ndim(candidate_ids) != 2:
            wrong.append(f"candidate_ids_ZY has {jnp.ndim(candidate_ids)} axes, expected sets x tokens")
        if sets.shape[:-1] != leading:
            wrong.append(f"sets have shape {sets.shape}, expected {(*leading, 'K')}")
    if wrong:
        raise ValueError(f"log-probabilities of hidden states {hidden.shape}: " + "; ".join(wrong))
