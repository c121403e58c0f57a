"""Parameters out to Hugging Face directories that transformers 4 and 5 both load.

A Thinker alone, the same Thinker as an Omni model without a voice, or a full Omni directory with its Thinker replaced.
Tensors are fetched from the devices or from files, cast and written one at a time. Everything goes to a directory
beside the target, which is renamed when it is whole: an interrupted export never looks finished.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.omni.config import DTYPES, ThinkerConfig
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.companion_files import (
    COPIED_FILES,
    LAYOUTS,
    copy_files,
    copy_rest,
    write_config,
    write_end_tokens,
)
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.matching import Matched, match_tensors
from mer_r1_jax.omni.hf.merging import fetch, merged
from mer_r1_jax.omni.hf.staging import ExportError, staged
from mer_r1_jax.omni.hf.sums import VOCABULARY_FILES, check_weights, write_sums
from mer_r1_jax.omni.hf.tensor_files import (
    INDEX_FILE,
    NUMPY_DTYPES,
    SINGLE_FILE,
    StoredTensor,
    TensorSpec,
    list_tensors,
    spec,
    write_index,
    write_tensor_file,
)
from mer_r1_jax.omni.thinker import abstract_thinker
from mer_r1_jax.storage import atomic_files

_NOT_ARCHITECTURE = ("param_dtype", "compute_dtype", "remat", "initializer_range", "pad_token_id", "eos_token_ids")
_CHUNK_BYTES = 1 << 26  # host bytes cast at once
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Source = tuple[table.Entry, Any]  # a stored tensor's place in our tree and the leaf it comes from


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        directory: where it is.
        tensors, parameters, nbytes: of the Thinker.
        weight_files: names of the safetensors files.
        verbatim_tensors: talker and vocoder tensors copied from the base.
        copied_files: names of the other files that were copied.
        left_out: names of files of the base that were not, being weights in other formats.
    """

    directory: Path
    tensors: int
    parameters: int
    nbytes: int
    weight_files: tuple[str, ...]
    verbatim_tensors: int
    copied_files: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?B?)", str(size).strip().upper())
    if match is None or match[2] not in _SIZE_UNITS or int(match[1]) == 0:
        raise ExportError(f'max_shard_size is {size!r}: expected a positive number of bytes or text like "5GB"')
    return int(match[1]) * _SIZE_UNITS[match[2]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How a model is written.

    Attributes:
        layout: "thinker" writes the Thinker alone, for transformers' class of that name; "omni" writes it under
            `thinker.` names as a full Omni model without a voice, which vLLM and transformers' Omni class load.
        source: directory whose tokenizer, processor and generation files are copied; the policy's end tokens are put
            among the latter's.
        base: full Omni directory (`thinker.`, `talker.` and `token2wav.` tensors). The export is then a copy of it,
            file by file and tensor by tensor, in which only the Thinker's weights, and end tokens that are missing,
            are new; `layout`, `source` and `max_shard_size` do not apply.
        dtype: float32 | bfloat16 | float16; None keeps the dtype of each parameter, or with `base` that of the tensor
            it replaces.
        max_shard_size: bytes, or text like "5GB" (10^9); more than fits goes to further files with an index.
        overwrite: replace a directory that holds an earlier export.
    """

    layout: str = "thinker"
    source: str | os.PathLike | None = None
    base: str | Path | None = None
    dtype: str | None = None
    max_shard_size: int | str = "5GB"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ExportError for an impossible layout, dtype or shard size."""
        if self.layout not in LAYOUTS:
            raise ExportError(f"layout is {self.layout!r}: expected one of {', '.join(LAYOUTS)}")
        if self.base is not None and self.layout != "thinker":
            raise ExportError(
                f"layout is {self.layout!r} beside the base {self.base}: expected one of the two, as a base makes a "
                "full Omni directory by itself; leave layout out, or base for a model without a voice"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ExportError(f"dtype is {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        _parse_size(self.max_shard_size)

    def dtype_over(self, own: Any) -> np.dtype:
        """The dtype a tensor is written in whose own is `own`."""
        return np.dtype(jnp.dtype(self.dtype or own))


def export_model(
    directory: str | os.PathLike,
    config: ThinkerConfig,
    params: Mapping,
    settings: ExportSettings = ExportSettings(),
    *,
    asked: Callable[[], bool] = lambda: False,
) -> ExportReport:
    """Writes a Hugging Face directory.

    Args:
        directory: where it goes; must not exist, or be empty, unless the settings say `overwrite`.
        config: the architecture of `params`; adapters are merged into their kernels.
        params: nested dict of numpy or jax arrays, or of leaves that are still in their files, in the shapes of
            `abstract_thinker(config)`, all of them held by this process.
        settings: dtype, files beside the weights, shards.
        asked: whether the program is to stop; looked at before every tensor.

    Raises:
        StopRequested: `asked` said so; nothing is left of the export.
        ExportError: parameters that do not fit `config`, are held by other processes or are not finite; a base that is
            another model or none; a target that exists.
        WeightError: the base's tensors are not those of its config.
    """
    # Neither architecture nor table knows adapters beyond this point.
    config, params = config.base, merged(params, config.adapters)
    sources = _sources(config, params)
    inputs = [Path(path) for path in (settings.source, settings.base) if path is not None]
    for path in inputs:
        if not path.is_dir():
            raise ExportError(f"{path}: not a directory; expected one to copy files from")
    with staged(Path(directory), overwrite=settings.overwrite, inputs=inputs) as staging:
        write = _write_thinker if settings.base is None else _write_omni
        report = write(staging, config, sources, settings, asked)
    return dataclasses.replace(report, directory=Path(directory))


def _sources(config: ThinkerConfig, params: Mapping) -> dict[str, Source]:
    """Bare stored name -> its entry and leaf. Raises ExportError listing every leaf that does not fit."""
    _, abstract, _ = abstract_thinker(config)
    expected, given = table.leaves(abstract), table.leaves(params)
    problems = [f"missing: {'/'.join(path)}" for path in expected if path not in given]
    problems += [f"surplus: {'/'.join(path)}" for path in given if path not in expected]
    for path in expected.keys() & given.keys():
        if tuple(given[path].shape) != tuple(expected[path].shape):
            problems.append(f"misshapen: {'/'.join(path)}: got {given[path].shape}, expected {expected[path].shape}")
        elif np.dtype(given[path].dtype) not in NUMPY_DTYPES.values():
            problems.append(f"not a float: {'/'.join(path)}: got {given[path].dtype}")
        elif isinstance(given[path], jax.Array) and not given[path].is_fully_addressable:
            problems.append(f"held by several processes: {'/'.join(path)}; export from a checkpoint, on one process")
    if problems:
        raise ExportError("these parameters are not the ones of the config:\n  " + "\n  ".join(sorted(problems)))
    return {entry.name: (entry, given[entry.path]) for entry in table.entries(abstract, config)}


def _write_thinker(
    staging: Path,
    config: ThinkerConfig,
    sources: Mapping[str, Source],
    settings: ExportSettings,
    asked: Callable[[], bool],
) -> ExportReport:
    """Writes the Thinker in a layout without a voice, with what `settings.source` has beside its weights."""
    prefix = "thinker." if settings.layout == "omni" else ""
    sources = {prefix + name: source for name, source in sources.items()}
    specs = [spec(name, entry.stored_shape, settings.dtype_over(leaf.dtype)) for name, (entry, leaf) in sources.items()]
    shards = _split(specs, _parse_size(settings.max_shard_size))
    sums = {
        file: write_tensor_file(
            staging / file, tensors, lambda tensor: _unless(asked, stored_chunks(tensor, sources[tensor.name]))
        )
        for file, tensors in shards.items()
    }
    if len(shards) > 1:
        write_index(staging, shards)
    written = {NUMPY_DTYPES[tensor.dtype].name for tensor in specs}
    write_config(staging, config, settings.layout, written.pop() if len(written) == 1 else None)
    copied = copy_files(Path(settings.source), staging, COPIED_FILES) if settings.source else ()
    write_end_tokens(staging, config)
    _write_sums(staging, sums)
    return _report(staging, specs, sources, tuple(shards), 0, copied)


def _write_omni(
    staging: Path,
    config: ThinkerConfig,
    sources: Mapping[str, Source],
    settings: ExportSettings,
    asked: Callable[[], bool],
) -> ExportReport:
    """Writes a copy of `settings.base` with another Thinker in it."""
    base = Path(settings.base or "")
    check_weights(base)
    stored = list_tensors(base)
    matched = _match_base(base, config, stored, [entry for entry, _ in sources.values()])
    if matched.tied_head:
        embedding = sources[table.EMBEDDING_NAME]
        sources = {**sources, table.HEAD_NAME: embedding}
    replaced: list[TensorSpec] = []
    shards: dict[str, list[TensorSpec]] = {}
    for name, tensor in stored.items():
        plain, written = table.plain_name(name), tensor
        if table.known_extra(name) is None:
            shape = sources[plain][0].stored_shape
            written = spec(name, shape, settings.dtype_over(NUMPY_DTYPES[tensor.dtype]))
            replaced.append(written)
        shards.setdefault(tensor.path.name, []).append(written)
    sums = {
        file: write_tensor_file(
            staging / file,
            tensors,
            lambda t: _unless(
                asked,
                t.chunks() if isinstance(t, StoredTensor) else stored_chunks(t, sources[table.plain_name(t.name)]),
            ),
        )
        for file, tensors in shards.items()
    }
    if (base / INDEX_FILE).is_file() and SINGLE_FILE not in shards:
        write_index(staging, shards)
    copied, left_out = copy_rest(base, staging)
    write_end_tokens(staging, config)
    _write_sums(staging, sums)
    verbatim = sum(matched.skipped.values())
    report = _report(staging, replaced, sources, tuple(shards), verbatim, copied)
    return dataclasses.replace(report, left_out=left_out)


def _match_base(
    base: Path, config: ThinkerConfig, stored: Mapping[str, StoredTensor], entries: Sequence[table.Entry]
) -> Matched:
    """Makes sure that `base` is a full Omni directory of the same architecture."""
    base_config = load_config(base)
    differing = [
        f"{name}: {mine!r} here, {theirs!r} in the base"
        for name, mine, theirs in _compare(config, base_config)
        if name not in _NOT_ARCHITECTURE
    ]
    if differing:
        raise ExportError(f"{base} is the base of another architecture:\n  " + "\n  ".join(differing))
    matched = match_tensors(stored, entries, base, tied=base_config.tie_word_embeddings)
    if not matched.skipped:
        raise ExportError(
            f"{base} has no talker. or token2wav. tensors: expected a full Omni directory; leave base out to export "
            "the Thinker alone"
        )
    return matched


def _compare(one: Any, other: Any, prefix: str = "") -> Iterable[tuple[str, Any, Any]]:
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(mine):
            yield from _compare(mine, theirs, f"{field.name}.")
        elif mine != theirs:
            yield f"{prefix}{field.name}", mine, theirs


def _unless(asked: Callable[[], bool], chunks: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    """The chunks of a tensor, unless the program is to stop."""
    if asked():
        raise StopRequested("a signal came while the model was exported")
    return chunks


def stored_chunks(tensor: TensorSpec, source: Source) -> Iterable[memoryview]:
    """The bytes of one stored tensor, cast to the spec's dtype a bounded number of rows at a time."""
    faults.here("export_tensor", tensor.name)
    entry, leaf = source
    dtype = NUMPY_DTYPES[tensor.dtype]
    rows = entry.to_stored(fetch(leaf, entry.layer))
    step = max(1, _CHUNK_BYTES * len(rows) // max(1, tensor.nbytes))
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # an overflow is reported below
            piece = np.ascontiguousarray(rows[start : start + step]).astype(dtype, copy=False)
        if not np.isfinite(piece).all():
            raise ExportError(
                f"{tensor.name} ({'/'.join(entry.path)}) holds values that are not finite in {dtype}: export an "
                "earlier checkpoint, or use a wider dtype"
            )
        yield piece.reshape(-1).view(np.uint8).data


def _split(specs: Sequence[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    """File name -> tensors, filled in order up to `limit` bytes; a tensor larger than that gets a file of its own."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in specs:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_sums(staging: Path, weights: dict[str, str]) -> None:
    """Lists the sums of the weights, which were taken while they were written, and of their index and vocabulary."""
    others = [name for name in (INDEX_FILE, *VOCABULARY_FILES) if (staging / name).is_file()]
    write_sums(staging, weights | {name: atomic_files.sha256_of(staging / name) for name in others})


def _report(
    staging: Path,
    specs: Sequence[TensorSpec],
    sources: Mapping[str, Source],
    files: tuple[str, ...],
    verbatim: int,
    copied: tuple[str, ...],
) -> ExportReport:
    parameters = sum(int(np.prod(tensor.shape)) for tensor in specs)
    nbytes = sum(tensor.nbytes for tensor in specs)
    return ExportReport(staging, len(specs), parameters, nbytes, files, verbatim, copied)
