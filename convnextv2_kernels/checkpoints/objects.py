"""What a file of torch.save may name, and what is built for it.

Tensors, plain containers, and the classes in which known code bases keep their settings beside the weights. Nothing of
the named module is imported or called: tensors are built here, after a look at every number, and what nobody needs
(NumPy's numbers, dates) becomes a :class:`.pickles.StandIn`. Any other name is refused, for it would run code.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pickles import Constructor, StandIn, check_key, fill_mapping

_MAX_RANK = 64  # of a tensor in PyTorch
_STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.int8,  # of quantised tensors, which are not built
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}


class UnknownName(ValueError):
    """A file asks for something that could run code; the text is its name."""


class StorageType(NamedTuple):
    """The class of a storage, which gives its elements a dtype; an untyped one has bytes."""

    dtype: torch.dtype


class Stored(NamedTuple):
    """The memory of tensors, with the dtype and number of its elements."""

    memory: torch.UntypedStorage
    dtype: torch.dtype
    numel: int


def find(name: str) -> Any:
    """The value that a pickle gets for a name such as ``"collections.OrderedDict"``.

    Raises:
        UnknownName: anything but what this module builds.
    """
    name = re.sub(r"^__builtin__\.", "builtins.", name)  # of Python 2
    if name in _CONSTRUCTORS:
        return Constructor(name, _CONSTRUCTORS[name])
    storage = re.fullmatch(r"torch(?:\.cuda)?\.(\w+)Storage", name)
    if storage and storage[1] in _STORAGE_DTYPES:
        return StorageType(_STORAGE_DTYPES[storage[1]])
    if name in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        return StorageType(torch.uint8)
    if isinstance(dtype := vars(torch).get(name.removeprefix("torch.")), torch.dtype) and name.startswith("torch."):
        return dtype
    for pattern, kind in _STAND_INS:
        if pattern.fullmatch(name):
            return Constructor(name, _stand_in(kind or name))
    raise UnknownName(name)


def _stand_in(kind: str) -> Callable[..., StandIn]:
    return lambda *_: StandIn(kind)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _dense(stored: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """A tensor within its storage that has no more elements than the storage, so that a copy costs no more either."""
    sized = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_RANK
    if not (isinstance(stored, Stored) and sized and all(map(_is_count, (offset, *size, *stride)))):
        raise ValueError("a tensor without valid storage, sizes and strides")
    elements = stored.memory.nbytes() // dtype.itemsize
    numel = 1
    for length in size:
        numel *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numel and last >= elements:
        raise ValueError(f"a tensor {list(size)} that ends beyond its storage of {elements} elements")
    if numel > elements:
        raise ValueError(
            f"a tensor {list(size)} of {numel} elements in a storage of {elements}: its elements share memory"
        )
    return torch.empty(0, dtype=dtype, device="cpu").set_(stored.memory, offset, size, stride)


def _marked(tensor: Tensor, requires_grad: Any, metadata: Any) -> Tensor | StandIn:
    if metadata:
        return StandIn("conjugate or negative view")
    return tensor.requires_grad_() if requires_grad is True and tensor.is_floating_point() else tensor


def _tensor(stored: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    return _dense(stored, offset, size, stride, getattr(stored, "dtype", torch.uint8))


def _tensor_v2(
    stored: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor | StandIn:
    return _marked(_tensor(stored, offset, size, stride), requires_grad, metadata)


def _tensor_v3(
    stored: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, *hooks_dtype_metadata: Any
) -> Tensor | StandIn:
    _, dtype, *metadata = hooks_dtype_metadata
    if not isinstance(dtype, torch.dtype) or len(metadata) > 1:
        raise ValueError("a tensor without valid storage, sizes and strides")
    return _marked(_dense(stored, offset, size, stride, dtype), requires_grad, metadata and metadata[0])


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> nn.Parameter | StandIn:
    if isinstance(data, StandIn):
        return data
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is no tensor")
    return nn.Parameter(data.detach(), requires_grad is True and data.is_floating_point())


def _from_type(function: Any, of: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes of its own or of a subclass: the tensor alone."""
    if not isinstance(function, Constructor) or type(arguments) is not tuple:
        raise ValueError("a tensor that no function of PyTorch builds")
    return function.make(*arguments)


def _size(items: Any = ()) -> torch.Size:
    if not (isinstance(items, (tuple, list)) and all(map(_is_count, items))):
        raise ValueError("a torch.Size of something that is no size")
    return torch.Size(items)


def _device(*parts: Any) -> torch.device:
    if not (1 <= len(parts) <= 2 and type(parts[0]) is str and len(parts[0]) < 32 and all(map(_is_count, parts[1:]))):
        raise ValueError("a torch.device that is none")
    try:
        return torch.device(*parts)
    except RuntimeError:
        raise ValueError(f"a torch.device {parts[0]!r}, which is none") from None


def _ordered_dict(pairs: Any = ()) -> OrderedDict:
    made: OrderedDict = OrderedDict()
    fill_mapping(made, ((key, value) for key, value in pairs))
    return made


def _mapping(*arguments: Any) -> dict[Any, Any]:
    """A plain dict for a subclass of dict, made of the mapping among its arguments, if any."""
    made: dict[Any, Any] = {}
    for argument in arguments:
        if isinstance(argument, dict):
            made.update(argument)
    return made


def _counter(counts: Any = None) -> Counter:
    if not (counts is None or type(counts) is dict):
        raise ValueError("a collections.Counter of something that is no dict")
    return Counter(counts)


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, (list, tuple)):
        raise ValueError("a set of something that is no list")
    return set(map(check_key, items))


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """Bytes, which protocol 2 writes as text."""
    if type(text) is bytes:
        return text
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an encoding other than latin-1")
    return text.encode("latin1")


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number of something that is no number")
    return complex(real, imaginary)


def _path(kind: type[PurePosixPath] | type[PureWindowsPath]) -> Callable[..., PurePosixPath | PureWindowsPath]:
    """Paths of either system, as text: a file of Windows is read elsewhere too."""

    def make(*parts: Any) -> PurePosixPath | PureWindowsPath:
        if not all(type(part) is str for part in parts):
            raise ValueError("a path of something that is no text")
        return kind(*parts)

    return make


def _no_object(*_: Any) -> Any:
    raise ValueError("a damaged pickle: a class where a value belongs")


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda factory=None: {},
    "collections.Counter": _counter,
    "builtins.dict": _mapping,
    "builtins.set": _set,
    "builtins.frozenset": lambda items=(): frozenset(_set(items)),
    "builtins.bytearray": lambda *parts: bytearray(_bytes(*parts)),
    "builtins.bytes": _bytes,
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
    "argparse.Namespace": lambda: Namespace(),
    "types.SimpleNamespace": lambda: Namespace(),
    # factories of defaultdicts, or the type of an argument: kept as names
    **{f"builtins.{name}": _no_object for name in ("bool", "float", "int", "list", "object", "str", "tuple")},
    # dicts with attributes: hyper_parameters of Lightning, settings of mmengine
    "lightning.fabric.utilities.data.AttributeDict": _mapping,
    "lightning_fabric.utilities.data.AttributeDict": _mapping,
    "pytorch_lightning.utilities.parsing.AttributeDict": _mapping,
    "lightning.pytorch.utilities.parsing.AttributeDict": _mapping,
    "addict.addict.Dict": _mapping,
    "mmengine.config.config.ConfigDict": _mapping,
    **{
        f"{module}.{prefix}{system}Path": _path(kind)
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for prefix in ("", "Pure")
        for system, kind in (("Posix", PurePosixPath), ("Windows", PureWindowsPath))
    },
    "torch.Size": _size,
    "torch.device": _device,
    "torch.Tensor": _no_object,
    "torch.nn.parameter.Parameter": _no_object,
    "torch.nn.parameter.Buffer": _no_object,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
_STAND_INS = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)", None),
        (r"numpy\.(dtype|ndarray|dtypes\.\w+|bool_?|str_|bytes_|(u?int|float|complex)\d+)", None),
        (r"datetime\.(datetime|date|time|timedelta|timezone)", None),
        (r"collections\.deque|builtins\.(x?range|slice)", None),
        (r"mmengine\.logging\.history_buffer\.HistoryBuffer", None),
        (r"torch\._utils\._rebuild_qtensor", "quantised tensor"),
        (r"torch\._utils\._rebuild_sparse_tensor", "sparse tensor"),
        (r"torch\._utils\._rebuild_nested_tensor", "nested tensor"),
        (r"torch\.nested\._internal\.nested_tensor\.(NestedTensor|_rebuild_njt)", "nested tensor"),
        (r"torch\._dynamo\.decorators\._DimRange", None),
        (r"torch\._utils\._rebuild_meta_tensor_no_storage", "tensor on the meta device, without values"),
        (r"torch\._utils\._rebuild_(wrapper_subclass|device_tensor_from_(numpy|cpu_tensor))", "tensor of a device"),
        (r"torch\.distributed\.(_?tensor|device_mesh)(\.\w+)*\.(DTensor|DTensorSpec|TensorMeta|DeviceMesh)", "DTensor"),
        (r"torch\.distributed\._?tensor\.placement_types\.(Partial|Replicate|Shard)", None),
        (r"torch\.per_(tensor|channel)_(affine|symmetric|affine_float_qparams)", None),
        (r"torch\.serialization\._get_layout", None),
    )
]
