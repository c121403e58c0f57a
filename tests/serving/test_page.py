"""The page in a real browser, with a trained tiny model behind it: what it shows, and that it asks nobody else."""

import json
import threading

import pytest
from support.chromium import FOUND, Browser
from support.served_page import serving
from support.small_fixtures import compiled, small, small_folder, trained  # noqa: F401
from support.small_run import with_config

from mer_r1_jax.commands.serve import ServedModel
from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.run.live_answers import LiveAnswers
from mer_r1_jax.serving.app import Asked

QUESTION, SUBTITLE = "Feel?", "I never"


@pytest.fixture(scope="module")
def model(small, trained):  # noqa: F811
    """The trained tiny model, decoding two tokens at a time."""
    with LiveAnswers(with_config(small, rl={"decode_chunk": 2}), trained) as answers:
        yield ServedModel(answers, "tiny", threshold=1.0)


@pytest.fixture(scope="module")
def expected(small, trained, small_folder):  # noqa: F811
    """Slow and fast answers of `mer-r1 infer`, decoded in one piece; of the first clip whose slow answer has words."""
    for number in range(6):
        clip = small_folder / f"clips/{number}.mp4"
        _, answers = answer(small, trained, clip_record(clip, QUESTION, SUBTITLE))
        if answers[0].words and answers[0].reasoning:
            return clip, answers
    raise AssertionError("there has to be something to show")


@pytest.mark.skipif(FOUND is None, reason="needs chromium")
@pytest.mark.timeout(120)
def test_a_person_with_a_clip_gets_the_models_answers_from_this_machine_alone(model, expected, tmp_path):
    clip, (slow, fast) = expected
    with serving(model, tmp_path) as address, Browser(tmp_path / "browser", width=400) as browser:
        browser.open(address)
        browser.until("about.model === 'tiny'")
        seen = "const texts = []; const kept = written; written = (event) => { texts.push(event.text); kept(event); };"
        browser.run(f"(() => {{ {seen.replace('const texts', 'window.texts')} }})()")
        browser.choose("#file", clip)
        browser.until("!document.getElementById('ask').disabled && document.getElementById('player').readyState > 1")
        browser.run(f"document.getElementById('subtitle').value = {json.dumps(SUBTITLE)}")
        browser.run(f"document.getElementById('question').value = {json.dumps(QUESTION)}")
        browser.run("document.getElementById('hide').click(); document.getElementById('ask').click()")
        browser.until("document.getElementById('status').textContent === 'Answered.'", seconds=60)
        for one in (slow, fast):
            at = f"document.querySelector('#answer-all-{one.mode}')"
            words = browser.run(f"[...{at}.querySelectorAll('td b')].map((word) => word.textContent)")
            assert tuple(words) == one.words
            if one.words:
                told = browser.run(f"{at}.querySelector('tbody').textContent")
                assert all(f"{100 * sure:.0f}%" in told for sure in one.probabilities.values())
        assert browser.run("document.querySelector('#answer-all-slow .reasoning').textContent") == slow.reasoning
        texts = browser.run("window.texts")
        assert len(texts) > 4 and any(slow.text.startswith(text) and text != slow.text for text in texts), "as written"
        # Without the face, the voice, the subtitle: the answers of `mer-r1 infer --show`.
        for part in ("face", "voice", "subtitle"):
            assert browser.run(f"document.querySelector('#answer-{part}-slow .words') !== null")
        assert browser.run("document.documentElement.scrollWidth") <= 400, "nothing sticks out of a telephone"
        assert browser.told == []
        outside = [url for url in browser.asked if not url.startswith((f"{address}/", "data:", f"blob:{address}/"))]
        assert outside == [] and any("/answer?" in url for url in browser.asked)
        assert [path.name for path in tmp_path.iterdir()] == ["browser"], "the clip is gone"


def test_events_of_a_gated_answer_and_of_a_part_that_is_not_there(model, expected, small, trained):  # noqa: F811
    clip, (slow, fast) = expected
    events = []
    asked = Asked(clip, "mine.mp4", False, "", QUESTION, "auto", True)
    model.answer(asked, events.append)
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
    assert kinds[6:] == [
        ("begins", "slow", "face"),
        ("answer", "slow", "face"),
        ("begins", "slow", "voice"),
        ("answer", "slow", "voice"),
        ("left_out", None, "subtitle"),
    ]
    for hidden, shown in (("face", {"frames": False}), ("voice", {"audio": False})):
        _, (without,) = answer(small, trained, clip_record(clip, QUESTION, None, **shown), ("slow",))
        (got,) = (event for event in told if event.get("hidden") == hidden and event["kind"] == "answer")
        assert got["text"] == without.text


def test_a_clip_that_cannot_be_read_is_named_as_its_owner_names_it(model, tmp_path):
    broken = tmp_path / "clip.mp4"
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

    seen = threading.Event()

    def tell(event):
        if event["kind"] == "text":
            assert not seen.is_set()
            seen.set()
            raise Gone

    with pytest.raises(Gone):
        model.answer(Asked(expected[0], "a", False, SUBTITLE, QUESTION, "both", False), tell)
    assert seen.is_set()
