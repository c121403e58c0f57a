"""The fitted threshold is found beside a run, an export, and an export within a run; never guessed."""

import json

import pytest

from mer_r1_jax.run.fitted_gate import GATE_FILE, GateError, fitted_gate, threshold_of, write_gate


def evaluated(folder, **thresholds):
    """A run's folder with evaluations by step: `_5=0.4`; None fitted nothing, and is of before there were gates."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "eval").mkdir()
    for name, threshold in thresholds.items():
        step = int(name[1:])
        gate = {} if threshold is None else {"gate": {"threshold": threshold, "curve": []}}
        scores = {"benchmark": "heldout", "step": step, **gate}
        (folder / f"eval/heldout_{step:05d}.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def run(tmp_path):
    return evaluated(tmp_path / "run", _5=0.4, _120=0.6, _90=0.5, _200=None)


def test_the_newest_evaluation_that_fitted_one_counts(run):
    found = fitted_gate(run)
    assert (found.threshold, found.benchmark, found.step) == (0.6, "heldout", 120)
    assert threshold_of(run) == 0.6 and threshold_of(run, 0.25) == 0.25


def test_an_export_has_it_beside_it_and_within_its_run_without(run, tmp_path):
    export = tmp_path / "elsewhere"
    export.mkdir()
    (export / "config.json").write_text("{}")
    assert fitted_gate(export) is None
    with pytest.raises(GateError, match=f"elsewhere: got a model without .*expected .*{GATE_FILE}; give --threshold"):
        threshold_of(export)
    assert write_gate(export, run) == ""
    assert fitted_gate(export) == fitted_gate(run) and fitted_gate(export).threshold == 0.6
    inside = run / "export/hf"
    inside.mkdir(parents=True)
    assert fitted_gate(inside).threshold == 0.6, "exported before there were gates"
    (inside / GATE_FILE).write_text(json.dumps({"gate": {"threshold": 0.1}}))
    assert fitted_gate(inside).threshold == 0.1, "what lies beside the weights goes before what the run found since"


def test_a_run_that_fitted_nothing_leaves_nothing_beside_its_export(tmp_path):
    bare = evaluated(tmp_path / "bare", _5=None)
    assert write_gate(tmp_path, bare) == "" and not (tmp_path / GATE_FILE).exists()


@pytest.mark.parametrize("given", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(run, given):
    with pytest.raises(GateError, match=r"threshold: got .*expected a probability in \[0, 1\]; change it"):
        threshold_of(run, given)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "no evaluation can be read"), ("[]", "no object"), ('{"gate": {"threshold": "x"}}', "got x")],
)
def test_a_damaged_file_is_named(run, content, said):
    (run / "eval/heldout_00300.json").write_text(content)
    with pytest.raises(GateError, match=f"heldout_00300.json.*{said}.*give --threshold"):
        threshold_of(run)
    # It keeps no export from being made, which says why it has no threshold.
    said = write_gate(run, run)
    assert said.startswith("the export has no threshold") and "heldout_00300.json" in said
    assert not (run / GATE_FILE).exists()
