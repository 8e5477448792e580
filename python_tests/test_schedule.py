"""The chunked schedule: chunks cover the batch, and neither they nor what is saved change the results."""

from __future__ import annotations

import itertools

import pytest
import torch
from conformance.backends import (
    BF16,
    F32,
    F64,
    needs_cpu_kernels,
    parametrize_backends,
    parametrize_backends_and_dtypes,
)
from conformance.layouts import make_layout
from conformance.samples import cotangent_of, make_sample
from conformance.tolerance import check
from helpers.plain_backend import PlainBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, schedule
from convnextv2_kernels.params import MLPBackwardArgs, MLPForwardArgs, MLPOptions, MLPParams, MLPRows, Segments
from convnextv2_kernels.settings import current, override

OPS = ("pointwise_mlp", "convnextv2_block")
PLACES = [("uniform", 4), ("ragged", 4), ("empty_image", 2), ("none_visible", 2), ("dense_14x9", None), ("batch_0", 2)]
HIDDEN = 20


def sample_of(op, at, scope="image"):
    axes = {"at": at, "c": 6, "hidden": HIDDEN, "scope": scope}
    return make_sample(op, **axes | ({"out_c": 6} if op == "pointwise_mlp" else {"k": 7}))


def assert_close(got, expected, factor):
    for name, t in expected.items():
        if t.numel():
            bound = factor * torch.finfo(t.dtype).eps * float(t.abs().max())
            error = float((got[name] - t).abs().max())
            assert error <= bound, f"{name} is off by {error:.3e}, more than {bound:.3e}"


# -- chunks


@settings(max_examples=60)
@given(slots=st.lists(st.integers(0, 6), max_size=6), per_slot=st.sampled_from((1, 4, 16)), budget=st.integers(1, 4000))
def test_chunks_of_ragged_batches_cover_every_row_once(slots, per_slot, budget):
    offsets = torch.tensor([sum(slots[:n]) for n in range(len(slots) + 1)], dtype=torch.int32)
    images = Segments(offsets, per_slot, len(slots))
    parts = schedule.chunks(images, sum(slots) * per_slot, hidden=8, itemsize=4, budget=budget)
    cover(parts, [count * per_slot for count in slots], budget)
    for part in parts:
        assert part.images[1:] == (per_slot, part.n1 - part.n0)
        assert torch.equal(part.images.offsets, offsets[part.n0 : part.n1 + 1])


@settings(max_examples=60)
@given(images=st.integers(0, 7), each=st.integers(0, 40), budget=st.integers(1, 4000))
def test_chunks_of_uniform_batches_cover_every_row_once(images, each, budget):
    parts = schedule.chunks(Segments(None, 1, images), images * each, hidden=8, itemsize=4, budget=budget)
    cover(parts, [each] * images, budget)
    if parts:
        sizes = [part.n1 - part.n0 for part in parts]
        assert max(sizes) - sizes[-1] <= len(parts), "equal chunks, not full ones and a small rest"
        assert [part.images for part in parts] == [Segments(None, 1, size) for size in sizes]


def cover(parts, counts, budget):
    # rows of 8 float32; fewer than half as many rows as columns are never asked for
    most = max(budget // 32, 4)
    assert [n for part in parts for n in range(part.n0, part.n1)] == list(range(len(counts)))
    for part in parts:
        assert (part.r0, part.r1) == (sum(counts[: part.n0]), sum(counts[: part.n1]))
        assert part.r1 - part.r0 <= most or part.n1 - part.n0 == 1, "more than the budget without need"


class Recorder(PlainBackend):
    """Remembers how many rows each hidden tensor had."""

    def __init__(self):
        self.rows = []

    def gelu_grn_linear(self, a, *rest, **named):
        self.rows.append(a.shape[0])
        return super().gelu_grn_linear(a, *rest, **named)


@pytest.mark.parametrize("at", [("uniform", 4), ("ragged", 4)])
def test_hidden_tensors_stay_within_the_budget(at, monkeypatch):
    sample = sample_of("pointwise_mlp", at)
    layout = sample.constants["layout"]
    t = sample.tensors
    recorder = Recorder()
    largest = int(layout.image_offsets.diff().max()) * 16
    monkeypatch.setattr(current, "chunk_bytes", largest * HIDDEN * 8)
    offsets = None if layout.patches_per_image is not None else layout.image_offsets
    batch = MLPRows(t["x"].reshape(-1, 6), None, None, Segments(offsets, 16, layout.num_images), F64)
    params = MLPParams(*(t[name] for name in MLPParams._fields))
    schedule.mlp_forward(recorder, batch, params, None, MLPOptions("gelu", 1e-6, False, "inputs", F64))
    assert len(recorder.rows) > 1 and max(recorder.rows) <= largest
    assert sum(recorder.rows) == layout.num_patches * 16


# -- results


def skip_some(backend, op, dtype):
    """Interpreted kernels take seconds: the block in float32, the MLP in float64."""
    if backend.interpreted and (op == "convnextv2_block") == (dtype == F64):
        pytest.skip(skip_some.__doc__)


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("at", PLACES, ids=lambda at: at[0])
@pytest.mark.parametrize("op", OPS)
@parametrize_backends_and_dtypes((F64, F32, BF16))
def test_chunking_does_not_change_results(backend, dtype, op, at, scope, monkeypatch):
    skip_some(backend, op, dtype)
    sample = sample_of(op, at, scope).rounded(dtype).cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device)
    results = []
    for size in (1, 5000, 1 << 30):
        monkeypatch.setattr(current, "chunk_bytes", size)
        results.append(sample.run(backend.name, cotangent))
    for chunked in results[:2]:
        # parameter gradients add over chunks, and products of other sizes may add in another order
        assert_close(chunked, results[2], factor=16)


@pytest.mark.parametrize("policy", schedule.SAVE_POLICIES)
@pytest.mark.parametrize("at", [("uniform", 4), ("ragged", 2), ("empty_image", 2)], ids=lambda at: at[0])
@pytest.mark.parametrize("op", OPS)
@parametrize_backends_and_dtypes((F64, F32, BF16))
def test_every_save_policy_conforms(backend, dtype, op, at, policy, monkeypatch):
    skip_some(backend, op, dtype)
    monkeypatch.setattr(current, "save", policy)
    monkeypatch.setattr(current, "chunk_bytes", 5000)
    check(sample_of(op, at), backend.name, dtype, backend.device)


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("at", [("uniform", 4), ("ragged", 4)], ids=lambda at: at[0])
@parametrize_backends_and_dtypes((F64, F32))
def test_save_policies_agree(backend, dtype, at, monkeypatch):
    skip_some(backend, "convnextv2_block", dtype)
    sample = sample_of("convnextv2_block", at).rounded(dtype).cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device)
    results = {}
    for policy in schedule.SAVE_POLICIES:
        monkeypatch.setattr(current, "save", policy)
        results[policy] = sample.run(backend.name, cotangent)
    assert_close(results["normalized"], results["inputs"], factor=8)
    assert_close(results["hidden"], results["inputs"], factor=8)


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("at", PLACES, ids=lambda at: at[0])
def test_the_schedule_on_plain_formulas_equals_autograd(at, residual, scope, monkeypatch):
    """The algebra of the schedule, without any kernel: against PyTorch's derivatives of the plain formula."""
    monkeypatch.setattr(current, "chunk_bytes", 4000)
    sample = sample_of("pointwise_mlp", at, scope).cast(F64)
    if not residual:
        sample.tensors["residual"] = None
    cotangent = cotangent_of(sample.run("reference")["out"], F64)
    expected = sample.run("reference", cotangent)

    layout, t = sample.constants["layout"], {k: v if v is None else v.detach() for k, v in sample.tensors.items()}
    drop = sample.constants["drop_path_scale"]
    uniform = layout is None or layout.patches_per_image is not None
    offsets = None if uniform else layout.image_offsets
    per_slot = 1 if layout is None else t["x"].shape[1] * t["x"].shape[2]
    images = t["x"].shape[0] if layout is None else layout.num_images
    settings = (per_slot, images, scope == "batch", "gelu", 1e-6, "inputs", F64, "plain")
    mlp, plain = [t[name] for name in ("w1", "b1", "gamma", "beta", "w2")], PlainBackend()
    forward = MLPForwardArgs(t["x"], *mlp, t["b2"], t["residual"], drop, offsets, *settings)
    out, norms, hidden = schedule.run_mlp_forward(plain, forward)
    backward = MLPBackwardArgs(cotangent, t["x"], *mlp, drop, offsets, norms, hidden, *settings)
    grads = schedule.run_mlp_backward(plain, backward)
    got = dict(zip(("out", "x", "w1", "b1", "gamma", "beta", "w2", "b2"), (out, *grads), strict=True))
    assert_close(got, {name: expected[name] for name in got}, factor=64)


GATHERED_PLACES = [at for at in PLACES if at[1] is not None]


@pytest.mark.parametrize(("ln", "scope"), [(True, "image"), (False, "image"), (True, "batch")])
@pytest.mark.parametrize("at", GATHERED_PLACES, ids=lambda at: at[0])
@parametrize_backends_and_dtypes((F64, F32, BF16))
def test_chunks_of_gathered_rows_give_the_same_results(backend, dtype, at, ln, scope, monkeypatch):
    skip_some(backend, "convnextv2_block" if ln else "pointwise_mlp", dtype)
    sample = make_sample("gathered_pointwise_mlp", at=at, c=6, hidden=HIDDEN, out_c=6, scope=scope, ln=ln)
    sample = sample.rounded(dtype).cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device)
    monkeypatch.setattr(current, "chunk_bytes", 1)
    chunked = sample.run(backend.name, cotangent)
    monkeypatch.setattr(current, "chunk_bytes", 1 << 30)
    assert_close(chunked, sample.run(backend.name, cotangent), factor=16)


@pytest.mark.parametrize("ln", (True, False))
@pytest.mark.parametrize("at", [("uniform", 4), ("ragged", 2), ("empty_image", 2)], ids=lambda at: at[0])
@parametrize_backends_and_dtypes((F64, F32))
def test_one_node_equals_its_parts(backend, dtype, at, ln):
    """Gather, LayerNorm and the MLP one after the other: the same formulas, with one rounding more between them."""
    skip_some(backend, "convnextv2_block" if ln else "pointwise_mlp", dtype)
    sample = make_sample("gathered_pointwise_mlp", at=at, c=6, hidden=HIDDEN, out_c=6, ln=ln)
    sample = sample.cast(dtype, backend.device)
    cotangent = cotangent_of(sample.run(backend.name)["out"], dtype).to(backend.device)
    got = sample.run(backend.name, cotangent)
    t, layout = dict(sample.tensors), sample.constants["layout"]
    with ck.use_backend(backend.name):
        rows = ck.ops.gather_patches(t.pop("x"), layout)
        weight, bias = t.pop("ln_weight"), t.pop("ln_bias")
        rows = rows if weight is None else ck.ops.layer_norm(rows, weight, bias)
        out = ck.ops.pointwise_mlp(rows, **t, **sample.constants)
    leaves = {name: leaf for name, leaf in sample.tensors.items() if leaf is not None}
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    assert_close(got, {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}, factor=64)


@parametrize_backends()
def test_not_a_number_stays_in_its_image(backend, monkeypatch):
    monkeypatch.setattr(current, "chunk_bytes", 1)
    sample = make_sample("gathered_pointwise_mlp", at=("uniform", 2), c=6).cast(F32, backend.device)
    layout = sample.constants["layout"]
    cotangent = cotangent_of(sample.run(backend.name)["out"], F32).to(backend.device)
    clean = sample.run(backend.name, cotangent)
    with torch.no_grad():
        sample.tensors["x"][1] = float("nan")
    dirty = sample.run(backend.name, cotangent)
    others = layout.image_of_slot != 1
    assert torch.equal(dirty["out"][others], clean["out"][others]), "another image changed"
    assert torch.equal(dirty["x"][::2], clean["x"][::2]) and torch.equal(dirty["residual"], clean["residual"])
    assert dirty["out"][~others].isnan().all(), "it disappeared"


# -- what is kept for backward


def saved(sample, backend):
    """Elements of every tensor an op keeps, without its own arguments."""
    arguments = {t.data_ptr() for t in sample.tensors.values() if t is not None and t.numel()}
    kept = []

    def pack(t):
        if t.data_ptr() not in arguments and t.is_floating_point():
            kept.append(t.numel())
        return t

    with ck.use_backend(backend), saved_tensors_hooks(pack, lambda t: t):
        out = sample()
    out.sum().backward()
    return sorted(n for n in kept if n)


@pytest.mark.parametrize(
    ("policy", "op", "rows", "hidden"),
    [
        ("inputs", "convnextv2_block", 0, 0),
        ("normalized", "convnextv2_block", 1, 0),
        ("hidden", "convnextv2_block", 1, 1),
        ("inputs", "pointwise_mlp", 0, 0),
        ("normalized", "pointwise_mlp", 0, 0),
        ("hidden", "pointwise_mlp", 0, 1),
    ],
)
@parametrize_backends()
def test_what_each_policy_keeps(backend, policy, op, rows, hidden, monkeypatch):
    """One norm per image and hidden channel always; normalised rows with 1/std, and hidden activations, as asked."""
    monkeypatch.setattr(current, "save", policy)
    sample = sample_of(op, ("ragged", 4)).cast(F32, backend.device)
    sample.constants["drop_path_scale"] = None
    total = sample.rows
    expected = [3 * HIDDEN] + rows * [total * 6, total] + hidden * [total * HIDDEN]
    assert saved(sample, backend.name) == sorted(expected)


@pytest.mark.thorough("triton")
@pytest.mark.parametrize("policy", schedule.SAVE_POLICIES)
@parametrize_backends()
def test_a_call_may_ask_for_a_policy(backend, policy, monkeypatch):
    """``save`` overrides the setting."""
    other = next(p for p in schedule.SAVE_POLICIES if p != policy)
    sample = sample_of("convnextv2_block", ("ragged", 4)).cast(F32, backend.device)
    monkeypatch.setattr(current, "save", policy)
    expected = saved(sample, backend.name)
    monkeypatch.setattr(current, "save", other)
    assert saved(sample, backend.name) != expected
    sample.constants["save"] = policy
    assert saved(sample, backend.name) == expected


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("submanifold_depthwise_conv2d", lambda rows, images, c: []),
        ("depthwise_conv_layer_norm", lambda rows, images, c: []),
        ("downsample", lambda rows, images, c: []),
        ("patch_embed", lambda rows, images, c: []),
        ("patch_embed_layer_norm", lambda rows, images, c: []),
        ("gather_patches", lambda rows, images, c: []),
        ("scatter_patches", lambda rows, images, c: []),
        ("gathered_pointwise_mlp", lambda rows, images, c: [images * HIDDEN]),
        ("layer_norm", lambda rows, images, c: [rows, rows]),
        ("global_response_norm", lambda rows, images, c: [images * c]),
        ("gelu_grn", lambda rows, images, c: [images * c]),
        ("layer_norm_grn", lambda rows, images, c: [rows, rows, images * c]),
    ],
)
@parametrize_backends()
def test_other_ops_keep_their_input_and_statistics(backend, op, expected):
    gathered = {"hidden": HIDDEN, "drop": False} if op == "gathered_pointwise_mlp" else {}
    sample = make_sample(op, at=("ragged", 4), c=6, **gathered).cast(F32, backend.device)
    layout = make_layout("ragged")
    assert saved(sample, backend.name) == sorted(expected(layout.num_patches * 16, layout.num_images, 6))


def peak_bytes(run) -> int:
    """The most that was allocated at a time, on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(steps))


@needs_cpu_kernels
@pytest.mark.parametrize("ln", (True, False))
def test_gathered_rows_exist_for_a_chunk_only(ln, monkeypatch):
    """Beyond the result, GRN's norms and the gradient of the map, no memory grows with the batch."""
    monkeypatch.setattr(current, "chunk_bytes", 1)
    c, hidden, draw = 16, 64, torch.randn
    shapes = {"w1": (hidden, c), "b1": (hidden,), "gamma": (hidden,), "beta": (hidden,), "w2": (c, hidden), "b2": (c,)}
    shapes |= {"ln_weight": (c,), "ln_bias": (c,)} if ln else {}
    params = {name: draw(shape, requires_grad=True) for name, shape in shapes.items()}

    def beyond(images: int) -> tuple[int, int]:
        layout = PatchLayout.from_kept(torch.arange(24).repeat(images, 1), (7, 7))
        x, out = draw(images, 28, 28, c, requires_grad=True), []
        forward = peak_bytes(lambda: out.append(ck.ops.gathered_pointwise_mlp(x, **params, layout=layout)))
        cotangent = draw(out[0].shape)
        backward = peak_bytes(lambda: out[0].backward(cotangent))
        return forward - 4 * (out[0].numel() + images * hidden), backward - 4 * x.numel()

    with ck.use_backend("cpu"):
        few, many = beyond(4), beyond(12)
    # eight more images: a packed copy of their rows would be 196608 bytes
    assert all(abs(a - b) <= 4096 for a, b in zip(few, many, strict=True)), (few, many)


class Calls(TorchDispatchMode):
    """Operators whose results hold ``numel`` elements or more."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]
        if any(t.numel() >= self.numel and not t._is_view() for t in results):
            self.names.append(func.name().split("::")[1])
        return out


@pytest.mark.parametrize("at", [("uniform", 4), ("ragged", 4), ("dense_7x7", None)])
@parametrize_backends()
def test_layer_norm_grn_forms_no_rows_but_its_results(backend, at):
    """One operator each way; what its kernels hold meanwhile is bounded by csrc/tests/test_rows.cpp."""
    sample = make_sample("layer_norm_grn", at=at, c=6).cast(F32, backend.device)
    inputs = list(sample.tensors.values())
    numel, cotangent = sample.tensors["x"].numel(), torch.randn_like(sample.tensors["x"])
    with ck.use_backend(backend.name), Calls(numel) as forward:
        out = sample()
    with Calls(numel) as backward:
        torch.autograd.grad(out, inputs, cotangent)
    assert (forward.names, backward.names) == (["layer_norm_grn_forward"], ["layer_norm_grn_backward"])


def test_a_new_policy_or_chunk_size_applies_at_once():
    with override(save=None, chunk_bytes=None):
        assert schedule.save_policy("cpu") == "inputs" and schedule.save_policy("cuda") == "hidden"
        assert schedule.chunk_bytes("cuda") > schedule.chunk_bytes("cpu") > 0
        with override(save="normalized", chunk_bytes=123):
            assert schedule.save_policy("cpu") == schedule.save_policy("cuda") == "normalized"
            assert schedule.chunk_bytes("cpu") == 123
        assert schedule.save_policy("cpu") == "inputs", "an override ends with its block"
    for values in ({"save": "everything"}, {"chunk_bytes": 0}):
        with pytest.raises(ValueError, match="must be"), override(**values):
            pass
