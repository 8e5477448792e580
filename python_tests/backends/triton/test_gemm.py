"""The fused products, kernel by kernel, against float64 in plain PyTorch: every way of cutting rows into tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance.samples import make_sample

from convnextv2_kernels.backends import triton

pytest.importorskip("triton")

from convnextv2_kernels.backends.triton import gemm_backward, gemm_forward, gemm_tiles, plans
from convnextv2_kernels.backends.triton.patches import gather_patches
from convnextv2_kernels.backends.triton.plans import Tile
from convnextv2_kernels.params import WHOLE_BATCH, MLPGradRows, MLPParams, MLPRows, Places, Segments
from convnextv2_kernels.settings import current

from .available import needs_kernels

F16, F32, F64 = torch.float16, torch.float32, torch.float64
DTYPES = tuple(dtype for dtype in (F32, F16, torch.bfloat16) if dtype in triton.DTYPES)
# name: (slot counts of images, rows of a slot, rows of a tile, whether all slots are images of equal size)
ROWS = {
    "short_last_tile": ((2, 2, 2), 35, 32, True),
    "one_tile_an_image": ((1, 1, 1), 16, 16, True),
    "one_image": ((1,), 53, 16, True),
    "two_images_a_tile": ((1,) * 5, 19, 16, True),
    "three_images_a_tile": ((1,) * 5, 19, 32, True),
    "many_images_a_tile": ((1,) * 11, 5, 16, True),
    "ragged": ((5, 0, 1, 7), 4, 16, False),
}
WIDTHS = ((24, 24, 96), (5, 3, 20), (48, 40, 44))  # C, O, H: whole tiles, less than one, and cut in two


class Case:
    """Random tensors of one kind of rows, and what images they belong to."""

    def __init__(self, name: str, widths: tuple[int, int, int], dtype: torch.dtype):
        counts, per_slot, self.tile, uniform = ROWS[name]
        self.c, self.o, self.h = widths
        self.dtype, self.device = dtype, triton.DEVICE
        rows_of = torch.tensor(counts) * per_slot
        self.rows, self.count = int(rows_of.sum()), len(counts)
        self.owner = torch.arange(self.count).repeat_interleave(rows_of)
        # offsets of a chunk in the middle of a batch: they do not start at zero
        offsets = None if uniform else torch.tensor([3, *(3 + torch.tensor(counts).cumsum(0))], dtype=torch.int32)
        offsets = None if offsets is None else offsets.to(self.device)
        self.images = Segments(offsets, 1 if uniform else per_slot, self.count)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=F64) * scale
        return values.to(self.device, dtype or self.dtype)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), device=self.device).to(self.dtype)

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_zeros(self.count, rows.shape[1]).index_add(0, self.owner, rows)


def close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, roundings: int) -> None:
    """Within as many roundings of the largest value as the way to it has, of dtype."""
    assert got.shape == exact.shape
    error = (got.double().cpu() - exact).abs().max()
    bound = roundings * torch.finfo(dtype).eps * exact.abs().max()
    assert error <= bound, f"off by {float(error):.3e}, more than {float(bound):.3e}"


every_case = [
    pytest.param(name, widths, dtype, id=f"{name}-{widths[0]}-{str(dtype)[6:]}")
    for name in ROWS
    for widths in WIDTHS
    for dtype in DTYPES
    if dtype == F32 or widths[0] == 24
]


@needs_kernels
@pytest.mark.parametrize(("name", "widths", "dtype"), every_case)
@pytest.mark.parametrize("keep", (True, False))
def test_forward(name, widths, dtype, keep):
    case = Case(name, widths, dtype)
    y, w1 = case.draw(case.rows, case.c), case.draw(case.h, case.c, scale=case.c**-0.5)
    w2, b1, b2 = case.draw(case.o, case.h, scale=case.h**-0.5), case.draw(case.h), case.draw(case.o)
    one, tile = keep, Tile(case.tile, 32, 16, 4, 2)
    scale = case.draw(1 if one else case.count, case.h, dtype=F32)
    factors, residual = case.draw(case.count, dtype=F32), case.draw(case.rows, case.o)
    hidden = case.empty(case.rows, case.h)
    tiles = gemm_tiles.partition(case.rows, case.images, case.tile)
    weights = MLPParams(w1, b1, scale, scale, w2, b2)  # gamma and beta have no part in these kernels
    rows = MLPRows(y, residual, factors, case.images, dtype)
    squares = gemm_forward.first_product(rows, weights, "gelu", hidden, keep, tiles, tile)
    act = "gelu" if keep else "none"
    out = gemm_forward.second_product(hidden, act, weights, scale, rows, tiles, tile)

    a = F.linear(y.double(), w1.double(), b1.double()).cpu()
    h = F.gelu(a)
    close(hidden, a if keep else h, dtype, 4)
    close(squares, case.sums(h * h), dtype, 4)
    scaled = h * scale.double().cpu().expand(case.count, -1)[case.owner]
    product = F.linear(scaled, w2.double().cpu(), b2.double().cpu())
    close(out, residual.double().cpu() + factors.double().cpu()[case.owner, None] * product, dtype, 6)


@needs_kernels
@pytest.mark.parametrize(("name", "widths", "dtype"), every_case)
@pytest.mark.parametrize("act", ("gelu", "gelu_tanh"))
def test_backward(name, widths, dtype, act):
    case = Case(name, widths, dtype)
    one = act == "gelu_tanh"
    a, d, z = case.draw(case.rows, case.h), case.draw(case.rows, case.o), case.draw(case.rows, case.c)
    w1, w2 = case.draw(case.h, case.c, scale=case.c**-0.5), case.draw(case.o, case.h, scale=case.h**-0.5)
    count = 1 if one else case.count
    scale, kappa = case.draw(count, case.h, dtype=F32), case.draw(count, case.h, dtype=F32)
    rstd = case.draw(case.rows, dtype=F32).abs()
    segments = WHOLE_BATCH if one else case.images
    g, t = gemm_backward.image_products(a, act, d, w2, segments, 2, Tile(16, 32, 0, 4, 2))
    tiles = gemm_tiles.partition(case.rows, case.images, case.tile, allow_flat=False)
    chunk = MLPGradRows(a, d, rstd, rstd, z, rstd, None, case.images, True)  # sums and norms have no part in it
    rest = (MLPParams(w1, rstd, rstd, rstd, w2, None), act, (scale, kappa), tiles, Tile(case.tile, 32, 0, 4, 2))
    da, dx, sums = gemm_backward.hidden_backward(chunk, *rest)
    dz = gemm_backward.hidden_backward(chunk._replace(z=None, rstd=None), *rest)[1]
    parts = gemm_backward.weight_product(a, act, d, scale, segments, 3, Tile(16, 32, 16, 4, 2))

    owner = torch.zeros_like(case.owner) if one else case.owner
    wide = a.double().cpu().requires_grad_()
    h = F.gelu(wide, approximate="tanh" if one else "none")
    slope = torch.autograd.grad(h.sum(), wide)[0]
    h, d, w1, w2, scale, kappa, z, rstd = (t.detach().double().cpu() for t in (h, d, w1, w2, scale, kappa, z, rstd))
    chosen = F.one_hot(owner, count).double()
    exact = torch.einsum("mn,mh,mo->nho", chosen, h, d)
    close(g.sum(1), exact, dtype, 4)
    close(t.sum(1), torch.einsum("nho,oh->nh", exact, w2), dtype, 4)
    exact_da = (d @ w2 * scale[owner] + h * kappa[owner]) * slope
    close(da, exact_da, dtype, 4)
    close(sums.sum(0), exact_da.sum(0), F32, 16)
    exact_dz = exact_da @ w1
    close(dz, exact_dz, dtype, 4)
    mean, along = exact_dz.mean(1, keepdim=True), (exact_dz * z).mean(1, keepdim=True)
    close(dx, rstd[:, None] * (exact_dz - mean - z * along), dtype, 4)
    close(parts.sum(0), d.t() @ (h * scale[owner]), dtype, 4)


@needs_kernels
@pytest.mark.parametrize(("side", "name"), [(1, "flat"), (4, "image"), (2, "ragged")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_map(side, name, dtype):
    """The first GEMM reads rows at their places in a map of 3x2 patches, the last one writes their gradient there."""
    c, h = 24, 40
    slots = torch.tensor([0, 3, 5, 6, 9, 10] if name != "ragged" else [1, 8, 9, 11], dtype=torch.int32)
    offsets = torch.tensor([4, 5, 8], dtype=torch.int32) if name == "ragged" else None
    device = triton.DEVICE
    images = Segments(None if offsets is None else offsets.to(device), side**2, 2)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    places = Places(slots.to(device), (3, 2), side)
    x = draw(2, 3 * side, 2 * side, c, dtype=F32)  # under autocast the map is wider than the operands
    packed = gather_patches(x, places.patch_of_slot, 3, 2).view(-1, c)
    w1, w2 = draw(h, c), draw(c, h)
    weights, count = MLPParams(w1, draw(h), draw(h), draw(h), w2, draw(c)), places.rows
    tile, tiles = Tile(16, 32, 16, 4, 2), gemm_tiles.partition(count, images, 16)
    results, copied = [], MLPRows(packed.to(dtype), None, None, images, dtype)
    for rows in (copied._replace(x=x, places=places), copied):
        out = torch.empty(count, h, device=device, dtype=dtype)
        results.append((out, gemm_forward.first_product(rows, weights, "gelu", out, False, tiles, tile)))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))

    scales = draw(2, h, dtype=F32), draw(2, h, dtype=F32)
    rstd, d, z = draw(count, dtype=F32).abs(), draw(count, c), draw(count, c)
    chunk = MLPGradRows(draw(count, h), d, rstd, rstd, z, rstd, None, images, True)
    tiles = gemm_tiles.partition(count, images, 16, allow_flat=False)
    for kept in (chunk, chunk._replace(z=None, rstd=None)):
        dx = torch.full((2, 3 * side, 2 * side, c), 7.0, device=device, dtype=dtype)
        expected = gemm_backward.hidden_backward(kept, weights, "gelu", scales, tiles, tile)
        got = gemm_backward.hidden_backward(kept._replace(places=places, dx=dx), weights, "gelu", scales, tiles, tile)
        assert got[1] is dx and torch.equal(got[0], expected[0])
        assert torch.equal(gather_patches(dx, places.patch_of_slot, 3, 2).view(-1, c), expected[1])
        assert int((dx != 7).any(-1).sum()) == count, "another row was written"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (48, (32, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (128, (128, 0)),
        (192, (128, 64)),
        (255, (256, 0)),
        (256, (256, 0)),
    ],
)
def test_a_width_is_cut_into_powers_of_two(width, expected):
    assert gemm_backward.halves(width) == expected
    assert sum(expected) >= width


def test_float32_products_follow_pytorch_s_own_setting():
    with plans.assumed_family("sm_90"):
        try:
            torch.set_float32_matmul_precision("high")
            assert gemm_forward.precision(F32) == "tf32" and gemm_forward.precision(F16) == "ieee"
            torch.set_float32_matmul_precision("highest")
            assert gemm_forward.precision(F32) == "ieee"
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert gemm_forward.precision(F32) == "tf32"
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
    with plans.assumed_family("gfx942"):
        assert gemm_forward.precision(F32) == "ieee"


@needs_kernels
@pytest.mark.parametrize("kind", ROWS)
def test_no_tile_spans_more_images_than_it_says(kind):
    case = Case(kind, WIDTHS[0], F32)
    tiles = gemm_tiles.partition(case.rows, case.images, case.tile)
    starts = [t * case.tile for t in range(-(-case.rows // case.tile))]
    if tiles.kind == "flat":
        spans = [int(case.owner[s : s + case.tile].unique().numel()) for s in starts]
        assert tiles.count == len(starts) and max(spans) <= tiles.span
    else:
        assert tiles.span == 1


@needs_kernels
def test_images_are_the_same_bits_in_any_chunk(monkeypatch):
    """Forward and the gradient of the features: what belongs to an image does not depend on the images beside it."""
    sample = make_sample("convnextv2_block", at=("uniform", 8), c=24)
    dtype = F32 if triton.INTERPRETED else torch.bfloat16
    sample = sample.rounded(dtype).cast(dtype, triton.DEVICE)
    cotangent = torch.randn(sample.tensors["x"].shape).to(triton.DEVICE, dtype)
    results = []
    for size in (1, 1 << 30):
        monkeypatch.setattr(current, "chunk_bytes", size)
        results.append(sample.run("triton", cotangent))
    for name in ("out", "x"):
        assert torch.equal(results[0][name], results[1][name]), name
