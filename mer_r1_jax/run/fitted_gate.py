"""The threshold of gated answers that a run fitted at its evaluations, found again wherever its model lies.

Every evaluation of held-out clips writes what was fitted and measured under `gate` (evaluation/gate.py) in
`eval/<benchmark>_<step>.json`. An export has the newest of them beside it, as `mer_r1_gate.json`.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.run.policy import RUN_MARKER, require_model
from mer_r1_jax.storage import atomic_files, bucket

GATE_FILE = "mer_r1_gate.json"
_EVALUATION = re.compile(r"[^/]+_(\d+)\.json")


class GateError(ValueError):
    """No threshold for gated answers; the message says where one was looked for, and how to give one."""


class FittedGate(NamedTuple):
    """A threshold and where it is from.

    Attributes:
        threshold: in [0, 1].
        benchmark, step: of the evaluation it was fitted at, steps over both phases.
        measured: everything that evaluation wrote of it.
    """

    threshold: float
    benchmark: str
    step: int
    measured: dict[str, Any]


def fitted_gate(model: str | pathlib.Path) -> FittedGate | None:
    """What was fitted for a model; None where nothing was.

    Args:
        model: a run's folder or `gs://` address, whose newest evaluation counts; an export, with its file or within
            its run's folder; or any other directory, which has none.

    Raises:
        GateError: there is a file that cannot be read, or says something impossible.
    """
    if is_bucket(model) or (pathlib.Path(model) / RUN_MARKER).is_dir():
        return _newest(model)
    folder = pathlib.Path(model)
    # An export has the file wherever it is copied; one that lacks it may still lie within its run.
    if (folder / GATE_FILE).is_file():
        return _gate(folder / GATE_FILE, _read(folder / GATE_FILE))
    run = folder.resolve().parent.parent  # <run>/export/hf
    return _newest(run) if (run / RUN_MARKER).is_dir() else None


def threshold_of(model: str | pathlib.Path, given: float | None = None) -> float:
    """The threshold that is given, or else the fitted one.

    Raises:
        GateError: there is neither.
        PolicyError: nor a model.
    """
    if given is not None:
        if not 0 <= given <= 1:
            raise GateError(f"threshold: got {given}, expected a probability in [0, 1]; change it")
        return given
    # Otherwise a path that is no model's would be said to lack a threshold.
    if not is_bucket(model):
        require_model(model)
    found = fitted_gate(model)
    if found is None:
        raise GateError(
            f"{printable(model)}: got a model without a fitted threshold, expected the folder of a run that was "
            f"evaluated on held-out clips, or an export with its {GATE_FILE}; give --threshold (in Python, "
            "mode=Auto(threshold)), a confidence in [0, 1]"
        )
    return found.threshold


def write_gate(directory: pathlib.Path, run: str | pathlib.Path) -> str:
    """Puts what a run fitted last beside its export; nothing where it fitted nothing.

    Returns:
        Why there is none although evaluations are there, or "": the model is what is exported, and a threshold can be
        given wherever it is asked, so a damaged evaluation keeps no export from being made.
    """
    try:
        found = fitted_gate(run)
    except GateError as error:
        return f"the export has no threshold for --mode=auto: {error}"
    if found is not None:
        gate = {"benchmark": found.benchmark, "step": found.step, "gate": found.measured}
        atomic_files.write_json(directory / GATE_FILE, gate)
    return ""


def _newest(run: str | pathlib.Path) -> FittedGate | None:
    """Of the evaluation at the most steps that fitted one."""
    for _, place in sorted(_evaluations(run), reverse=True):
        found = _gate(place, _read(place))
        if found is not None:
            return found
    return None


def _evaluations(run: str | pathlib.Path) -> Iterator[tuple[int, str]]:
    """(steps, file) of each evaluation in a run's folder."""
    root = f"{str(run).rstrip('/')}/eval"
    names = bucket.listing(root) if is_bucket(run) else [path.name for path in pathlib.Path(root).glob("*.json")]
    for name in names:
        if found := _EVALUATION.fullmatch(name):
            yield int(found[1]), f"{root}/{name}"


def _read(place: str | pathlib.Path) -> dict[str, Any]:
    try:
        content = bucket.read(str(place)) if is_bucket(place) else pathlib.Path(place).read_bytes()
        found = json.loads(content or b"")
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(
            f"{printable(place)}: no evaluation can be read there ({error}); expected the JSON that a run writes; give "
            "--threshold, or remove the file"
        ) from error


def _gate(place: str | pathlib.Path, evaluation: dict[str, Any]) -> FittedGate | None:
    """What an evaluation fitted; None where it is of before there were gates, or had too few clips."""
    measured = evaluation.get("gate")
    threshold = measured.get("threshold") if isinstance(measured, dict) else None
    if threshold is None or not isinstance(measured, dict):
        return None
    # To Python `true` is a number in [0, 1]; nobody fitted it.
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise GateError(
            f"{printable(place)}: gate.threshold: got {printable(threshold)}, expected a probability in [0, 1]; give "
            "--threshold, or mend the file"
        )
    step = evaluation.get("step")
    return FittedGate(
        float(threshold), str(evaluation.get("benchmark")), step if isinstance(step, int) else 0, measured
    )
