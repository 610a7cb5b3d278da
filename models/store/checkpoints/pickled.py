"""Reads pickles without running them: an interpreter that builds containers, numbers, text and placeholders, and calls nothing.

    bytes --Reader.load--> dict, list, tuple, str, int, float ... and, for names and calls in the pickle,
        NameAt("torch.float32")             a class or function by its name, never imported
        Thing("argparse.Namespace", ...)    the arguments, state and items of an object
        TensorAt(storage, offset, shape)    the place of the values of a tensor
        NumpyArrayAt(dtype, shape, data)    an array of NumPy

Time and memory are bounded by the size of the file and by MAX_STEPS.
"""

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from models.store.checkpoints.makers import MAKERS, dtype_name, key_of, modern, name_of, storage_of
from models.store.checkpoints.placeholders import NameAt, NumpyArrayAt, StorageAt, Thing, Unordered

MAX_STEPS = 5_000_000  # a step makes 64 bytes at most: 320 MB; an optimizer of 1,000 tensors takes 100,000
MARK = object()


class Unreadable(ValueError):
    """Bytes that are no pickle, are cut off, or would take too much time or memory."""


class Reader:
    """Reads consecutive pickles from an open file of `size` bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.steps = file, size, 0
        self.persistent: Callable[[Any], Any] = storage_of
        self.storages: list[StorageAt] = []

    def load(self) -> Any:
        """Returns the value of the next pickle. Raises Unreadable."""
        try:
            return self._run()
        except Unreadable:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, OverflowError) as error:
            raise Unreadable("the pickle is damaged") from error
        except RecursionError as error:
            raise Unreadable("the pickle is nested too deeply") from error

    def _run(self) -> Any:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        while True:
            code = self._read(1)
            self._spend(1)
            if code == b".":
                return self.stack.pop()
            step = STEPS.get(code)
            if step is None:
                raise Unreadable(f"the pickle has an unknown code {code!r}")
            step(self)

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Unreadable(f"its pickle takes more than {MAX_STEPS:,} steps")

    def _read(self, count: int) -> bytes:
        if count < 0 or (count > 4096 and count > self.size - self.file.tell()):
            raise Unreadable("the pickle is cut off")
        data = self.file.read(count)
        if len(data) != count:
            raise Unreadable("the pickle is cut off")
        return data

    def _line(self) -> bytes:
        line = self.file.readline(1 << 20)
        if not line.endswith(b"\n"):
            raise Unreadable("the pickle is cut off")
        return line[:-1]

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def _text(self, layout: str) -> str:
        data = self._read(self._number(layout))
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # of Python 2
            return data.decode("latin-1")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not MARK:
            place -= 1
            if place < 0:
                raise Unreadable("the pickle is damaged")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise Unreadable("the pickle is damaged")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Thing):
            target = target.elements
        if isinstance(target, list):
            target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Thing):
            target = target.pairs
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key_of(key)] = value

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, NameAt) else f"an instance of {name_of(function)}"
        made = MAKERS.get(modern(name))
        if made is None or not isinstance(arguments, tuple):
            self._push(Thing(name, arguments))
            return
        self._spend(
            sum(len(a) >> 3 for a in (arguments, *arguments) if isinstance(a, str | bytes | list | tuple | dict))
        )
        try:
            self._push(made(*arguments))
        except (TypeError, ValueError, AttributeError, LookupError):
            self._push(Thing(name, arguments))

    def _instance(self, items: list[Any]) -> None:
        self._push(items[0])
        self._push(tuple(items[1:]))
        self._reduce()

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, NumpyArrayAt) and isinstance(state, tuple) and len(state) == 5:
            _, target.shape, dtype, target.fortran, target.data = state
            target.dtype = dtype_name(dtype) or ""
        elif isinstance(target, Thing):
            target.state = state

    def _remember(self, place: int) -> None:
        if not 0 <= place <= MAX_STEPS:  # larger numbers could be chosen to have the same hash
            raise Unreadable("the pickle is damaged")
        self.memo[place] = self.stack[-1]

    def _bytes(self, layout: str) -> None:
        self._push(self._read(self._number(layout)))

    def _long(self, layout: str) -> None:
        self._push(int.from_bytes(self._read(self._number(layout)), "little", signed=True))

    def _integer(self) -> None:
        line = self._line()
        self._push(line == b"01" if line in (b"00", b"01") else int(line))

    def _global(self) -> None:
        module, name = self._line().decode("utf-8"), self._line().decode("utf-8")
        self._push(NameAt(f"{module}.{name}"))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push(NameAt(f"{module}.{name}"[:1000]) if isinstance(name, str) and isinstance(module, str) else None)

    def _persistent(self) -> None:
        value = self.persistent(self.stack.pop())
        if isinstance(value, StorageAt):
            self.storages.append(value)
        self._push(value)

    def _persistent_line(self) -> None:
        self._push(self._line())
        self._persistent()

    def _old_instance(self) -> None:
        self._global()
        self._instance([self.stack.pop(), *self._since_mark()])

    def _dict(self) -> None:
        items = self._since_mark()
        self._push({})
        self._set(items)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _quoted(self) -> None:
        self._push(self._line()[1:-1].decode("latin-1"))

    def _new_with_keywords(self) -> None:
        self.stack.pop()
        self._reduce()


STEPS: dict[bytes, Callable[[Reader], Any]] = {
    b"(": lambda r: r._push(MARK),
    b"0": lambda r: r.stack.pop(),
    b"1": lambda r: r._since_mark(),
    b"2": lambda r: r._push(r.stack[-1]),
    b"F": lambda r: r._push(float(r._line())),
    b"I": lambda r: r._integer(),
    b"L": lambda r: r._push(int(r._line().rstrip(b"L"))),
    b"J": lambda r: r._push(r._number("<i")),
    b"K": lambda r: r._push(r._number("<B")),
    b"M": lambda r: r._push(r._number("<H")),
    b"G": lambda r: r._push(r._number(">d")),
    b"N": lambda r: r._push(None),
    b"P": lambda r: r._persistent_line(),
    b"Q": lambda r: r._persistent(),
    b"R": lambda r: r._reduce(),
    b"\x81": lambda r: r._reduce(),
    b"\x92": lambda r: r._new_with_keywords(),
    b"i": lambda r: r._old_instance(),
    b"o": lambda r: r._instance(r._since_mark()),
    b"b": lambda r: r._build(),
    b"c": lambda r: r._global(),
    b"\x93": lambda r: r._stack_global(),
    b"S": lambda r: r._quoted(),
    b"T": lambda r: r._push(r._text("<i")),
    b"U": lambda r: r._push(r._text("<B")),
    b"V": lambda r: r._push(r._line().decode("raw-unicode-escape")),
    b"X": lambda r: r._push(r._text("<I")),
    b"\x8c": lambda r: r._push(r._text("<B")),
    b"\x8d": lambda r: r._push(r._text("<Q")),
    b"B": lambda r: r._bytes("<I"),
    b"C": lambda r: r._bytes("<B"),
    b"\x8e": lambda r: r._bytes("<Q"),
    b"\x96": lambda r: r._bytes("<Q"),
    b"\x8a": lambda r: r._long("<B"),
    b"\x8b": lambda r: r._long("<I"),
    b"}": lambda r: r._push({}),
    b"]": lambda r: r._push([]),
    b"\x8f": lambda r: r._push(Unordered()),
    b")": lambda r: r._push(()),
    b"d": lambda r: r._dict(),
    b"l": lambda r: r._push(r._since_mark()),
    b"\x91": lambda r: r._push(Unordered(r._since_mark())),
    b"t": lambda r: r._push(tuple(r._since_mark())),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    b"a": lambda r: r._extend([r.stack.pop()]),
    b"e": lambda r: r._extend(r._since_mark()),
    b"\x90": lambda r: r._extend(r._since_mark()),
    b"s": lambda r: r._set_one(),
    b"u": lambda r: r._set(r._since_mark()),
    b"g": lambda r: r._push(r.memo[int(r._line())]),
    b"h": lambda r: r._push(r.memo[r._number("<B")]),
    b"j": lambda r: r._push(r.memo[r._number("<I")]),
    b"p": lambda r: r._remember(int(r._line())),
    b"q": lambda r: r._remember(r._number("<B")),
    b"r": lambda r: r._remember(r._number("<I")),
    b"\x94": lambda r: r._remember(len(r.memo)),
    b"\x80": lambda r: r._read(1),
    b"\x95": lambda r: r._read(8),
}
