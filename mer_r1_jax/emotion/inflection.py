"""English inflections and close derivations of emotion words, by rule.

Used to build the word-form table of the wheels shipped here. The rules look at spelling only, so a few forms are rare
or do not occur; every form stays in its word's category, so a spurious one costs nothing but a dictionary entry.
"""

from __future__ import annotations

import re

VOWELS = "aeiou"
PARTS = ("adj", "noun", "verb", "phrase")

# verbs whose past forms the rules cannot find: stem -> (past, participle)
IRREGULAR = {
    "break": ("broke", "broken"),
    "forget": ("forgot", "forgotten"),
    "forsake": ("forsook", "forsaken"),
    "freeze": ("froze", "frozen"),
    "hide": ("hid", "hidden"),
    "hurt": ("hurt", "hurt"),
    "leave": ("left", "left"),
    "lose": ("lost", "lost"),
    "mislead": ("misled", "misled"),
    "overcome": ("overcame", "overcome"),
    "shake": ("shook", "shaken"),
    "shrink": ("shrank", "shrunk"),
    "spellbind": ("spellbound", "spellbound"),
    "spend": ("spent", "spent"),
    "weep": ("wept", "wept"),
    "withdraw": ("withdrew", "withdrawn"),
}


def inflections(word: str, part: str, stem: str | None = None) -> list[str]:
    """Surface forms of `word`, itself first, without repeats.

    Args:
        word: a lower-case word.
        part: "adj", "noun", "verb" or "phrase" (a phrase has no other forms).
        stem: the verb an adjective in -ed or -ing comes from; its forms are added.

    Raises:
        ValueError: `part` is none of these.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part of speech {part!r}: expected one of {', '.join(PARTS)}")
    if part == "phrase" or " " in word:
        return [word]
    forms = {"adj": _adjective, "noun": _noun, "verb": verb_forms}[part](word)
    if stem is not None:
        forms = [*forms, *verb_forms(stem)]
    return list(dict.fromkeys([word, *forms]))


def _noun(word: str) -> list[str]:
    return [plural(word)]


def plural(word: str) -> str:
    """The regular plural of a noun, which is also the third person of a verb."""
    if word.endswith("y") and word[-2:-1] not in VOWELS:
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word + "s"


def verb_forms(stem: str) -> list[str]:
    """Third person, past, participles, agent noun and the adverbs of the participles."""
    base = _before_vowel(stem)
    if stem.endswith("y") and stem[-2:-1] not in VOWELS:
        past = stem[:-1] + "ied"
        agent = stem[:-1] + "ier"
    else:
        past, agent = base + "ed", base + "er"
    pasts = IRREGULAR.get(stem, (past,))
    gerund = (stem[:-2] + "ying") if stem.endswith("ie") else base + "ing"
    forms = [stem, plural(stem), *pasts, gerund, agent, agent + "s", gerund + "s", gerund + "ly", pasts[-1] + "ly"]
    forms += [pasts[-1] + "ness", gerund + "ness"]
    if stem.endswith("ate"):
        forms += [stem[:-1] + "ion", stem[:-1] + "ions", stem[:-1] + "or", stem[:-1] + "ive"]
    return forms


def _before_vowel(stem: str) -> str:
    """The stem as it stands before -ed and -ing: amaz(e), stun(n), trust."""
    if stem.endswith("ee") or stem.endswith("oe") or stem.endswith("ye"):
        return stem
    if stem.endswith("e"):
        return stem[:-1]
    one_syllable = re.fullmatch(r"[^aeiou]*(?:qu)?[aeiou][^aeiouwxy]", stem)
    if one_syllable or stem in {"regret", "upset", "repel", "forget", "rebut", "commit", "admit", "propel", "befit"}:
        return stem + stem[-1]
    return stem


def _adjective(word: str) -> list[str]:
    forms = [adverb(word), *_quality(word)]
    return forms + _comparison(word) if _is_short(word) else forms


def adverb(word: str) -> str:
    """The adverb in -ly of an adjective."""
    if word.endswith("ic"):
        return word + "ally"
    if word.endswith("le") and word[-3:-2] not in VOWELS:
        return word[:-1] + "y"
    if word.endswith("y") and len(word) > 3 and word[-2:-1] not in VOWELS:
        return word[:-1] + "ily"
    return word + ("y" if word.endswith("ll") else "ly")


def _quality(word: str) -> list[str]:
    """Nouns for the quality an adjective names, with their plurals where usual."""
    if word.endswith("y") and word[-2:-1] not in VOWELS:
        found = [word[:-1] + "iness"]
    else:
        found = [word + "ness"]
    for ending, nouns in (
        ("able", ("ability", "abilities")),
        ("ible", ("ibility", "ibilities")),
        ("ent", ("ence", "ency", "ences")),
        ("ant", ("ance", "ancy", "ances")),
        ("ical", ("icality",)),
        ("al", ("ality",)),
        ("ive", ("ivity",)),
        ("ile", ("ility", "ilities")),
        ("ful", ("fulnesses",)),
        ("ic", ("icism",)),
        ("id", ("idity",)),
        ("ous", ("osity",)),
        ("ate", ("acy",)),
        ("tic", ("sm",)),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            found += [word[: -len(ending)] + noun for noun in nouns]
    return found


def _is_short(word: str) -> bool:
    syllables = len(re.findall(r"[aeiouy]+", word.removesuffix("e") if not word.endswith("le") else word))
    return syllables == 1 or (syllables == 2 and word.endswith(("y", "le", "ow")))


def _comparison(word: str) -> list[str]:
    if word.endswith("y") and word[-2:-1] not in VOWELS:
        base = word[:-1] + "i"
    elif word.endswith("e"):
        base = word[:-1]
    elif re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", word):
        base = word + word[-1]
    else:
        base = word
    return [base + "er", base + "est"]
