"""When a result is right: at most twice as far from the truth as plain PyTorch in the same dtype, plus rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .samples import FEATURES, Sample, cotangent_of

# Long sums: a kernel may add in one chain where plain PyTorch adds in several, or the other way round.
_PRODUCT, _CONV = 8, 4
# How many times a value is rounded on the longest way from an input to an output and back to a gradient: one for each
# operation of the formulas.
ROUNDINGS = {
    "gather_patches": 1,
    "scatter_patches": 1,
    "submanifold_depthwise_conv2d": _CONV,
    "layer_norm": 4,  # mean, deviation, normalised, affine
    "depthwise_conv_layer_norm": 4 + _CONV,
    "global_response_norm": 4,  # square, norm, scale, result
    "gelu_grn": 5,
    "layer_norm_grn": 8,
    "linear": _PRODUCT,
    "patch_embed": _PRODUCT,
    "patch_embed_layer_norm": 4 + _PRODUCT,
    "downsample": 4 + _PRODUCT,
    "pointwise_mlp": 5 + 2 * _PRODUCT,  # GELU and GRN
    "gathered_pointwise_mlp": 9 + 2 * _PRODUCT,  # and LayerNorm
    "convnextv2_block": 9 + _CONV + 2 * _PRODUCT,
}


def floor(op: str, name: str, size: float, dtype: torch.dtype, rows: int) -> float:
    """Error that rounding alone explains in values of the given size.

    Each rounding costs up to one epsilon, and n independent ones the square root of n. A parameter gradient is
    besides a sum of ``rows`` terms in the statistics dtype, whose errors walk in the same way.
    """
    relative = ROUNDINGS[op] ** 0.5 * torch.finfo(dtype).eps
    if name not in ("out", *FEATURES):
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        relative += rows**0.5 * torch.finfo(statistics).eps
    return relative * size


def _largest(t: Tensor) -> float:
    return float(t.abs().max())


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def assert_conforms(
    op: str,
    got: dict[str, Tensor],
    truth: dict[str, Tensor],
    ordinary: dict[str, tuple[float, float]],
    dtype: torch.dtype,
    rows: int,
    computed_in: torch.dtype | None = None,
    times: float = 2.0,
) -> None:
    """Compares output and gradients by name. ``ordinary`` has the errors of plain PyTorch: largest, root mean square.

    ``computed_in`` is the dtype whose rounding counts, where autocast makes it another than that of the results;
    ``times`` how many times the ordinary error is allowed.
    """
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, f"{name} has shape {list(got[name].shape)}, not {list(exact.shape)}"
        assert got[name].dtype == dtype, f"{name} has dtype {got[name].dtype}, not {dtype}"
        if not exact.numel():
            continue
        value = got[name].double().cpu()
        assert torch.isfinite(value).all(), f"{name} is not finite"
        for measure, plain in zip((_largest, _rms), ordinary[name], strict=True):
            allowance = floor(op, name, measure(exact), computed_in or dtype, rows)
            error, bound = measure(value - exact), times * plain + allowance
            assert error <= bound, (
                f"{name}: {measure.__name__[1:]} error {error:.3e} exceeds {bound:.3e} (plain PyTorch {plain:.3e}, "
                f"rounding {allowance:.3e}, {measure.__name__[1:]} value {measure(exact):.3e})"
            )


def errors(plain: dict[str, Tensor], truth: dict[str, Tensor], factor: float = 1.0) -> dict[str, tuple[float, float]]:
    """Largest and root mean square error of each tensor, times ``factor``."""

    def pair(name):
        difference = plain[name].double() - truth[name]
        return (factor * _largest(difference), factor * _rms(difference)) if difference.numel() else (0.0, 0.0)

    return {name: pair(name) for name in truth}


def allowed_times(sample: Sample) -> float:
    """Twice the error of plain PyTorch; eight times where a norm runs over fewer than eight channels, or where the
    features are fewer than eight numbers.

    Such a row may have next to no spread, and is then blown up by up to 1/sqrt(eps): one rounding decides by chance
    how far either side is off. So it does where plain PyTorch's error is that of a few numbers, as in the gradient of
    layer scale, one number a channel.
    """
    if "x" in sample.tensors and sample.tensors["x"].numel() < 8:
        return 8.0
    given = (sample.tensors.get(name) for name in ("ln_weight", "gamma", "layer_scale"))
    normalised = [t.numel() for t in given if t is not None]
    if sample.op == "layer_norm":
        normalised.append(sample.tensors["x"].shape[-1])
    return 8.0 if min(normalised, default=8) < 8 else 2.0


def check(sample: Sample, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that a backend's output and gradients of a sample conform, for a random cotangent."""
    truth, cotangent = _truth(sample, dtype)
    if dtype == torch.float64:
        # plain float64 is the truth itself; its ordinary error is that of float32 on a finer grid, and the truth's
        # own is as large: 3 of them in the bound
        coarse, coarse_cotangent = _truth(sample, torch.float32)
        plain = sample.cast(torch.float32).run("reference", coarse_cotangent)
        ordinary = errors(plain, coarse, 1.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    else:
        ordinary = errors(sample.cast(dtype).run("reference", cotangent), truth)
    got = sample.cast(dtype, device).run(backend, cotangent.to(device))
    assert_conforms(sample.op, got, truth, ordinary, dtype, sample.rows, times=allowed_times(sample))


def _truth(sample: Sample, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The reference in float64 on inputs and a cotangent that ``dtype`` can hold."""
    exact = sample.rounded(dtype).cast(torch.float64)
    cotangent = cotangent_of(exact.run("reference")["out"], dtype)
    return exact.run("reference", cotangent), cotangent
