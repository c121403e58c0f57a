"""Both sides of `mer-r1 bench` do the same work: same weights, same tokens, same numbers."""

import jax
import numpy as np
import pytest
import torch
from support.small_fixtures import compiled, small, small_folder  # noqa: F401
from support.small_run import with_config

from mer_r1_jax.peers import page, real_page, timing
from mer_r1_jax.peers.omni import PARTS, OmniSide, make_job
from mer_r1_jax.peers.omni_torch import OmniPeer, load
from mer_r1_jax.peers.real_size import SIZES, real_job, useful_flops
from mer_r1_jax.peers.text import END, TextJob, TextSide
from mer_r1_jax.peers.text_torch import TextPeer

LENGTH = 48  # tokens of a completion of clips; a demonstration has to fit


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Both sides of a small text job."""
    job = TextJob(
        completions=8,
        num_generations=4,
        prompt_length=6,
        max_completion_length=5,
        hidden_size=64,
        layers=2,
        mlp_size=64,
        vocab_size=96,
    )
    side, export = TextSide(job), tmp_path_factory.mktemp("text") / "export"
    side.export(export)
    torch.set_num_threads(1)
    return job, side, TextPeer(job, export)


@pytest.fixture(scope="module")
def omni(small, tmp_path_factory):  # noqa: F811
    """Both sides of the small run's step, after two steps each, with the metrics of both."""
    setup = with_config(small, rl={"max_completion_length": LENGTH})
    records = [record for record in setup.data.sft if "broken" not in record.id][:3]
    job = make_job(setup, records)
    side, export = OmniSide(job), tmp_path_factory.mktemp("omni") / "export"
    side.export(export)
    torch.set_num_threads(1)
    peer = OmniPeer(job, *load(export))
    metrics, laps = [], []
    for _ in range(2):
        laps.append((side.step(), peer.step()))
        metrics.append((side.metrics, peer.metrics))
    return job, side, peer, metrics, laps


def test_text_sides_have_the_same_logits(text):
    job, side, peer = text
    ids = np.random.default_rng(0).integers(0, job.vocab_size, (8, 9)).astype(np.int32)
    np.testing.assert_allclose(side.logits(ids), peer.logits(ids), atol=2e-5)


def test_text_sides_sample_the_same_number_of_tokens(text):
    job, side, peer = text
    prompts = job.prompts(job.completions)
    ours, theirs = side.sampled_ids(prompts, generations=1), peer.sampled_ids(prompts)
    assert ours[:, 0].shape == theirs.shape == (job.completions, job.max_completion_length)
    assert END not in ours and END not in theirs


def test_omni_sides_learn_the_same(omni):
    _, _, _, metrics, _ = omni
    for step, (ours, theirs) in enumerate(metrics):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), f"step {step}"
    (first, _), (second, _) = metrics
    assert first["grad_norm"] > 0.01 and first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-5, "the first update has to have moved the policy"


def test_omni_sides_sample_the_same_number_of_tokens(omni):
    job, side, peer, _, _ = omni
    ours, theirs = side.sampled_ids(), peer.sampled_ids(peer.rows())
    assert ours.shape == (*job.script.length_BG.shape, LENGTH)
    assert ours.reshape(-1, LENGTH).shape == tuple(theirs.shape)
    banned = job.setup.programs.sampling.banned_ids  # the end among them
    assert ours.min() >= 0, "every completion has its full length"
    assert not np.isin(ours, banned).any() and not np.isin(theirs.numpy(), banned).any()


def test_omni_sides_time_the_same_parts(omni):
    *_, laps = omni
    for ours, theirs in laps:
        assert set(ours) == set(theirs) == {*PARTS, timing.WHOLE}
        for one in (ours, theirs):
            assert all(seconds > 0 for seconds in one.values())
            assert sum(one[part] for part in PARTS) <= one[timing.WHOLE] * 1.001


def test_a_comparison_pairs_repetitions():
    own = [{timing.WHOLE: 1.0, "a": 0.5}, {timing.WHOLE: 2.0, "a": 0.5}, {timing.WHOLE: 4.0, "a": 1.0}]
    other = [{timing.WHOLE: 6.0, "a": 1.0}, {timing.WHOLE: 6.0, "a": 2.0}, {timing.WHOLE: 4.0, "a": 2.0}]
    whole = timing.compare("work", own, other)
    assert whole.ratio == 3.0 and whole.spread == (1.0, 6.0)
    assert timing.compare("part", own, other, ("a",)).ratio == 4.0
    row = page.Row(comparison=whole, target=page.Target(gate=1.5, aim=4.0))
    assert row.verdict == "gate 1.5x met, aim 4x missed"


def test_a_page_keeps_what_is_around_its_tables():
    page_of = "# Title\n\nbefore\n\n<a>\nold\n<b>\n\nafter\n"
    new = page.replaced(page_of, "new\n", "<a>", "<b>")
    assert new == "# Title\n\nbefore\n\n<a>\nnew\n<b>\n\nafter\n"
    assert page.replaced(new, "new\n", "<a>", "<b>") == new
    assert "<a>\nnew\n<b>" in page.replaced("", "new\n", "<a>", "<b>")


def test_both_sides_learn_the_same_of_the_job_of_a_card(tmp_path):
    """At a small size: in float32, from one export, the torch side in micro-batches that recompute."""
    size = SIZES["tiny"]
    job = real_job(size, tmp_path, devices=jax.devices()[:1])
    side = OmniSide(job)
    side.export(tmp_path / "export")
    peer = OmniPeer(job, *load(tmp_path / "export"), rows_at_once=size.torch_rows)
    side.step()
    parts, reference = peer.parts(), [peer.logprobs(part, peer.reference).detach() for part in peer.parts()]
    assert [len(part.rows["input_ids"]) for part in parts] == [3, 1]
    groups = job.setup.scorer.groups(job.script, [record.solution for record in job.records])
    peer.learn(parts, peer.advantages_of(parts, groups), reference)
    assert side.metrics == pytest.approx(peer.metrics, rel=1e-3, abs=1e-6)
    assert side.metrics["grad_norm"] > 0.01
    # Answers as long as reasoning has them, and a count of operations that follows from them.
    lengths = job.script.length_BG
    assert (lengths > 0.75 * size.completion).all() and (lengths <= size.completion).all()
    text = job.setup.backbone.config.text
    tokens = sum(len(prompt.ids) for prompt in job.prompts) + int(lengths.sum())
    weights = text.num_hidden_layers * (
        2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
        + 3 * text.hidden_size * text.intermediate_size
    )
    products = 6 * (weights * tokens + text.hidden_size * text.vocab_size * int(lengths.sum()))
    assert products < useful_flops(job) < 2 * products  # the rest is attention


OURS = {
    "device": "card",
    "prompt_tokens": [10, 12],
    "tokens_in_loss": 99,
    "update_flops": 200e12,
    "peak_flops": 1000e12,
    "steps": [{"sample": 2.0, "score": 0.5, "reference": 0.1, "update": 0.4, "whole": 3.0}],
    "decode_ms": [4.0, 5.0, 9.0],
    "memory": {"perf/peak_memory_gib": 60.0},
}
THEIRS = {
    "device": "the same",
    "steps": [{"sample": 10.0, "score": 4.0, "reference": 3.0, "update": 20.0, "whole": 37.0}],
    "encode_s": 1.0,
    "decode_ms": [20.0],
}


def test_a_page_of_a_card_has_both_ratios_where_their_update_is_odd():
    text = real_page.markdown(SIZES["3b"], OURS, THEIRS, command="mer-r1 bench")
    assert "|whole MER-R1 step|3|37|12.3|" in text
    assert "|one more token of all completions, ms|5|20|4.0|" in text
    assert "utilisation of our update: 50.0%" in text
    # Encoded once, and four passes of the rest: 1 + 4 x (3 - 1) = 9 in place of 20, so 26 for 3 and 9 for 0.4.
    assert "should take 9.0 s" in text and "took 20.0" in text and "step is 8.7, of the update 22.5" in text


def test_a_page_of_a_card_says_what_was_not_measured():
    text = real_page.markdown(SIZES["3b"], OURS, {"encode_s": 1.0}, command="mer-r1 bench")
    assert "|whole MER-R1 step|3|not measured||" in text and "theirs: not measured" in text
    assert "should take" not in text
