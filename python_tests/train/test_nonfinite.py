"""A number that is not finite stops the run, and the first tensor that holds one is named."""

import pytest
import torch
from helpers.training import run_tiny, tiny_model

from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import FCMAE
from convnextv2_kernels.train.nonfinite import first_gradient, first_in_forward


class _Broken(FCMAE):
    """NaN in what enters at the third step."""

    calls = 0

    def forward(self, images, mask=None):
        self.calls += 1
        return super().forward(images * float("nan") if self.calls >= 3 else images, mask)


class _NoGradient(FCMAE):
    """A finite loss with a gradient that is not: the square root at zero."""

    def forward(self, images, mask=None):
        loss, pred, mask = super().forward(images, mask)
        return loss + (self.mask_token * 0).sum().sqrt(), pred, mask


def test_first_tensor_that_is_not_finite_is_named(tmp_path, sources):
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"step 3 .*the output of encoder\.downsample_layers\.0 \(PatchEmbed\)"):
        run_tiny(tmp_path, sources, model=tiny_model(kind=_Broken))
    with pytest.raises(UserError, match=r"the gradient is not finite.*the gradient of mask_token \[1, 16, 1, 1\]"):
        run_tiny(tmp_path / "b", sources, model=tiny_model(kind=_NoGradient))
    model = tiny_model()
    with torch.no_grad():
        model.encoder.stages[1][0].pwconv1.weight[3, 2] = float("inf")
    name = r"parameter encoder\.stages\.1\.0\.pwconv1\.weight \[32, 8\]: 1 infinite of 256 values"
    with pytest.raises(UserError, match=name):
        run_tiny(tmp_path / "c", sources, model=model)


def test_overflow_names_the_layer_where_it_begins(tmp_path, sources):
    model = tiny_model()
    with torch.no_grad():
        model.encoder.downsample_layers[2][1].weight.fill_(3e38)  # finite, but its products are not
    name = r"step 1 .*the output of encoder\.downsample_layers\.2 \(\w+\) .* values, while its inputs reach [\d.]+\."
    with pytest.raises(UserError, match=name) as caught:
        run_tiny(tmp_path, sources, model=model)
    assert "parameter " not in str(caught.value) and "No checkpoint had been written yet" in str(caught.value)
    assert not list(tmp_path.glob("checkpoint-*"))


class _Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.steep = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.second(self.first(x).tanh()) + self.steep.sqrt()


def test_report_counts_what_is_not_finite():
    model, x = _Chain(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert first_in_forward(model, lambda: model(x).mean()) is None
    x[1, 2], hooks = float("inf"), sum(len(m._forward_hooks) for m in model.modules())
    found = first_in_forward(model, lambda: model(x).mean())
    assert found == "the output of first (Linear) [5, 4]: 4 infinite of 20 values, while its inputs reach inf"
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks  # none is left behind
    x[1, 2] = 0.5
    assert first_in_forward(model, lambda: model(x).mean() * float("nan")) == "the loss itself: 1 NaN of 1 values"
    model(x).backward(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    # backward reaches `second` last of all: the root at zero alone has a gradient that is not finite
    assert first_gradient(model).startswith("the gradient of steep [2]: 2 infinite")
    with torch.no_grad():
        model.second.weight[0, 1] = float("nan")
    found = first_in_forward(model, lambda: model(x).mean())
    assert found == "parameter second.weight [2, 4]: 1 NaN of 8 values"
