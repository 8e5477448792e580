"""Weight files that ask for far more than they hold, and what reads them in a child process."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from convnextv2_kernels.checkpoints import load_checkpoint
from convnextv2_kernels.checkpoints.convert import convert_file
from convnextv2_kernels.models import ConvNeXtV2

DEPTHS, DIMS = (1, 1, 1, 1), (4, 4, 4, 4)
PROTO, STOP = b"\x80\x02", b"."
LARGE = 64 << 20


def model() -> ConvNeXtV2:
    return ConvNeXtV2(num_classes=2, depths=DEPTHS, dims=DIMS)


def load_and_convert(path: str) -> str:
    """What either says, on two lines."""
    said = []
    for read in (
        lambda: load_checkpoint(model(), path),
        lambda: convert_file(Path(path), Path(f"{path}.out.pt"), "timm"),
    ):
        try:
            said.append(str(read()))
        except (ValueError, OSError) as error:
            said.append(str(error))
    return "\n".join(said)


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **options: object) -> None:
    """What torch.save writes, around a pickle written by hand."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        for name, content in (storages or {}).items():
            file.writestr(f"archive/data/{name}", content)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return (
        b"J" + struct.pack("<i", value)
        if abs(value) < 1 << 31
        else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    )


def called(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", numel: int = 16, legacy: bool = False) -> bytes:
    kind = b"ctorch\nFloatStorage\n"
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(numel) + b"N" * legacy + b"tQ"


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, stored: bytes | None = None) -> bytes:
    hooks = called("collections OrderedDict")
    where = (storage() if stored is None else stored, number(offset), numbers(size), numbers(stride))
    return called("torch._utils _rebuild_tensor_v2", *where, b"\x89", hooks)


def dictionary(*items: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def whole(value: bytes) -> bytes:
    return PROTO + value + STOP


def state() -> OrderedDict:
    torch.manual_seed(0)
    return OrderedDict(model().state_dict())


def saved(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def doubled(depth: int) -> bytes:
    """A list of a list twice of a list twice, ..."""
    made = b"]q\x00"
    for i in range(depth):
        made = b"](" + made + b"h%ceq%c" % (i, i + 1)
    return made


def doubled_late(depth: int) -> bytes:
    """The same, of lists that are empty when they are put into each other."""
    made = b"".join(b"]q%c" % i for i in range(depth + 1))
    return b"(" + made + b"".join(b"h%c(h%ch%ce" % (i + 1, i, i) for i in reversed(range(depth))) + b"t"


def tuple_key(depth: int) -> bytes:
    return b"}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth)) + b"Ns"


def many_entries(path: Path) -> None:
    """2000 directory entries of one member of 64 MB."""
    name, crc = b"archive/data/0", zlib.crc32(bytes(LARGE))
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, crc, LARGE, LARGE, len(name), 0) + name
    central = struct.pack(
        "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, crc, LARGE, LARGE, len(name), 0, 0, 0, 0, 0, 0
    )
    entries = 2000 * (central + name)
    with path.open("wb") as file:
        file.write(local)
        file.seek(LARGE, os.SEEK_CUR)
        start = file.tell()
        file.write(entries + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 2000, 2000, len(entries), start, 0))


def hostile_state(**changes: torch.Tensor) -> dict:
    return {"model": {**state(), **{name.replace("__", "."): value for name, value in changes.items()}}}


def shared() -> dict:
    """Every parameter a view of the same numbers."""
    numbers = torch.ones(max(value.numel() for value in state().values()))
    return {name: numbers[: value.numel()].view(value.shape) for name, value in state().items()}


def old_tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(offsets: tuple[int, int], shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES: dict[str, Callable[[Path], object]] = {
    "marks.pt": lambda p: archive(p, PROTO + b"(" * (8 << 20)),
    "marks legacy.pt": lambda p: p.write_bytes(PROTO + b"(" * (8 << 20)),
    "empty lists.pt": lambda p: archive(p, PROTO + b"]" * (8 << 20)),
    "many keys.pt": lambda p: archive(
        p, whole(dictionary(*((text(str(i)), tensor((1,), (1,))) for i in range(60_000)))), {"0": bytes(64)}
    ),
    "many numbers.pt": lambda p: archive(p, whole(dictionary(*((text(str(i)), b"K\x01") for i in range(400_000))))),
    "deflated pickle.pt": lambda p: archive(
        p, whole(dictionary((text("a"), text("b" * (8 << 20))))), compression=zipfile.ZIP_DEFLATED
    ),
    "deflated tensor.pt": lambda p: archive(
        p,
        whole(dictionary((text("a"), tensor((1 << 24,), (1,), stored=storage(numel=1 << 24))))),
        {"0": bytes(1 << 26)},
        compression=zipfile.ZIP_DEFLATED,
    ),
    "one member 2000 times.pt": many_entries,
    "tuple as a key.pt": lambda p: archive(p, whole(tuple_key(60))),
    "doubled.pt": lambda p: archive(p, whole(dictionary((doubled(60), b"N")))),
    "doubled value.pt": lambda p: archive(p, whole(dictionary((text("model"), doubled(60))))),
    "doubled late.pt": lambda p: archive(p, whole(dictionary((text("model"), doubled_late(60))))),
    "deep list.pt": lambda p: archive(p, PROTO + b"]" * 500000 + b"a" * 499999 + STOP),
    "list in itself.pt": lambda p: archive(p, whole(dictionary((text("model"), b"]q\x00h\x00a")))),
    "huge number.pt": lambda p: archive(
        p, whole(dictionary((b"\x8b" + struct.pack("<i", 5 << 20) + b"\x7f" * (5 << 20), b"N")))
    ),
    "long key.pt": lambda p: archive(p, whole(dictionary((text("k" * 10**8), b"N")))),
    "long string length.pt": lambda p: archive(p, PROTO + b"X\xff\xff\xff\xff" + STOP),
    "long memo.pt": lambda p: archive(p, PROTO + b"Nr\xff\xff\xff\xff" + STOP),
    "expanded.pt": lambda p: p.write_bytes(
        saved(
            hostile_state(
                head__weight=torch.zeros(1).expand(750_000_000, 4), head__bias=torch.zeros(1).expand(750_000_000)
            )
        )
    ),
    "beyond the storage.pt": lambda p: archive(
        p, whole(dictionary((text("stages.0.0.dwconv.weight"), tensor((16,), (1,), 1)))), {"0": bytes(64)}
    ),
    "claimed storage.pt": lambda p: archive(
        p, whole(dictionary((text("a"), tensor((4,), (1,), stored=storage(numel=1 << 40))))), {"0": bytes(64)}
    ),
    "claimed storage legacy.pt": lambda p: p.write_bytes(
        b"".join(pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {}))
        + whole(dictionary((text("a"), tensor((4,), (1,), stored=storage(numel=1 << 33, legacy=True)))))
        + pickle.dumps(["0"], protocol=2)
    ),
    "no storage.pt": lambda p: archive(p, whole(dictionary((text("a"), tensor((4,), (1,)))))),
    "negative size.pt": lambda p: archive(p, whole(dictionary((text("a"), tensor((-4,), (1,))))), {"0": bytes(64)}),
    "nested.pt": lambda p: p.write_bytes(
        saved(hostile_state(norm__bias=torch.nested.nested_tensor([torch.ones(2), torch.ones(2)])))
    ),
    "jagged.pt": lambda p: p.write_bytes(
        saved(hostile_state(norm__bias=torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)))
    ),
    "sparse.pt": lambda p: p.write_bytes(saved(hostile_state(norm__bias=torch.ones(4).to_sparse()))),
    "csr.pt": lambda p: p.write_bytes(saved(hostile_state(head__weight=torch.ones(2, 4).to_sparse_csr()))),
    "quantised.pt": lambda p: p.write_bytes(
        saved(hostile_state(norm__bias=torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)))
    ),
    "meta.pt": lambda p: p.write_bytes(saved(hostile_state(norm__bias=torch.ones(4, device="meta")))),
    "complex.pt": lambda p: p.write_bytes(saved(hostile_state(norm__bias=torch.ones(4, dtype=torch.complex64)))),
    "torchscript.pt": lambda p: torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), p),
    "fifo.pt": lambda p: os.mkfifo(p),
    "zero.pt": lambda p: p.symlink_to("/dev/zero"),
    "random.safetensors": lambda p: p.symlink_to("/dev/urandom"),
    "call of a tensor.pt": lambda p: archive(p, whole(tensor((4,), (1,)) + b")R"), {"0": bytes(64)}),
    "bytearray.pt": lambda p: archive(p, whole(called("builtins bytearray", number(1 << 36)))),
    "header of 2^60.safetensors": lambda p: p.write_bytes(safetensors_file(b"{}", length=1 << 60)),
    "header of 19 MB.safetensors": lambda p: p.write_bytes(
        safetensors_file(
            json.dumps({f"{i:01000}": entry((4 * i, 4 * i + 4), (1,)) for i in range(18000)}).encode(), bytes(72000)
        )
    ),
    "deep header.safetensors": lambda p: p.write_bytes(safetensors_file(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}")),
    "header is a list.safetensors": lambda p: p.write_bytes(safetensors_file(b"[]")),
    "copied over and over.pt": lambda p: archive(
        p,
        whole(
            b"](" + text("b" * (1 << 20)) + b"q\x00" + b"c_codecs\nencode\nq\x01" + b"h\x01h\x00\x85R" * 100000 + b"e"
        ),
    ),
    "shared.pt": lambda p: p.write_bytes(saved(shared())),
    "contradiction.pt": lambda p: p.write_bytes(saved(hostile_state(stages__1__0__pwconv2__weight=torch.ones(4, 12)))),
    "tar.pt": old_tar,
    "link to itself.pt": lambda p: p.symlink_to(p),
    "folder.pt": lambda p: p.mkdir(),
    "key twice.safetensors": lambda p: p.write_bytes(
        safetensors_file(b'{"a":%s,"a":%s}' % ((json.dumps(entry((0, 16))).encode(),) * 2), bytes(16))
    ),
    "overlap.safetensors": lambda p: p.write_bytes(
        safetensors_file(json.dumps({"a": entry((0, 16)), "b": entry((8, 24))}).encode(), bytes(24))
    ),
}


def write(folder: Path, name: str) -> Path:
    path = folder / name
    FILES[name](path)
    return path
