"""The longest shapes before the first step: every program runs once, the run calls the very same, and is unchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.killing import train
from support.run_contents import contents, differences
from support.small_run import visits_of, with_config

from mer_r1_jax.faults import StopRequested
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.reward_funcs import RewardFunctions
from mer_r1_jax.run.warm_up import WarmUpError, is_wanted, warm_up
from mer_r1_jax.training.stopping import Stop

pytestmark = pytest.mark.timeout(1800)  # two processes, on a busy machine

PROGRAMS = ("encode_media", "begin", "go_on", "logprobs", "score")  # jitted for one setup; others are shared
SAMPLED = ("encode", "sample", "decode", "reference", "score", "advantages", "update")


@pytest.fixture
def setup(small):
    """The small run, with two lengths of prompts and rollouts in chunks; its programs have not run yet."""
    return with_config(small, rl={"decode_chunk": 8}, data={"prompt_buckets": (60, 64)})


def phases_of(setup):
    return setup.sft_phase(), setup.rl_phase()


def test_every_program_runs_once_and_the_run_compiles_none_of_them_again(setup, trained):
    sft, rl = phases_of(setup)
    told, programs = [], setup.programs
    warm_up(setup, sft, rl, 0, told.append)
    (line,) = told
    assert line.startswith("longest shapes compiled and run once in ")
    assert line.endswith(f": {', '.join(('sft_step', *SAMPLED))}")
    update, step = programs.make_update(rl.optimizer), sft.make_step()
    compiled = [*(getattr(programs, name) for name in PROGRAMS), update, step]
    assert [function._cache_size() for function in compiled] == [1] * len(compiled)

    # A real step of each phase at that length, of parameters that were trained.
    smaller, compact = set(), programs.compact

    def noted(state, kept, size):
        smaller.add(size)
        return compact(state, kept, size)

    programs.compact = noted
    longest = setup.rl_step(rl.buckets[-1:])
    state = rl.new_state(jax.tree.map(jnp.copy, trained))
    reference = state.split()[1] | {name: leaf.copy() for name, leaf in state.split()[0].items()}
    rollout = longest.rollout(state.params, reference, visits_of(setup, setup.data.rl, [0, 1, 2, 3]), 0)
    assert rollout.metrics["completions/max_length"] > setup.config.rl.decode_chunk  # so there was a second chunk
    update(state, programs.minibatch(rollout.experience, 0), np.float32(0.04))
    sft.buckets[:] = sft.buckets[-1:]
    batch, _ = sft.batch(visits_of(setup, setup.data.sft, [0, 1, 2, 3]))
    step(sft.new_state(jax.tree.map(jnp.copy, trained)), put(batch, setup.backbone.mesh))
    # A decode batch that has shrunk is another shape, and not the longest.
    new = [function._cache_size() - 1 for function in compiled]
    assert new == [len(smaller) if function is programs.go_on else 0 for function in compiled]


@pytest.mark.parametrize("weights", [(0.5, 2.0), ()])
def test_reward_functions_are_not_called_and_their_advantages_are_the_run_s_program(small, trained, weights):
    paths = tuple(f"support.reward_functions.{name}" for name in ("letters", "not_of_the_first"))
    functions = RewardFunctions(paths, timeout=60.0, max_faulty_rollouts=3)
    settings = {"reward_funcs": paths, "reward_weights": weights}
    setup = with_config(small, rl=settings, train={"warm_up_longest": "always"})
    setup = dataclasses.replace(setup, reward_funcs=functions)
    assert is_wanted(setup)
    rl, advantages, told = setup.rl_phase(), setup.programs.advantages, []
    ask, asked = functions._pool.ask, []
    functions._pool.ask = lambda job, *more: asked.append(job["function"]) or ask(job, *more)
    try:
        before = advantages._cache_size()
        warm_up(setup, None, rl, 0, told.append)
        assert "advantages" in told[0] and asked == []
        assert advantages._cache_size() == before + 1
        rollout = setup.rl_step(rl.buckets[-1:]).rollout(
            trained, trained, visits_of(setup, setup.data.rl, [0, 1, 2, 3]), 0
        )
    finally:
        functions.close()
    assert advantages._cache_size() == before + 1
    assert set(asked) == {0, 1} and rollout.metrics["rewards/letters/unscored"] == 0


def test_what_a_run_has_done_is_not_warmed_up(setup):
    sft, rl = phases_of(setup)
    told = []
    warm_up(setup, sft, rl, sft.total_steps + rl.total_steps, told.append)
    assert told == []
    warm_up(setup, sft, rl, sft.total_steps, told.append)
    assert told[0].endswith(f"s: {', '.join(SAMPLED)}")


def test_a_signal_ends_it_before_the_next_program(setup):
    sft, rl = phases_of(setup)
    told, ran = [], []

    class Signals:
        """Of a process to which one comes while the rollout's first program runs."""

        def should_stop(self):
            return "encode" in ran

    encode = setup.programs.encode_media
    setup.programs.encode_media = lambda *given: ran.append("encode") or encode(*given)
    setup.programs.begin = lambda *_: ran.append("begin")
    with pytest.raises(StopRequested):
        warm_up(setup, None, rl, 0, told.append, Stop(Signals()))
    assert ran == ["encode"] and told == []


def test_it_is_left_out_on_a_cpu_unless_asked_for(small):
    asked = {
        name: is_wanted(with_config(small, train={"warm_up_longest": name})) for name in ("auto", "always", "never")
    }
    assert asked == {"auto": False, "always": True, "never": False}


@pytest.mark.parametrize(
    ("program", "message", "words"),
    [
        (
            "score",
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345678 bytes.",
            [
                "rl score at its longest shape, 4 prompts of 64 tokens x 4 completions of 24",
                "more memory than the chip has",
            ],
        ),
        ("go_on", "INTERNAL: Mosaic failed to compile TPU kernel", ["rl decode at its longest", "Pallas kernel"]),
    ],
)
def test_a_program_that_is_refused_is_named_with_its_shape_and_what_to_change(setup, program, message, words):
    def refused(*_):
        raise jax.errors.JaxRuntimeError(message)

    setattr(setup.programs, program, refused)
    with pytest.raises(WarmUpError) as caught:
        warm_up(setup, None, setup.rl_phase(), 0, print)
    told = str(caught.value)
    for word in (*words, "Try ", "GiB are held", "optimizer 0.00", "train.warm_up_longest=never", message.rstrip(".")):
        assert word in told
    if program == "score":
        assert "rl.prompts_per_step=2" in told


def test_an_update_that_does_not_fit_is_told_to_have_more_parts(setup):
    rl = setup.rl_phase()

    def refused(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    setup.programs._updates[rl.optimizer] = refused
    with pytest.raises(WarmUpError, match=r"rl update at its longest.*rl\.gradient_accumulation_steps=2"):
        warm_up(setup, None, rl, 0, print)


def test_a_run_is_bit_for_bit_the_same_with_and_without(small_folder, compiled):
    settings = (
        *("--config.sft.max_steps=4", "--config.rl.max_steps=2", "--config.eval.limit=1", "--config.eval.eval_steps=0"),
        "--config.train.save_steps=2",
    )
    found = {}
    for wanted in ("never", "always"):
        output = small_folder / f"warm_up_{wanted}"
        ended = train(small_folder, output, compiled, *settings, f"--config.train.warm_up_longest={wanted}")
        assert ended.returncode == 0, ended.stderr
        assert ("longest shapes compiled and run once" in ended.stderr) == (wanted == "always")
        found[wanted] = contents(output / "small")
    # The export keeps the settings, and one of them differs.
    assert differences(found["never"], found["always"]) == ["export: mer_r1.json"]
    assert len(found["never"]) > 100


def test_a_state_that_does_not_fit_is_told_to_be_smaller_and_not_to_have_fewer_prompts(setup, monkeypatch):
    def refused(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("mer_r1_jax.run.warm_up._zeros", refused)
    with pytest.raises(WarmUpError, match=r"rl state at.*rl\.optimizer\.dtype=bfloat16") as caught:
        warm_up(setup, None, setup.rl_phase(), 0, print)
    assert "prompts_per_step" not in str(caught.value)
