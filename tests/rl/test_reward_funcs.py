"""Reward functions of a user's, in their real process: what they are given, and every way they can fail."""

import itertools
import logging
import os
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from mer_r1_jax import screen
from mer_r1_jax.data.records import Record
from mer_r1_jax.process_pool import ChildDiedError
from mer_r1_jax.rl import reward_funcs, reward_worker
from mer_r1_jax.rl.reward_funcs import (
    RewardError,
    RewardFunctions,
    Sample,
    Scored,
    columns_of,
    metrics_of,
    short_names,
    together,
)

HERE = "support.reward_functions."


class Endless(list):
    def __iter__(self):
        return itertools.repeat(1.0)


def samples(*groups):
    """Samples from the texts of each prompt's completions."""
    made = []
    for row, texts in enumerate(groups):
        record = Record(
            id=f"clip-{row}",
            messages=({"role": "user", "content": "Feel?"},),
            subtitle="I never" if row else None,
            solution=("happy", "calm")[: row + 1],
            extra={"patience": row} if row else {},
        )
        made += [Sample(record=record, row=row, generation=g, text=text, ids=(1, g)) for g, text in enumerate(texts)]
    return made


@pytest.fixture
def functions():
    """(names, ...) -> RewardFunctions, closed at the end."""
    made = []

    def functions(*names, timeout=20.0, max_faulty_rollouts=3, columns=("patience",)):
        paths = [name if "." in name else HERE + name for name in names]
        made.append(RewardFunctions(paths, timeout=timeout, max_faulty_rollouts=max_faulty_rollouts, columns=columns))
        return made[-1]

    yield functions
    for one in made:
        one.close()


def test_functions_are_called_as_trl_calls_them(functions):
    """Conversational completions, columns as keyword lists, only what the signature takes; None means unscored."""
    asked = functions("letters", "patience", "only_what_it_names", "later", "trl.rewards.think_format_reward")
    good = "<think>Calm.</think>\n<answer>calm</answer>"
    scores = asked.score(samples(["a", "bcd"], ["", good]))
    np.testing.assert_array_equal(scores["letters"].values, [1, 3, 0, len(good)])
    np.testing.assert_array_equal(scores["patience"].values, [np.nan, np.nan, 4, 4])
    np.testing.assert_array_equal(scores["only_what_it_names"].values, [0, 0, 1, 1])
    np.testing.assert_array_equal(scores["later"].values, [1, 3, 0, len(good)])
    np.testing.assert_array_equal(scores["think_format_reward"].values, [0, 0, 0, 1])
    assert not any(scored.faults for scored in scores.values())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("raise", "ValueError: no such mood (reward_functions.py:"),
        ("die", "its process ended: exit status 3"),
        ("leave", "it raised SystemExit: 3 (reward_functions.py:"),
        ("interrupt", "it raised KeyboardInterrupt"),
        ("short", "it returned 0 values for 1 completions"),
        ("nan", "it returned nan, expected a finite number"),
        ("inf", "it returned inf, expected a finite number"),
        ("huge", "beyond the range of float32"),
        ("word", "it returned 'good' (str), expected a number or None"),
        ("list", "it returned [1.0] (list), expected a number or None"),
    ],
)
def test_only_the_sample_at_fault_is_unscored_and_it_is_named(functions, caplog, text, word):
    asked = functions("troubled")
    with caplog.at_level(logging.WARNING):
        scored = asked.score(samples(["a", "b"], ["a", text, "none"], ["a", "b"]))["troubled"]
    np.testing.assert_array_equal(scored.values, [1, 1, 1, np.nan, np.nan, 1, 1])  # never 0
    assert list(scored.faults) == [3] and word in scored.faults[3]
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"reward {HERE}troubled, sample clip-1, completion 1: " in line and word in line
    assert metrics_of({"troubled": scored}) == {
        "rewards/troubled/unscored": 1 - 5 / 7,
        "rewards/troubled/faults": 1.0,
        "rewards/troubled/mean": 1.0,
        "rewards/troubled/std": 0.0,
    }
    columns = columns_of({"troubled": scored})
    assert columns["troubled"] == [1, 1, 1, None, None, 1, 1]
    assert [bool(faults) for faults in columns["reward_faults"]] == [False] * 3 + [True] + [False] * 3
    grid = scored.grid((3, 3))
    np.testing.assert_array_equal(grid, [[1, 1, np.nan], [1, np.nan, np.nan], [1, 1, np.nan]])


@pytest.mark.parametrize(
    "text, word",
    [
        ("text", r"\\x1b\]0;owned"),
        ("digits", "OverflowError"),
        ("negative", "OverflowError"),
        ("nested", "list"),
        ("complex", "complex"),
        ("cruel", "Cruel"),
        ("long", "characters more"),
    ],
)
def test_a_value_that_is_no_number_costs_its_own_sample_only(functions, caplog, text, word):
    scored = functions("odd_values").score(samples(["fine", text, "yes"], ["fine"]))["odd_values"]
    np.testing.assert_array_equal(scored.values, np.array([0.5, np.nan, 1.0, 0.5], np.float32))
    assert list(scored.faults) == [1] and re.search(word, scored.faults[1]) and len(scored.faults[1]) < 1000
    assert "clip-0" in caplog.text and scored.faults[1].isprintable() and len(caplog.records) == 1


@pytest.mark.parametrize("name, word", [("raises_escapes", "RuntimeError"), ("raises_without_words", "without a text")])
def test_an_errors_words_reach_logs_and_tables_as_text(functions, caplog, tmp_path, name, word):
    path = tmp_path / "log.txt"
    handler = screen.log_file(path)
    logging.getLogger().addHandler(handler)
    try:
        asked = functions(name, max_faulty_rollouts=2)
        scores = asked.score(samples(["fine", "fine"]))
        with pytest.raises(RewardError, match=word) as stopped:
            asked.score(samples(["fine"]))
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    faults = columns_of(scores)["reward_faults"]
    pa.table({"faults": faults})  # half a surrogate pair could not be kept
    shown = [fault for row in faults for fault in row] + [str(stopped.value), *path.read_text().splitlines()]
    assert all(text.isprintable() and len(text) < 1500 for text in shown) and word in shown[0]
    assert not any(line.startswith("2030") for line in path.read_text().splitlines())


def test_a_hanging_call_ends_in_time_and_the_others_are_scored(functions):
    asked = functions("troubled", timeout=0.5)
    begin = time.monotonic()
    scored = asked.score(samples(["a", "b"], ["hang", "b"]))["troubled"]
    assert time.monotonic() - begin < 300  # it would hang for 600 s
    np.testing.assert_array_equal(scored.values, [1, 1, np.nan, 1])
    assert scored.faults == {2: "it did not return within 0.5 s (rl.reward_timeout)"}
    assert not asked.score(samples(["a", "b"]))["troubled"].faults  # a new process answers


def test_a_function_that_always_hangs_costs_a_few_time_outs_only(functions, monkeypatch):
    monkeypatch.setattr(reward_funcs, "MAX_HANGS", 2)
    asked = functions("always_hangs", "letters", timeout=0.3)
    scores = asked.score(samples(*[["a", "b"]] * 6))
    assert np.isnan(scores["always_hangs"].values).all()
    np.testing.assert_array_equal(scores["letters"].values, [1] * 12)
    reasons = list(scores["always_hangs"].faults.values())
    assert [reason.startswith("it did not return") for reason in reasons] == [True] * 2 + [False] * 10  # of 13 calls, 2
    assert set(reasons[2:]) == {"not asked any more, as 2 calls in this rollout ran out of time or crashed"}
    # What was nothing but faults is asked once in the next rollout.
    reasons = list(asked.score(samples(*[["a", "b"]] * 6))["always_hangs"].faults.values())
    assert reasons == ["it did not return within 0.3 s (rl.reward_timeout)"] * 12


def test_values_that_are_compared_come_from_calls_of_one_size(functions):
    asked = functions("of_the_group")
    np.testing.assert_array_equal(asked.score(samples(["a", "b"], ["c", "d"]))["of_the_group"].values, [4] * 4)
    scored = asked.score(samples(["a", "b"], ["c", "raise", "d"]))["of_the_group"]
    np.testing.assert_array_equal(scored.values, [2, 2, 1, np.nan, 1])


@pytest.mark.parametrize(("name", "word"), [("always_raises", "never works"), ("returns_a_dict", "returned a dict")])
def test_a_reward_that_never_works_stops_the_run_after_a_while(functions, name, word):
    asked = functions(name, max_faulty_rollouts=2)
    scored = asked.score(samples(["a", "b"]))[name]
    assert np.isnan(scored.values).all() and len(scored.faults) == 2
    assert metrics_of({name: scored}) == {f"rewards/{name}/unscored": 1.0, f"rewards/{name}/faults": 2.0}
    assert asked.score([])[name].values.shape == (0,)  # a rollout whose clips all broke says nothing
    with pytest.raises(RewardError, match=f"{name} gave nothing but faults in 2 rollouts.*max_faulty_rollouts.*{word}"):
        asked.score(samples(["a", "b"]))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.at.all", ["nowhere.at.all", "ModuleNotFoundError", "cannot be imported"]),
        (HERE + "lettres", ["the module support.reward_functions has no lettres"]),
        (HERE + "NUMBER", ["it is a int, expected a function"]),
        (HERE + "needs_more", ["it needs mood", "patience", "data.rl_path"]),
        ("builtins.abs", ["builtins.abs: its argument x cannot be given by name"]),
    ],
)
def test_functions_that_cannot_be_used_are_refused_at_the_start(functions, path, words):
    with pytest.raises(RewardError) as caught:
        functions("letters", path)
    for word in ("rl.reward_funcs", *words):
        assert word in str(caught.value)


def test_all_paths_that_do_not_import_come_in_one_message(functions):
    with pytest.raises(RewardError) as caught:
        functions("nowhere.one", "nowhere.two", "letters")
    assert "nowhere.one" in str(caught.value) and "nowhere.two" in str(caught.value)
    assert "letters" not in str(caught.value)


def test_column_with_an_arguments_name_is_refused(functions):
    with pytest.raises(RewardError, match="column completions has the name of an argument"):
        functions("letters", columns=("completions",))


def test_a_module_that_ends_its_process_when_it_is_imported_is_named(functions, tmp_path, monkeypatch):
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(4)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="leaves_at_once cannot be imported: SystemExit: 4"):
        functions("letters", "leaves_at_once.anything")


def test_a_function_that_breaks_the_answers_of_its_process_changes_no_others(functions):
    asked = functions("letters", "breaks_answers", "only_what_it_names", timeout=2.0)
    for _ in range(2):
        scores = asked.score(samples(["a", "bcd"]))
        np.testing.assert_array_equal(scores["letters"].values, [1, 3])
        np.testing.assert_array_equal(scores["only_what_it_names"].values, [0, 0])
        assert np.isnan(scores["breaks_answers"].values).all() and len(scores["breaks_answers"].faults) == 2


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (np.ones(2), [1.0, 1.0]),
        (np.ones(10**9, np.int8), "returned 1000000000 values for 2"),  # refused before it becomes a list
        (np.float32(1), "returned a float32, expected a list of 2"),
        (np.array(1.0), "returned a ndarray, expected a list of 2"),
        (Endless([1.0, 2.0]), "returned a Endless that cannot be read"),
    ],
    ids=str,
)
def test_arrays_and_lists_are_read_as_far_as_they_are_expected(result, expected):
    found = reward_worker.call(lambda: result, {}, 2)
    assert found.get("values") == expected or expected in found["error"]


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"values": 1.0},
        {"values": [1.0]},
        {"values": [1.0, "1"]},
        {"values": [1.0, True]},
        {"values": [1.0, float("nan")]},
        {"values": [1.0, {"fault": 3}]},
        {"error": ["it raised"]},
    ],
)
def test_what_is_no_list_of_values_is_no_answer(head):
    assert reward_funcs._read({"values": [1.0, {"fault": "no"}]}, 2) == [1.0, {"fault": "no"}]
    with pytest.raises(ChildDiedError, match="something else than values"):
        reward_funcs._read(head, 2)


def test_names_in_metrics_are_short_unless_taken_or_shared():
    assert short_names(["a.b.good", "a.c.good", "a.b.fine", "a.b.recall"]) == (
        "a.b.good", "a.c.good", "fine", "a.b.recall",
    )  # fmt: skip


def test_the_process_is_light_and_ends_with_the_functions(functions):
    program = "import sys, mer_r1_jax.rl.reward_worker; print(sorted({'jax', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    asked = functions("letters")
    (child,) = asked._pool._running
    process = child._process
    assert process.poll() is None
    asked.close()
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_scores_of_several_processes_become_those_of_all():
    first = Scored(tuple(samples(["a", "b"])), np.array([1, np.nan], np.float32), {1: "it hung"})
    second = Scored(tuple(samples(["c", "d"])), np.array([np.nan, 4], np.float32), {0: "it raised"})
    joined = together([{"mood": first}, {}, {"mood": second}])["mood"]
    assert [sample.text for sample in joined.samples] == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(joined.values, [1, np.nan, np.nan, 4])
    assert joined.faults == {1: "it hung", 2: "it raised"}
    assert columns_of({"mood": joined})["reward_faults"] == [[], ["mood: it hung"], ["mood: it raised"], []]
    assert metrics_of({"mood": joined})["rewards/mood/mean"] == 2.5
    assert together([{}]) == {}
