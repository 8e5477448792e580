import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint
from convnextv2_kernels.checkpoints.storage import load_torch, read_checkpoint_file, read_file
from convnextv2_kernels.errors import FileError
from convnextv2_kernels.train.checkpoint import export_encoder, gather_state, write_checkpoint
from convnextv2_kernels.train.optim import Average

from .samples import assert_same, autoencoder, classifier, encoder_of, snapshot, without


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(path, message, error=ValueError):
    """The error names the file, and the model is as it was, bit for bit."""
    model = classifier()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "checkpoint"])
def test_files_of_torch_save(tmp_path, name):
    state, model = classifier().state_dict(), classifier()
    torch.save({"model": state}, tmp_path / name)
    load_checkpoint(model, str(tmp_path / name))
    assert_same(model.state_dict(), state)


def test_older_files_of_torch_save(tmp_path):
    state, model = classifier().state_dict(), classifier()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "a.pt")
    assert_same(model.state_dict(), state)


def test_what_the_official_scripts_write(tmp_path):
    """With their command line, an argparse.Namespace, and the averaged weights beside the last ones."""
    state, averaged, model = classifier().state_dict(), classifier().state_dict(), classifier()
    args = argparse.Namespace(model="convnextv2_atto", lr=None, blr=1.5e-4, opt_betas=[0.9, 0.95], use_amp=False)
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    content = {"model": state, "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args, "model_ema": averaged}
    torch.save(content, tmp_path / "checkpoint-3.pth")
    load_checkpoint(model, tmp_path / "checkpoint-3.pth")
    assert_same(model.state_dict(), state)
    load_checkpoint(model, tmp_path / "checkpoint-3.pth", use_ema=True)
    assert_same(model.state_dict(), averaged)


def plain_content():
    """Views, parameters, every dtype, numbers and containers of Python."""
    model, flat = classifier(), torch.randn(100)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2])
    types = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16 float8_e4m3fn".split()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "parameters": list(model.parameters()),
        "views": [flat[3:10], flat[::2], flat.view(10, 10).t(), flat[:0], flat[0]],
        "dtypes": {name: torch.ones(3).to(getattr(torch, name)) for name in types},
        "of torch": [torch.float16, torch.device("cpu"), torch.device("cuda", 1), torch.Size([1, 2])],
        "numbers": [2**70, -(2**40), 70000, 300, True, 1.5, float("inf"), 1j, None],
        "texts": ["\ud800é😀", "x" * 300, b"ab\xff", b"", bytearray(b"q")],
        "containers": [(), (1,), (1, 2, 3, 4), {1, "a"}, collections.Counter("aab"), [{"b": (1, [2])}]],
        "many": list(range(3000)),
    }


def same(a, b):
    """Equal to the last bit and type."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b) and vars(a) == vars(b) if isinstance(a, collections.OrderedDict) else True
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_content_is_as_torch_load_reads_it(tmp_path, protocol, kind):
    content, path = plain_content(), tmp_path / "a.pt"
    if kind == "legacy":  # which has no storages without a type
        content["dtypes"] = {
            name: x for name, x in content["dtypes"].items() if name not in ("uint16", "float8_e4m3fn")
        }
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
    read = load_torch(path)
    same(read, torch.load(path, weights_only=False))
    first, second = read["views"][:2]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_files_of_a_machine_of_the_other_byte_order(tmp_path):
    path, x = tmp_path / "a.pt", torch.arange(10.0)
    torch.save({"x": x, "y": x[2:4]}, path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            if "/data/" in name:
                numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                content = bytes(numbers.view(-1, 4).flip(1).flatten().tolist())
            file.writestr(name, b"big" if "byteorder" in name else content)
    same(load_torch(path), {"x": x, "y": x[2:4]})


def test_archives_of_more_than_4_gib(tmp_path):
    """In which sizes and offsets stand in a field of their own: here as in a large file, of a small one."""
    content = {"x": torch.arange(10.0), "y": torch.ones(3)}
    whole = torch_bytes(content)
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        entries, start = file.infolist(), file.start_dir
    directory = b""
    for entry in entries:
        wide = struct.pack("<2H3Q", 1, 24, entry.file_size, entry.compress_size, entry.header_offset)
        extra = struct.pack("<2HL", 0x9999, 4, 0) + wide
        name = entry.filename.encode()
        sizes = (entry.CRC, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, *sizes) + name + extra
    end = start + len(directory)
    count = len(entries)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path = tmp_path / "a.pt"
    path.write_bytes(whole[:start] + directory + end64 + locator + last)
    same(load_torch(path), torch.load(path))
    path.write_bytes(whole[:start] + directory[:-20] + directory[-8:] + end64 + locator + last)
    with pytest.raises(FileError, match="a.pt is not a readable checkpoint: an archive with a damaged directory"):
        load_torch(path)


class ListedNames:
    """Pickled as a class or function of this name, called with ``arguments`` and given a state, in any version."""

    def __init__(self, name, arguments=(), state=None):
        self.name, self.arguments, self.state = name, arguments, state


class NamingPickler(pickle._Pickler):
    """Of Python itself, to write names that are not installed here."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, ListedNames):
            module, _, name = obj.name.rpartition(".")
            self.write(b"c" + f"{module}\n{name}\n".encode())
            self.save(obj.arguments)
            self.write(b"R")
            if obj.state is not None:
                self.save(obj.state)
                self.write(b"b")
        else:
            super().save(obj, save_persistent_id)


def archive_of(path, content, protocol=2):
    """A file of torch.save without tensors."""
    pickled = io.BytesIO()
    NamingPickler(pickled, protocol).dump(content)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled.getvalue())
        file.writestr("a/version", "3")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_code_bases_keep_beside_the_weights(tmp_path, protocol):
    """Nobody needs it here, and none of it runs: the official submitit script keeps paths, others NumPy's numbers."""
    state, model, path = classifier().state_dict(), classifier(), tmp_path / "checkpoint.pth"
    args = argparse.Namespace(
        output_dir=pathlib.Path("/checkpoint/run"),
        job_dir=pathlib.PureWindowsPath("c:/jobs"),
        lr=np.float64(1e-3),
        numbers=[np.int64(3), np.float32(1), np.bool_(True), np.arange(5.0), np.array(["a"], dtype=object)],
        dtypes=[np.dtype("f4"), np.dtype("i8"), np.float32],
        when=[datetime.datetime.now(), datetime.date.today(), datetime.timedelta(1), datetime.timezone.utc],
        state=np.random.default_rng(0).random(3),
        groups=collections.defaultdict(list, a=[1]),
        containers=[collections.OrderedDict(a=1), types.SimpleNamespace(b=2), frozenset([1]), range(3), slice(1, 2)],
    )
    torch.save({"model": state, "args": args, "epoch": np.int64(3)}, path, pickle_protocol=protocol)
    load_checkpoint(model, path)
    assert_same(model.state_dict(), state)
    read = load_torch(path)["args"]
    assert read.output_dir == pathlib.PurePosixPath("/checkpoint/run")
    assert read.job_dir == pathlib.PureWindowsPath("c:/jobs")
    assert read.groups == {"a": [1]} and read.containers[:2] == [{"a": 1}, argparse.Namespace(b=2)]
    assert "not read" in repr(read.lr) and "float32" in repr(read.dtypes[2])


@pytest.mark.parametrize(
    "name",
    [
        *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
        *(f"pathlib.{kind}" for kind in ("PurePosixPath", "PureWindowsPath")),
    ],
)
def test_paths_of_every_python_on_every_system(tmp_path, name):
    archive_of(tmp_path / "a.pt", {"path": ListedNames(name, ("a", "b"))})
    kind = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    assert load_torch(tmp_path / "a.pt") == {"path": kind("a", "b")}


@pytest.mark.parametrize(
    "name",
    [
        *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
        *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Int32")),
        *("numpy.dtype", "numpy.ndarray", "numpy.core.numeric._frombuffer", "numpy.bool_", "numpy.bool"),
        *("datetime.datetime", "mmengine.logging.history_buffer.HistoryBuffer", "collections.deque"),
    ],
)
def test_stand_ins_need_no_package(tmp_path, name):
    """The state of mmengine's histories, of NumPy's numbers and dtypes, is passed over."""
    archive_of(tmp_path / "a.pt", {"x": [ListedNames(name, ("f8", b"1", [2.0]), state={"max_length": 3})], "y": 1})
    read = load_torch(tmp_path / "a.pt")
    assert read["y"] == 1 and repr(read["x"]) == f"[<{name}, not read>]"


@pytest.mark.parametrize(
    "name", ["pytorch_lightning.utilities.parsing.AttributeDict", "mmengine.config.config.ConfigDict"]
)
def test_dicts_of_frameworks_are_dicts(tmp_path, name):
    archive_of(tmp_path / "a.pt", {"hyper_parameters": ListedNames(name, ({"lr": 1.0},))})
    assert load_torch(tmp_path / "a.pt") == {"hyper_parameters": {"lr": 1.0}}


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "nt.system", "builtins.eval", "builtins.getattr", "builtins.open"),
        *("builtins.__import__", "numpy.load", "numpy.core.multiarray.fromfile", "pathlib.Path.unlink", "torch.load"),
        *("torch.storage._load_from_bytes", "torch.hub.load", "torch.nn.modules.linear.Linear", "torch.jit.load"),
        *("argparse.ArgumentParser", "collections.namedtuple", "functools.partial", "copyreg._reconstructor"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_any_other_name_is_refused(tmp_path, name, protocol):
    archive_of(tmp_path / "a.pt", {"model": {}, "x": ListedNames(name, ("x",))}, protocol)
    refused(tmp_path / "a.pt", f"not read because it asks for {name}, .* if you trust the file, load it with PyTorch")


def test_what_other_frameworks_write(tmp_path):
    """timm, Lightning and mmengine, with all that they keep beside the weights."""
    state, path = classifier().state_dict(), tmp_path / "a.ckpt"
    behind = {f"model.{key}": value for key, value in convert_state_dict(state, "timm").items()}
    optimizer = torch.optim.AdamW(classifier().parameters()).state_dict()
    files = {
        "timm": {
            "epoch": 3,
            "arch": "convnextv2_atto",
            "state_dict": state,
            "optimizer": optimizer,
            "version": 2,
            "args": argparse.Namespace(data_dir="x", mean=None),
            "amp_scaler": {"scale": 65536.0},
            "state_dict_ema": state,
            "metric": 75.1,
        },
        "Lightning": {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.2.0",
            "state_dict": behind,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'x'}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [optimizer],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 1e-3, "path": pathlib.Path("x")},
        },
        "mmengine": {
            "meta": {
                "epoch": np.int64(3),
                "cfg": "model = dict()",
                "dataset_meta": {"classes": ("a", "b")},
                "experiment_name": "x",
                "time": "20240101",
            },
            "state_dict": convert_state_dict(state, "mmpretrain"),
            "optimizer": optimizer,
            "message_hub": {"log_scalars": {"train/lr": np.arange(9.0)}, "runtime_info": {"iter": 3}},
        },
    }
    for content in files.values():
        torch.save(content, path)
        model = classifier()
        report = load_checkpoint(model, path)
        assert_same(model.state_dict(), state)
        assert not report.left_out + report.kept_initial


def test_what_this_library_writes(tmp_path):
    fcmae, model = autoencoder(), classifier()
    average = Average(fcmae, 0.9)
    path = write_checkpoint(tmp_path, 4, gather_state(fcmae, torch.optim.AdamW(fcmae.parameters()), average))
    same(load_torch(path), torch.load(path, weights_only=True))
    report = load_checkpoint(model, path)
    assert report.source_format == "fcmae" and len(report.kept_initial) == 4
    first = encoder_of(snapshot(model))
    export_encoder(tmp_path / "encoder.safetensors", fcmae, "x")
    other = classifier()
    assert load_checkpoint(other, tmp_path / "encoder.safetensors").source_format == "official"
    assert_same(encoder_of(other.state_dict()), first)


def test_folders(tmp_path):
    state, model = classifier().state_dict(), classifier()
    refused(tmp_path, "is a folder without model.safetensors or pytorch_model.bin", FileNotFoundError)
    torch.save(state, tmp_path / "pytorch_model.bin")
    load_checkpoint(model, tmp_path)
    assert_same(model.state_dict(), state)
    newer = classifier().state_dict()
    safetensors.torch.save_file(newer, tmp_path / "model.safetensors")
    load_checkpoint(model, tmp_path)
    assert_same(model.state_dict(), newer)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("https://dl.fbaipublicfiles.com/a.pt", "https://dl.fbaipublicfiles.com/a.pt is an address, expected a file"),
        ("hf_hub:timm/convnextv2_atto.fcmae", "hf_hub:timm/convnextv2_atto.fcmae is an address"),
        ("hf://timm/a", "hf://timm/a is an address, .*: download it first"),
    ],
)
def test_addresses_are_told_to_be_some(given, told):
    for path in (given, pathlib.Path(given)):  # in which two slashes are one
        with pytest.raises(FileNotFoundError, match=told):
            load_checkpoint(classifier(), path)


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors.index.json"],
        ["pytorch_model.bin.index.json"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ],
)
def test_sharded_folders_are_told_to_be_some(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    refused(tmp_path, "is a sharded checkpoint, expected one file with all weights")
    which = "the index" if "index" in names[0] else "shard 1 of 2"
    refused(tmp_path / names[0], f"is {which} of a sharded checkpoint")
    whole = classifier().state_dict()
    safetensors.torch.save_file(whole, tmp_path / "model-00001-of-00001.safetensors")
    assert_same(dict(read_file(tmp_path / "model-00001-of-00001.safetensors")), whole)


def test_names_of_files_do_not_reach_a_terminal_raw(tmp_path):
    path = tmp_path / "\x1b[31ma\n.pt"
    path.write_bytes(b"GIF89a")
    with pytest.raises(FileError, match=r"/\\x1b\[31ma\\n.pt is not a readable checkpoint"):
        load_checkpoint(classifier(), path)


def test_settings_come_with_a_file(tmp_path):
    state = classifier().state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {"grn": "l1", "model": "x"})
    torch.save({"model": state, "config": {"grn": "none"}}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt")
    settings = [read_checkpoint_file(tmp_path / name).settings for name in ("a.safetensors", "a.pt", "b.pt")]
    assert settings == [{"grn": "l1", "model": "x"}, {"grn": "none"}, {}]


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "none/none.bin"])
def test_missing_files(tmp_path, name):
    refused(tmp_path / name, "there is no such file", FileNotFoundError)


def torch_bytes(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(tmp_path, kind, share):
    state, path = classifier().state_dict(), tmp_path / f"a.{kind}"
    if kind == "safetensors":
        whole = safetensors.torch.save(state)
    else:
        whole = torch_bytes({"model": state}, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "is not a readable checkpoint: .")


def test_flipped_bytes(tmp_path):
    """Anywhere in the tensors of an archive; torch.load itself does not notice."""
    whole = torch_bytes({"model": classifier().state_dict()})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    path = tmp_path / "a.pt"
    for entry in tensors[::20]:
        damaged = bytearray(whole)
        damaged[whole.index(entry.filename.encode()) + 200] ^= 1
        path.write_bytes(damaged)
        torch.load(path, weights_only=True)
        refused(path, r"is not a readable checkpoint: the checksum of .*/data/\d+ is wrong")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.anything"])
def test_no_code_from_a_file_is_run(tmp_path, name, legacy):
    path, trace = tmp_path / name, tmp_path / "trace"
    content = {"model": dict(classifier().state_dict()), "args": Hostile(trace)}
    path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=not legacy))
    refused(path, r"not read because it asks for (posix|nt)\.mkdir, .* if you trust the file")
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the check above can fail


def test_code_in_the_arguments_is_not_run_either(tmp_path):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    torch.save({"model": {}, "args": argparse.Namespace(output_dir=Hostile(trace))}, path)
    refused(path, r"asks for (posix|nt)\.mkdir")
    path.write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    refused(path, r"asks for (posix|nt)\.mkdir")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable checkpoint: ."),
        (b"GIF89a, or some other picture" * 50, "is not a readable checkpoint: ."),
        (torch_bytes([torch.ones(1)]), "holds a list, expected a state_dict"),
        (torch_bytes(torch.ones(1)), "holds a Tensor, expected a state_dict"),
        (torch_bytes({"model": {}}), "is no ConvNeXt, .* got nothing at all$"),
        (torch_bytes({"weight": torch.ones(1)}), "is no ConvNeXt, .* got weight$"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    refused(path, message)


def test_archives_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    refused(path, "is not a readable checkpoint: .")


def test_sound_files_that_do_not_fit(tmp_path):
    torch.save(without(classifier().state_dict(), "stages.0.0.norm.bias"), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "lacks parameters .*: stages.0.0.norm.bias$")
    safetensors.torch.save_file(without(classifier().state_dict(), "stages.1.1."), tmp_path / "b.safetensors")
    refused(tmp_path / "b.safetensors", "does not fit the model: it lacks stages.1.1.dwconv.weight, .*")


def test_the_content_tells_what_a_file_is(tmp_path):
    """Not its name: safetensors called .bin, and the other way round."""
    state = classifier().state_dict()
    (tmp_path / "model.bin").write_bytes(safetensors.torch.save(state))
    torch.save(state, tmp_path / "model.safetensors")
    for name in ("model.bin", "model.safetensors"):
        model = classifier()
        load_checkpoint(model, tmp_path / name)
        assert_same(model.state_dict(), state)


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x03", b"PK"])
def test_safetensors_whose_length_looks_like_another_kind(tmp_path, start):
    """The first bytes are the length of the header, which may be any."""
    state, wanted = classifier().state_dict(), int.from_bytes(start, "little")
    head = safetensors.torch.save(state)
    short = int.from_bytes(head[:8], "little")
    header, rest = head[8 : 8 + short].rstrip(), head[8 + short :]
    padded = header.ljust(wanted if wanted >= len(header) else wanted + (1 << 16))
    (tmp_path / "model").write_bytes(len(padded).to_bytes(8, "little") + padded + rest)
    assert (tmp_path / "model").read_bytes().startswith(start)
    assert_same(dict(read_file(tmp_path / "model")), state)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14854337\n")
    with pytest.raises(ValueError, match="model.pt is not a readable checkpoint: a pointer of Git LFS"):
        load_checkpoint(classifier(), path)
