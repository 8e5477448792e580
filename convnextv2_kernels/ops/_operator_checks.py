"""What the composite operators and the products accept, each in a function of its name: more than the ops check, which
build most of these arguments themselves."""

from __future__ import annotations

from torch import Tensor

from .. import schedule
from ..backends import _contracts as contract
from ..backends._contracts import expect
from ..dtypes import FLOAT_DTYPES, statistics_dtype
from ..params import (
    BlockBackwardArgs,
    BlockForwardArgs,
    GatheredMLPBackwardArgs,
    GatheredMLPForwardArgs,
    MLPBackwardArgs,
    MLPForwardArgs,
)
from ._checks import check_act, check_float

GatheredArgs = GatheredMLPForwardArgs | GatheredMLPBackwardArgs
RowsArgs = MLPForwardArgs | MLPBackwardArgs | BlockForwardArgs | BlockBackwardArgs
AnyArgs = GatheredArgs | RowsArgs


def _tensor(t: Tensor | None, name: str, x: Tensor, numel: int | None = None) -> None:
    """A dense tensor of floats with data, on the device of x."""
    if t is None:
        return
    check_float(t, name)
    expect(t.device == x.device, f"{name} must lie on the device of the features, {x.device}, got {t.device}")
    # a freed storage leaves sizes without data
    expect(t.numel() == 0 or t.data_ptr() != 0, f"{name} has the shape {list(t.shape)}, but no memory")
    fits = numel is None or t.numel() == numel
    expect(fits, f"{name} has shape {list(t.shape)}, expected {numel} elements")


def _matrix(t: Tensor, name: str, x: Tensor, rows: int | None, columns: int | None) -> None:
    _tensor(t, name, x)
    fits = t.dim() == 2 and rows in (None, t.shape[0]) and columns in (None, t.shape[1])
    want = ", ".join("any" if side is None else str(side) for side in (rows, columns))
    expect(fits, f"{name} has shape {list(t.shape)}, expected [{want}]")


def _rows(t: Tensor, name: str, columns: int | None = None) -> int:
    _tensor(t, name, t)
    fits = t.dim() >= 2 and t.shape[-1] >= 1 and columns in (None, t.shape[-1])
    expect(fits, f"{name} has shape {list(t.shape)}, expected [..., {'C' if columns is None else columns}]")
    return t.numel() // t.shape[-1]


def _same_rows(t: Tensor, name: str, x: Tensor, rows: int, columns: int) -> None:
    _tensor(t, name, x)
    expect(_rows(t, name, columns) == rows, f"{name} has shape {list(t.shape)}, expected {rows} rows")


def _settings(a: AnyArgs) -> None:
    check_act(a.act)
    contract.check_eps(a.grn_eps, "grn_eps")
    save = a.options.save
    expect(save in schedule.SAVE_POLICIES, f"save must be one of {', '.join(schedule.SAVE_POLICIES)}, got {save!r}")
    expect(a.dtype in FLOAT_DTYPES, f"dtype must be float32, float64, bfloat16 or float16, got {a.dtype}")


def _mlp(a: RowsArgs, width: int) -> int:
    """Settings, rows and what forward and backward share; returns the number of rows."""
    _settings(a)
    rows = _rows(a.x, "x", width)
    _weights(a, width)
    contract.segments(a.offsets, a.x, rows, a.rows_per_slot, a.images, "images")
    _tensor(a.factors, "factors", a.x, a.images)
    return rows


def _weights(a: AnyArgs, width: int) -> None:
    _matrix(a.w1, "w1", a.x, None, width)
    hidden = a.w1.shape[0]
    expect(hidden >= 1, f"w1 has shape {list(a.w1.shape)}, expected [hidden, {width}] with hidden >= 1")
    for name in ("b1", "gamma", "beta"):
        _tensor(getattr(a, name), name, a.x, hidden)
    _matrix(a.w2, "w2", a.x, None, hidden)


def _saved(a: MLPBackwardArgs | BlockBackwardArgs, rows: int) -> None:
    hidden = a.w1.shape[0]
    _matrix(a.norms, "norms", a.x, 1 if a.batch_scope else a.images, hidden)
    _matrix(a.hidden, "hidden", a.x, None, hidden)
    _matrix(a.hidden, "hidden", a.x, a.hidden.shape[0] and rows, hidden)
    ok = a.norms.dtype == statistics_dtype(a.dtype) and a.hidden.dtype == a.dtype
    expect(ok, f"norms and hidden are {a.norms.dtype} and {a.hidden.dtype}, expected those of a call in {a.dtype}")


def mlp_forward(a: MLPForwardArgs) -> None:
    rows = _mlp(a, a.x.shape[-1] if a.x.dim() else 1)
    _tensor(a.b2, "b2", a.x, a.w2.shape[0])
    if a.residual is not None:
        _same_rows(a.residual, "residual", a.x, rows, a.w2.shape[0])


def mlp_backward(a: MLPBackwardArgs) -> None:
    rows = _mlp(a, a.x.shape[-1] if a.x.dim() else 1)
    _same_rows(a.dout, "dout", a.x, rows, a.w2.shape[0])
    _saved(a, rows)


def _gathered(a: GatheredArgs) -> int:
    """Returns the number of visible rows."""
    _settings(a)
    contract.check_eps(a.eps)
    _rows(a.x, "x")
    contract.gather_patches(a.x, a.patch_of_slot, a.grid_h, a.grid_w)
    width, images = a.x.shape[-1], a.x.shape[0]
    _weights(a, width)
    expect((a.ln_weight is None) == (a.ln_bias is None), "ln_weight and ln_bias must both be tensors or both be None")
    _tensor(a.ln_weight, "ln_weight", a.x, width)
    _tensor(a.ln_bias, "ln_bias", a.x, width)
    rows = a.places.rows
    contract.segments(a.offsets, a.x, rows, a.segments.rows_per_slot, images, "images")
    _tensor(a.factors, "factors", a.x, images)
    return rows


def gathered_mlp_forward(a: GatheredMLPForwardArgs) -> None:
    rows = _gathered(a)
    _tensor(a.b2, "b2", a.x, a.w2.shape[0])
    if a.residual is not None:
        _same_rows(a.residual, "residual", a.x, rows, a.w2.shape[0])


def gathered_mlp_backward(a: GatheredMLPBackwardArgs) -> None:
    rows = _gathered(a)
    _same_rows(a.dout, "dout", a.x, rows, a.w2.shape[0])
    _matrix(a.norms, "norms", a.x, 1 if a.batch_scope else a.x.shape[0], a.w1.shape[0])
    want = statistics_dtype(a.dtype)
    expect(a.norms.dtype == want, f"norms is {a.norms.dtype}, expected {want}, that of a call in {a.dtype}")


def _block(a: BlockForwardArgs | BlockBackwardArgs) -> int:
    contract.check_eps(a.eps)
    expect(a.x.dim() == 4, f"x has shape {list(a.x.shape)}, expected four dimensions [maps, H, W, C]")
    width = a.x.shape[-1]
    rows = _mlp(a, width)
    _tensor(a.dw_weight, "dw_weight", a.x)
    fits = a.dw_weight.dim() == 4 and tuple(a.dw_weight.shape[:2]) == (width, 1)
    expect(fits, f"dw_weight has shape {list(a.dw_weight.shape)}, expected [{width}, 1, K, K]")
    for name in ("dw_bias", "ln_weight", "ln_bias"):
        _tensor(getattr(a, name), name, a.x, width)
    _matrix(a.w2, "w2", a.x, width, a.w1.shape[0])
    return rows


def block_forward(a: BlockForwardArgs) -> None:
    _block(a)
    _tensor(a.b2, "b2", a.x, a.w2.shape[0])


def block_backward(a: BlockBackwardArgs) -> None:
    rows = _block(a)
    _same_rows(a.dout, "dout", a.x, rows, a.x.shape[-1])
    _saved(a, rows)
    saved = a.z.dim() != 1  # or an empty vector
    _tensor(a.z, "z", a.x, a.x.numel() if saved else 0)
    _tensor(a.rstd, "rstd", a.x, rows if saved else 0)
    ok = a.z.dtype == a.dtype and a.rstd.dtype == statistics_dtype(a.x.dtype)
    expect(ok, f"z and rstd are {a.z.dtype} and {a.rstd.dtype}, expected those of a call in {a.dtype}")


def _operands(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    for t, name in zip((x, y), names, strict=True):
        _matrix(t, name, x, None, None)
    expect(x.dtype == y.dtype, f"{names[1]} is {y.dtype}, expected the dtype of {names[0]}, {x.dtype}")


def product(a) -> None:
    _operands(a.x, a.weight, ("x", "weight"))
    _matrix(a.weight, "weight", a.x, None, a.x.shape[1])
    _tensor(a.bias, "bias", a.x, a.weight.shape[0])


def product_input_grad(a) -> None:
    _operands(a.grad, a.weight, ("grad", "weight"))
    _matrix(a.weight, "weight", a.grad, a.grad.shape[1], None)


def product_weight_grad(a) -> None:
    _operands(a.grad, a.x, ("grad", "x"))
    _matrix(a.x, "x", a.grad, a.grad.shape[0], None)


__all__ = [
    "block_backward",
    "block_forward",
    "gathered_mlp_backward",
    "gathered_mlp_forward",
    "mlp_backward",
    "mlp_forward",
    "product",
    "product_input_grad",
    "product_weight_grad",
]
