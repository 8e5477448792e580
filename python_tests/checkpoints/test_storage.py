import argparse
import io
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from convnextv2_kernels.checkpoints import load_checkpoint
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
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_what_this_library_writes(tmp_path):
    fcmae, model = autoencoder(), classifier()
    average = Average(fcmae, 0.9)
    path = write_checkpoint(tmp_path, 4, gather_state(fcmae, torch.optim.AdamW(fcmae.parameters()), average))
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
        (torch_bytes({"model": {}}), "is no ConvNeXt V2, .* got nothing at all$"),
        (torch_bytes({"weight": torch.ones(1)}), "is no ConvNeXt V2, .* got weight$"),
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


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14854337\n")
    with pytest.raises(ValueError, match="model.pt is not a readable checkpoint: a pointer of Git LFS"):
        load_checkpoint(classifier(), path)
