"""ConvNeXt V1 in training: it learns from a layer scale of 1e-6, resumes exactly, and tells what it is."""

import json

import pytest
import torch
from helpers.pictures import class_folder
from helpers.training import command, config_of, losses, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convnextv2_kernels.analysis import load_network
from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint
from convnextv2_kernels.cli import main
from convnextv2_kernels.models import create_fcmae, create_model
from convnextv2_kernels.sizes import V1_BLOCK, block_of, size_of
from convnextv2_kernels.train import setup
from convnextv2_kernels.train.optim import is_undecayed, layer_ids, parameter_groups

V1 = ("--model", "convnext_atto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return class_folder(tmp_path_factory.mktemp("v1") / "data", each=4)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of V1 that was stopped and resumed."""
    output = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in tests
    assert main(command("pretrain", folder, output, *V1, "--max-steps", "2")) == 0
    assert main(command("pretrain", folder, output, *V1)) == 0
    torch.set_num_threads(threads)
    return output


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main(list(words)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_an_autoencoder_learns_from_a_tiny_layer_scale():
    torch.manual_seed(0)
    model, images = tiny_model(**V1_BLOCK), torch.randn(1, 3, 64, 64).expand(4, -1, -1, -1).contiguous()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=3e-3)
    mask = torch.tensor([[1, 1, 0, 1]]).expand(4, -1)
    first = model(images, mask)[0].item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(images, mask)[0]
        loss.backward()
        optimizer.step()
    scales = {name: p for name, p in model.named_parameters() if name.endswith(".gamma")}
    assert len(scales) == 5 and "decoder.0.gamma" in scales
    assert all((p - 1e-6).abs().max() > 1e-3 for p in scales.values())
    assert loss.item() < 0.8 * first


def test_a_run_resumes_bit_for_bit(folder, finished, tmp_path):
    assert main(command("pretrain", folder, tmp_path, *V1)) == 0
    assert losses(tmp_path) == losses(finished)
    ours, theirs = (load_file(output / "encoder.safetensors") for output in (finished, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_runs_and_weights_tell_that_they_are_v1(finished):
    config = config_of(finished)
    assert (config["model"], config["grn"], config["layer_scale"]) == ("convnext_atto", "none", 1e-6)
    with safe_open(finished / "encoder.safetensors", "pt") as file:
        told = file.metadata()
        names = set(file.keys())
    assert (told["model"], told["grn"], told["layer_scale"]) == ("convnext_atto", "none", "1e-06")
    assert names == set(create_fcmae("convnext_atto").encoder.state_dict())
    load_checkpoint(create_model("convnext_atto"), finished / "encoder.safetensors")


def test_settings_of_v2_have_no_layer_scale(tmp_path, folder, monkeypatch):
    """A checkpoint of before there was one resumes: it has the default."""
    monkeypatch.setattr(setup, "create_fcmae", lambda name, img_size, **changes: tiny_model(grn=changes["grn"]))
    words = ("--grn", "none", "--max-steps")
    assert main(command("pretrain", folder, tmp_path / "a", *words, "2")) == 0
    path = tmp_path / "a" / "checkpoint-2.pt"
    state = torch.load(path)
    assert state["config"].pop("layer_scale") is None and "encoder.stages.0.0.grn.gamma" in state["model"]
    torch.save(state, path)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    del settings["config"]["layer_scale"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    for output in ("a", "b"):
        assert main(command("pretrain", folder, tmp_path / output, *words, "4")) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_finetuning_and_evaluation(folder, finished, tmp_path, capsys):
    init = ("--init", str(finished / "encoder.safetensors"))
    assert main(command("finetune", folder, tmp_path / "a", *V1, *init, "--layer-decay", "0.9")) == 0
    assert "; initial: norm and head" in capsys.readouterr().out
    assert config_of(tmp_path / "a")["layer_scale"] == 1e-6
    best = tmp_path / "a" / "best.safetensors"
    for to in ("official", "torchvision"):  # as others would give it
        target = tmp_path / f"{to}.safetensors"
        save_file(convert_state_dict(load_file(best), to), target)
        words = (
            "finetune",
            "--data",
            str(folder),
            "--init",
            str(target),
            "--eval-only",
            "--img-size",
            "32",
            "--workers",
            "0",
        )
        assert main([*words, *V1, "--output", str(tmp_path / to)]) == 0
    results = [json.loads((tmp_path / to / "evaluation.json").read_text()) for to in ("official", "torchvision")]
    assert results[0]["loss"] == results[1]["loss"]


def test_what_does_not_fit_is_one_sentence(folder, finished, tmp_path, capsys):
    for grn in ("default", "l1"):
        message = refused(capsys, *command("pretrain", folder, tmp_path / "b", *V1, "--grn", grn))
        assert f"--grn {grn} must be none for --model convnext_atto, a ConvNeXt V1, which has no GRN" in message
    assert "must be none" in refused(capsys, *command("finetune", folder, tmp_path / "b", *V1, "--grn", "default"))
    init = ("--init", str(finished / "encoder.safetensors"))
    message = refused(capsys, *command("pretrain", folder, tmp_path / "b", *init))
    assert "this is convnext_atto, --model is convnextv2_atto; give --model convnext_atto" in message
    message = refused(capsys, *command("pretrain", folder, finished, "--model", "convnextv2_atto"))
    assert "model: convnext_atto in the checkpoint, convnextv2_atto now" in message
    assert not (tmp_path / "b").exists()


def test_layer_scale_is_of_its_block_and_does_not_decay():
    with torch.device("meta"):
        model = create_model("convnext_base", num_classes=2)
    assert len(parameter_groups(model, 0.05)) == 2
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            assert is_undecayed(name, parameter) and is_undecayed(name, parameter, "official")
    for kind in ("single", "group"):
        ids = layer_ids(model, kind)
        assert all(ids[name] == ids[f"{name.removesuffix('gamma')}pwconv1.weight"] for name in ids if "gamma" in name)


def test_names_of_sizes():
    assert size_of((3, 3, 9, 3), (96, 192, 384, 768)) == "convnextv2_tiny"
    assert size_of((3, 3, 9, 3), (96, 192, 384, 768), v1=True) == "convnext_tiny"
    assert size_of((3, 3, 27, 3), (352, 704, 1408, 2816), v1=True) is None
    assert block_of("convnext_tiny") == {"grn": "none", "layer_scale": 1e-6} and block_of("convnextv2_tiny") == {}


def test_analyses_take_v1(folder, finished, tmp_path, capsys):
    network = load_network(finished / "encoder.safetensors", "a", "convnext_atto")
    assert network.about["model"] == "convnext_atto" and network.about["grn"] == "none"
    whole = load_network(finished / "checkpoint-6.pt", "a", decoder=True).model
    assert "decoder.0.gamma" in whole.state_dict()
    with pytest.raises(ValueError, match="this is convnext_atto, expected convnextv2_atto"):
        load_network(finished / "encoder.safetensors", "a", "convnextv2_atto")
    timm = tmp_path / "timm.safetensors"
    save_file(convert_state_dict(create_model("convnext_atto").state_dict(), "timm"), timm)
    words = ["--data", str(folder), "--img-size", "32", "--output", str(tmp_path / "out")]
    assert main(["analyze", "cosine", str(finished / "encoder.safetensors"), str(timm), "--random", *words]) == 0
    told = json.loads((tmp_path / "out" / "cosine.json").read_text())
    text = json.dumps(told)
    assert text.count('"model": "convnext_atto"') == 3
