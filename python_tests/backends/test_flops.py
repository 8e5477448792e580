"""FlopCounterMode on our operators: what it counts is what the paper counts, and what runs."""

from math import prod

import pytest
import torch
from conformance.backends import BACKENDS, needs_cpu_kernels, parametrize_backends
from conformance.operators import SAMPLES, Draw, names_on, operator, registered
from conformance.samples import make_sample
from helpers.reference_models import timm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, backends, random_mask
from convnextv2_kernels.backends import _flops
from convnextv2_kernels.ops import _dispatch
from convnextv2_kernels.settings import SAVE_POLICIES, current
from convnextv2_kernels.sizes import CONFIGS

pytestmark = needs_cpu_kernels

# 10^9 multiply-adds at 224 px, as printed in Table 14 of the paper, and at other sides in Table 15
PAPER = {
    "atto": 0.55,
    "femto": 0.78,
    "pico": 1.37,
    "nano": 2.45,
    "tiny": 4.47,
    "base": 15.4,
    "large": 34.4,
    "huge": 115,
}
LARGER = {("nano", 384): 7.21, ("tiny", 384): 13.1, ("base", 384): 45.2, ("large", 384): 101.1} | {
    ("huge", 384): 337.9,
    ("huge", 512): 600.8,
}
KERNELS = {"product", "block_forward"}


def counted(call) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter


def multiply_adds(call) -> float:
    """Of a forward pass, 10^9."""
    return counted(call).get_total_flops() / 2e9


def names(counter: FlopCounterMode) -> set[str]:
    """The operators that were counted."""
    return {str(key).rpartition(".")[2].rstrip("')>") for key in counter.get_flop_counts()["Global"]}


class OnPaper:
    """Networks without weights, which run on our kernels' fakes: huge needs no memory."""

    def __init__(self, create, size: str):
        with torch.device("meta"):
            self._model = create(f"convnextv2_{size}")

    def __enter__(self) -> torch.nn.Module:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.__enter__()
        return self._model.to_empty(device="cpu")

    def __exit__(self, *exc) -> None:
        self._mode.__exit__(*exc)


# -- every operator


def test_every_operator_has_a_formula_or_is_known_to_need_none():
    found = set(registered())
    if backends.triton.load_error() is None:
        _ = backends.REGISTRY["triton"].operators
        from convnextv2_kernels.backends.triton.launch import FUNCTIONS

        found |= FUNCTIONS.keys()
    assert len(found) > 20
    forgotten = found - _flops.FORMULAS.keys() - _flops.WITHOUT_PRODUCTS
    assert not forgotten, f"give these a formula in backends/_flops.py, or a place in WITHOUT_PRODUCTS: {forgotten}"
    assert not _flops.FORMULAS.keys() & _flops.WITHOUT_PRODUCTS


def by_hand(name: str, d: Draw) -> int:
    """Two operations a multiply-add of the sample of an operator in ``conformance/operators.py``."""
    rows, c, h, o = prod(d.map), d.c, d.h, d.o
    conv = rows * c * d.k**2
    first, second, block = rows * c * h, rows * h * o, 2 * rows * c * h
    saved = {"inputs": (1, 1), "normalized": (0, 1), "hidden": (0, 0)}[d.policy]
    counts = {
        "mlp_forward": first + second,
        "mlp_backward": (2 + saved[1]) * first + 2 * second + h * o,
        "gathered_mlp_forward": first + second,
        "gathered_mlp_backward": 3 * first + 2 * second + h * o,
        "block_forward": conv + block,
        "block_backward": (2 + saved[0]) * conv + 2 * block + saved[1] * first + h * c,
        "product": 6 * c * h,
        "product_input_grad": 6 * c * h,
        "product_weight_grad": 40 * c * h,
    }
    return 2 * (conv if name.startswith("depthwise_conv") else counts.get(name, 0))


CASES = [
    pytest.param(backend, name, policy, id=f"{backend.name}-{name}-{policy}")
    for backend in BACKENDS
    for name in names_on(backend)
    for policy in (SAVE_POLICIES if name.endswith(("mlp_backward", "block_backward")) else ("inputs",))
]


@pytest.mark.parametrize(("backend", "name", "policy"), CASES)
def test_an_operator_counts_as_by_hand(backend, name, policy, monkeypatch):
    monkeypatch.setattr(current, "save", policy)
    d = Draw(torch.float32, backend.device, True, backend.name)
    call = operator(name, backend)
    counter = counted(lambda: call(*SAMPLES[name](d)))
    assert counter.get_total_flops() == by_hand(name, d)
    if name in _flops.FORMULAS:
        assert names(counter) == {name}  # and nothing inside it


@pytest.mark.parametrize("save", SAVE_POLICIES)
@pytest.mark.parametrize("at", [("ragged", 2), ("uniform", 2), ("dense_14x9", 2)])
@pytest.mark.parametrize("op", ["pointwise_mlp", "convnextv2_block"])
@parametrize_backends()
def test_a_composite_counts_what_runs_inside(backend, op, at, save, monkeypatch):
    """By PyTorch's own formulas of the products of its schedule, and ours of the convolutions."""
    if backend.interpreted:
        pytest.skip("Triton's fused products are no operators")
    monkeypatch.setattr(current, "save", save)
    dtype = torch.float64  # oneDNN's products of float32 have no formula
    sample = make_sample(op, at=at).cast(dtype, backend.device)

    def run():
        with ck.use_backend(backend.name):
            sample().sum().backward()

    as_operators = counted(run)
    monkeypatch.setattr(_dispatch, "traced", lambda: False)
    inside = counted(run)
    assert as_operators.get_total_flops() == inside.get_total_flops() > 0
    assert any("mm" in name for name in names(inside)) and not any("mm" in name for name in names(as_operators))


@pytest.mark.parametrize("op", ["pointwise_mlp", "convnextv2_block", "downsample", "patch_embed_layer_norm", "linear"])
def test_the_reference_counts_the_same_on_a_dense_map(op):
    sample = make_sample(op, at=("dense_14x9", 2)).cast(torch.float32)
    assert counted(lambda: sample.run("cpu")).get_total_flops() == (
        counted(lambda: sample.run("reference")).get_total_flops()
    )


# -- networks


@pytest.mark.parametrize("size", PAPER)
def test_dense_networks_count_as_the_paper_says(size):
    with OnPaper(ck.models.create_model, size) as model:
        counter = counted(lambda: model(torch.empty(1, 3, 224, 224)))
    assert names(counter) == {*KERNELS, "addmm"}  # the head
    assert counter.get_total_flops() / 2e9 == pytest.approx(PAPER[size], rel=0.01)


@pytest.mark.parametrize(("size", "side"), LARGER)
def test_larger_images_count_as_the_paper_says(size, side):
    with OnPaper(ck.models.create_model, size) as model:
        found = multiply_adds(lambda: model(torch.empty(1, 3, side, side)))
    assert found == pytest.approx(LARGER[size, side], rel=0.01)


@pytest.mark.parametrize("size", PAPER)
def test_fused_networks_count_as_the_paper_says(size):
    with OnPaper(timm.create_model, size) as model:
        report = ck.fuse(model)
        counter = counted(lambda: model(torch.empty(1, 3, 224, 224)))
    assert len(report.replaced) == sum(CONFIGS[f"convnextv2_{size}"].depths)
    assert names(counter) == {"block_forward", "convolution", "addmm"}
    assert counter.get_total_flops() / 2e9 == pytest.approx(PAPER[size], rel=0.01)


def autoencoder_by_hand(size: str, mask: torch.Tensor) -> tuple[int, int]:
    """Multiply-adds of FCMAE's encoder and decoder with 32-pixel patches; every tap of a visible site counts."""
    depths, dims = CONFIGS[f"convnextv2_{size}"]
    visible = int((~mask).sum())
    encoder, before = visible * 64 * 3 * 16 * dims[0], 0
    for depth, width, side in zip(depths, dims, (8, 4, 2, 1), strict=True):
        rows = visible * side * side
        encoder += depth * rows * (49 * width + 2 * 4 * width * width) + rows * 4 * before * width
        before = width
    decoder = visible * before * 512 + mask.numel() * (49 * 512 + 8 * 512**2 + 512 * 32 * 32 * 3)
    return encoder, decoder


@pytest.mark.parametrize("size", PAPER)
def test_packed_networks_count_visible_work(size):
    """The dense count of the paper falls to the share of visible patches: hidden ones cost nothing."""
    mask = random_mask(2, (7, 7), 0.6, torch.Generator().manual_seed(0))
    mask[1, 0] = False  # images of different counts
    layout = PatchLayout.from_mask(mask)
    hidden = layout.complement()
    layout.complement = lambda: hidden  # which of a ragged layout reads numbers
    encoder, decoder = autoencoder_by_hand(size, mask)
    with OnPaper(ck.models.create_fcmae, size) as model:
        images = torch.empty(2, 3, 224, 224)
        assert counted(lambda: model.encode(images, layout)).get_total_flops() == 2 * encoder
        counter = counted(lambda: model(images, layout))
    assert names(counter) == KERNELS
    assert counter.get_total_flops() == 2 * (encoder + decoder)
    share = (~mask).double().mean().item()
    assert encoder / 2e9 == pytest.approx(share * PAPER[size], rel=0.01)  # of each of two images


@pytest.mark.parametrize("fcmae", [False, True])
def test_kernels_count_as_their_fakes_do(fcmae):
    """Forward and backward of atto on real tensors, and compiled."""
    create = ck.models.create_fcmae if fcmae else ck.models.create_model
    kept = torch.arange(38).view(2, 19)
    layout = (PatchLayout.from_kept(kept % 49, (7, 7)),) if fcmae else ()

    def step(model):
        out = model(torch.ones(2, 3, 224, 224), *layout)
        (out[0] if fcmae else out).sum().backward()

    with OnPaper(create, "atto") as model:
        expected = counted(lambda: step(model)).get_total_flops()
    model = create("convnextv2_atto")
    assert counted(lambda: step(model)).get_total_flops() == expected
    assert 2e9 * PAPER["atto"] < expected  # an order of magnitude; the paper has no number of backward


@pytest.mark.thorough
def test_compiled_networks_count_the_same():
    """PyTorch runs them eager in a dispatch mode."""
    model, images = ck.models.create_model("convnextv2_atto"), torch.randn(1, 3, 64, 64)
    eager = counted(lambda: model(images).sum().backward()).get_total_flops()
    compiled = torch.compile(model)
    compiled(images)
    assert counted(lambda: compiled(images).sum().backward()).get_total_flops() == eager


def test_a_layout_that_hides_nothing_counts_as_the_dense_map():
    """Taps on hidden sites count as those on padding do."""
    layout = PatchLayout.from_mask(torch.zeros(2, 3, 3, dtype=torch.bool))
    weight = torch.randn(5, 1, 7, 7)
    packed, dense = torch.randn(18, 2, 2, 5), torch.randn(2, 6, 6, 5)
    conv = ck.ops.submanifold_depthwise_conv2d
    assert multiply_adds(lambda: conv(packed, weight, None, layout)) == multiply_adds(lambda: conv(dense, weight))


def test_an_operator_that_is_defined_in_a_counter_is_counted():
    """As Triton's are, on first use."""
    library = torch.library.Library("convnextv2_kernels_counted", "DEF")
    x, weight = torch.randn(6, 5), torch.randn(7, 5)
    with FlopCounterMode(display=False) as counter:
        library.define("product(Tensor x, Tensor weight) -> Tensor")
        library.impl("product", lambda x, weight: x @ weight.t(), "CompositeExplicitAutograd")
        _flops.register("convnextv2_kernels_counted", "product")
        torch.ops.convnextv2_kernels_counted.product(x, weight)
    assert counter.get_total_flops() == 2 * 6 * 5 * 7
