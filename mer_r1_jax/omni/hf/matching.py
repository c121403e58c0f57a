"""Which stored tensor fills which place: a checkpoint's headers against the weight table, before any data moves."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.tensor_files import NUMPY_DTYPES, StoredTensor, WeightError


@dataclasses.dataclass(frozen=True)
class Matched:
    """A checkpoint that fits.

    Attributes:
        tensors: bare transformers 4 name -> where it is stored, one for every entry of the table.
        skipped: part of a full Omni directory -> number of its tensors, which the Thinker does not need.
        tied_head: a stored output head that equals the embedding of a tied model, if there is one.
    """

    tensors: dict[str, StoredTensor]
    skipped: dict[str, int]
    tied_head: StoredTensor | None = None


def match_tensors(
    stored: Mapping[str, StoredTensor], entries: Sequence[table.Entry], directory: Path, *, tied: bool
) -> Matched:
    """Finds a stored tensor for every entry.

    Args:
        stored: the tensors of a checkpoint by stored name.
        entries: what the Thinker needs.
        directory: named in the error.
        tied: whether the head is the embedding; a stored head is then accepted if it is the same, bit for bit.

    Raises:
        WeightError: one error that lists every missing, surplus, repeated and misshapen tensor and every dtype that is
            not a float's, with what was got and what was expected.
    """
    found: dict[str, StoredTensor] = {}
    skipped: collections.Counter[str] = collections.Counter()
    problems: list[tuple[str, str, str]] = []  # (kind, tensor name, detail)
    for name, tensor in stored.items():
        part = table.known_extra(name)
        if part:
            skipped[part] += 1
            continue
        plain = table.plain_name(name)
        if plain in found:
            problems.append(("repeated", plain, f"stored as {found[plain].name} and as {name}"))
        found[plain] = tensor

    tied_head = found.pop(table.HEAD_NAME, None) if tied else None
    for entry in entries:
        tensor = found.get(entry.name)
        if tensor is None:
            problems.append(("missing", entry.name, f"expected shape {entry.stored_shape}"))
        elif tensor.shape != entry.stored_shape:
            problems.append(("misshapen", entry.name, f"got shape {tensor.shape}, expected {entry.stored_shape}"))
        elif tensor.dtype not in NUMPY_DTYPES:
            problems.append(("not a float", entry.name, f"got dtype {tensor.dtype}, expected {'|'.join(NUMPY_DTYPES)}"))
    wanted = {entry.name for entry in entries}
    for name, tensor in found.items():
        if name not in wanted:
            problems.append(("surplus", name, f"got shape {tensor.shape}, expected no such tensor"))
    if tied_head and table.EMBEDDING_NAME in found and not _same_bytes(tied_head, found[table.EMBEDDING_NAME]):
        problems.append(("untied", table.HEAD_NAME, "differs from the embedding although the config ties the two"))
    if problems:
        raise WeightError(_report(directory, problems, bool(wanted & found.keys())))
    return Matched({entry.name: found[entry.name] for entry in entries}, dict(skipped), tied_head)


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))


def _report(directory: Path, problems: Iterable[tuple[str, str, str]], any_match: bool) -> str:
    """All problems, a line each; the same problem in several layers is one line with the layers in brackets."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    count = 0
    for kind, name, detail in problems:
        count += 1
        template, layer = _layer_of(name)
        groups.setdefault((kind, template, detail), []).extend([] if layer is None else [layer])
    lines = [
        f"  {kind}: {template.replace('*', _ranges(layers), 1)}: {detail}"
        for (kind, template, detail), layers in groups.items()
    ]
    kinds = {kind for kind, _, _ in groups}
    return "\n".join(
        [f"{directory}: {count} of its weights do not fit the config:", *lines, *_advice(kinds, any_match)]
    )


def _layer_of(name: str) -> tuple[str, int | None]:
    match = re.search(r"(?<=layers\.)\d+(?=\.)|(?<=blocks\.)\d+(?=\.)", name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}*{name[match.end() :]}", int(match.group())


def _ranges(layers: Sequence[int]) -> str:
    """ "3" for one layer, "[0-2,5]" for several."""
    if not layers:
        return "*"
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(layers) == 1 else f"[{text}]"


def _advice(kinds: set[str], any_match: bool) -> list[str]:
    if not any_match:
        return ["No tensor of a Qwen2.5-Omni Thinker is among them: is this the right directory?"]
    advice = []
    if "untied" in kinds:
        advice.append("Set tie_word_embeddings to false in config.json, or remove lm_head.weight from the weights.")
    if kinds & {"missing", "surplus", "misshapen"}:
        advice.append(
            "Sizes, layer counts and tie_word_embeddings come from config.json: use the one these weights were saved "
            "with, and check that every shard was copied."
        )
    if "surplus" in kinds:
        advice.append("Adapter weights have to be merged first; nothing that is not loaded may stay in the files.")
    if "not a float" in kinds:
        advice.append("Quantised weights are not supported: use the original ones.")
    return advice
