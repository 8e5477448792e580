"""A fused network on every backend: the small one of each library, with each library's block options."""

import copy

import pytest
import torch
from conformance.backends import parametrize_backends

import convnextv2_kernels as ck
from convnextv2_kernels.schedule import SAVE_POLICIES

from .networks import official_model, results_of, small_timm_model, transformers_model

NETWORKS = {
    "timm": lambda: small_timm_model(ls_init_value=0.1, kernel_sizes=(3, 5, 7, 9), conv_bias=False),
    "transformers tanh": lambda: transformers_model(hidden_act="gelu_pytorch_tanh"),
    "official": official_model,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("save", SAVE_POLICIES)
@parametrize_backends(reference=True)
def test_logits_and_gradients(backend, save, name):
    model = NETWORKS[name]().double().to(backend.device)
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 45, 64, dtype=torch.float64, device=backend.device)
    cotangent = torch.randn(2, 10, dtype=torch.float64, device=backend.device)
    expected = results_of(twin, images, cotangent)
    with ck.use_backend(backend.name):
        assert ck.fuse(model, save=save).backend.startswith(backend.name)
        got = results_of(model, images, cotangent)
    for key, value in expected.items():
        assert float((got[key] - value).abs().max()) <= 1e-9 * float(value.abs().max()), key
