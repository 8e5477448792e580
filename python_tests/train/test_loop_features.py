"""What the loop offers besides steps: parts, averages, clipping, scalars, the report of what is not finite."""

import copy
import json

import pytest
import torch
from helpers.reference_models import timm

from convnextv2_kernels.cli import main
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.train.average import Average
from convnextv2_kernels.train.optim import make_optimizer, parameter_groups, set_lr
from convnextv2_kernels.train.pretrain_task import PretrainTask
from convnextv2_kernels.train.trainer import Spread, Storage, train

from .conftest import CONFIG, run_tiny, tiny_model
from .test_trainer import losses


def stir(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_parts_add_up_to_the_whole(tmp_path, sources):
    for name, accumulate in (("whole", 1), ("parts", 4)):
        (tmp_path / name).mkdir()
        settings = {"batch_size": 4, "precision": "float64", "split": Spread(accumulate=accumulate)}
        run_tiny(tmp_path / name, sources, **settings)
    whole, parts = (torch.tensor([loss for _, loss, _ in losses(tmp_path / name)]) for name in ("whole", "parts"))
    # float64, only the order of sums differs
    torch.testing.assert_close(parts.double(), whole.double(), rtol=1e-6, atol=0)
    a, b = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("whole", "parts"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-13)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-11)


def test_average_is_that_of_timm():
    model = tiny_model()
    average = Average(model, 0.9)
    theirs = timm.utils.ModelEmaV3(copy.deepcopy(model), decay=0.9, foreach=False)
    for seed in range(5):
        stir(model, seed)
        average.update(model)
        theirs.update(model)
    for name, expected in theirs.module.named_parameters():
        torch.testing.assert_close(average.tensors[name], expected.detach())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.applied(model):
        for ours, expected in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(ours, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_average_survives_a_resume_bitwise(tmp_path, sources):
    for name, stops in (("whole", (None,)), ("resumed", (3, None))):
        (tmp_path / name).mkdir()
        for stop in stops:
            run_tiny(tmp_path / name, sources, max_steps=stop, ema_decay=0.7)
    whole, resumed = (torch.load(tmp_path / name / "checkpoint-12.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed["model_ema"][name]) for name, tensor in whole["model_ema"].items())
    assert any(not torch.equal(tensor, whole["model"][name]) for name, tensor in whole["model_ema"].items())


def test_clipping_bounds_the_step(tmp_path, sources):
    """Adam's first moments after one step are 0.1 times the gradient, so their norm is 0.1 times the bound."""
    run_tiny(tmp_path, sources, max_steps=1, clip_grad=1e-3, precision="float64")
    state = torch.load(tmp_path / "checkpoint-1.pt")["optimizer"]["state"]
    norm = torch.stack([entry["exp_avg"].norm() for entry in state.values()]).norm()
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # PyTorch adds 1e-6 to the norm it divides by
    assert json.loads((tmp_path / "log.jsonl").read_text())["grad_norm"] > 1e-2


def test_scalars_of_a_resumed_run_have_each_step_once(tmp_path, sources):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from convnextv2_kernels.data.images import CropDataset

    def run(stop):
        task = PretrainTask(tiny_model(), CropDataset(sources, CONFIG.img_size, CONFIG.seed), CONFIG)
        return train(task, Storage(tmp_path, save_every=2, tensorboard=True), max_steps=stop)

    run(3)
    (tmp_path / "checkpoint-3.pt").unlink()  # as if killed before it was written: step 3 is done again
    run(5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5]
    assert [p.value for p in points] == pytest.approx([loss for _, loss, _ in losses(tmp_path)], rel=1e-6)
    assert {"lr", "grad_norm", "images_per_second"} <= set(events.Tags()["scalars"])


class _Broken(type(tiny_model())):
    """NaN in what enters at the third step."""

    calls = 0

    def forward(self, images, mask=None):
        self.calls += 1
        return super().forward(images * float("nan") if self.calls >= 3 else images, mask)


class _NoGradient(type(tiny_model())):
    """A finite loss with a gradient that is not: the square root at zero."""

    def forward(self, images, mask=None):
        loss, pred, mask = super().forward(images, mask)
        return loss + (self.mask_token * 0).sum().sqrt(), pred, mask


def other(kind):
    model = tiny_model()
    model.__class__ = kind
    return model


def test_first_tensor_that_is_not_finite_is_named(tmp_path, sources):
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"step 3 .*the output of encoder\.downsample_layers\.0 \(PatchEmbed\)"):
        run_tiny(tmp_path, sources, model=other(_Broken))
    with pytest.raises(UserError, match=r"the gradient is not finite.*the gradient of mask_token \[1, 16, 1, 1\]"):
        run_tiny(tmp_path / "b", sources, model=other(_NoGradient))
    model = tiny_model()
    with torch.no_grad():
        model.encoder.stages[1][0].pwconv1.weight[3, 2] = float("inf")
    name = r"parameter encoder\.stages\.1\.0\.pwconv1\.weight \[32, 8\]: 1 infinite of 256 values"
    with pytest.raises(UserError, match=name):
        run_tiny(tmp_path / "c", sources, model=model)


def test_official_decay_takes_what_ours_spares():
    model = tiny_model()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(model, 0.05, "official")[0]["params"]}
    ours = {names[id(p)] for p in parameter_groups(model, 0.05)[0]["params"]}
    more = decayed - ours
    assert ours < decayed and {"mask_token", "encoder.stages.0.0.grn.gamma", "decoder.0.grn.beta"} <= more
    assert all(name == "mask_token" or ".grn." in name for name in more)


def test_layers_scale_the_rate():
    weight = torch.nn.Parameter(torch.ones(2))
    other_ = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.0, "lr_scale": 0.25}, {"params": [other_], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, 1.0, (0.9, 0.999))
    set_lr(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.8]


@pytest.mark.parametrize("words", ["--grn l1", "--grn none --decoder-depth 2 --decoder-width 32"])
def test_ablations_reach_the_model(photos, tmp_path, words):
    common = ["--data", str(photos), "--img-size", "64", "--batch-size", "4", "--epochs", "1", "--workers", "0"]
    for name, encoding in (("sparse", "sparse"), ("dense", "masked_dense")):
        more = ["--precision", "float64", "--encoding", encoding, "--lr", "1e-3", *words.split()]
        assert main(["pretrain", *common, "--output", str(tmp_path / name), *more]) == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())["config"]
    assert config["encoding"] == "masked_dense" and config["grn"] == words.split()[1]
    state = torch.load(tmp_path / "dense" / "checkpoint-2.pt")["model"]
    assert ("decoder.1.dwconv.weight" in state) == ("--decoder-depth" in words)
    ours, theirs = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("sparse", "dense"))
    # float64 through sixteen blocks; the second step follows an AdamW step, whose quotient of roundings is coarser
    assert ours == pytest.approx(theirs, rel=1e-7) and ours[0] == pytest.approx(theirs[0], rel=1e-12)
