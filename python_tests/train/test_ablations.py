"""Ablations train, resume bit for bit and are recorded; GRN dropped or added at fine-tuning; a batch norm in two
processes."""

import json
from pathlib import Path

import pytest
import torch
from helpers.pictures import class_folder
from helpers.training import config_of, lines, losses, run_tiny, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

from convnextv2_kernels.checkpoints import convert_state_dict, load_checkpoint
from convnextv2_kernels.cli import main
from convnextv2_kernels.models import create_fcmae, create_model
from convnextv2_kernels.nn.hidden_layers import hidden_layer
from convnextv2_kernels.train.checkpoint import export_encoder

from .two_processes import join, needs_gloo, spawn

GRNS = ("lrn", "bn", "ln", "se", "cbam", "affine", "aggregate-only", "normalize-only")
SWITCHES = [{"grn": grn} for grn in GRNS] + [
    {"decoder": "unet"},
    {"decoder": "unet-no-skip"},
    {"decoder": "transformer"},
    {"encoding": "dense"},
    {"decoder": "unet", "encoding": "dense", "grn": "cbam"},
]


def name_of(switches):
    return "+".join(switches.values())


@pytest.mark.parametrize("switches", SWITCHES, ids=name_of)
def test_trains_and_resumes_bitwise(switches, tmp_path, sources):
    """Twelve steps at once, or in two parts; the loss falls."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for output, stops in (("whole", (None,)), ("parts", (5, None))):
            (tmp_path / output).mkdir()
            for stop in stops:
                settings = {"max_steps": stop, "lr": 1e-2, "ema_decay": 0.5, "norm_pix_loss": False, **switches}
                model = tiny_model(norm_pix_loss=False, **switches)
                run_tiny(tmp_path / output, sources, model=model, **settings)
    finally:
        torch.set_num_threads(threads)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert losses(whole) == losses(parts)
    values = [loss for _, loss, _ in losses(whole)]
    assert sum(values[-4:]) < 0.97 * sum(values[:4])
    ours, theirs = (torch.load(folder / "checkpoint-12.pt") for folder in (whole, parts))
    for part in ("model", "model_ema"):
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in theirs[part].items())
    assert {**ours["config"], **switches} == ours["config"]
    described = ours["task"]["about"]
    assert all(described.get(name) == value for name, value in switches.items())
    if "grn" in switches:
        with pytest.raises(ValueError, match="which timm does not have"):
            convert_state_dict(ours, "timm")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return class_folder(tmp_path_factory.mktemp("classes") / "data", classes=2, each=6)


def finetune(data, output, *more):
    words = "--recipe default --img-size 32 --epochs 1 --batch-size 5 --workers 0 --device cpu --accumulate 1".split()
    return ["finetune", "--data", str(data), "--output", str(output), *words, *more]


def pretrain(data, output, *more):
    words = "--img-size 64 --epochs 1 --batch-size 4 --workers 0 --device cpu --max-steps 1".split()
    return ["pretrain", "--data", str(data), "--output", str(output), *words, *more]


def told(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_layer_is_fine_tuned_as_it_was_pre_trained(classes, tmp_path, capsys):
    """Files tell the layer; their statistics and weights are taken; another layer is refused."""
    made = tmp_path / "pre"
    assert main(pretrain(classes, made, "--grn", "bn", "--decoder", "unet", "--decoder-width", "32")) == 0
    assert config_of(made)["decoder"] == "unet" and config_of(made)["micro_batch"] == 4
    state = torch.load(made / "checkpoint-1.pt")["model"]
    rate = ["--lr", "1e-30", "--min-lr", "0", "--max-steps", "1"]
    run = tmp_path / "fine"
    assert main(finetune(classes, run, "--init", str(made / "checkpoint-1.pt"), "--grn", "bn", *rate)) == 0
    weights, name = torch.load(run / "checkpoint-1.pt")["model"], "stages.2.3.grn.layer.running_mean"
    assert torch.equal(weights["stages.2.3.pwconv1.weight"], state["encoder.stages.2.3.pwconv1.weight"])
    before = state[f"encoder.{name}"]
    assert before.any() and not torch.equal(before, weights[name])  # of another batch, in training
    classifier = create_model("convnextv2_atto", grn="bn")
    load_checkpoint(classifier, made / "checkpoint-1.pt")
    assert torch.equal(classifier.state_dict()[name], before)
    capsys.readouterr()
    assert main(finetune(classes, tmp_path / "x", "--init", str(made / "checkpoint-1.pt"), "--grn", "ln")) == 1
    assert "was trained with --grn bn, and --grn is ln." in capsys.readouterr().err
    more = ("--grn", "bn", "--init", str(made / "checkpoint-1.pt"))
    assert main(pretrain(classes, tmp_path / "y", *more)) == 1
    assert "has a decoder of --decoder unet, and --decoder is convnext" in capsys.readouterr().err
    unet = (*more, "--decoder", "unet", "--decoder-width", "32")
    assert main(pretrain(classes, tmp_path / "z", *unet)) == 0
    assert "first weights: encoder and decoder of" in capsys.readouterr().out


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """With a GRN that does something, and without one."""
    folder = tmp_path_factory.mktemp("encoders")
    for grn in ("default", "none"):
        torch.manual_seed(1)
        model = create_fcmae("convnextv2_atto", grn=grn)
        if grn == "default":
            for name, parameter in model.named_parameters():
                if "grn" in name:
                    torch.nn.init.normal_(parameter)
        export_encoder(folder / f"{grn}.safetensors", model, "convnextv2_atto")
    return folder


@pytest.mark.parametrize(
    ("change", "file", "grn", "initial"),
    [("drop", "default", "none", 0.0), ("add", "none", "default", 0.0), ("add", "none", "no-skip", 1.0)],
)
def test_grn_dropped_or_added(classes, encoders, tmp_path, capsys, change, file, grn, initial):
    init = encoders / f"{file}.safetensors"
    words = ("--init", str(init), "--grn", grn)
    assert main(finetune(classes, tmp_path / "refused", *words)) == 1
    error = capsys.readouterr().err
    assert f"was trained with --grn {file}, and --grn is {grn}; --init-grn {change} takes" in error
    rate = ["--lr", "1e-30", "--min-lr", "0"]  # the weights at the end are the first
    assert main(finetune(classes, tmp_path / "run", *words, "--init-grn", change, *rate)) == 0
    assert f"GRN {'dropped' if change == 'drop' else 'initial'}" in capsys.readouterr().out
    weights, before = load_file(tmp_path / "run" / "model.safetensors"), load_file(init)
    assert told(tmp_path / "run" / "model.safetensors")["grn"] == grn
    assert config_of(tmp_path / "run")["init_grn"] == change
    for name, tensor in before.items():
        if ".grn." not in name:
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-28)
        else:
            assert (weights[name] - (initial if name.endswith("gamma") else 0)).abs().max() < 1e-28, name


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        ("--init-grn drop --grn none", "--init-grn drop is about the weights of --init, which is missing", 2),
        ("--init {default} --init-grn drop", "--init-grn drop needs --grn none, got --grn default", 2),
        ("--init {none} --init-grn add --grn none", "--init-grn add needs a --grn to add, got --grn none", 2),
        ("--init {none} --init-grn drop --grn none", "was trained with --grn none, so --init-grn drop has no GRN", 1),
        ("--init {default} --init-grn add --grn l1", "--grn default, so --init-grn add has none to add", 1),
        ("--init {default} --init-grn drop --grn none --eval-only", "--init-grn drop is for fine-tuning", 2),
        ("--grn bn --parallel fsdp", "--grn bn keeps running statistics, which --parallel fsdp does not share", 1),
        ("--grn se --backend cpu", "--grn se runs in plain PyTorch only, and --backend is cpu", 1),
    ],
)
def test_what_cannot_be_is_refused(classes, encoders, tmp_path, capsys, words, message, code):
    files = {name: str(encoders / f"{name}.safetensors") for name in ("default", "none")}
    try:
        result = main(finetune(classes, tmp_path, *words.format(**files).split()))
    except SystemExit as stopped:
        result = stopped.code
    assert result == code and message in capsys.readouterr().err


def test_untold_weights_do_not_lose_their_grn_unasked(classes, encoders, tmp_path, capsys):
    """A file of another program does not tell its GRN, but has one."""
    torch.save(dict(load_file(encoders / "default.safetensors")), tmp_path / "plain.pt")
    assert main(finetune(classes, tmp_path / "run", "--init", str(tmp_path / "plain.pt"), "--grn", "none")) == 1
    assert "was trained with --grn default, and --grn is none; --init-grn drop" in capsys.readouterr().err


def _two_processes(rank: int, ports: list[int], data: str, root: str) -> None:
    join(rank, ports[0])
    assert main(finetune(data, Path(root) / "run", "--grn", "bn", "--batch-size", "4", "--lr", "1e-2")) == 0


@needs_gloo
@pytest.mark.thorough
def test_a_batch_norm_in_two_processes_is_evaluated_as_it_is_saved(classes, tmp_path, capsys):
    """Running statistics are those of the first process, in both, when an evaluation reads them."""
    spawn(_two_processes, str(classes), str(tmp_path))
    best = str(tmp_path / "run" / "best.safetensors")
    assert main(finetune(classes, tmp_path / "again", "--init", best, "--grn", "bn", "--eval-only")) == 0
    found = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    (metrics,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert found["images"] == metrics["images"]
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("grn", ("bn", "cbam"))
def test_a_batch_norm_of_one_site_is_refused(grn, classes, tmp_path, capsys):
    one = ("--batch-size", "2", "--accumulate", "2", "--grn", grn)
    for command, more in ((pretrain, ("--decoder-width", "32", "--max-steps", "1")), (finetune, ())):
        assert main(command(classes, tmp_path / command.__name__, *one, *more)) == 1
        text = capsys.readouterr().err
        assert f"error: --grn {grn} trains on a batch of at least 2 visible sites of stride 32" in text
        assert "--batch-size 2 over 2 part(s)" in text
    layer = hidden_layer(8, grn=grn)
    with pytest.raises(ValueError, match=f"grn '{grn}' trains on a batch of at least 2 visible sites .*, got 1"):
        layer(torch.randn(1, 1, 1, 8))
    assert torch.isfinite(layer.eval()(torch.randn(1, 1, 1, 8))).all()
