"""Other engines as variants: against stand-ins that keep to each library's interface, and real ones where installed.

An adapter that confuses the order of coordinates, taps or rows fails the check on a stand-in; the check has to see it.
"""

import re
import sys

import pytest
import torch
from helpers.sparse_engines import FAKES, Fault, shuffled

from bench.ops.cases import SPECS
from bench.ops.engine_adapters import row_orders, site_coordinates
from bench.ops.engines import available, engine_variants
from bench.ops.measure import OpCase, pack
from convnextv2_kernels import random_mask

BY_NAME = {spec.name: spec for spec in SPECS}
SIDE = 2
# Neither images nor patches are square, and the last image has no visible patch.
MASK = torch.cat([random_mask(2, (2, 3), 0.5, torch.Generator().manual_seed(0)), torch.ones(1, 2, 3, dtype=torch.bool)])
LABELS = {
    "SparseConvNet": "SparseConvNet groups=C",
    "MinkowskiEngine": "MinkowskiEngine 0.5.4 channelwise",
    "spconv": "spconv 2.3.8 dense-channel (other operation)",
}


def make_case(name="depthwise_conv", dtype=torch.float32, mask=MASK):
    return OpCase(BY_NAME[name], 6, SIDE, mask, dtype, seed=1)


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins in the place of all three libraries, each with a fault or none; returns the faults."""

    def put(**kinds):
        faults = {name: Fault(kinds.get(name)) for name in FAKES}
        for name, fake in FAKES.items():
            for module, value in fake(faults[name]).items():
                monkeypatch.setitem(sys.modules, module, value)
        return faults

    return put


def test_coordinates_are_those_of_the_packed_rows():
    n, gh, gw = MASK.shape
    grids = torch.meshgrid(torch.arange(n), torch.arange(gh * SIDE), torch.arange(gw * SIDE), indexing="ij")
    expected = pack(torch.stack(grids, dim=-1), MASK).flatten(0, 2)
    assert torch.equal(site_coordinates(MASK, SIDE), expected)


def test_orders_map_rows_there_and_back():
    ours = site_coordinates(MASK, SIDE)
    theirs = ours[shuffled(len(ours))]
    there, back = row_orders(ours, theirs.int())
    assert torch.equal(ours[there], theirs)
    assert torch.equal(theirs[back], ours)
    assert row_orders(ours, ours.int()) is None
    with pytest.raises(ValueError, match="not the .* visible ones"):
        row_orders(ours, torch.cat([theirs[:-1], theirs[:1]]))


def test_what_is_not_installed_is_named(monkeypatch):
    for package in ("sparseconvnet", "MinkowskiEngine", "spconv"):
        monkeypatch.setitem(sys.modules, package, None)
    expected = {
        "SparseConvNet": "sparseconvnet is not installed",
        "MinkowskiEngine": "MinkowskiEngine is not installed",
        "spconv": "spconv is not installed",
    }
    assert available() == expected
    assert engine_variants(make_case()) == ({}, expected)


def test_an_import_that_fails_says_how(install, monkeypatch, tmp_path):
    install()
    for package, line in (("sparseconvnet", "import no_such_dependency"), ("MinkowskiEngine", "raise OSError('lib')")):
        monkeypatch.delitem(sys.modules, package)
        (tmp_path / f"{package}.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    reasons = available()
    missing = "ModuleNotFoundError: No module named 'no_such_dependency'"
    assert reasons["SparseConvNet"] == f"import of sparseconvnet fails with {missing}"
    assert reasons["MinkowskiEngine"] == "import of MinkowskiEngine fails with OSError: lib"
    assert reasons["spconv"] is None


def test_right_engines_pass_with_maps_built_once(install):
    faults = install()
    variants, reasons = engine_variants(make_case())
    assert reasons == {}
    assert {label: variant.comparable for label, variant in variants.items()} == {
        label: name != "spconv" for name, label in LABELS.items()
    }
    for variant in variants.values():
        variant.forward_backward()
    assert {name: fault.built for name, fault in faults.items()} == dict.fromkeys(FAKES, 1)


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("taps", "CorrectnessError: .*C=6 s=2: . of 4 results disagree"),
        ("rows", "CorrectnessError: .*C=6 s=2: . of 4 results disagree"),
        ("numbers", "CorrectnessError: .*C=6 s=2: . of 4 results disagree"),
        ("sites", "ValueError: the engine holds"),
        ("raises", "RuntimeError: this engine is broken"),
    ],
)
def test_a_faulty_engine_is_left_out_and_the_others_stay(install, name, kind, reason):
    install(**{name: kind})
    variants, reasons = engine_variants(make_case())
    assert set(variants) == set(LABELS.values()) - {LABELS[name]}
    assert set(reasons) == {name}
    assert re.match(reason, reasons[name])


def test_only_visible_float32_depthwise_cases_have_peers(install):
    install()
    assert engine_variants(make_case("layer_norm")) == ({}, {})
    assert engine_variants(make_case(dtype=torch.bfloat16)) == ({}, {})
    nothing = make_case(mask=torch.ones_like(MASK))
    assert engine_variants(nothing) == ({}, dict.fromkeys(FAKES, "the case has no visible site"))


@pytest.mark.parametrize(
    ("name", "module"),
    [("SparseConvNet", "sparseconvnet"), ("MinkowskiEngine", "MinkowskiEngine"), ("spconv", "spconv.pytorch")],
)
@pytest.mark.parametrize(("width", "side"), [(5, 1), (8, 8)])
def test_real_engines_pass_the_gate_and_give_the_same_again(name, module, width, side):
    pytest.importorskip(module, exc_type=ImportError)
    case = OpCase(BY_NAME["depthwise_conv"], width, side, MASK, torch.float32, seed=1)
    variants, reasons = engine_variants(case)
    assert name not in reasons
    (variant,) = (variant for label, variant in variants.items() if label.startswith(name))
    (first, first_grads), (again, again_grads) = variant.forward_backward(), variant.forward_backward()
    # One thread, the same program and the same maps: nothing may depend on how often it ran.
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))
