"""timm's requirements for every registered model, tested on its ConvNeXt V2 models after ``fuse``."""

import pytest
import torch
from helpers.reference_models import timm
from timm.models._features_fx import GraphExtractNet
from timm.optim import create_optimizer_v2

import convnextv2_kernels as ck

from .networks import close

SIZES = ("convnextv2_atto", "convnextv2_tiny")  # 1x1 convolutions, linear layers


def create(size: str, **options) -> torch.nn.Module:
    model = timm.create_model(size, **options)
    depth = sum(ck.models.CONFIGS[size].depths)
    assert len(ck.fuse(model).replaced) == depth
    return model


@pytest.mark.parametrize("size", SIZES)
def test_forward(size):
    model = create(size).eval()
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 1000) and torch.isfinite(logits).all()


@pytest.mark.parametrize("size", SIZES)
def test_backward(size):
    model = create(size, num_classes=42).train()
    logits = model(torch.randn(2, 3, 64, 64))
    logits.backward(torch.randn_like(logits))
    assert logits.shape == (2, 42)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_classifier_and_pooling_can_be_changed(size):
    model = create(size).eval()
    images, width = torch.randn(1, 3, 64, 64), model.num_features
    features = model.forward_features(images)
    assert features.shape == (1, width, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (1, width)
    model.reset_classifier(0)
    assert model(images).shape == (1, width)
    model.reset_classifier(0, "")
    assert model(images).shape == (1, width, 2, 2)
    model.reset_classifier(7, "avg")
    assert model(images).shape == (1, 7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (-1,)])
def test_features_only(size, out_indices):
    model = create(size, features_only=True, out_indices=out_indices).eval()
    maps = model(torch.randn(1, 3, 96, 64))
    assert len(maps) == len(out_indices)
    for features, channels, stride in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert features.shape == (1, channels, 96 // stride, 64 // stride)


@pytest.mark.parametrize("size", SIZES)
def test_fx(size):
    """timm's own graph wrapper, for inference and training."""
    model = create(size, num_classes=10)
    images = torch.randn(1, 3, 64, 64)
    graph = GraphExtractNet(model, ["head"])
    close(graph.eval()(images), model.eval()(images))
    graph.train()(images).backward(torch.randn(1, 10))
    assert all(p.grad is not None for p in graph.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_checkpointing(size):
    model = create(size, num_classes=10).train()
    model.set_grad_checkpointing(True)
    model(torch.randn(1, 3, 64, 64)).backward(torch.randn(1, 10))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_intermediates_and_pruning(size):
    model = create(size).eval()
    images = torch.randn(1, 3, 64, 64)
    _last, maps = model.forward_intermediates(images, indices=(1, 2))
    assert [m.shape[1] for m in maps] == list(ck.models.CONFIGS[size].dims[1:3])
    model.prune_intermediate_layers(indices=(2,), prune_head=True)
    pruned = model.forward_intermediates(images, indices=(1, 2), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, maps, strict=True))


def test_parameter_groups_and_layer_decay():
    """The optimizer factory sees the same parameters as before."""
    plain, fused = timm.create_model(SIZES[0], num_classes=10), create(SIZES[0], num_classes=10)

    def groups(model):
        built = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
        return [(g["lr_scale"], g["weight_decay"], [p.shape for p in g["params"]]) for g in built.param_groups]

    assert groups(fused) == groups(plain)
