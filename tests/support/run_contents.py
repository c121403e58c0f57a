"""What two runs of one command must share bit for bit, however often they were stopped: names with their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq

from mer_r1_jax.storage.checkpoints import HOST_STATE, Checkpoints
from mer_r1_jax.training.metrics import read_metrics

TIMED = ("time", "step_time", "perf/throughput", "data/decode_ms")  # and everything below timing_s/


def contents(run: Path) -> dict[str, str]:
    """Hashes of a finished run: parameters and optimizer, export, metrics, sampled completions, evaluations."""
    found = {}
    for step in sorted(int(folder.name) for folder in (run / "checkpoints").iterdir()):
        found |= {f"checkpoint {step}: {name}": value for name, value in checkpoint(run, step).items()}
    for file in sorted((run / "export/hf").iterdir()):
        found[f"export: {file.name}"] = _hash(_without_output_dir(file, run))
    for file in sorted((run / "eval").iterdir()):
        found[f"eval: {file.name}"] = _hash(file.read_bytes())
    for file in sorted((run / "completions").iterdir()):
        found[f"completions: {file.name}"] = _hash(json.dumps(pq.read_table(file).to_pydict()).encode())
    for line in read_metrics(run / "metrics.jsonl"):
        values = {name: value for name, value in line.items() if name not in TIMED and not name.startswith("timing_s/")}
        name = f"metrics: {line['phase']} {line['step']}"
        found[name] = json.dumps(values, sort_keys=True) + (" twice" if name in found else "")
    return found


def checkpoint(run: Path, step: int) -> dict[str, str]:
    """Hashes of every array of a checkpoint, and its host state."""
    described = json.loads((run / "checkpoints" / str(step) / HOST_STATE).read_text())
    arrays = {name: jax.ShapeDtypeStruct(spec["shape"], spec["dtype"]) for name, spec in described["arrays"].items()}
    restored = Checkpoints(run / "checkpoints").restore(arrays, step=step)
    hashes = {name: _hash(np.asarray(array).tobytes()) for name, array in restored.arrays.items()}
    return hashes | {"host": json.dumps(restored.host, sort_keys=True)}


def leftovers(run: Path) -> list[str]:
    """Half-made files that an interrupted attempt left and a finished one should have cleared."""
    wanted = ("*.partial", "*.replaced", ".saving-*", ".replaced-*", ".deleting-*", ".*.new")
    return sorted(str(path.relative_to(run)) for pattern in wanted for path in run.rglob(pattern))


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names whose content differs or that only one has."""
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def _without_output_dir(file: Path, run: Path) -> bytes:
    """The saved configuration names the folder it lies in; everything else is compared as it is."""
    content = file.read_bytes()
    return content.replace(str(run.parent).encode(), b"") if file.suffix == ".json" else content


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
