"""The page in a real browser, with a trained tiny model behind it: what it shows, and that it asks nobody else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.chromium import Browser, needs_chromium
from support.served_page import serving
from support.small_fixtures import compiled, small, small_folder, trained  # noqa: F401
from support.small_run import with_config

from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.run.live_answers import PARTS, LiveAnswers, Question, _cannot_hide
from mer_r1_jax.run.served_model import ServedModel
from mer_r1_jax.serving.app import Asked

QUESTION, SUBTITLE = "Feel?", "I never"


@pytest.fixture(scope="module")
def model(small, trained):  # noqa: F811
    """The trained tiny model, decoding two tokens at a time; auto takes the slow answer."""
    with LiveAnswers(with_config(small, rl={"decode_chunk": 2}), trained) as answers:
        yield ServedModel(answers, "tiny", threshold=1.0)


@pytest.fixture(scope="module")
def expected(small, trained, small_folder):  # noqa: F811
    """A clip, and its slow and fast answers as `mer-r1 infer` gives them; the first whose slow answer has words."""
    for number in range(6):
        clip = small_folder / f"clips/{number}.mp4"
        _, answers = answer(small, trained, clip_record(clip, QUESTION, SUBTITLE))
        if answers[0].words and answers[0].reasoning:
            return clip, answers
    raise AssertionError("there has to be something to show")


@needs_chromium
def test_a_person_with_a_clip_gets_the_models_answers_from_this_machine_alone(model, expected, tmp_path):
    clip, (slow, fast) = expected
    with serving(model, tmp_path) as address, Browser(tmp_path / "browser", width=400) as browser:
        browser.open(address)
        browser.until("about.model === 'tiny'")
        browser.run("window.texts = []; const shows = show; show = (one) => { texts.push(one.text); shows(one); }; 0")
        browser.choose("#file", clip)
        browser.until("!document.getElementById('ask').disabled && document.getElementById('player').readyState > 1")
        size = -(-clip.stat().st_size // 1000)
        assert browser.run("document.getElementById('clip-note').textContent") == f"{clip.name}, {size} kB"
        browser.run(f"document.getElementById('subtitle').value = {json.dumps(SUBTITLE)}")
        browser.run(f"document.getElementById('question').value = {json.dumps(QUESTION)}")
        browser.run("document.getElementById('ask').click()")
        browser.until("document.getElementById('status').textContent === 'Answered.'", seconds=240)
        for one in (slow, fast):
            at = f"document.querySelector('#answer-all-{one.mode}')"
            words = browser.run(f"[...{at}.querySelectorAll('td b')].map((word) => word.textContent)")
            assert tuple(words) == one.words
            if one.words:
                told = browser.run(f"{at}.querySelector('tbody').textContent")
                assert all(f"{100 * sure:.0f}%" in told for sure in one.probabilities.values())
        assert browser.run("document.querySelector('#answer-all-slow .reasoning').textContent") == slow.reasoning
        texts = [text for text in browser.run("texts") if text]
        assert len([text for text in texts if text != slow.text and slow.text.startswith(text)]) > 1, "as it is written"
        # What hiding a part changes is shown beside what was said of the whole clip.
        words = ["brooding", slow.words[0]]
        none = {word: [None] * 5 for word in words}
        heard = {"kind": "answer", "mode": "slow", "hidden": "face", "answer": words, "reasoning": "r", "text": ""}
        heard |= {"confidences": dict.fromkeys(words, 0.25), "categories": none, "wheel_confidences": none}
        browser.run(f"show({json.dumps(heard)})")
        changes = browser.run("[...document.querySelectorAll('#answer-face-slow li')].map((one) => one.textContent)")
        before = f"{slow.words[0]} {100 * slow.probabilities[slow.words[0]]:.0f}% → 25%"
        assert changes == [before, *(f"{word} gone" for word in slow.words[1:]), "brooding new"]
        assert browser.run("document.documentElement.scrollWidth") <= 400, "nothing sticks out of a telephone"
        assert browser.told == []
        outside = [url for url in browser.asked if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))]
        assert outside == [] and any("/answer?" in url for url in browser.asked)
        assert [path.name for path in tmp_path.iterdir()] == ["browser"], "the clip is gone"


def test_events_of_a_gated_answer_and_of_hidden_parts(model, expected):
    clip, (slow, fast) = expected
    events = []
    model.answer(Asked(clip, "mine.mp4", False, SUBTITLE, QUESTION, "auto", True), events.append)
    told = [event for event in events if event["kind"] != "text"]
    kinds = [(event["kind"], event.get("mode"), event.get("hidden")) for event in told]
    assert kinds[:6] == [
        ("clip", None, None),
        ("begins", "fast", ""),
        ("answer", "fast", ""),
        ("begins", "slow", ""),
        ("answer", "slow", ""),
        ("taken", "slow", None),
    ]
    assert kinds[6:] == [(kind, "slow", part) for part in PARTS for kind in ("begins", "answer")]
    assert (told[2]["text"], told[4]["text"]) == (fast.text, slow.text)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_hidden_is_not_shown(part):
    clip = Question(Path("/clips/a.mp4"), "a", False, "Oh.", "", ("slow",)).record("Feel?", part)
    shown = {"face": clip.videos, "voice": clip.audios, "subtitle": clip.subtitle}
    assert {name for name, value in shown.items() if not value} == {part}
    assert clip.use_audio_in_video is (False if part == "voice" else None)


def test_a_part_that_is_not_there_or_is_all_there_is_cannot_be_hidden():
    def why(part, frames, sound, subtitle):
        question = Question(Path("a"), "a", False, subtitle, "", ("slow",))
        return _cannot_hide(part, question, SimpleNamespace(stats={"frames": frames}, audio=sound))

    assert [why(part, 3, ["sound"], "Oh.") for part in PARTS] == ["", "", ""]
    silent = [why(part, 3, [], None) for part in PARTS]
    assert silent == ["nothing would be left to show", "there is none", "there is none"]
    assert why("voice", 0, ["sound"], "Oh.") == "nothing would be left to show"


def test_a_clip_that_cannot_be_read_is_named_as_its_owner_names_it(model, tmp_path):
    broken = tmp_path / "tmp123.mp4"
    broken.write_bytes(b"no clip")
    asked = Asked(broken, "holiday.mp4", False, "", "", "fast", False)
    with pytest.raises(Exception) as error:
        model.answer(asked, lambda event: None)
    told = model.explain(error.value, asked)
    assert told.startswith("holiday.mp4: ") and "expected" in told and str(tmp_path) not in told
    assert model.explain(KeyError("x"), asked) is None


def test_an_answer_that_nobody_waits_for_is_left_after_a_chunk(model, expected):
    class Gone(Exception):
        pass

    kinds = []

    def tell(event):
        kinds.append(event["kind"])
        if event["kind"] == "text":
            raise Gone

    with pytest.raises(Gone):
        model.answer(Asked(expected[0], "a", False, SUBTITLE, QUESTION, "both", False), tell)
    assert kinds == ["clip", "begins", "text"]
