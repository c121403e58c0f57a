"""What may not stand in a record's text: placeholders, special tokens and tags, which the model reads as structure."""

from __future__ import annotations

import re

from mer_r1_jax.data.problems import LineProblems, shown
from mer_r1_jax.emotion.answer_form import TAGS

PLACEHOLDER = re.compile(r"<(?:video|audio|image)>")
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
STRUCTURE_TAG = re.compile("|".join(("</?subtitle>", *TAGS)))

_NAMES = {PLACEHOLDER: "a media placeholder", SPECIAL_TOKEN: "a special token", STRUCTURE_TAG: "a tag"}


def check_text(problems: LineProblems, field: str, text: str, *forbidden: re.Pattern) -> None:
    """Adds a problem for each of the forbidden patterns that stands in the text."""
    for pattern in forbidden:
        found = pattern.search(text)
        if found:
            mend = f"take {found.group()} out of the text; the model would read it as structure, not as words"
            problems.add(field, f"{found.group()} in {shown(text)}", f"a text without {_NAMES[pattern]}", mend)
