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
    "bite": ("bit", "bitten"),
    "drive": ("drove", "driven"),
    "leave": ("left", "left"),
    "misread": ("misread", "misread"),
    "misunderstand": ("misunderstood", "misunderstood"),
    "sleep": ("slept", "slept"),
    "unbind": ("unbound", "unbound"),
    "unwind": ("unwound", "unwound"),
    "break": ("broke", "broken"),
    "forget": ("forgot", "forgotten"),
    "forsake": ("forsook", "forsaken"),
    "freeze": ("froze", "frozen"),
    "hide": ("hid", "hidden"),
    "hurt": ("hurt", "hurt"),
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


_SUFFIX = re.compile(
    r"(tion|sion|ment|ness|ity|ance|ence|ancy|ency|ism|ship|hood|dom|our|tude|ous|ful|less|able|ible|ive|ic|ical|al|ent"
    r"|ant|ly|ed|ing|ate|ary|ory|ish|some|ile|id|y|ern)$"
)

# longer verbs whose last letter doubles
_DOUBLES = set(
    "abhor admit befit commit compel defer deter forget fulfil omit propel rebel rebut regret repel submit".split()
)


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
    if " " in word:
        return list(dict.fromkeys([word, *(_phrase(word, stem) if stem is not None else ())]))
    forms = {"adj": _adjective, "noun": _noun, "verb": verb_forms, "phrase": lambda _: []}[part](word)
    if stem is not None:
        forms = [*forms, *verb_forms(stem)]
    return list(dict.fromkeys([word, *forms]))


def _phrase(word: str, stem: str) -> list[str]:
    """Forms of a phrase that opens with a participle: turned away -> turn away, turns away, turning away."""
    rest = word[word.index(" ") :]
    return [form + rest for form in (stem, plural(stem), _before_vowel(stem) + "ing")]


def _noun(word: str) -> list[str]:
    forms = [plural(word)]
    if _is_plain(word):
        full = (word[:-1] + "i" if word.endswith("y") else word) + "ful"
        forms += [*conjugation(word), full, full + "s", full + "ly", full + "ness"]
    if word.endswith("pathy"):
        forms += verb_forms(word[:-1] + "ize")
    return forms


def _is_plain(word: str) -> bool:
    """Whether a word shows no ending that tells its part of speech, so that it may also be used as a verb."""
    return not _SUFFIX.search(word)


def plural(word: str) -> str:
    """The regular plural of a noun, which is also the third person of a verb."""
    if word.endswith("y") and word[-2:-1] not in VOWELS:
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word + "s"


def conjugation(stem: str) -> list[str]:
    """A verb's own forms: stem, third person, past, participles."""
    if stem.endswith("y") and stem[-2:-1] not in VOWELS:
        past = stem[:-1] + "ied"
    else:
        past = _before_vowel(stem) + "ed"
    gerund = (stem[:-2] + "ying") if stem.endswith("ie") else _before_vowel(stem) + "ing"
    return [stem, plural(stem), *IRREGULAR.get(stem, (past,)), gerund]


def verb_forms(stem: str) -> list[str]:
    """A verb's own forms, the agent noun, what the participles give, and the nouns and adjectives of its ending."""
    own = conjugation(stem)
    participle, gerund = own[-2:]
    agent = stem[:-1] + "ier" if participle.endswith("ied") else _before_vowel(stem) + "er"
    forms = [*own, agent, agent + "s", gerund + "ly", participle + "ly", participle + "ness"]
    for ending, nouns in _VERB_NOUNS:
        if stem.endswith(ending):
            forms += [stem[: -len(ending)] + noun for noun in nouns]
    return forms


# what verbs with these endings are turned into: frustrate -> frustration, energize -> energization, energise
_VERB_NOUNS = (
    ("ate", ("ation", "ations", "ator", "ators")),
    ("ize", ("ization", "izations", "isation", "ise", "ises", "ised", "ising")),
    ("ise", ("isation", "isations", "ize", "izes", "ized", "izing")),
    ("ify", ("ification", "ifications")),
    ("ade", ("adation", "adations")),
    ("ct", ("ction", "ctions", "ctive", "ctor", "ctors")),
    ("ss", ("ssion", "ssions", "ssive")),
    ("se", ("sion", "sions", "sive", "sure")),
    ("de", ("sion", "sions", "sive")),
    ("ive", ("iver", "ivers", "iving")),
    ("it", ("ition", "itions", "ission", "itive")),
    ("pt", ("ption", "ptions", "ptive")),
    ("rt", ("rtion", "rtions", "rtive")),
    ("ve", ("vation", "vations")),
    ("re", ("ration", "rations")),
    ("sh", ("shment", "shments")),
    ("ge", ("gement", "gements")),
    ("le", ("lement", "lements")),
    ("in", ("inment", "inments")),
)


def _before_vowel(stem: str) -> str:
    """The stem as it stands before -ed and -ing: amaz(e), stun(n), trust."""
    if stem.endswith("ee") or stem.endswith("oe") or stem.endswith("ye"):
        return stem
    if stem.endswith("e"):
        return stem[:-1]
    if stem.endswith("ic"):
        return stem + "k"
    one_syllable = re.fullmatch(r"[^aeiou]*(?:qu)?[aeiou][^aeiouwxy]", stem)
    if one_syllable or stem in _DOUBLES:
        return stem + stem[-1]
    return stem


def _adjective(word: str) -> list[str]:
    forms = [adverb(word), *_quality(word), plural(word)]
    if _is_plain(word) or (word.endswith("ate") and len(word) > 5):
        forms += conjugation(word)
    elif word.endswith("ative"):
        forms += verb_forms(word[:-3] + "e")
    elif word.endswith(("ctive", "rtive", "ssive")):
        forms += verb_forms(word[:-3])
    elif word.endswith("al"):
        forms += conjugation(word + "ize")
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
        ("able", ("ability",)),
        ("ible", ("ibility",)),
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
    if word.endswith("y") and word[-2:-1] not in VOWELS:
        return len(word) < 9
    syllables = len(re.findall(r"[aeiouy]+", word if word.endswith("le") else word.removesuffix("e")))
    return syllables == 1 or (syllables == 2 and word.endswith(("le", "ow")))


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
