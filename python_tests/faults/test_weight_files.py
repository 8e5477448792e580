"""Weight files that ask for more than they hold: one sentence, in seconds, within memory."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoints.samples import assert_same, classifier, snapshot
from helpers.bounded import call_each

from convnextv2_kernels import cli
from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint

from . import weight_files

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEGABYTES = 20, 500  # of one file, on a machine that has much else to do

BEYOND_A_BOUND = r"is not a readable checkpoint: (archive/data.pkl of \d+ bytes, of which|more than \d+ )"
NO_ARCHIVE_OF_TORCH = r"is not a readable checkpoint: an archive in which archive/data(.pkl|/0) is "
NOT_DENSE = r"must hold dense floating-point tensors, but "
SAID = {
    "marks.pt": BEYOND_A_BOUND,
    "marks legacy.pt": BEYOND_A_BOUND,
    "empty lists.pt": BEYOND_A_BOUND,
    "many keys.pt": BEYOND_A_BOUND,
    "many numbers.pt": "has 400000 keys, of which at most 100000 are read",
    "deflated pickle.pt": NO_ARCHIVE_OF_TORCH + "compressed or encrypted",
    "deflated tensor.pt": NO_ARCHIVE_OF_TORCH + "compressed or encrypted",
    "one member 2000 times.pt": NO_ARCHIVE_OF_TORCH + "larger than its place, or shares it",
    "tuple as a key.pt": "a tuple as a key",
    "doubled.pt": "a list as a key",
    "doubled value.pt": BEYOND_A_BOUND,
    "doubled late.pt": BEYOND_A_BOUND,
    "deep list.pt": "(nested more than 64 deep|more than 1000000 values)",
    "list in itself.pt": "a list or dict that contains itself",
    "huge number.pt": r"an integer of 419430\d\d bits, of which at most 1024",
    "long key.pt": r"got k{50,300}\.\.\.$",
    "long string length.pt": "is not a readable checkpoint: expected 4294967295 bytes",
    "long memo.pt": "holds a NoneType",
    "expanded.pt": r"a tensor \[750000000, 4\] of 3000000000 elements in a storage of 1: its elements share memory",
    "beyond the storage.pt": r"a tensor \[16\] that ends beyond its storage of 16 elements",
    "claimed storage.pt": "archive/data/0 has 64 bytes instead of 4398046511104",
    "claimed storage legacy.pt": r"storages that are larger than the file of \d+ bytes",
    "no storage.pt": "an archive without archive/data/0",
    "negative size.pt": "a tensor without valid storage, sizes and strides",
    "nested.pt": NOT_DENSE + "norm.bias is a nested tensor",
    "jagged.pt": NOT_DENSE + "norm.bias is a nested tensor",
    "sparse.pt": NOT_DENSE + "norm.bias is a sparse tensor",
    "csr.pt": NOT_DENSE + "head.weight is a sparse tensor",
    "quantised.pt": NOT_DENSE + "norm.bias is a quantised tensor",
    "meta.pt": NOT_DENSE + "norm.bias is a tensor on the meta device",
    "complex.pt": NOT_DENSE + "norm.bias is of dtype torch.complex64",
    "torchscript.pt": "a TorchScript program",
    "fifo.pt": "is a FIFO, expected a regular file",
    "zero.pt": "is a device, expected a regular file",
    "random.safetensors": "is a device, expected a regular file",
    "call of a tensor.pt": "a damaged pickle: a call of something that is no function",
    "bytearray.pt": "bytes in an encoding other than latin-1",
    "header of 2^60.safetensors": "a header that ends beyond the file",
    "header of 19 MB.safetensors": r"a header of \d+ bytes, of which at most 16777216 are read",
    "deep header.safetensors": "its header is nested more than 32 deep",
    "header is a list.safetensors": "a header that is no table of tensors",
    "copied over and over.pt": r"copies of \d+ bytes, of which at most 268435456 are made",
    "shared.pt": None,  # loading copies into the model's own memory
    "contradiction.pt": r"its shapes differ: stages.1.0.pwconv2.weight \[4, 12\] instead of \[4, 16\]",
    "tar.pt": "a tar file, as of PyTorch before 0.1.10",
    "link to itself.pt": "(there is no such file|cannot be read)",
    "folder.pt": "is a folder without model.safetensors",
    "key twice.safetensors": "a header with two tensors of one name",
    "overlap.safetensors": "is not a readable checkpoint: .*(offset|Offset)",
}
CONVERSION_SAID = {
    "shared.pt": r"has parameters that share memory: \d+ bytes of them in 784 bytes",
    "contradiction.pt": r"contradict each other: stages.1.0.pwconv2.weight \[4, 12\] \(expected \[4, 16\]\)",
}


# seconds of work each, and much the same as others
DEEP = {"marks legacy.pt", "empty lists.pt", "many numbers.pt", "deep list.pt", "long key.pt", "deflated tensor.pt"}


def told(folder: Path, names: set[str]) -> None:
    paths = {str(weight_files.write(folder, name)): name for name in sorted(names)}
    called = call_each("faults.weight_files:load_and_convert", list(paths), SECONDS, MEGABYTES)
    faults = []
    for path, name in paths.items():
        call = called[path]
        loaded, _, converted = call.value.partition("\n")
        if call.error or call.value.count("\n") != 1:
            faults.append(f"{name}: {call}")
        elif call.seconds > SECONDS or call.growth > MEGABYTES:
            faults.append(f"{name} takes {call.seconds:.1f} s and {call.growth:.0f} MiB")
        elif SAID[name] and not (re.search(SAID[name], loaded) and name in loaded):
            faults.append(f"{name}: {loaded}")
        elif not re.search(CONVERSION_SAID.get(name) or SAID[name], converted):
            faults.append(f"{name}, converted: {converted}")
    assert not faults, "\n".join(faults)
    assert {path.name for path in folder.iterdir()} == names  # nothing is left of the conversions


def test_hostile_files_cost_little_and_are_told(tmp_path):
    assert SAID.keys() == weight_files.FILES.keys() > DEEP
    told(tmp_path, SAID.keys() - DEEP)


@pytest.mark.thorough
def test_more_hostile_files(tmp_path):
    told(tmp_path, DEEP)


# Writes half a file with atomic_file, says so, and waits; without PyTorch, which takes seconds to import.
HALF = """
import sys, time, types
package = types.ModuleType("convnextv2_kernels")
package.__path__ = [sys.argv[1]]
sys.modules["convnextv2_kernels"] = package
from convnextv2_kernels._files import atomic_file
from pathlib import Path
with atomic_file(Path(sys.argv[2])) as file:
    file.write(b"half")
    print("half", flush=True)
    time.sleep(600)
"""


def half_written(target):
    """A process that is writing ``target``."""
    command = [sys.executable, "-c", HALF, str(ROOT / "convnextv2_kernels"), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    return process


def end(process, number):
    process.send_signal(number)
    process.stdout.close()
    return process.wait(60)


def temporaries(folder):
    return sorted(path.name for path in folder.glob(".*.tmp"))


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(classifier().state_dict(), source)
    running = half_written(target)
    try:
        assert end(half_written(target), signal.SIGKILL) == -signal.SIGKILL
        assert end(half_written(tmp_path / "other.pt"), signal.SIGKILL) == -signal.SIGKILL
        planted = tmp_path / ".target.pt.1.00000000.tmp"
        planted.symlink_to(source)
        assert len(temporaries(tmp_path)) == 4
        assert cli.main(["convert", str(source), str(target), "--to", "timm"]) == 0
        # what is still being written stays, as do another file's and a link that somebody planted
        left = temporaries(tmp_path)
        assert len(left) == 3 and planted.name in left and any(f".target.pt.{running.pid}." in name for name in left)
        assert source.is_file()
    finally:
        end(running, signal.SIGKILL)


SLOW_CONVERSION = """
import sys, time
import torch
from convnextv2_kernels import cli
def save(content, file):
    file.write(b"half")
    print("half", flush=True)
    time.sleep(600)
torch.save = save
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_signal_removes_the_temporary_file(tmp_path):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(classifier().state_dict(), source)
    command = [sys.executable, "-c", SLOW_CONVERSION, "convert", str(source), str(target), "--to", "timm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"half\n" and temporaries(tmp_path)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + signal.SIGTERM, b"terminated\n")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def tensors_that_hold_no_numbers():
    x = torch.ones(32)
    return {
        "a nested tensor": torch.nested.nested_tensor([torch.ones(16), torch.ones(16)]),
        "a nested tensor ": torch.nested.nested_tensor([torch.ones(32)], layout=torch.jagged),
        "of layout torch.sparse_coo": x.to_sparse(),
        "of layout torch.sparse_csr": x[None].to_sparse_csr(),
        "of layout torch._mkldnn": x.to_mkldnn(),
        "of dtype torch.quint8": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "of dtype torch.complex64": x.to(torch.complex64),
        "on the meta device, without values": x.to("meta"),
        "not initialised yet": torch.nn.UninitializedParameter(),
        "a list": [1.0] * 32,
    }


def test_tensors_that_hold_no_numbers_are_told(tmp_path):
    model, state = classifier(), classifier().state_dict()
    before = snapshot(model)
    for kind, tensor in tensors_that_hold_no_numbers().items():
        sentence = f"must hold dense floating-point tensors, but norm.bias is {kind.strip()}$"
        with pytest.raises(ValueError, match=sentence):
            load_checkpoint(model, {**state, "norm.bias": tensor})
        with pytest.raises(ValueError, match=sentence):
            convert_state_dict({**state, "norm.bias": tensor}, "timm")
    assert_same(model.state_dict(), before)
    expanded = {**state, "head.weight": torch.zeros(1, 32).expand(10**9, 32), "head.bias": torch.zeros(1).expand(10**9)}
    with pytest.raises(ValueError, match=r"has parameters that share memory: \d+ bytes of them in \d+ bytes"):
        convert_state_dict(expanded, "timm")


def damaged(content, generator):
    """Bytes that differ in a few places, mostly near each other and near the end, where a directory is."""
    made = bytearray(content)
    start = generator.choice((0, len(made) // 2, max(0, len(made) - 3000)))
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = min(len(made) - 1, start + generator.randrange(3000))
        if generator.random() < 0.7:
            made[at] = generator.randrange(256)
        else:
            del made[at : at + generator.randrange(1, 9)]
    return bytes(made)


def rewrapped(pickled):
    file = weight_files.io.BytesIO()
    weight_files.archive(file, pickled, {"0": bytes(64), "1": bytes(16)})
    return file.getvalue()


def damaged_files(generator):
    """Endlessly: archives, old files, and sound archives around a damaged pickle, of one small content."""
    x = torch.arange(16.0)
    content = {"model": {"a": x, "b": x[4:8].view(2, 2), "c": torch.ones(4)}, "args": [1, "x", {"k": (2.5, None)}]}
    whole = weight_files.saved(content)
    legacy = weight_files.saved(content, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(weight_files.io.BytesIO(whole)) as file:
        pickled = file.read("archive/data.pkl")
    tensors = safetensors.torch.save({"a": x, "b": torch.ones(2, 2)})
    while True:
        yield damaged(whole, generator)
        yield damaged(legacy, generator)
        yield rewrapped(damaged(pickled, generator))
        yield damaged(tensors, generator)


def read_damaged(path, count, seed):
    """Read so many damaged files; how many were refused."""
    refused = 0
    for _, content in zip(range(count), damaged_files(random.Random(seed)), strict=False):
        path.write_bytes(content)
        start = time.monotonic()
        try:
            load_checkpoint(weight_files.model(), path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            refused += 1
        assert time.monotonic() - start < SECONDS
    return refused


def test_damaged_files_are_refused(tmp_path):
    assert read_damaged(tmp_path / "a.pt", 400, 0) == 400  # what is read is no network


@pytest.mark.thorough
def test_many_damaged_files_are_refused(tmp_path):
    assert read_damaged(tmp_path / "a.pt", 5000, 1) == 5000
