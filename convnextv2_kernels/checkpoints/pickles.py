"""Pickles read without running anything, within bounds on what they cost.

The unpickler of Python calls what a file names; the restricted one of torch.load calls a few functions with whatever
arguments the file gives, and both follow any number of instructions. Here an instruction builds plain values, or calls
a :class:`Constructor` of :mod:`.objects`, which checks its arguments.
"""

from __future__ import annotations

import pickletools
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

# Far beyond real files: a training checkpoint of the largest published size takes about 50,000 instructions.
MAX_INSTRUCTIONS = 1_000_000
MAX_ITEMS = 10_000_000  # counted as often as they are reached
MAX_DEPTH = 64
MAX_COPIED_BYTES = 256 << 20  # by constructors, which a file may call with one large argument over and over
_MAX_INTEGER_BITS = 1024
_MAPPINGS = (dict, OrderedDict, Counter)


class Constructor:
    """What stands for a class or function that a pickle names: ``make(*arguments)`` is called in its place."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]):
        self.name = name
        self.make = make

    def __repr__(self) -> str:
        return f"<{self.name}>"


class StandIn:
    """An object of a class that is not built: it keeps nothing but the name of its ``kind``."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}, not read>"


def unpickle(stream: BinaryIO, find: Callable[[str], Any], persistent: Callable[[Any], Any]) -> Any:
    """The next value of a stream; the stream is left behind it.

    Args:
        find: the value of a name such as ``"collections.OrderedDict"``.
        persistent: the value of a reference to something outside the pickle.

    Raises:
        ValueError: a pickle that is damaged, uses what torch.save does not, or exceeds a bound.
    """
    machine = _Machine(find, persistent)
    for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_INSTRUCTIONS:
            raise ValueError(
                f"more than {MAX_INSTRUCTIONS} values beside the numbers of its tensors, the most that is read"
            )
        run = _INSTRUCTIONS.get(instruction.name)
        if run is None:
            raise ValueError(f"a pickle with the instruction {instruction.name}, which torch.save does not write")
        try:
            run(machine, argument)
        except (IndexError, KeyError):
            raise ValueError(f"a damaged pickle: {instruction.name} without its values") from None
    _check_structure(value := machine.stack.pop())
    return value


def check_key(key: Any) -> Any:
    """Return a key that costs little to look up, whatever else the file holds.

    Raises:
        ValueError: any other: tuples, for their hashes are neither bounded nor hard to make equal.
    """
    if key is None or type(key) in (str, bytes, float, bool, StandIn):
        return key
    if type(key) is int and key.bit_length() <= 64:
        return key
    kind = f"an integer of {key.bit_length()} bits" if type(key) is int else f"a {type(key).__name__}"
    raise ValueError(f"{kind} as a key, expected a string or a number")


def fill_mapping(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
    """Set items, after a look at each key."""
    for key, value in pairs:
        target[check_key(key)] = value


class _Machine:
    """The stack on which instructions work; ``marks`` are heights of it."""

    def __init__(self, find: Callable[[str], Any], persistent: Callable[[Any], Any]):
        self.find = find
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_integer(self, value: int) -> None:
        if value.bit_length() > _MAX_INTEGER_BITS:
            raise ValueError(f"an integer of {value.bit_length()} bits, of which at most {_MAX_INTEGER_BITS} are read")
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def remember(self, index: int | None = None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def name(self, text: str) -> None:
        module, _, name = text.partition(" ")
        self.push(self.find(f"{module}.{name}"))

    def name_of_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a damaged pickle: a name that is no text")
        self.push(self.find(f"{module}.{name}"))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Constructor) or type(arguments) is not tuple:
            raise ValueError("a damaged pickle: a call of something that is no function")
        self.charge(arguments)
        self.push(function.make(*arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, StandIn):
            return
        self.charge((state,))
        if type(target) is Namespace and type(state) is dict:
            vars(target).update({check_key(key): value for key, value in state.items() if type(key) is str})
        elif type(target) is OrderedDict and type(state) is dict and state.keys() <= {"_metadata"}:
            vars(target).update(state)  # of nn.Module.state_dict: versions of its modules
        elif type(target) is dict and type(state) is dict:
            target.update(state)
        else:
            raise ValueError(f"a pickle that gives a {type(target).__name__} a state, which torch.save does not")

    def charge(self, arguments: tuple[Any, ...]) -> None:
        for value in arguments:
            if isinstance(value, (str, bytes, list, tuple, dict)):
                self.copied += len(value) * (1 if isinstance(value, (str, bytes)) else 64)
        if self.copied > MAX_COPIED_BYTES:
            raise ValueError(f"copies of {self.copied} bytes, of which at most {MAX_COPIED_BYTES} are made")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise ValueError(f"a damaged pickle: an item for a {type(target).__name__}")

    def add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise ValueError(f"a damaged pickle: an item for a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(check_key, items))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not (type(target) in _MAPPINGS or isinstance(target, StandIn)):
            raise ValueError(f"a damaged pickle: an item for a {type(target).__name__}")
        if not isinstance(target, StandIn):
            fill_mapping(target, zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(
        (
            *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        ),
        _Machine.push,
    ),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _Machine.push_integer),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "FROZENSET": lambda m, _: m.push(frozenset(map(check_key, m.pop_mark()))),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_item(),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": lambda m, _: m.remember(),
    "BINGET": lambda m, index: m.push(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda m, _: m.name_of_stack(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.push(m.persistent(m.stack.pop())),
}


def _parts(value: Any) -> Iterable[Any] | None:
    """What a container holds; None for anything else."""
    if isinstance(value, Mapping):
        return [*value.values(), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, Namespace):
        return vars(value).values()
    return value if isinstance(value, (list, tuple)) else None


def _check_structure(root: Any) -> None:
    """Whoever walks through the value, or prints it, comes to an end soon.

    References make a pickle of a few bytes a list of a list twice of a list twice, and so on, or one that contains
    itself. Sizes count an item as often as it is reached.
    """
    measured: dict[int, tuple[int, int]] = {}  # size and height, by identity
    if (parts := _parts(root)) is None:
        return
    path = [id(root)]
    walks, sizes, heights, open_ = [iter(parts)], [0], [1], {id(root)}
    while path:
        for value in walks[-1]:
            sizes[-1] += 1
            if (parts := _parts(value)) is None:
                continue
            known = measured.get(id(value))
            if known is None:
                if id(value) in open_:
                    raise ValueError("a list or dict that contains itself")
                path.append(id(value))
                open_.add(id(value))
                walks.append(iter(parts))
                sizes.append(0)
                heights.append(1)
                break
            sizes[-1] += known[0]
            heights[-1] = max(heights[-1], 1 + known[1])
        else:
            walks.pop()
            key, size, height = path.pop(), sizes.pop(), heights.pop()
            open_.discard(key)
            measured[key] = size, height
            if path:
                sizes[-1] += size
                heights[-1] = max(heights[-1], 1 + height)
        if len(path) > MAX_DEPTH or (heights and heights[-1] > MAX_DEPTH):
            raise ValueError(f"values nested more than {MAX_DEPTH} deep")
        if sizes and sizes[-1] > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} items, the most that is read")
