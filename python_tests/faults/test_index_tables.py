"""Index tables, sizes and every other argument of the operators are checked before a kernel trusts them: a tampered one
is an error in one sentence, never a signal, an endless loop or a result of memory that nobody wrote."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance.backends import BACKENDS, CPU, F32, marks, needs_cpu_kernels, parametrize_backends
from conformance.layouts import LAYOUTS, make_layout
from conformance.operators import SAMPLES, Draw, operator

import convnextv2_kernels as ck
from convnextv2_kernels import PatchLayout, backends

PYTHON_TESTS = Path(__file__).resolve().parents[1]
FIELDS = ("slot_of_patch", "patch_of_slot", "image_offsets")


def call_all(backend: str, step: int) -> None:
    """Every ``step``-th of the cases of ``hostile_calls.py``, in a process that is allowed to die."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (PYTHON_TESTS.parent, PYTHON_TESTS)))}
    command = [sys.executable, PYTHON_TESTS / "faults" / "hostile_calls.py", backend, "0", str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit code {done.returncode} in {lines[-1:]}\n{done.stderr[-2000:]}"
    wrong = [line for line in lines if "\tWRONG" in line]
    assert not wrong, "\n".join(wrong)
    results = sum(line.endswith("\ta result") for line in lines)
    assert results < len(lines) / 4, f"{results} of {len(lines)} hostile calls had a result"


# the emulated kernels and those of Triton's interpreter are slow
SHORT_STEP = {"cpu": 1, "cuda": 13, "triton": 97}
ALL_STEP = {"cuda": 1, "triton": 11}


@pytest.mark.parametrize("backend", [pytest.param(b.name, marks=marks(b)) for b in BACKENDS])
def test_hostile_arguments(backend):
    call_all(backend, SHORT_STEP[backend])


@pytest.mark.thorough
@pytest.mark.parametrize("backend", [pytest.param(b.name, marks=marks(b)) for b in BACKENDS if b.name in ALL_STEP])
def test_every_hostile_argument(backend):
    call_all(backend, ALL_STEP[backend])


# what the search found first: a signal, a division by zero, a loop without end
FOUND = [
    ("depthwise_conv_forward", "neighbours", lambda t: torch.full_like(t, 10**6)),
    ("depthwise_conv_normalize", "neighbours", lambda t: torch.full_like(t, -2)),
    ("depthwise_conv_backward_weight", "neighbours", lambda t: torch.full_like(t, 2**31 - 1)),
    ("gather_patches", "patch_of_slot", lambda t: t + 27),
    ("scatter_patches", "slot_of_patch", lambda t: t + 1),
    ("patch_pixels", "patch_of_slot", lambda t: t - 10),
    ("gather_patches", "grid_h", lambda n: 0),
    ("scatter_patches", "grid_w", lambda n: 2**40),
    ("patch_pixels", "grid_h", lambda n: 0),
    ("grn_forward", "offsets", lambda t: t.flip(0)),
    ("grn_backward", "offsets", lambda t: t * 10**6),
    ("grn_forward", "segments", lambda n: 2**40),
    ("grn_forward", "rows_per_slot", lambda n: 2**40),
    ("mlp_forward", "images", lambda n: 2**40),
    ("gathered_mlp_forward", "patch_of_slot", lambda t: t + 27),
    ("gathered_mlp_backward", "patch_of_slot", lambda t: t - 10),
    ("gathered_mlp_forward", "grid_h", lambda n: 0),
    ("block_backward", "images", lambda n: 2**40),
    ("block_forward", "neighbours", lambda t: torch.full_like(t, 10**6)),
]
NATIVE_FOUND = [
    ("gather_normalize", "patch_of_slot", lambda t: t + 27),
    ("normalized_backward_put", "patch_of_slot", lambda t: t - 10),
    ("put_patches", "patch_of_slot", lambda t: t + 27),
    ("put_patches", "grid_w", lambda n: 2**40),
    ("gelu_statistics", "segments", lambda n: 2**40),
    ("gelu_scale", "segments", lambda n: 2**40),
    ("mlp_backward_statistics", "segments", lambda n: -1),
    ("mlp_backward_pointwise", "offsets", lambda t: t + torch.arange(t.numel(), dtype=t.dtype)),
]


@pytest.mark.parametrize(
    ("name", "argument", "change"),
    FOUND + NATIVE_FOUND,
    ids=[f"{name}-{argument}-{i}" for i, (name, argument, _) in enumerate(FOUND + NATIVE_FOUND)],
)
@parametrize_backends()
def test_what_was_found(backend, name, argument, change):
    if backend.name == "triton" and any(name == found[0] for found in NATIVE_FOUND):
        pytest.skip("not an operator of Triton")
    _ = backends.get(backend.name).operators
    run = operator(name, backend)
    arguments = list(SAMPLES[name](Draw(F32, backend.device, True, backend.name)))
    at = [a.name for a in run._schema.arguments].index(argument)
    arguments[at] = change(arguments[at])
    with pytest.raises((RuntimeError, ValueError)) as caught:
        run(*arguments)
    text = str(caught.value)
    assert text.startswith("convnextv2_kernels"), text
    # assertions in a kernel, which the emulation has too, name the kernel instead
    assert argument in text or "assertion failed" in text or "the number of patches" in text, text


@needs_cpu_kernels
def test_a_sentence_names_the_entry():
    layout = make_layout("ragged")
    table = layout.patch_of_slot.clone()
    table[4] = 27
    with pytest.raises(RuntimeError, match="^convnextv2_kernels: patch_of_slot holds 27 at 4, expected .* 0 to 26$"):
        torch.ops.convnextv2_kernels.gather_patches(torch.zeros(3, 6, 6, 5), table, 3, 3)


@needs_cpu_kernels
def test_a_result_may_not_overlap_another_argument():
    """In place is fine, a few elements off would be a race."""
    memory = torch.randn(41)
    rows, later = memory[:40].view(8, 5), memory[1:].view(8, 5)
    expected = torch.nn.functional.gelu(rows)
    for out, ok in ((later, False), (rows, True)):
        call = (rows, out, None, False, None, 1, 1)
        if ok:
            torch.ops.convnextv2_kernels.gelu_scale(*call)
        else:
            with pytest.raises(RuntimeError, match="out must not overlap the memory of another argument"):
                torch.ops.convnextv2_kernels.gelu_scale(*call)
    torch.testing.assert_close(rows, expected)


# -- layouts


def fields(layout: PatchLayout) -> dict:
    names = ("grid", *FIELDS, "patches_per_image")
    return {name: copy.deepcopy(getattr(layout, name)) for name in names}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_fields_of_a_layout_make_a_layout(name):
    layout = make_layout(name)
    copies = [PatchLayout(**fields(layout)), pickle.loads(pickle.dumps(layout)), layout.to("cpu"), copy.copy(layout)]
    for same in copies:
        assert same.grid == layout.grid and same.patches_per_image == layout.patches_per_image
        assert all(torch.equal(getattr(same, field), getattr(layout, field)) for field in FIELDS)


def entry(field: str, at: int, value: int):
    def change(values: dict) -> None:
        values[field].view(-1)[at] = value

    return change


def whole(field: str, make):
    def change(values: dict) -> None:
        values[field] = make(values[field])

    return change


def swapped(values: dict) -> None:
    """The last slot of one image and the first of the next change places, in both tables."""
    patches, slots = values["patch_of_slot"], values["slot_of_patch"].view(-1)
    patches[[4, 5]] = patches[[5, 4]]
    slots[patches[4]], slots[patches[5]] = 4, 5


# "ragged": 3 images of 3x3 patches with 5, 1 and 7 visible ones
TAMPERED = [
    (entry("slot_of_patch", 0, 10**6), "slot_of_patch must lie in -1..12, got values from -1 to 1000000"),
    (entry("slot_of_patch", 0, -2), "slot_of_patch must lie in -1..12, got values from -2"),
    (entry("patch_of_slot", 3, 27), r"patch_of_slot must lie in 0\.\.26"),
    (entry("patch_of_slot", 3, -1), r"patch_of_slot must lie in 0\.\.26, got values from -1"),
    (whole("patch_of_slot", lambda t: t.flip(0)), "each other's inverse"),
    (whole("patch_of_slot", torch.zeros_like), "each other's inverse"),
    (whole("slot_of_patch", lambda t: torch.full_like(t, -1)), "each other's inverse"),
    (swapped, "patch_of_slot must be sorted by image"),
    (entry("image_offsets", 0, 1), "image_offsets must rise from 0 to 13"),
    (entry("image_offsets", 1, 7), "image_offsets must rise from 0 to 13"),
    (entry("image_offsets", 3, 12), "image_offsets must rise from 0 to 13"),
    (entry("image_offsets", 1, 4), "patch_of_slot must be sorted by image"),
    (whole("image_offsets", lambda t: t[:-1].clone()), r"image_offsets has shape \[3\], expected \[4\]"),
    (whole("slot_of_patch", lambda t: t[:, :-1].contiguous()), r"slot_of_patch has shape \[3, 8\], expected \[N, 9\]"),
    (whole("patch_of_slot", lambda t: t[:, None]), r"patch_of_slot has shape \[13, 1\], expected \[P\]"),
    (whole("patch_of_slot", lambda t: t.long()), "patch_of_slot must be a contiguous int32 tensor, got torch.int64"),
    (whole("slot_of_patch", lambda t: t.t().contiguous().t()), "slot_of_patch must be a contiguous int32 tensor"),
    (whole("slot_of_patch", lambda t: t.to("meta")), "patch_of_slot lies on cpu, expected the device of slot_of_patch"),
    (whole("slot_of_patch", lambda t: t.tolist()), "slot_of_patch must be a torch.Tensor, got list"),
    (whole("slot_of_patch", lambda t: t.to_sparse()), "slot_of_patch is torch.sparse_coo, expected a dense tensor"),
    (whole("patches_per_image", lambda n: 4), "patches_per_image is 4, expected None or"),
    (whole("patches_per_image", lambda n: True), "patches_per_image is True, expected None or"),
    (whole("grid", lambda g: (0, 9)), r"grid must be two positive integers .*got \(0, 9\)"),
    (whole("grid", lambda g: (3.0, 3)), r"grid must be two positive integers .*got \(3\.0, 3\)"),
    (whole("grid", lambda g: 9), "grid must be two positive integers .*got 9"),
    (whole("grid", lambda g: (2, 4)), r"slot_of_patch has shape \[3, 9\], expected \[N, 8\]"),
]


@pytest.mark.parametrize(("change", "message"), TAMPERED, ids=[str(i) for i in range(len(TAMPERED))])
def test_tampered_layouts(change, message):
    values = fields(make_layout("ragged"))
    change(values)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        PatchLayout(**values)
    assert "\n" not in str(caught.value)
    # the same out of a pickle, whose state is not the constructor's
    layout = PatchLayout.__new__(PatchLayout)
    with pytest.raises((ValueError, TypeError), match=message):
        layout.__setstate__(values)


def test_a_uniform_layout_has_equal_counts():
    values = fields(make_layout("uniform"))
    values["image_offsets"][1] += 1
    with pytest.raises(ValueError, match=r"image_offsets must rise from 0 to 12, the number of patches \(4 an image\)"):
        PatchLayout(**values)


@pytest.mark.parametrize("state", ({}, [], {"grid": (3, 3)}))
def test_states_that_are_none(state):
    with pytest.raises(ValueError, match="the state of a PatchLayout must hold grid, slot_of_patch"):
        PatchLayout.__new__(PatchLayout).__setstate__(state)


@pytest.mark.parametrize("name", (*FIELDS, "grid", "num_images", "num_patches", "patches_per_image", "_neighbours"))
def test_attributes_cannot_be_replaced(name):
    layout = make_layout("ragged")
    with pytest.raises(AttributeError, match=f"^{name} of a PatchLayout cannot be replaced"):
        setattr(layout, name, getattr(layout, name))


def test_cached_neighbours_are_not_pickled():
    layout = make_layout("ragged")
    layout.neighbour_slots(1).fill_(10**6)
    assert torch.equal(pickle.loads(pickle.dumps(layout)).neighbour_slots(1), make_layout("ragged").neighbour_slots(1))


@parametrize_backends(reference=True)
@pytest.mark.parametrize("field", FIELDS)
def test_tables_changed_in_place(field, backend):
    """Nobody looks at a layout again, but the operators do."""
    if backend.device != "cpu":
        pytest.skip("a GPU asserts in a debug build only")
    layout = make_layout("ragged", backend.device)
    getattr(layout, field).view(-1)[-1] = 10**6
    x = torch.randn(13, 2, 2, 5)
    calls = [lambda: layout.to("cpu")]
    if field == "slot_of_patch" and backend.name != "reference":
        calls.append(lambda: ck.ops.submanifold_depthwise_conv2d(x, torch.randn(5, 1, 3, 3), None, layout))
        calls.append(lambda: ck.ops.scatter_patches(x, layout))
    if field == "patch_of_slot":
        calls.append(lambda: ck.ops.gather_patches(torch.randn(3, 6, 6, 5), layout))
        calls.append(lambda: ck.ops.patch_embed(torch.randn(3, 2, 24, 24), torch.randn(5, 2, 4, 4), None, layout))
    if field == "image_offsets" and backend.name != "reference":
        calls.append(lambda: ck.ops.global_response_norm(x, torch.ones(5), torch.ones(5), layout))
    for call in calls:
        with ck.use_backend(backend.name), pytest.raises((ValueError, RuntimeError, IndexError)):
            call()


def test_a_mask_without_values():
    with pytest.raises(ValueError, match="mask lies on meta, without values to count; from_kept builds"):
        PatchLayout.from_mask(torch.zeros(2, 3, 3, dtype=torch.bool, device="meta"))


@needs_cpu_kernels
def test_fakes_refuse_tensors_of_two_devices():
    """PyTorch asks a fake for the result as soon as one argument has no data."""
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="all tensors must lie on one device, got cpu, meta"):
        torch.ops.convnextv2_kernels.layer_norm_forward(x, torch.ones(5, device="meta"), None, 1e-6)
    y = torch.ops.convnextv2_kernels.layer_norm_forward(x.to("meta"), None, None, 1e-6)[0]
    assert y.is_meta and y.shape == x.shape


def test_the_cpu_backend_is_under_test():
    assert CPU in BACKENDS
