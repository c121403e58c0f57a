"""Wheel folders: the official lookup rules on small folders written out here, the shipped wheels, and bad folders."""

import csv
import pathlib
import sys

import openpyxl
import pytest

from mer_r1_jax.emotion.wheels import WheelError, load_wheels

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # for tools/, which is not installed

from tools.wheels import coverage, inflection, lexicon  # noqa: E402

SHIPPED = load_wheels()

FAMILIES = {  # words that must stay apart on wheels 1, 2 and 4, and together within a line on every wheel
    "happy": ("happy", "joyful", "cheerful", "delighted", "joy"),
    "sad": ("sad", "unhappy", "sorrowful", "miserable", "sadness"),
    "angry": ("angry", "furious", "annoyed", "irritated", "anger"),
    "afraid": ("afraid", "scared", "anxious", "worried", "fear"),
    "surprised": ("surprised", "astonished", "amazed", "surprise"),
    "disgusted": ("disgusted", "revolted", "disgust"),
    "loving": ("loving", "affectionate", "love", "tender"),
    "proud": ("proud", "confident", "pride"),
    "ashamed": ("ashamed", "guilty", "embarrassed", "shame"),
}


def write_csv(path: pathlib.Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_xlsx(path: pathlib.Path, rows: list[list[str]]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append([cell or None for cell in row])
    book.save(path)


WHEEL = [
    ["level1", "level2", "level3"],
    [" Glad ", "Merry", "Jolly"],
    ["", "", "Amused"],
    ["", "Calm", "At Ease"],
    ["Low", "Blue", "Jolly"],  # recurs: the later place wins
    ["Glad", "Bright", "Sunny"],  # goes on with the first branch
]
SYNONYMS = [
    ["word_run1", "synonym_run1", "word_run2", "synonym_run2"],
    ["Merry", "chirpy, gleeful", "merry", "zesty"],
    ["Blue", "glum", "blue", "zesty, zippy"],
    ["Sunny", "", "sunny", "zippy"],
    ["Off wheel", "adrift", "aaa", "gleeful"],
    ["Glad", "", "glad", ""],
]
FORMS = [
    ["name", "format"],
    ["merry", "merry,merrily"],
    ["chirpy", "chirpier,chirpy"],
    ["zesty", "zest"],
    ["zippy", "zip, zest"],
    ["glum", "glumly"],
    ["gleeful", "glee"],
    ["jolly", "jolly"],
    ["adrift", "drift"],
    ["glad", "gladly"],
]


@pytest.fixture(params=["csv", "xlsx"])
def folder(request, tmp_path):
    write = write_csv if request.param == "csv" else write_xlsx
    for k in range(1, 6):
        write(tmp_path / f"wheel{k}.{request.param}", WHEEL)
    write(tmp_path / f"synonym.{request.param}", SYNONYMS)
    write(tmp_path / f"format.{request.param}", FORMS)
    write_csv(tmp_path / "mer2026" / "format.csv", [["name", "format"], ["merry", "merry,zest"]])
    return tmp_path


def test_lookup_rules_by_hand(folder):
    wheels = load_wheels(folder)
    assert wheels.groups(0) == ("glad", "low")
    assert wheels.category(" Merrily ", 0) == "glad"
    assert wheels.category("chirpier", 0) == "glad"
    assert wheels.category("glee", 0) == "glad", "'aaa' comes first but is not on the wheel; then 'merry'"
    assert wheels.category("zest", 0) == "low", "blue < merry < sunny: the first of the union over both base words"
    assert wheels.category("zip", 0) == "low", "blue < sunny"
    assert wheels.category("glumly", 0) == "low"
    assert wheels.category("drift", 0) is None, "its only wheel word is on no wheel"
    assert wheels.category("amused", 0) is None, "a wheel word without forms is not in the vocabulary"
    assert wheels.categories(["zest", "merry", "nothing"], 0) == {"low", "glad"}
    assert wheels.forms(0)["glad"] == (
        "chirpier", "chirpy", "glad", "gladly", "glee", "gleeful", "merrily", "merry"
    )  # fmt: skip


def test_second_level_and_single_valued_lookups(folder):
    wheels = load_wheels(folder)
    assert wheels.category("merry", 0, level=2) == "merry"
    assert wheels.category("zest", 0, level=2) == "blue"
    assert wheels.category("gladly", 0, level=2) == "bright", "a core word: the alphabetically first branch"
    assert wheels.base_words["zest"][0] == "zesty" and wheels.wheel_words["zesty"][0] == "blue"
    assert "nothing" not in wheels.base_words


def test_later_place_of_a_repeated_word_wins(folder):
    write_csv_or = write_csv if (folder / "synonym.csv").exists() else write_xlsx
    suffix = "csv" if (folder / "synonym.csv").exists() else "xlsx"
    write_csv_or(folder / f"synonym.{suffix}", [["word_run1", "synonym_run1"], ["jolly", "zippy"]])
    wheels = load_wheels(folder)
    assert wheels.category("jolly", 0) == "low" and wheels.category("jolly", 0, level=2) == "blue"


def test_variant_reads_its_own_forms(folder):
    assert load_wheels(folder, "mer2026").category("zest", 0) == "glad"
    assert load_wheels(folder, "mer2026").category("zip", 0) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "wheel3.csv").unlink(), "wheel3.csv or .xlsx is missing"),
        (lambda folder: write_csv(folder / "wheel2.csv", [["level1", "level2"], ["a", "b"]]), "no column level3"),
        (lambda folder: write_csv(folder / "wheel2.csv", [WHEEL[0], ["", "b", "c"]]), "row 2: level1 is"),
        (lambda folder: write_csv(folder / "wheel2.csv", WHEEL[:1]), "no row below the header"),
        (lambda folder: (folder / "wheel2.csv").write_text(""), "no column level1"),
        (lambda folder: write_csv(folder / "synonym.csv", [["word", "synonym"], ["a", "b"]]), "no column word_run1"),
        (lambda folder: write_csv(folder / "synonym.csv", [["word_run1"], ["a"]]), "no column synonym_run1"),
        (lambda folder: write_csv(folder / "format.csv", [["name", "format"], ["", "b"]]), "row 2: the column 'name'"),
        (lambda folder: (folder / "format.xlsx").write_bytes(b"x"), "both exist"),
        (lambda folder: (folder / "format.csv").write_bytes(b"\xff\xfe\x00name"), "cannot be read as csv"),
        (lambda folder: (folder / "format.csv").rename(folder / "format.xlsx"), "cannot be read as xlsx"),
    ],
)
def test_bad_wheel_folder_names_file_and_remedy(tmp_path, damage, message):
    for k in range(1, 6):
        write_csv(tmp_path / f"wheel{k}.csv", WHEEL)
    write_csv(tmp_path / "synonym.csv", SYNONYMS)
    write_csv(tmp_path / "format.csv", FORMS)
    load_wheels(tmp_path)
    damage(tmp_path)
    with pytest.raises(WheelError, match=message) as error:
        load_wheels(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_unknown_variant_and_missing_folder(tmp_path):
    with pytest.raises(WheelError, match="expected one of unibench, mer2026"):
        load_wheels(variant="mer2025")
    with pytest.raises(WheelError, match="no such folder"):
        load_wheels(tmp_path / "none")
    with pytest.raises(WheelError, match="missing"):
        load_wheels(tmp_path)


def test_shipped_tables_are_what_the_lexicon_makes():
    tables = lexicon.build_tables(lexicon.read_lexicon(lexicon.LEXICON))
    assert len(tables) == 7
    for name, rows in tables.items():
        with open(lexicon.TABLES / name, encoding="utf-8", newline="") as file:
            assert list(csv.reader(file)) == rows, f"{name} is stale: run python -m tools.wheels.lexicon"


def test_shipped_families_stay_together_and_apart():
    for wheel in range(5):
        for words in FAMILIES.values():
            found = {SHIPPED.category(word, wheel) for word in words} - {None}
            # Wheel 2 knows embarrassment as submission, wheel 5 as not in control; shame is apart from both.
            allowed = 2 if words[0] == "ashamed" and wheel in (1, 4) else 1
            assert 1 <= len(found) <= allowed, (wheel, words, found)
    for wheel in (0, 1, 3):
        first = [SHIPPED.category(words[0], wheel) for words in FAMILIES.values()]
        assert len(set(first)) == len(FAMILIES) and None not in first, (wheel, first)


def test_no_shipped_word_has_two_categories_on_a_wheel():
    """First match must not matter: every wheel word of a form leads to the same category."""
    for wheel in range(5):
        place = SHIPPED.levels[0][wheel]
        for form, bases in SHIPPED.base_words.items():
            words = {word for base in bases for word in SHIPPED.wheel_words.get(base, ())}
            assert len({place[word] for word in words if word in place}) <= 1, (wheel, form, words)


@pytest.mark.parametrize("word", ["neutral", "happy.", "xyzzy", "", "生气", "fearlessly happy"])
def test_words_without_category(word):
    assert not SHIPPED.is_known(word)


@pytest.mark.parametrize(
    ("word", "other"), [("fear", "fearless"), ("hope", "hopeless"), ("joy", "joyless"), ("care", "careless")]
)
def test_opposites_are_no_forms(word, other):
    assert SHIPPED.category(word, 0) != SHIPPED.category(other, 0)


@pytest.mark.parametrize(
    ("word", "part", "stem", "expected"),
    [
        ("happy", "adj", None, {"happily", "happiness", "happier", "happiest"}),
        ("amazed", "adj", "amaze", {"amaze", "amazes", "amazing", "amazingly", "amazedly"}),
        ("worried", "adj", "worry", {"worry", "worries", "worrying", "worrier"}),
        ("stunned", "adj", "stun", {"stun", "stunning"}),
        ("fulfilled", "adj", "fulfil", {"fulfilling", "fulfils"}),
        ("panicked", "adj", "panic", {"panicking"}),
        ("frustrated", "adj", "frustrate", {"frustration", "frustrating"}),
        ("hurt", "verb", None, {"hurts", "hurting"}),
        ("withdraw", "verb", None, {"withdrew", "withdrawn", "withdrawing"}),
        ("pity", "noun", None, {"pities"}),
        ("fear", "noun", None, {"fears", "fearful", "fearing"}),
        ("sympathetic", "adj", None, {"sympathetically"}),
        ("humble", "adj", None, {"humbly"}),
        ("turned away", "phrase", "turn", {"turn away", "turning away", "turns away"}),
        ("let down", "phrase", None, set()),
    ],
)
def test_inflections_by_rule(word, part, stem, expected):
    found = inflection.inflections(word, part, stem)
    assert found[0] == word and len(found) == len(set(found))
    assert expected <= set(found)
    if part == "phrase" and stem is None:
        assert found == [word]


def test_unknown_part_of_speech_is_refused():
    with pytest.raises(ValueError, match="expected one of adj"):
        inflection.inflections("happy", "adverb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nat: x/y | x/y\nadj: *glad\n", "five places"),
        ("[a]\nat: x/y | x/y | - | x/y | x/y\nadj: glad\n", "no wheel word"),
        ("[a]\nat: - | - | - | - | -\nadj: *glad, glad\n", "stands in .a. already"),
        ("[a]\nplace: - | - | - | - | -\n", "line 2: got"),
    ],
)
def test_lexicon_mistakes_name_the_line(tmp_path, text, message):
    path = tmp_path / "lexicon.txt"
    path.write_text(text)
    with pytest.raises(lexicon.LexiconError, match=message):
        lexicon.read_lexicon(path)


def test_coverage_counts_words_without_a_category_of_ours(tmp_path, monkeypatch, capsys):
    for table in lexicon.TABLES.glob("*.csv"):
        (tmp_path / table.name).write_bytes(table.read_bytes())
    with open(tmp_path / "format.csv", "a", encoding="utf-8") as file:
        file.write("glorped,glorped\n")
    with open(tmp_path / "synonym.csv", "a", encoding="utf-8") as file:
        file.write("glorped,\n")
    monkeypatch.setattr("sys.argv", ["coverage", str(tmp_path)])
    coverage.main()
    wheel_words, base_words, forms = capsys.readouterr().out.splitlines()
    assert all(line.endswith("missing: glorped") for line in (wheel_words, base_words, forms))
