"""A Python pickle read as data: nothing it names is called, looked up or built.

A pickle is a program for a stack machine, and Python's own reader calls what the program names and lets it set the
state of what came out; numpy then believes a type that the file describes, even one that takes eight bytes of the file
for the address of an object. Here the standard library splits the program into its steps, and a machine of our own
knows the few that a dictionary of numbers and texts is made of. Numpy's arrays and scalars are known by name only:
their bytes are decoded by a table of type codes below.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError
from mer_r1_jax.foreign_text import printable

MAX_STEPS = 2_000_000  # of the program; the largest official file has some 200,000
MAX_OPEN = 100_000  # values that wait on the stack, and so the depth of what is open; pickles are written in batches
MAX_KEPT = 1_000_000  # values kept for later use
_LARGEST_INT = 1 << 64
_QUOTED = 80  # characters of a name in a message

_NUMBERS = {  # numpy's code of a type -> struct's
    **{"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q"},
    **{"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "f2": "e", "f4": "f", "f8": "d"},
}
_DTYPE, _RECONSTRUCT, _SCALAR, _ENCODE, _NDARRAY = "dtype", "_reconstruct", "scalar", "encode", "ndarray"
_NAMES = {  # until numpy 1, and since numpy 2; the bytes of pickles of Python 2's protocols go through _codecs.encode
    **{("numpy", name): name for name in (_DTYPE, _NDARRAY)},
    **{(f"numpy.{core}.multiarray", name): name for core in ("core", "_core") for name in (_RECONSTRUCT, _SCALAR)},
    ("_codecs", "encode"): _ENCODE,
}


class UnsafePickle(BenchmarkError):
    """A pickle that holds something label files have no use for. Nothing of it was run."""


class Array:
    """An array's place in the pickle.

    Attributes:
        content: its element, if it has exactly one.
        size: its elements; None until the pickle has said.
    """

    content: Any = None
    size: int | None = None


class _Named(NamedTuple):
    """One of the names above."""

    name: str


class _Type:
    """A numpy type by its code; `order` is struct's for the order of bytes."""

    def __init__(self, code: str):
        self.code, self.order = code, "<"


def load(content: bytes) -> Any:
    """The value of a pickle: texts, numbers, bytes, None, lists, tuples, dictionaries, and `Array`.

    Raises:
        UnsafePickle: it names or does anything else, or more than a label file has.
        ValueError: it is damaged.
    """
    machine = _Machine()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        assert position is not None  # genops knows where it is in bytes
        if opcode.name == "STOP":
            if position + 1 != len(content):
                raise UnsafePickle(f"{len(content) - position - 1} bytes follow its pickle's end, expected none")
            return machine.result()
        if count >= MAX_STEPS:
            raise UnsafePickle(f"its pickle has more than {MAX_STEPS} steps, expected a label file's; not read further")
        machine.step(opcode.name, argument)
    raise ValueError("the pickle is truncated")


class _Machine:
    """The stack, what waits below marks, and what is kept for later."""

    def __init__(self):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._kept: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Does one step."""
        if name in _IGNORED:
            return
        if name in _PUSHED:
            self._push(_plain(name, argument))
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise UnsafePickle(f"its pickle uses the step {name}, which no label file needs; nothing was run")

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError(f"the pickle leaves {len(self._stack)} values, expected one")
        return self._stack[0]

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))
        self._check_open()

    def tuple_of_marked(self, _: Any) -> None:
        self._push(_shallow(tuple(self._marked())))

    def tuple_of(self, count: int) -> None:
        self._push(_shallow(tuple(self._popped(count))))

    def list_of_marked(self, _: Any) -> None:
        self._push(self._marked())

    def dict_of_marked(self, _: Any) -> None:
        items = self._marked()
        self._push({})
        self._put(items)

    def append(self, _: Any) -> None:
        self._extend(self._popped(1))

    def append_marked(self, _: Any) -> None:
        self._extend(self._marked())

    def set_item(self, _: Any) -> None:
        self._put(self._popped(2))

    def set_marked(self, _: Any) -> None:
        self._put(self._marked())

    def keep(self, index: int | None) -> None:
        index = len(self._kept) if index is None else int(index)
        if not 0 <= index < MAX_KEPT:
            raise UnsafePickle(f"its pickle keeps more than {MAX_KEPT} values, expected a label file's")
        self._kept[index] = self._top()

    def recall(self, index: int) -> None:
        if int(index) not in self._kept:
            raise ValueError(f"the pickle recalls value {index}, which it has not kept")
        self._push(self._kept[int(index)])

    def name(self, argument: str) -> None:
        """A name as `module name`."""
        self._push(_known(*argument.split(" ", 1)))

    def name_from_stack(self, _: Any) -> None:
        self._push(_known(*self._popped(2)))

    def call(self, _: Any) -> None:
        """What numpy's own functions would have made of these arguments."""
        called, arguments = self._popped(2)
        if not isinstance(called, _Named) or called.name not in _CALLS or not isinstance(arguments, tuple):
            raise UnsafePickle("its pickle calls something that makes no array, number or text; nothing was run")
        self._push(_CALLS[called.name](arguments))

    def build(self, _: Any) -> None:
        """Fills an array, or tells a type's order of bytes."""
        state = self._popped(1)[0]
        target = self._top()
        if isinstance(target, Array):
            _fill(target, state)
        elif isinstance(target, _Type):
            _set_order(target, state)
        else:
            raise UnsafePickle("its pickle sets the state of something that is no array; nothing was run")

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError("the pickle appends to what is no list")
        target.extend(values)

    def _put(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("the pickle sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # a tuple's hash can take for ever
                raise UnsafePickle(f"a dictionary's key is a {type(key).__name__}, expected text")
            if key in target:
                raise UnsafePickle(f"a dictionary names {printable(key, _QUOTED)!r} twice, expected it once")
            target[key] = value

    def _top(self) -> Any:
        if not self._stack:
            raise ValueError("the pickle takes a value where there is none")
        return self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)
        self._check_open()

    def _check_open(self) -> None:
        if len(self._stack) > MAX_OPEN or len(self._marks) > MAX_OPEN:
            raise UnsafePickle(f"its pickle opens more than {MAX_OPEN} values at once, expected a label file's")

    def _popped(self, count: int) -> list[Any]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise ValueError("the pickle takes a value where there is none")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        if not self._marks:
            raise ValueError("the pickle takes a mark where there is none")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values


_IGNORED = frozenset(("PROTO", "FRAME"))
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_WHOLE = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_PUSHED = frozenset((*_TEXTS, *_BYTES, *_WHOLE, "FLOAT", "BINFLOAT"))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.list_of_marked,
    "DICT": _Machine.dict_of_marked,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_marked,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_marked,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.keep),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def _plain(name: str, value: Any) -> Any:
    """A number, text or bytes as the step holds it, but for numbers that cannot be written.

    Python 2 wrote texts and bytes alike, which are told apart by their letters here.
    """
    if isinstance(value, str) and name in ("BINSTRING", "SHORT_BINSTRING") and not value.isascii():
        return value.encode("latin-1")
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise UnsafePickle("it holds a whole number beyond 64 bits, expected a label")
    return value


def _shallow(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tuple, which may hold a shape at most: tuples within tuples grow without a limit."""
    if any(isinstance(inner, tuple) and any(isinstance(one, tuple) for one in inner) for inner in values):
        raise UnsafePickle("its pickle holds tuples three deep, expected an array's state at most")
    return values


def _known(module: Any, name: Any) -> _Named:
    key = (module, name)
    if not (isinstance(module, str) and isinstance(name, str) and key in _NAMES):
        raise UnsafePickle(
            f"its pickle names {printable(f'{_text(module)}.{_text(name)}', _QUOTED)}; a label file needs numpy's "
            "arrays and numbers and plain containers only. Nothing was run. Do not open this file by other means; get "
            "it from its publisher again"
        )
    return _Named(_NAMES[key])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"a {type(value).__name__}"


def _type_of(arguments: tuple[Any, ...]) -> _Type:
    code = arguments[0] if arguments else None
    if isinstance(code, str) and (code in _NUMBERS or code in ("O", "O8") or _width(code) is not None):
        return _Type(code)
    raise UnsafePickle(
        f"its pickle holds an array of type {printable(_text(code), _QUOTED)}, expected numbers or text. Nothing was "
        "run"
    )


def _width(code: str) -> int | None:
    """Bytes of an element of text, "U12" or "S12"; None for another code."""
    kind, count = code[:1], code[1:]
    if kind not in ("U", "S") or not (count.isascii() and count.isdigit() and len(count) <= 8):
        return None
    return int(count) * (4 if kind == "U" else 1)


def _set_order(target: _Type, state: Any) -> None:
    """Takes the order of bytes from a type's state; the rest of it must say nothing new."""
    if not (
        isinstance(state, tuple)
        and len(state) == 8
        and isinstance(state[1], str)
        and state[1] in ("<", ">", "|", "=")
        and all(part is None for part in state[2:5])
        and state[5] in (-1, _width(target.code))
    ):
        raise UnsafePickle("its pickle describes a type of its own making, expected numbers or text")
    target.order = ">" if state[1] == ">" else "<"


def _decoded(kind: _Type, content: Any) -> str | int | float | bool:
    """One number or text from its bytes."""
    width = _width(kind.code)
    layout = None if width is not None else _NUMBERS.get(kind.code)
    if layout is not None:
        width = struct.calcsize(f"{kind.order}{layout}")
    if isinstance(content, str):  # bytes as Python 2 wrote them
        content = content.encode("latin-1")
    if width is None or not isinstance(content, bytes) or len(content) != width:
        raise UnsafePickle(
            "its pickle holds a number or text of numpy's in more or fewer bytes than its type has; nothing was run"
        )
    if layout is not None:
        return struct.unpack(f"{kind.order}{layout}", content)[0]
    encoding = "ascii" if kind.code.startswith("S") else "utf-32-be" if kind.order == ">" else "utf-32-le"
    return content.decode(encoding).rstrip("\0")


def _scalar(arguments: tuple[Any, ...]) -> str | int | float | bool:
    if len(arguments) != 2 or not isinstance(arguments[0], _Type):
        raise UnsafePickle("its pickle holds a numpy scalar that is neither number nor text; nothing was run")
    return _decoded(*arguments)


def _encoded(arguments: tuple[Any, ...]) -> bytes:
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        raise UnsafePickle("its pickle encodes something other than bytes; nothing was run")
    return arguments[0].encode("latin-1")


def _fill(target: Array, state: Any) -> None:
    """An array's element from its state: version, shape, type, order, and bytes, or a list where it holds objects."""
    if not (
        isinstance(state, tuple)
        and len(state) == 5
        and isinstance(state[1], tuple)
        and all(isinstance(length, int) and length >= 0 for length in state[1])
        and isinstance(state[2], _Type)
    ):
        raise UnsafePickle("its pickle holds an array in a form that numpy does not write; nothing was run")
    _, shape, kind, _, content = state
    target.size = math.prod(shape)
    if kind.code.startswith("O"):
        if not isinstance(content, list) or len(content) != target.size:
            raise UnsafePickle("its pickle holds an array of objects without a list of them; nothing was run")
        target.content = content[0] if target.size == 1 else None
    elif target.size == 1:
        target.content = _decoded(kind, content)


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    _DTYPE: _type_of,
    _RECONSTRUCT: lambda arguments: Array(),
    _SCALAR: _scalar,
    _ENCODE: _encoded,
}
