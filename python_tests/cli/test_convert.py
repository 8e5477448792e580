import subprocess
import sys

import pytest
import safetensors.torch
import torch
from checkpoints.samples import WRITABLE, assert_same, autoencoder, classifier

from convnextv2_kernels import cli
from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint
from convnextv2_kernels.checkpoints.storage import read_checkpoint_file


def convert(*words):
    return cli.main(["convert", *map(str, words)])


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_format_is_written_as_its_code_base_does(tmp_path, capsys, to, suffix):
    state, source, target = autoencoder().state_dict(), tmp_path / "source.pt", tmp_path / f"target{suffix}"
    torch.save({"format": 1, "model": state}, source)
    assert convert(source, target, "--to", to) == 0
    expected = convert_state_dict(state, to)
    if suffix == ".safetensors":
        written = safetensors.torch.load_file(target)
        with safetensors.safe_open(target, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it
    else:
        written = torch.load(target, weights_only=True)
        wrapper = {"timm": None, "transformers": None, "mmpretrain": "state_dict"}.get(to, "model")
        if wrapper:
            assert list(written) == [wrapper]
            written = written[wrapper]
    assert_same(written, expected)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{source}: fcmae names", f"{target}: {to} names, {len(expected)} tensors"]
    if to in ("fcmae", "official-sparse"):
        assert lines[2:] == ["left out: nothing"]
    else:
        assert lines[2].startswith("left out: mask_token, proj.weight, ") and lines[2].endswith(" more")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt", target.name]
    load_checkpoint(classifier(), target)


def test_averaged_weights(tmp_path, capsys):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    averaged = classifier().state_dict()
    torch.save({"model": classifier().state_dict(), "model_ema": averaged}, source)
    assert convert(source, target, "--to", "official", "--ema") == 0
    assert_same(torch.load(target, weights_only=True)["model"], averaged)
    assert convert(target, tmp_path / "other.pt", "--to", "official", "--ema") == 1
    assert capsys.readouterr().err == (
        f"error: {target} has no averaged weights, expected model_ema or state_dict_ema, got model\n"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_grn_stays_known(tmp_path, capsys, suffix):
    source, target = tmp_path / "source.safetensors", tmp_path / f"target{suffix}"
    safetensors.torch.save_file(classifier().state_dict(), source, {"grn": "l1", "grn_scope": "batch", "model": "x"})
    assert convert(source, target, "--to", "official") == 0
    assert read_checkpoint_file(target).settings.items() >= {"grn": "l1", "grn_scope": "batch"}.items()
    with pytest.raises(ValueError, match="trained with the GRN 'l1', and the model has 'default'"):
        load_checkpoint(classifier(), target)
    assert convert(source, target, "--to", "timm", "--force") == 1
    assert "source.safetensors was trained with the GRN 'l1', which timm does not have" in capsys.readouterr().err


def test_a_prefix_is_reported(tmp_path, capsys):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    behind = {f"net.{key}": value for key, value in classifier().state_dict().items()}
    torch.save({"state_dict": behind | {"loss.weight": torch.ones(1)}}, source)
    assert convert(source, target, "--to", "timm") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{source}: official names behind net." and lines[2] == "left out: loss.weight"


def test_overwriting(tmp_path, capsys):
    source, target = tmp_path / "source.safetensors", tmp_path / "target.pth"
    safetensors.torch.save_file(classifier().state_dict(), source)
    target.write_bytes(b"precious")
    assert convert(source, target, "--to", "timm") == 1
    assert capsys.readouterr().err == f"error: {target} exists already; --force overwrites it\n"
    assert target.read_bytes() == b"precious"
    assert convert(source, target, "--to", "timm", "--force") == 0
    assert "stem.0.weight" in torch.load(target, weights_only=True)
    assert convert(source, source, "--to", "timm", "--force") == 0
    assert "stem.0.weight" in safetensors.torch.load_file(source)


def test_errors_are_one_line(tmp_path, capsys):
    source = tmp_path / "source.pt"
    torch.save(classifier().state_dict(), source)
    (tmp_path / "bad.pt").write_bytes(source.read_bytes()[:1000])
    for words, message in (
        ((tmp_path / "none.pt", tmp_path / "a.pt"), "none.pt: there is no such file"),
        ((tmp_path / "bad.pt", tmp_path / "a.pt"), "bad.pt is not a readable checkpoint: "),
        ((source, tmp_path / "a.onnx"), "a.onnx must end in .safetensors, .pt, .pth, .bin"),
        ((source, tmp_path / "none" / "a.pt"), f"cannot write {tmp_path / 'none' / 'a.pt'}: No such file or directory"),
    ):
        assert convert(*words, "--to", "timm") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "source.pt"]


def test_failed_write_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(classifier().state_dict(), source)
    target.write_bytes(b"precious")

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert convert(source, target, "--to", "timm", "--force") == 1
    assert capsys.readouterr().err == f"error: cannot write {target}: No space left on device\n"
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt", "target.pt"]


def test_as_a_program_without_timm_and_transformers(tmp_path):
    source, target = tmp_path / "source.pt", tmp_path / "target.safetensors"
    torch.save(classifier().state_dict(), source)
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('convnextv2_kernels', run_name='__main__', alter_sys=True)\n"
        "finally: assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "convert", str(source), str(target), "--to", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{source}: official names"
    assert "classifier.weight" in safetensors.torch.load_file(target)


def test_usage(capsys):
    with pytest.raises(SystemExit) as end:
        convert("a.pt", "b.pt", "--to", "keras")
    assert end.value.code == 2 and "invalid choice: 'keras'" in capsys.readouterr().err
