"""Random state_dicts of a tiny ConvNeXt V2, and those of the official sparse code, made element by element."""

import torch
from torch import nn

from convnextv2_kernels.models import FCMAE, ConvNeXtV2

DEPTHS, DIMS, CLASSES = (1, 2, 1, 1), (8, 16, 24, 32), 5
WRITABLE = ("official", "official-sparse", "fcmae", "timm", "transformers", "mmpretrain")
DENSE = ("official", "timm", "transformers", "mmpretrain")


def randomize(model):
    """Redraws every parameter, including GRN and biases; LayerNorm's are around 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
            if parameter.dim() == 1:
                parameter.add_(1)
    return model


def classifier(**kwargs):
    return randomize(ConvNeXtV2(num_classes=CLASSES, depths=DEPTHS, dims=DIMS, **kwargs))


def autoencoder():
    return randomize(FCMAE(DEPTHS, DIMS, img_size=64, decoder_depth=2, decoder_embed_dim=12))


def without(state_dict, *prefixes):
    return {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}


def encoder_of(state_dict):
    """The dense encoder alone, as in the official FCMAE files."""
    return without(state_dict, "norm.", "head.")


def official_sparse(fcmae):
    """The names, shapes and kernel order that the official FCMAE saves; offset kw * K + kh, one number at a time."""
    sparse = {}
    for key, value in fcmae.items():
        owner, _, leaf = key.rpartition(".")
        layer = owner.rpartition(".")[2]
        if not key.startswith("encoder.") or owner.startswith("encoder.downsample_layers.0."):
            sparse[key] = value
        elif layer.startswith("pwconv"):
            sparse[f"{owner}.linear.{leaf}"] = value
        elif layer == "norm" or (layer == "0" and "downsample_layers" in owner):
            sparse[f"{owner}.ln.{leaf}"] = value
        elif layer == "grn" or leaf == "bias":
            sparse[key] = value.reshape(1, -1)
        else:
            out, inputs, side, _ = value.shape
            kernel = value.new_empty(side * side, inputs, out)
            for kh in range(side):
                for kw in range(side):
                    for channel in range(inputs):
                        kernel[kw * side + kh, channel] = value[:, channel, kh, kw]
            sparse[f"{owner}.kernel"] = kernel[:, 0] if layer == "dwconv" else kernel
    return sparse


def module_of(state_dict):
    """A module with these parameters, of a code base that is not installed."""
    root = nn.Module()
    for key, value in state_dict.items():
        *path, leaf = key.split(".")
        module = root
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        module.register_parameter(leaf, nn.Parameter(torch.randn_like(value)))
    return root


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].shape == value.shape and actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key
