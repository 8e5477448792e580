"""Bad calls: each gets one sentence that names the argument, its value and what was expected."""

from __future__ import annotations

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, backends, random_kept, random_mask
from convnextv2_kernels.settings import Settings

from .backends import BF16, F16, F32, F64, needs_cpu_kernels
from .layouts import make_layout
from .samples import SPECS, make_sample

CONV, GRN, BLOCK = "submanifold_depthwise_conv2d", "global_response_norm", "convnextv2_block"
GATHERED = "gathered_pointwise_mlp"


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def meta(*shape):
    return torch.zeros(shape, device="meta")


# op, what replaces its good arguments, exception, message. The good samples have the layout "ragged": 13 patches of
# side 2 (8 pixels for patch_embed) in 3 images of a 3x3 grid; C = 5, or 3 for the MLP, downsample and the block; H = 7.
CALLS = [
    # ranks and types
    (CONV, {"x": zeros(13, 2, 5)}, ValueError, r"x has shape \[13, 2, 5\], expected four dimensions \[P, s, s, C\]"),
    (CONV, {"x": zeros(2, 5), "layout": None}, ValueError, r"x has shape \[2, 5\], expected four .*\[N, H, W, C\]"),
    (CONV, {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    (CONV, {"x": zeros(13, 2, 2, 5, dtype=torch.int64)}, TypeError, "x has dtype torch.int64, expected float32"),
    (CONV, {"x": zeros(13, 2, 2, 5, dtype=torch.complex64)}, TypeError, "x has dtype torch.complex64, expected"),
    (CONV, {"weight": zeros(5, 3, 3)}, ValueError, r"weight has shape \[5, 3, 3\], expected \[C, 1, K, K\]"),
    (CONV, {"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ("layer_norm", {"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\], expected \[..., C\]"),
    ("linear", {"weight": zeros(7, 5, 1)}, ValueError, r"weight has shape \[7, 5, 1\], expected \[O, 5\]"),
    ("patch_embed", {"images": zeros(3, 24, 24)}, ValueError, r"images has shape .* expected \[N, in_chans, H, W\]"),
    ("patch_embed", {"weight": zeros(5, 32)}, ValueError, r"weight has shape \[5, 32\], expected \[C, 2, 4, 4\]"),
    ("downsample", {"weight": zeros(5, 12)}, ValueError, r"weight has shape \[5, 12\], expected \[O, 3, 2, 2\]"),
    ("pointwise_mlp", {"w1": zeros(7)}, ValueError, r"w1 has shape \[7\], expected \[hidden, 3\]"),
    ("pointwise_mlp", {"b2": 0.0}, TypeError, "b2 must be a torch.Tensor, got float"),
    # layouts
    (CONV, {"layout": "ragged"}, TypeError, "layout must be a PatchLayout or None, got str"),
    (CONV, {"layout": make_layout("uniform")}, ValueError, "x holds 13 patches, expected 12, .*another batch"),
    (GRN, {"layout": make_layout("uniform")}, ValueError, "x holds 13 patches, expected 12, .*another batch"),
    (BLOCK, {"layout": make_layout("non_square")}, ValueError, "x holds 13 patches, expected 8, .*another batch"),
    (CONV, {"x": zeros(13, 2, 3, 5)}, ValueError, r"x has shape \[13, 2, 3, 5\], expected square packed patches"),
    ("scatter_patches", {"layout": None}, ValueError, "layout must be a PatchLayout, got None"),
    ("gather_patches", {"layout": None}, TypeError, "layout must be a PatchLayout"),
    ("gather_patches", {"x": zeros(2, 6, 6, 5)}, ValueError, r"x has shape \[2, 6, 6, 5\], .*the 3 images of layout"),
    ("gather_patches", {"x": zeros(3, 7, 6, 5)}, ValueError, "x is 7x6 pixels, expected 3s x 3s .*grid 3x3"),
    ("gather_patches", {"x": zeros(3, 6, 12, 5)}, ValueError, "x is 6x12 pixels, expected 3s x 3s .*grid 3x3"),
    ("gather_patches", {"x": zeros(3, 0, 0, 5)}, ValueError, "x is 0x0 pixels, expected 3s x 3s .*grid 3x3"),
    (GATHERED, {"x": zeros(3, 6, 9, 3)}, ValueError, "x is 6x9 pixels, expected 3s x 3s"),
    (GATHERED, {"x": zeros(13, 2, 2, 3)}, ValueError, "x has shape .*the 3 images of layout"),
    (GATHERED, {"layout": None}, TypeError, "layout must be a PatchLayout, got NoneType"),
    (GATHERED, {"layout": make_layout("uniform")}, ValueError, r"residual has shape .*, expected \[12, 2, 2, 3\]"),
    (GATHERED, {"layout": make_layout("non_square")}, ValueError, "x (has shape|is 6x6 pixels, expected)"),
    ("patch_embed", {"images": zeros(2, 2, 12, 12)}, ValueError, "images holds 2 images, expected 3"),
    ("patch_embed", {"images": zeros(3, 2, 18, 18)}, ValueError, "images are 18x18 pixels, expected .*multiple of 4"),
    ("patch_embed", {"images": zeros(3, 2, 13, 12)}, ValueError, "images are 13x12 pixels, expected .*grid 3x3"),
    ("patch_embed", {"images": zeros(3, 2, 8, 3), "layout": None}, ValueError, "images are 8x3 .*sides of at least 4"),
    # devices
    (CONV, {"x": meta(13, 2, 2, 5)}, ValueError, "layout lies on cpu, expected the device of x, meta"),
    (CONV, {"weight": meta(5, 1, 3, 3)}, ValueError, "weight lies on meta, expected the device of the input, cpu"),
    (GRN, {"gamma": meta(5)}, ValueError, "gamma lies on meta, expected the device of the input, cpu"),
    ("pointwise_mlp", {"drop_path_scale": meta(3)}, ValueError, "drop_path_scale lies on meta, expected .*cpu"),
    ("gather_patches", {"x": meta(3, 6, 6, 5)}, ValueError, "layout lies on cpu, expected the device of x, meta"),
    # dtypes
    (CONV, {"weight": zeros(5, 1, 3, 3, dtype=BF16)}, TypeError, "weight has dtype torch.bfloat16, expected .*float32"),
    (CONV, {"x": zeros(13, 2, 2, 5, dtype=F64)}, TypeError, "weight has dtype torch.float32, expected .*float64"),
    ("layer_norm", {"bias": zeros(5, dtype=F64)}, TypeError, "bias has dtype torch.float64, expected torch.float32"),
    (BLOCK, {"beta": zeros(7, dtype=F16)}, TypeError, "beta has dtype torch.float16, expected .*torch.autocast"),
    ("pointwise_mlp", {"residual": zeros(13, 2, 2, 3, dtype=BF16)}, TypeError, "residual has dtype torch.bfloat16"),
    ("scatter_patches", {"fill": zeros(5, dtype=F64)}, TypeError, "fill has dtype torch.float64, expected"),
    # sizes
    (CONV, {"weight": zeros(5, 1, 4, 4)}, ValueError, "weight has kernel size 4, expected an odd K from 3 to 11"),
    (CONV, {"weight": zeros(5, 1, 1, 1)}, ValueError, "weight has kernel size 1, expected an odd K from 3 to 11"),
    (CONV, {"weight": zeros(5, 1, 13, 13)}, ValueError, "weight has kernel size 13, expected an odd K from 3 to 11"),
    (CONV, {"weight": zeros(5, 1, 3, 5)}, ValueError, r"weight has shape \[5, 1, 3, 5\], expected \[C, 1, K, K\]"),
    (CONV, {"weight": zeros(6, 1, 3, 3)}, ValueError, r"weight has shape \[6, 1, 3, 3\], expected \[5, 1, 3, 3\]"),
    (CONV, {"bias": zeros(4)}, ValueError, r"bias has shape \[4\], expected \[5\]"),
    ("depthwise_conv_layer_norm", {"ln_weight": zeros(4)}, ValueError, r"ln_weight has shape \[4\], expected \[5\]"),
    ("layer_norm", {"weight": zeros(1, 5)}, ValueError, r"weight has shape \[1, 5\], expected \[5\]"),
    ("layer_norm", {"x": zeros(4, 0)}, ValueError, r"x has shape \[4, 0\], expected \[..., C\] with C >= 1"),
    (GRN, {"gamma": zeros(6)}, ValueError, r"gamma has shape \[6\], expected 5 elements"),
    ("gelu_grn", {"beta": zeros(1, 4)}, ValueError, r"beta has shape \[1, 4\], expected 5 elements"),
    ("layer_norm_grn", {"ln_bias": zeros(5, 1)}, ValueError, r"ln_bias has shape \[5, 1\], expected \[5\]"),
    ("linear", {"weight": zeros(7, 4)}, ValueError, r"weight has shape \[7, 4\], expected \[7, 5\]"),
    ("linear", {"bias": zeros(5)}, ValueError, r"bias has shape \[5\], expected \[7\]"),
    ("patch_embed", {"weight": zeros(5, 3, 4, 4)}, ValueError, r"weight has shape .* expected \[5, 2, 4, 4\]"),
    ("patch_embed_layer_norm", {"weight": zeros(5, 2, 2, 2)}, ValueError, r"weight has shape .*\[5, 2, 4, 4\]"),
    ("patch_embed_layer_norm", {"ln_weight": zeros(2)}, ValueError, r"ln_weight has shape \[2\], expected \[5\]"),
    ("downsample", {"x": zeros(13, 1, 1, 3)}, ValueError, r"x has shape \[13, 1, 1, 3\], expected sides of at least 2"),
    ("downsample", {"x": zeros(13, 2, 1, 3)}, ValueError, r"x has shape \[13, 2, 1, 3\], expected sides of at least 2"),
    ("downsample", {"weight": zeros(5, 3, 3, 3)}, ValueError, r"weight has shape .*, expected \[5, 3, 2, 2\]"),
    ("convnextv2_block", {"save": "all"}, ValueError, "save must be one of inputs, .* or None, got 'all'"),
    ("downsample", {"bias": zeros(3)}, ValueError, r"bias has shape \[3\], expected \[5\]"),
    ("pointwise_mlp", {"w1": zeros(7, 4)}, ValueError, r"w1 has shape \[7, 4\], expected \[7, 3\]"),
    ("pointwise_mlp", {"b1": zeros(6)}, ValueError, r"b1 has shape \[6\], expected \[7\]"),
    ("pointwise_mlp", {"w2": zeros(3, 6)}, ValueError, r"w2 has shape \[3, 6\], expected \[3, 7\]"),
    ("pointwise_mlp", {"residual": zeros(13, 2, 2, 4)}, ValueError, r"residual has shape .*, expected \[13, 2, 2, 3\]"),
    (GATHERED, {"residual": zeros(3, 6, 6, 3)}, ValueError, r"residual has shape .*, expected \[13, 2, 2, 3\]"),
    (GATHERED, {"ln_weight": None}, ValueError, r"ln_weight must be a tensor \[C\] where ln_bias is given, got None"),
    (GATHERED, {"ln_bias": None}, ValueError, r"ln_bias must be a tensor \[C\] where ln_weight is given, got None"),
    (GATHERED, {"ln_weight": zeros(4)}, ValueError, r"ln_weight has shape \[4\], expected \[3\]"),
    (GATHERED, {"ln_eps": -1.0}, ValueError, "ln_eps must be a finite number >= 0, got -1.0"),
    (BLOCK, {"w2": zeros(4, 7), "b2": zeros(4)}, ValueError, r"w2 has shape \[4, 7\], expected \[3, 7\]"),
    (BLOCK, {"drop_path_scale": zeros(2)}, ValueError, r"drop_path_scale has shape \[2\], expected \[3\], one factor"),
    ("pointwise_mlp", {"drop_path_scale": [1.0] * 3}, TypeError, "drop_path_scale must be a torch.Tensor, got list"),
    (BLOCK, {"drop_path_scale": torch.ones(3, requires_grad=True)}, ValueError, "drop_path_scale requires grad"),
    ("scatter_patches", {"fill": zeros(4)}, ValueError, r"fill has shape \[4\], expected 5 elements"),
    # empty dimensions
    (CONV, {"x": zeros(13, 0, 0, 5)}, ValueError, r"x has shape \[13, 0, 0, 5\], expected"),
    (CONV, {"x": zeros(13, 2, 2, 0), "weight": zeros(0, 1, 3, 3), "bias": None}, ValueError, r"x has shape .*C >= 1"),
    (GRN, {"x": zeros(13, 2, 2, 0), "gamma": zeros(0), "beta": zeros(0)}, ValueError, r"x has shape .*C >= 1"),
    (
        "pointwise_mlp",
        {"w1": zeros(0, 3), "b1": zeros(0), "gamma": zeros(0), "beta": zeros(0), "w2": zeros(3, 0)},
        ValueError,
        r"w1 has shape \[0, 3\], expected",
    ),
    # words and numbers
    (GRN, {"scope": "patch"}, ValueError, "scope must be 'image' or 'batch', got 'patch'"),
    (BLOCK, {"scope": None}, ValueError, "scope must be 'image' or 'batch', got None"),
    (BLOCK, {"act": "relu"}, ValueError, "act must be one of gelu, gelu_tanh, got 'relu'"),
    (BLOCK, {"eps": -1.0, "grn_eps": 1e-6}, ValueError, r"^eps must be a finite number >= 0, got -1\.0"),
    (BLOCK, {"eps": 0.0, "grn_eps": None}, ValueError, "^eps must be a number > 0 for global response"),
    (BLOCK, {"grn_eps": -1.0}, ValueError, r"grn_eps must be a finite number >= 0, got -1\.0"),
    (BLOCK, {"grn_eps": 0.0}, ValueError, "grn_eps must be a number > 0 for global response"),
    (GRN, {"eps": -1e-6}, ValueError, "eps must be a finite number >= 0, got -1e-06"),
    ("layer_norm", {"eps": float("nan")}, ValueError, "eps must be a finite number >= 0, got nan"),
    ("layer_norm_grn", {"ln_eps": -1.0}, ValueError, r"ln_eps must be a finite number >= 0, got -1\.0"),
]


def _name(call) -> str:
    op, changes, *_ = call
    name, value = next(iter(changes.items()))
    text = str(list(value.shape)) + str(value.dtype)[6:] if isinstance(value, torch.Tensor) else str(value)[:24]
    return f"{op}-{name}-{text}"


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize(("op", "changes", "exception", "message"), CALLS, ids=map(_name, CALLS))
def test_bad_calls_of_ops(op, changes, exception, message, backend):
    sample = make_sample(op).cast(F32)
    with ck.use_backend(backend), pytest.raises(exception, match=message) as caught:
        getattr(ck.ops, op)(**sample.tensors | sample.constants | changes)
    assert "\n" not in str(caught.value), "one sentence"


def test_every_op_is_here():
    assert {call[0] for call in CALLS} == set(SPECS)


MASK = torch.zeros(2, 3, 3, dtype=torch.bool)
IDS = torch.tensor([[0, 1], [2, 8]])
LAYOUTS = [
    (lambda: PatchLayout.from_mask(MASK.float()), ValueError, "mask must be a bool tensor .*got torch.float32"),
    (lambda: PatchLayout.from_mask(MASK[0]), ValueError, r"\[N, Gh, Gw\].*got torch.bool of shape \[3, 3\]"),
    (lambda: PatchLayout.from_mask([[True]]), TypeError, "mask must be a torch.Tensor .*got list"),
    (lambda: PatchLayout.from_mask(zeros(2, 0, 3).bool()), ValueError, "grid|Gh"),
    (lambda: PatchLayout.from_kept(IDS.int(), (3, 3)), ValueError, r"ids must be an int64 tensor .*got torch.int32"),
    (lambda: PatchLayout.from_kept(IDS[0], (3, 3)), ValueError, r"\[N, K\], got torch.int64 of shape \[2\]"),
    (lambda: PatchLayout.from_kept([[0]], (3, 3)), ValueError, "ids must be an int64 tensor .*got list"),
    (lambda: PatchLayout.from_kept(IDS, (2, 4)), ValueError, r"ids must lie in 0\.\.7 for grid 2x4, got .*to 8"),
    (lambda: PatchLayout.from_kept(-IDS, (3, 3)), ValueError, r"ids must lie in 0\.\.8 .*from -8 to 0"),
    (lambda: PatchLayout.from_kept(torch.tensor([[1, 1]]), (3, 3)), ValueError, "ids must not repeat a patch"),
    (lambda: PatchLayout.from_kept(IDS, (1, 1)), ValueError, "ids keeps 2 patches per image, but grid 1x1 has only 1"),
    (lambda: PatchLayout.from_kept(IDS, (3, 0)), ValueError, r"grid must be two positive integers .*got \(3, 0\)"),
    (lambda: PatchLayout.from_kept(IDS, (3,)), ValueError, r"grid must be two positive integers .*got \(3,\)"),
    (
        lambda: PatchLayout.from_mask(MASK).neighbour_slots(-1),
        ValueError,
        "radius must be an integer from 0 to 255, got -1",
    ),
    (
        lambda: PatchLayout.from_mask(MASK).neighbour_slots(1.0),
        ValueError,
        r"radius must be an integer from 0 to 255, got 1\.0",
    ),
    (lambda: random_mask(2, (3, 3), ratio=1.5), ValueError, r"ratio must lie between 0 and 1 .*got 1\.5"),
    (lambda: random_kept(2, (3, 3), ratio=-0.1), ValueError, r"ratio must lie between 0 and 1 .*got -0\.1"),
    (lambda: random_mask(2, (0, 3)), ValueError, r"grid must be two positive integers .*got \(0, 3\)"),
    (lambda: random_mask(-1, (3, 3)), ValueError, "num_images"),
    (lambda: ck.use_backend("gpu"), ValueError, "backend must be one of reference, cpu, .*got 'gpu'"),
    (lambda: ck.use_backend(None), ValueError, "backend must be one of .*got None"),
]


@pytest.mark.parametrize(("call", "exception", "message"), LAYOUTS, ids=[message[:40] for _, _, message in LAYOUTS])
def test_bad_layouts_and_backends(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


FORCED = [
    ("cpu", F16, "but its kernels serve float32, float64 and bfloat16, and the input is torch.float16"),
    ("cuda", F32, "was built without CUDA|serve tensors on cuda, and the input lies on cpu"),
    ("triton", F32, "triton is not installed|serve tensors on cuda, and the input lies on cpu"),
]


@pytest.mark.parametrize(("backend", "dtype", "message"), FORCED)
@needs_cpu_kernels
def test_a_forced_backend_that_cannot_serve_says_why(backend, dtype, message):
    if backends.unsupported_reason(backend, "cpu", dtype) is None:
        pytest.skip("emulated and interpreted kernels serve tensors on a CPU")
    sample = make_sample(BLOCK).cast(dtype)
    with ck.use_backend(backend), pytest.raises(RuntimeError, match=f"^{BLOCK} .*{message}"):
        sample()


@pytest.mark.parametrize("op", SPECS)
def test_every_op_refuses_an_absent_backend(op):
    sample = make_sample(op).cast(F32)
    absent = "cuda" if backends.triton.INTERPRETED else "triton"
    # gathered_pointwise_mlp is the gather first, and patch_embed names its own product
    with ck.use_backend(absent), pytest.raises(RuntimeError, match=f"was asked of backend '{absent}', but"):
        sample()


@needs_cpu_kernels
def test_a_forced_backend_refuses_another_device():
    with ck.use_backend("cpu"), pytest.raises(RuntimeError, match="serve tensors on cpu, and the input lies on meta"):
        ck.ops.layer_norm(meta(2, 5), None, None)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CONVNEXTV2_KERNELS_CHUNK_BYTES", "lots", "must be a positive number of bytes, got 'lots'"),
        ("CONVNEXTV2_KERNELS_CHUNK_BYTES", "0", "must be a positive number of bytes, got '0'"),
        ("CONVNEXTV2_KERNELS_CHUNK_BYTES", "-5", "must be a positive number of bytes, got '-5'"),
        ("CONVNEXTV2_KERNELS_CUDA_CONV", "mma", "must be one of fma, tensor, got 'mma'"),
        ("CONVNEXTV2_KERNELS_CUDA_EMULATION", "no.so", "must be the path of a library that exists, got 'no.so'"),
        ("CONVNEXTV2_KERNELS_SAVE", "everything", "must be one of inputs, normalized, hidden, got 'everything'"),
    ],
)
def test_environment_variables(variable, value, message):
    with pytest.raises(ValueError, match=f"{variable} {message}"):
        Settings.read({variable: value})


# -- checks that are remembered: a good call must not let a bad one through


def block(x, params, **options):
    return ck.ops.convnextv2_block(x, *params, **options)


@pytest.fixture
def passed():
    """Arguments of a block after a call with them."""
    c = 6
    shapes = [(c, 1, 7, 7), (c,), (c,), (c,), (4 * c, c), (4 * c,), (4 * c,), (4 * c,), (c, 4 * c), (c,)]
    x, params = torch.randn(2, 4, 4, c), [torch.randn(shape) for shape in shapes]
    block(x, params)
    return x, params


@pytest.mark.parametrize("index", range(10))
def test_a_parameter_on_another_device_after_a_good_call(passed, index):
    x, params = passed
    params[index] = params[index].to("meta")
    with pytest.raises(ValueError, match="lies on meta, expected the device of the input, cpu"):
        block(x, params)


def test_other_bad_arguments_after_a_good_call(passed):
    x, params = passed
    factors = torch.ones(2)
    block(x, params, drop_path_scale=factors)
    with pytest.raises(ValueError, match="drop_path_scale requires grad"):
        block(x, params, drop_path_scale=factors.requires_grad_())
    with pytest.raises(ValueError, match="drop_path_scale has shape"):
        block(x, params, drop_path_scale=torch.ones(3))
    with pytest.raises(ValueError, match="scope must be"):
        block(x, params, scope="images")
    with pytest.raises(TypeError, match="dtype"):
        block(x, [params[0].double(), *params[1:]])


@pytest.mark.parametrize("shape", [(4, 4, 1), (), (1, 4, 4, 1), (2, 4, 4)])
def test_a_mask_of_another_shape(passed, shape):
    x, params = passed
    with pytest.raises(ValueError, match=r"visible has shape .*expected \[2, 4, 4, 1\], one value per site"):
        block(x, params, visible=torch.ones(shape))


def test_symbolic_sizes_are_not_remembered(passed):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    x, params = passed
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(p, static_shapes=True) for p in params]
    with mode:
        assert block(mode.from_tensor(x, static_shapes=False), fakes).dim() == 4
