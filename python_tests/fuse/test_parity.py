"""A fused network gives the logits and gradients of the original network: float64 to 1e-9, float32 by the 2x rule."""

import copy

import pytest
import torch

import convnextv2_kernels as ck

from .networks import official_model, results_of, timm_model, transformers_model

DEEP = {"depths": (1, 1, 1, 1)}
DIMS = {name.removeprefix("convnextv2_"): config.dims for name, config in ck.models.CONFIGS.items()}

# network -> images' sides: at full depth for two sizes, at one block a stage for all; 224 pixels, and sides that no
# stride divides
CASES = {
    "timm atto 224": (timm_model, (224, 224)),
    "timm atto odd": (timm_model, (75, 118)),
    "timm tiny 224": (lambda: timm_model("convnextv2_tiny"), (224, 224)),
    "timm tiny odd": (lambda: timm_model("convnextv2_tiny"), (75, 118)),
    "transformers atto 224": (lambda: transformers_model((2, 2, 6, 2), DIMS["atto"]), (224, 224)),
    "transformers tiny odd": (lambda: transformers_model((3, 3, 9, 3), DIMS["tiny"]), (75, 118)),
    **{
        f"timm {size} shallow": (lambda size=size: timm_model(f"convnextv2_{size}", **DEEP), (64, 45))
        for size in ("femto", "pico", "nano", "base", "large", "huge")
    },
    "transformers base shallow": (lambda: transformers_model((1, 1, 1, 1), DIMS["base"]), (64, 45)),
    "official": (official_model, (50, 37)),
    # every option that has a fused form
    "timm tanh": (lambda: timm_model(act_layer="gelu_tanh", **DEEP), (64, 45)),
    "transformers tanh": (lambda: transformers_model(hidden_act="gelu_new"), (64, 45)),
    "timm layer scale": (lambda: timm_model(ls_init_value=0.1, **DEEP), (64, 45)),
    "timm no conv bias": (lambda: timm_model("convnextv2_tiny", conv_bias=False, **DEEP), (64, 45)),
    "timm kernels": (lambda: timm_model(kernel_sizes=(3, 5, 9, 11), **DEEP), (64, 45)),
    "timm other MLP": (lambda: timm_model(conv_mlp=False, **DEEP), (64, 45)),
    "timm other eps": (lambda: timm_model(norm_eps=1e-2, **DEEP), (64, 45)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.thorough]
            if name in ("timm tiny 224", "timm large shallow", "timm huge shallow")
            else [],
        )
        for name in CASES
    ],
)
def test_logits_and_gradients(name):
    make, (height, width) = CASES[name]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1 if height == 224 else 2, 3, height, width, generator=generator)
    cotangent = torch.randn(images.shape[0], 10, generator=generator)
    model = make()
    wide = copy.deepcopy(model).double()
    truth = results_of(wide, images.double(), cotangent.double())
    plain = results_of(model, images, cotangent)
    for network in (model, wide):
        report = ck.fuse(network)
        assert report.replaced and not report.skipped
    exact = results_of(wide, images.double(), cotangent.double())
    fused = results_of(model, images, cotangent)
    # the error of a sum over all rows grows like a random walk; so does a sum over the layers
    rows = images.shape[0] * height * width // 16
    allowance = (rows**0.5 + 64) * torch.finfo(torch.float32).eps
    for key, value in truth.items():
        size = float(value.abs().max())
        assert float((exact[key] - value).abs().max()) <= 1e-9 * size, f"{key} in float64"
        error, ordinary = (float((r[key].double() - value).norm()) for r in (fused, plain))
        assert error <= 2 * ordinary + allowance * float(value.norm()), f"{key}: {error:.3e}, PyTorch {ordinary:.3e}"
