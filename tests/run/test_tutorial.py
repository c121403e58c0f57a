"""The tutorial notebook: it runs as it stands, and its numbers follow from each other by the method's formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import EXPERIMENTS, load_command
from support.small_run import environment

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
LAMBDA = FORMAT_WEIGHT = 0.1

pytestmark = pytest.mark.timeout(1800)  # two minutes on two cores, many more on a busy machine


@pytest.fixture(scope="module", params=["committed", "run anew"])
def notebook(request, tmp_path_factory):
    text = NOTEBOOK.read_text(encoding="utf-8")
    if request.param == "run anew":
        settings = environment() | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        settings.pop("PYTHONPATH", None)  # it hides torch in a way that SciPy, in Jupyter, does not bear
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("notebook"))
            text = load_command("tutorial", EXPERIMENTS).executed(text, settings)
    return json.loads(text)


def printed(notebook, beginning):
    """Lines of the output that begins like this, without the first."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            text = "".join(output.get("text", ""))
            if text.startswith(beginning):
                return text.splitlines()[1:]
    raise AssertionError(f"no output begins with {beginning!r}")


def numbers(lines, columns):
    return np.array([[float(word) for word in line.split()[:columns]] for line in lines]).T


def z(x):
    """(x - mean) / (std + 1e-4) over the values that are not NaN; 0 for those, and where there is no spread."""
    valid = ~np.isnan(x)
    if valid.sum() < 2 or np.ptp(x[valid]) == 0:
        return np.zeros_like(x)
    return np.where(valid, (x - x[valid].mean()) / (x[valid].std(ddof=1) + 1e-4), 0.0)


def test_every_cell_ran_in_order_and_without_an_error(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert all(len("".join(cell["source"]).splitlines()) <= 32 for cell in code)


def test_advantages_follow_from_the_rewards_it_prints(notebook):
    recall, precision, f1, form = numbers(printed(notebook, "recall  precision"), 4)
    plus, minus = numbers(printed(notebook, "R+"), 2)
    assert recall.shape == plus.shape == (8,) and np.ptp(f1) > 0
    assert np.all((0 <= f1) & (f1 <= 1)) and set(form) <= {0.0, 1.0}
    dual = z(recall) + z(precision) + FORMAT_WEIGHT * z(form)
    expected = {
        "baseline": z(f1 + FORMAT_WEIGHT * form),
        "rd": z(recall + precision) + FORMAT_WEIGHT * z(form),
        "ad": dual,
        "mer_r1": dual + LAMBDA * (z(plus) + z(minus)),
    }
    table = numbers(printed(notebook, "baseline        rd"), 4)
    for (arm, values), column in zip(expected.items(), table, strict=True):
        np.testing.assert_allclose(column, values, atol=0.01, err_msg=arm)  # rewards have four decimals


def test_words_without_a_confidence_give_no_calibration_reward(notebook):
    form = numbers(printed(notebook, "recall  precision"), 4)[3]
    plus, minus = numbers(printed(notebook, "R+"), 2)
    assert np.all(np.isnan(plus[form == 0]) & np.isnan(minus[form == 0]))
    assert np.isfinite([plus, minus]).any()


def test_the_loss_is_that_by_hand_and_the_update_moves_tokens_the_right_way(notebook):
    said = ["".join(output.get("text", "")) for cell in notebook["cells"] for output in cell.get("outputs", ())]
    loss = next(text for text in said if text.startswith("loss "))
    values = [float(word.strip(",;")) for word in loss.split() if word[0] in "+-"]
    assert values[0] == pytest.approx(values[1], abs=2e-5)
    good, bad = (float(part.split()[0]) for part in next(t for t in said if t.startswith("mean ρ"))[8:].split(","))
    assert good > 1 > bad
