"""The port against transformers on every kind of prompt: features, positions, logits, greedy tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.omni_cases import CASES, ROOMY, PromptMaker, inputs_of
from support.omni_model import AUDIO, LOGITS, VISION, tiny_port

from mer_r1_jax.omni.positions import PositionError
from mer_r1_jax.parity.port import run_port
from mer_r1_jax.parity.processor_inputs import InputError, ProcessorInputs, to_batch
from mer_r1_jax.parity.transformers_reference import run_reference

NEW_TOKENS = 8
LIMITS = {"logits": LOGITS, "audio_features": AUDIO, "image_features": VISION, "video_features": VISION}
REPO = Path(__file__).parents[2]


def worst(got: dict, expected: dict, inputs: ProcessorInputs) -> dict[str, float]:
    """Largest absolute difference of each real-valued output."""
    real_BT = inputs.attention_mask == 1
    pairs = {name: (got[name], expected[name]) for name in expected if name in LIMITS}
    pairs["logits"] = (got["logits"][real_BT], expected["logits"][real_BT])
    return {name: float(np.abs(a - b).max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("name", CASES)
def test_port_agrees_with_transformers(name):
    port = tiny_port()
    inputs = CASES[name]()
    # transformers reads the next token behind the padding of a right-padded row, so there is nothing to compare.
    generate = 0 if name == "right_padded" else NEW_TOKENS
    expected = run_reference(port.reference, inputs, generate=generate)
    got = run_port(port.params, port.config, inputs, generate=generate, shape=ROOMY)

    assert got.keys() == expected.keys()
    np.testing.assert_array_equal(got["position_ids"], expected["position_ids"])
    for output, difference in worst(got, expected, inputs).items():
        assert got[output].dtype == np.float32 and got[output].shape == expected[output].shape
        assert difference <= LIMITS[output], f"{output} differs by {difference}"
        assert np.abs(expected[output]).max() > 0.1, f"{output} is too small for its limit to mean anything"
    if generate:
        np.testing.assert_array_equal(got["greedy_ids"], expected["greedy_ids"])


def test_exactly_fitting_shapes_agree_too():
    """Nothing depends on the padding of the roomy shape, nor on an absent kind of medium being padding."""
    port = tiny_port()
    inputs = CASES["odd_audio"]()
    expected = run_reference(port.reference, inputs, generate=3)
    got = run_port(port.params, port.config, inputs, generate=3)
    differences = worst(got, expected, inputs)
    assert all(differences[name] <= LIMITS[name] for name in differences), differences
    np.testing.assert_array_equal(got["greedy_ids"], expected["greedy_ids"])


def test_greedy_tokens_do_not_depend_on_the_padding_side():
    port = tiny_port()
    makers = [PromptMaker(10).text(9), PromptMaker(11).text(4).image(4, 4).text(9)]
    sides = [inputs_of(makers, left=left) for left in (True, False)]
    left, right = (run_port(port.params, port.config, inputs, generate=NEW_TOKENS, shape=ROOMY) for inputs in sides)
    np.testing.assert_array_equal(left["greedy_ids"], right["greedy_ids"])


def test_generate_stops_like_transformers():
    """Rows are padded after their end token, and columns after the last end are dropped."""
    import dataclasses

    from mer_r1_jax.parity.port import _as_generate

    config = dataclasses.replace(tiny_port().config, eos_token_ids=(7, 8), pad_token_id=0)
    chosen = np.array([[5, 7, 5, 5, 5], [5, 6, 5, 8, 9]])
    np.testing.assert_array_equal(_as_generate(chosen, config), [[5, 7, 0, 0], [5, 6, 5, 8]])


def test_numbering_after_a_backward_block_decides_the_tokens():
    """Continuing from the largest position, as transformers 4 does, gives other tokens: the case is worth having."""
    from mer_r1_jax.parity.port import _greedy

    port = tiny_port()
    differs = []
    for name in ("av_fractional", "av_backwards", "av_slow", "several_turns"):
        inputs = CASES[name]()
        batch, next_position_B, _ = to_batch(inputs, port.config, ROOMY)
        largest_B = batch.tokens.position_3BT.max(axis=(0, 2)) + 1
        features = _features(port, batch)
        v5 = np.asarray(_greedy(port.config, NEW_TOKENS, port.params, batch, features, next_position_B))
        v4 = np.asarray(_greedy(port.config, NEW_TOKENS, port.params, batch, features, largest_B.astype(np.int32)))
        rows = len(inputs.input_ids)
        differs.append((v5[:rows] != v4[:rows]).any())
    assert any(differs)


def _features(port, batch):
    from mer_r1_jax.parity.port import _forward

    return _forward(port.config, port.params, batch)[0]


def test_parity_command_compares_with_transformers(tmp_path):
    port = tiny_port()
    inputs = CASES["two_images"]()
    arrays = {name: value for name, value in vars(inputs).items() if value is not None}
    np.savez(tmp_path / "case.npz", **arrays)
    command = [sys.executable, "experiments/parity.py", f"--model={port.directory}", f"--inputs={tmp_path}/case.npz"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/out.npz", "--generate=4", "--reference"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "greedy_ids: equal" in done.stdout and "position_ids: worst difference 0," in done.stdout
    with np.load(tmp_path / "out.npz") as out:
        got = dict(out)
    expected = run_reference(port.reference, inputs, generate=4)
    assert got.keys() == {"logits", "position_ids", "image_features", "greedy_ids"}
    assert worst(got, expected, inputs)["logits"] <= LOGITS
    np.testing.assert_array_equal(got["greedy_ids"], expected["greedy_ids"])


def test_parity_command_explains_bad_inputs(tmp_path):
    np.savez(tmp_path / "case.npz", input_ids=np.ones((1, 3), int), pixels=np.ones(3))
    command = [sys.executable, "experiments/parity.py", f"--model={tiny_port().directory}"]
    done = subprocess.run(
        [*command, f"--inputs={tmp_path}/case.npz", f"--out={tmp_path}/out.npz"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "attention_mask: missing" in done.stderr and "pixels: not an input" in done.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(pixel_values=None), InputError, "pixel_values: missing"),
        (dict(attention_mask=np.ones((1, 3))), InputError, "attention_mask: shape"),
        (dict(pixel_values=np.ones((3, 1176), np.float32)), InputError, "images: 3 patches"),
        (dict(image_grid_thw=np.array([[1, 12, 8], [1, 10, 8]])), InputError, "images: 156 patches"),
        (dict(image_grid_thw=np.array([[1, 10, 6], [1, 8, 12]])), PositionError, "image 0 of grid"),
        (dict(input_ids=np.ones((1, 55), int)), InputError, "the placeholders take only 0 of them"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(change, error, message):
    inputs = CASES["two_images"]()
    arrays = {name: value for name, value in (vars(inputs) | change).items() if value is not None}
    with pytest.raises(error, match=message):
        to_batch(ProcessorInputs.of(arrays), tiny_port().config)


def test_inputs_larger_than_the_shape_are_refused():
    import dataclasses

    with pytest.raises(InputError, match="tokens 55 > 20"):
        to_batch(CASES["two_images"](), tiny_port().config, dataclasses.replace(ROOMY, tokens=20))
