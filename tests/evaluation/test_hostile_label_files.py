"""Label files made to read memory, to fill it, or to end somewhere else than in a message."""

import ctypes
import io
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
from support.commands import run_command

from mer_r1_jax.evaluation.benchmarks.pickled_labels import convert, read_corpora
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError

SECRET = "known only to " + "this process"
_EIGHT = struct.pack("<Q", id(SECRET))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def kind(code: str, *state: bytes) -> bytes:
    """A numpy type, and its state if there is one."""
    made = called(named("numpy", "dtype"), text(code), b"I00\nI01\n")
    return made + b"(" + b"".join(state) + b"tb" if state else made


def with_fields(field: bytes, offset: int = 0, size: int = 8) -> bytes:
    """A type of eight bytes whose state claims a field."""
    names = b"(" + text("a") + b"t"
    fields = b"}" + text("a") + b"(" + field + number(offset) + b"ts"
    return kind("V8", number(3), text("|"), b"N", names, fields, number(size), number(1), number(0))


def scalar(of: bytes, content: bytes, core: str = "_core") -> bytes:
    return called(named(f"numpy.{core}.multiarray", "scalar"), of, raw(content))


def array(of: bytes, content: bytes, shape: bytes = b"(t") -> bytes:
    made = called(
        named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"(" + number(0) + b"t", raw(b"b")
    )
    return made + b"(" + number(1) + shape + of + b"I00\n" + content + b"tb"


def label(value: bytes) -> bytes:
    """A whole pickle: {"clip": {"emo": value}}."""
    return b"}" + text("clip") + b"}" + text("emo") + value + b"ss."


def npz(path, *pickles: bytes, header: bytes | None = None):
    """An npz of object arrays with these pickles."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for position, content in enumerate(pickles):
            archive.writestr(f"corpus{position}.npy", (header or buffer.getvalue()) + content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        label(scalar(with_fields(kind("O8")), _EIGHT)),
        label(scalar(with_fields(kind("S4096")), _EIGHT)),
        label(scalar(with_fields(kind("S64"), offset=1 << 30), _EIGHT)),
        label(array(with_fields(kind("O8")), raw(_EIGHT))),
        label(scalar(kind("O8"), _EIGHT)),
        label(array(kind("O8"), raw(_EIGHT))),
        label(scalar(kind("S8", number(3), text("|"), *b"NNN".split(), number(1 << 20), number(1), number(0)), _EIGHT)),
        label(scalar(kind("S4096"), _EIGHT)),
        label(scalar(kind("M8[s]"), _EIGHT)),
        label(array(kind("S1"), raw(_EIGHT))),
        b"}" + text("clip") + b"}" + scalar(with_fields(kind("O8")), _EIGHT) + text("v") + b"ss.",
    ],
)
def test_no_address_in_a_file_is_followed(tmp_path, content):
    path = npz(tmp_path / "label.npz", content)
    assert run_command("convert_labels", f"--labels={path}") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["label.npz"]
    assert ctypes.cast(id(SECRET), ctypes.py_object).value is SECRET  # the address was a good one


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x02(" + text("a") + b"t" + b"2\x86" * 40 + b".", "DUP"),
        (
            b"\x80\x04" + text("a") + b"\x94" + b"h\x00h\x00\x86\x94" + b"h\x01h\x01\x86\x94h\x02h\x02\x86.",
            "three deep",
        ),
        (b"\x80\x04}" + text("c") + b"}" + b"N\x85" + text("v") + b"ss.", "key is a tuple"),
        (b"]" * 200_000 + b"a" * 199_999 + b".", "opens more than"),
        (b"(" * 200_000 + b".", "opens more than"),
        (b"]" + b"N\x85" + b"\x85" * 200_000 + b".", "three deep"),
        (b"]" + b"(e" * 1_100_000 + b".", "more than 2000000 steps"),
        (b"}" + text("a") + b"r" + struct.pack("<I", 1 << 30) + b"0.", "keeps more than"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.", "truncated or damaged"),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "truncated or damaged"),
        (label(b"\x8b" + struct.pack("<i", 4000) + b"\x01" * 4000), "beyond 64 bits"),
        (label(b"L" + b"9" * 10_000 + b"L\n"), "truncated or damaged"),
        (label(array(kind("i8"), raw(bytes(8)), b"(" + number(1 << 30) + b"t")), "an array of 1073741824 elements"),
        (label(array(kind("i8"), raw(bytes(8)), b"(" + number(-1) + b"t")), "a form that numpy does not write"),
        (label(b"N")[:-1] + b".}.", "2 bytes follow"),
        (b"}" + text("clip") + b".", "leaves 2 values"),
        (b"}(" + (text("clip") + b"}") * 2 + b"u.", "twice"),
        (b"Pevil\n.", "PERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (
            b"\x80\x04" + text("numpy") + text("dtype.__class__.__subclasses__") + b"\x93.",
            "names numpy.dtype.__class__",
        ),
        (called(named("numpy", "dtype"), text("O8, (2,)i8")) + b".", "array of type"),
        (label(b"U\x02\xe4\xbd"), "got bytes, expected text"),
    ],
)
def test_a_pickle_that_grows_without_end_or_says_nothing_ends_with_a_message(tmp_path, content, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BenchmarkError, match=message) as refused:
        convert(npz(tmp_path / "label.npz", content))
    assert len(str(refused.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_archives_that_are_bombs_or_hold_other_things_end_with_a_message(tmp_path):
    described = b"{'descr': %s, 'fortran_order': False, 'shape': (), }"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 80)
    body = pickle.dumps({"clip": {"emo": "sad"}}, protocol=4)
    good = head + (described % b"'|O'").ljust(80) + body
    numbers = head + (described % b"'<i8'").ljust(80) + body
    fields = head + (described % b"[('a', '|O')]").ljust(80) + body

    def archive(name, members, compression=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            for member, content in members:
                file.writestr(member, content)
        return tmp_path / name

    def lying(name, size):
        """Its index says another size than there is."""
        path = archive(name, [("test.npy", good)])
        content = path.read_bytes()
        path.write_bytes(content.replace(struct.pack("<I", len(good)), struct.pack("<I", size)))
        return path

    inner = archive("inner.zip", [("test.npy", good)]).read_bytes()
    locked = archive("locked.npz", [("test.npy", good)])
    content = bytearray(locked.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    locked.write_bytes(content)
    sparse = tmp_path / "large.npz"
    with open(sparse, "wb") as file:
        file.truncate(1 << 40)
    with pytest.warns(UserWarning, match="Duplicate name"):
        doubled = archive("doubled.npz", [("test.npy", good), ("test.npy", good)])
    for path, message in (
        (
            archive("large.zip", [(f"{n}.npy", bytes(10 << 20)) for n in range(7)]),
            "unpacks to .* bytes, expected at most",
        ),
        (archive("many.npz", [(f"{n}.npy", good) for n in range(65)]), "holds 65 files, expected"),
        (archive("nested.npz", [("test.npy", good), ("inner.zip", inner)]), "inner.zip, which is no array"),
        (archive("disguised.npz", [("inner.npy", inner)]), "cannot be read"),
        (archive("lzma.npz", [("test.npy", good)], zipfile.ZIP_LZMA), "packed in a way numpy does not use"),
        (locked, "packed in a way numpy does not use"),
        (doubled, "two files of one name"),
        (lying("short.npz", len(good) - 3), "cannot be read"),
        (lying("long.npz", 50 << 20), "cannot be read"),
        (archive("escapes.npz", [("\x1b[2Jtest.npy", good)]), r"\\x1b\[2Jtest holds characters"),
        (archive("empty.npz", []), "holds no array"),
        (sparse, "1099511627776 bytes, expected a label file"),
        (tmp_path, "no such file"),
        (archive("numbers.npz", [("test.npy", numbers)]), "an array of numbers"),
        (archive("fields.npz", [("test.npy", fields)]), "an array of numbers"),
        (archive("header.npz", [("test.npy", good.replace(head, head[:-2] + b"\xff\xff"))]), "a header of 65535"),
    ):
        with pytest.raises(BenchmarkError, match=message) as refused:
            convert(path)
        assert "\x1b" not in str(refused.value)
    slip = archive("slip.npz", [("../../outside.npy", good)])  # a name only: nothing is unpacked to disk
    assert list(read_corpora(slip)) == ["../../outside"] and not (tmp_path.parent.parent / "outside.npy").exists()


@pytest.mark.parametrize(
    "corpus, message",
    [
        ({"clip": {"emo": '=HYPERLINK("http://a.example","x")'}}, "run as a formula"),
        ({"=1+1": {"emo": "sad"}}, "run as a formula"),
        ({"-2+3+cmd|' /C calc'!A0": {"emo": "sad"}}, "run as a formula"),
        ({"clip": {" @SUM(1)": "sad"}}, "run as a formula"),
        ({"clip\x1b[2J": {"emo": "sad"}}, r"clip\\x1b\[2J holds characters"),
        ({"clip": {"emo": "sad\ud83d"}}, r"sad\\ud83d holds characters"),
        ({"clip": {"name": "other"}}, "called name, which is a column"),
        ({"clip": {"emo": "sad", "split": "x"}}, "called split, which is a column"),
        ({"clip": {"emo": None}}, "got NoneType, expected text or a number"),
        ({"clip": {"emo": np.arange(3)}}, "an array of 3 elements"),
        ({"clip": {"emo": {"a": 1}}}, "got dict, expected text"),
        ({3: {"emo": "sad"}}, "expected text"),
    ],
)
def test_names_and_labels_that_no_table_may_hold_are_named(tmp_path, corpus, message):
    np.savez(tmp_path / "label.npz", test_corpus=corpus)
    with pytest.raises(BenchmarkError, match=message):
        convert(tmp_path / "label.npz")


def test_what_numpy_writes_for_labels_is_read_in_every_protocol(tmp_path):
    values = {
        "text": np.str_("愤怒 and joy"),
        "empty": "",
        "bytes": np.bytes_(b"sad"),
        "single": np.float32(-0.5),
        "half": np.float16(0.25),
        "swapped": np.array(1.25, ">f8"),
        "small": np.int8(-3),
        "large": np.uint64(2**64 - 1),
        "yes": np.bool_(True),
        "one": np.array(["worried"]),
        "object": np.array([0.125], object),
        "-3g5yACwYnA_10": -7,  # a name of CMU-MOSI's
    }
    expected = {
        **{"text": "愤怒 and joy", "empty": "", "bytes": "sad", "single": -0.5, "half": 0.25, "swapped": 1.25},
        **{"small": -3, "large": 2**64 - 1, "yes": True, "one": "worried", "object": 0.125, "-3g5yACwYnA_10": -7},
    }
    corpus = np.array({f"-clip{n}": values for n in range(1001)})  # more than one batch of pickle's
    for protocol in range(5):
        content = pickle.dumps(corpus, protocol=protocol)
        for names in (content, content.replace(b"numpy._core.", b"numpy.core.") if protocol < 4 else content):
            read = read_corpora(npz(tmp_path / "label.npz", names))["corpus0"]
            assert len(read) == 1001 and read["-clip0"] == expected == read["-clip1000"]
            assert {name: type(value) for name, value in read["-clip7"].items()} == {
                name: type(value) for name, value in expected.items()
            }
