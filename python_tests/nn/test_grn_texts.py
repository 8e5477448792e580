"""Parsing and printing GRN variants; errors for invalid ones."""

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels import nn as cnn
from convnextv2_kernels.nn import GRNVariant

from .grn_by_hand import FORMULAS


def test_text_is_canonical_and_parses_back():
    texts = set()
    for variant in (*(GRNVariant(*formula) for formula in FORMULAS), GRNVariant(enabled=False)):
        assert GRNVariant.parse(str(variant)) == variant
        texts.add(str(variant))
    assert len(texts) == 23 and {"default", "none", "l1", "l1,standardize,no-skip", "no-skip"} <= texts
    assert {"affine", "aggregate-only", "normalize-only", "l1,aggregate-only,no-skip"} <= texts
    for layer in ("lrn", "bn", "ln", "se", "cbam"):
        assert str(GRNVariant.parse(layer)) == layer and GRNVariant.parse(layer) == GRNVariant(layer=layer)
    assert GRNVariant.parse("no-skip , inverse,mean") == GRNVariant("mean", "inverse", False)
    assert str(GRNVariant.parse("l2,divisive,skip")) == "default"
    assert GRNVariant.of(GRNVariant("l1")) == GRNVariant.of("l1") and hash(GRNVariant()) == hash(GRNVariant())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "grn must be 'default', 'none', one of lrn, .*, or comma-separated words of l2, .*no-skip, .*got ''"),
        ("l3", "got 'l3'"),
        ("l1,", "got 'l1,'"),
        ("l1,none", "got 'l1,none'"),
        ("default,l1", "got 'default,l1'"),
        ("l1,l2", "at most one of l2, l1, mean, .*got 'l1,l2'"),
        ("inverse,inverse", "at most one of divisive, standardize, inverse"),
        ("skip,no-skip", "at most one of skip, no-skip"),
        ("affine,l1", "at most one of l2, l1, mean, normalize-only, affine, got 'affine,l1'"),
        ("se,no-skip", "got 'se,no-skip'"),
    ],
)
def test_bad_texts_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        cnn.ConvNeXtV2Block(4, grn=text)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="aggregation must be one of l2, l1, mean, none, got 'max'"):
        GRNVariant("max")
    with pytest.raises(ValueError, match="normalizer .*got 'softmax'"):
        GRNVariant(normalizer="softmax")
    with pytest.raises(TypeError, match="skip must be True or False, got 1"):
        GRNVariant(skip=1)
    with pytest.raises(ValueError, match=r"enabled=False leaves GRN out.*got \('l1', 'divisive', True\)"):
        GRNVariant("l1", enabled=False)
    with pytest.raises(TypeError, match="grn must be a string or a GRNVariant, got NoneType"):
        cnn.GlobalResponseNorm(4, variant=None)


def test_bad_inputs_are_refused():
    layer, block = cnn.GlobalResponseNorm(4, variant="l1"), cnn.ConvNeXtV2Block(4, grn="l1")
    other = ck.PatchLayout.from_mask(torch.zeros(1, 1, 1, dtype=torch.bool))
    for module in (layer, block):
        with pytest.raises(ValueError, match="four dimensions"):
            module(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="holds 2 patches, expected 1"):
            module(torch.zeros(2, 1, 1, 4), other)
        with pytest.raises(ValueError, match="expected"):
            module(torch.zeros(2, 1, 1, 5))
        with pytest.raises(TypeError, match="float64"):
            module(torch.zeros(2, 1, 1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="eps must be a number > 0"):
        cnn.GlobalResponseNorm(4, eps=0.0, variant="l1")(torch.zeros(2, 1, 1, 4))
