"""Labels keep every word, however people write lists of them."""

from __future__ import annotations

import pytest
from support.record_files import GOOD, fault

from mer_r1_jax.data.records import read_records


@pytest.mark.parametrize(
    "label",
    [
        "[angry, worried, sad]",
        "['angry', 'worried', 'sad']",
        '["angry", "worried", "sad"].',
        "['angry' 'worried' 'sad']",
        "angry，worried、sad。",
        "【angry；worried；sad】",
        "“angry”, “worried”, “sad”",
        "「angry」「worried」「sad」",
        "angry; worried; sad.",
        "angry/worried|sad",
        "1. angry 2. worried 3. sad",
        "①angry ②worried ③sad",
        "- angry\n- worried\n- sad\n",
        "angry, worried, and sad!",
        "ａｎｇｒｙ，ｗｏｒｒｉｅｄ，ｓａｄ",
        "\u200bangry , worried ,, sad\ufeff",
        "angry 和 worried 与 sad",
        "angry and worried & sad",
        "angry、worried或sad。",
        "angry + worried + sad",
        "angry — worried - sad",
        "• angry • worried • sad",
        "angry · worried → sad",
        "（1）angry（2）worried（3）sad",
        "a) angry b) worried c) sad",
        "一、angry 二、worried 三、sad",
        "angry…worried…sad…",
        "angry\u3000worried\u3000sad",
        "Emotions: angry, worried, or sad",
        "情绪：angry，worried，sad",
        ["angry.", "'worried'", " [sad] "],
        ["angry and worried", "sad"],
    ],
)
def test_a_label_keeps_every_word_however_it_is_written(write, label):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>x</think><answer>{}</answer>"}]
    (record,) = read_records(write({"videos": ["a.mp4"], "solution": label}))
    assert record.solution == ("angry", "worried", "sad")
    if isinstance(label, str):
        turns[1]["content"] = turns[1]["content"].format(label)
        (record,) = read_records(write({"videos": ["a.mp4"], "messages": turns}))
        assert record.solution == ("angry", "worried", "sad")


@pytest.mark.parametrize("label", ["can't cope, very sad", ["can't cope", "very sad"], "[can't cope (a bit), sad]"])
def test_apostrophes_and_brackets_inside_a_phrase_stay(write, label):
    (record,) = read_records(write({"videos": ["a.mp4"], "solution": label}))
    assert record.solution in (("can't cope", "very sad"), ("can't cope (a bit)", "sad"))


@pytest.mark.parametrize("word", ["温和", "well-meaning", "a bit sad", "hand-in-hand"])
def test_a_word_with_a_joining_sign_inside_is_one_word(write, word):
    (record,) = read_records(write({"videos": ["a.mp4"], "solution": f"angry, {word}"}))
    assert record.solution == ("angry", word)


@pytest.mark.parametrize("word", ["happy，sad", "[happy, sad]", "happy; sad", "happy\nsad"])
def test_an_entry_of_a_list_is_one_word(write, word):
    problem = fault(write({**GOOD, "solution": ["angry", word]}))
    assert problem.field == "solution[1]" and "no comma or other separator" in problem.expected
