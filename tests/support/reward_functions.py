"""Reward functions as users write them, good and bad; a completion's text says what is to go wrong with it."""

import json
import os
import sys
import time

NUMBER = 3  # not a function


def _texts(completions):
    return [completion[0]["content"] for completion in completions]


def letters(completions, **kwargs):
    return [len(text) for text in _texts(completions)]


def patience(prompts, completions, patience, subtitle, solution, **kwargs):
    """Uses every kind of column; None where the record has none of its own."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [
        None if own is None else own + len(words) + (said is not None)
        for own, words, said in zip(patience, solution, subtitle, strict=True)
    ]


def only_what_it_names(completions, id):
    return [float(name[-1]) for name in id]


async def later(completions, **kwargs):
    import numpy as np  # here, because every process that is started for a test imports this module

    return np.asarray([float(len(text)) for text in _texts(completions)], np.float32)


def troubled(completions, completion_ids, **kwargs):
    """1 for each completion, unless its text asks for trouble."""
    texts = _texts(completions)
    if any("raise" in text for text in texts):
        raise ValueError("no such mood")
    if any("hang" in text for text in texts):
        time.sleep(600)
    if any("die" in text for text in texts):
        os._exit(3)
    if any("leave" in text for text in texts):
        sys.exit(3)
    if any("interrupt" in text for text in texts):
        raise KeyboardInterrupt
    if any("short" in text for text in texts):
        return [1.0] * (len(texts) - 1)
    values = {"nan": float("nan"), "inf": float("inf"), "word": "good", "none": None, "huge": 1e300, "list": [1.0]}
    return [values.get(text, 1.0) for text in texts]


def breaks_answers(completions, **kwargs):
    json.dumps = json.JSONEncoder.encode = lambda *_, **__: '{"values": [5.0, 5.0]}'
    return [1.0] * len(completions)


def of_the_group(completions, **kwargs):
    """How many completions it is asked about at once; raises when one of them asks for it."""
    if any("raise" in text for text in _texts(completions)):
        raise ValueError("no")
    return [float(len(completions))] * len(completions)


def always_raises(completions, **kwargs):
    raise RuntimeError("never works")


def always_hangs(completions, **kwargs):
    time.sleep(600)


def returns_a_dict(completions, **kwargs):
    return dict.fromkeys(_texts(completions), 1.0)


def needs_more(completions, mood, **kwargs):
    return [1.0] * len(completions)


def recall(completions, **kwargs):
    return [1.0] * len(completions)


def not_of_the_first(completions, id, **kwargs):
    """Letters; raises when asked about `clip-0`."""
    if "clip-0" in id:
        raise ValueError("not this one")
    return letters(completions)


def odd_values(completions, **kwargs):
    """A value of the kind that a completion's text names."""

    class Cruel:
        def __repr__(self):
            raise ValueError("no words \x1b[2J")

    values = {
        **{"text": "\x1b]0;owned\x07 \ud83d", "yes": True, "digits": 10**5000, "negative": -(10**400)},
        **{"nested": [[1.0]], "complex": 1j, "cruel": Cruel(), "long": "x" * 100_000},
    }
    return [values.get(text, 0.5) for text in _texts(completions)]


def raises_escapes(completions, **kwargs):
    raise RuntimeError("\x1b[2J\x1b]0;owned\x07 [/bold] \ud83d \u202e\n2030-01-01 ERROR root: forged " + "x" * 100_000)


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("nothing to say")


def raises_without_words(completions, **kwargs):
    raise Speechless


def held_up(completions, **kwargs):
    """1 for each completion, once the file that the variable HELD_UP names is not there."""
    while os.path.exists(os.environ.get("HELD_UP", "")):
        time.sleep(0.1)
    return [1.0] * len(completions)
