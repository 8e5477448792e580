import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import images, network

from convnextv2_kernels import PatchLayout
from convnextv2_kernels.analysis import CosineByLayer, Tapped, cosine_by_layer, feature_cosine_distance, tapped


def brute_force(rows: torch.Tensor) -> float:
    """The paper's double sum over the channels of ``[sites, C]``, one pair after the other."""
    maps = rows.double().T
    channels = len(maps)
    total = 0.0
    for i in range(channels):
        for j in range(channels):
            # eps far below the norms here, which only keeps 0 / 0 from being NaN
            total += (1 - F.cosine_similarity(maps[i], maps[j], dim=0, eps=1e-300).item()) / 2
    return total / channels**2


def test_equals_the_double_sum():
    torch.manual_seed(1)
    x = F.gelu(torch.randn(3, 4, 5, 12))
    x[0, ..., 3] = 0  # undefined cosines: 0 with all, themselves included
    x[0, ..., 5] = 0
    x[1, ..., 2] *= 1e-30  # tiny, but with a direction
    result = feature_cosine_distance(x)
    for image in range(3):
        rows = x[image].flatten(0, 1)
        # float64 on both sides: 144 cosines of rounding 1e-16
        assert result.all[image].item() == pytest.approx(brute_force(rows), abs=1e-13)
        live = [c for c in range(12) if (image, c) not in [(0, 3), (0, 5), (1, 2)]]
        assert result.live[image].item() == pytest.approx(brute_force(rows[:, live]), abs=1e-13)
    assert result.dead.tolist() == pytest.approx([2 / 12, 1 / 12, 0])


def test_packed_features_count_visible_sites_only():
    torch.manual_seed(2)
    mask = torch.tensor([[[True, False]], [[False, False]], [[True, True]]])
    layout = PatchLayout.from_mask(mask)
    x = torch.randn(3, 2, 2, 6)
    result = feature_cosine_distance(x, layout)
    assert result.all[0].item() == pytest.approx(brute_force(x[0].flatten(0, 1)), abs=1e-13)
    assert result.all[1].item() == pytest.approx(brute_force(x[1:].flatten(0, 2)), abs=1e-13)
    assert all(math.isnan(values[2]) for values in result)


def test_range():
    one = torch.rand(1, 3, 3, 1)
    alike = one * torch.tensor([1.0, 2.0, 1e-3, 5e3])
    assert feature_cosine_distance(alike).all.item() == pytest.approx(0, abs=1e-12)
    opposed = one * torch.tensor([1.0, -1.0, 2.0, -3.0])
    assert feature_cosine_distance(opposed).all.item() == pytest.approx(0.5, abs=1e-12)
    orthogonal = torch.eye(4).reshape(1, 2, 2, 4)
    assert feature_cosine_distance(orthogonal).all.item() == pytest.approx(0.5 * (1 - 1 / 4))
    nothing = feature_cosine_distance(torch.zeros(1, 2, 2, 4))
    assert nothing.all.item() == 0.5 and nothing.dead.item() == 1 and math.isnan(nothing.live.item())
    huge = torch.rand(1, 2, 2, 4) * 1e38
    assert feature_cosine_distance(huge).all.item() == pytest.approx(feature_cosine_distance(huge / 1e38).all.item())


def test_dead_channels_are_those_of_a_hundredth_of_the_root_mean_square():
    x = torch.ones(1, 4, 4, 4)
    x[..., 3] = 0
    rms = math.sqrt(3 / 4)
    for value, share in ((0.009 * rms, 0.25), (0.0101 * rms, 0.0)):
        x[0, 1, 1, 3] = value
        assert feature_cosine_distance(x).dead.item() == share
        assert feature_cosine_distance(x, dead=0.0).dead.item() == 0


def test_layers_of_a_network_are_averaged_over_images():
    model, batches = network(), [images(3, seed=1), images(2, 32, 96, seed=2)]
    layers = cosine_by_layer(model, batches, tap="grn")
    assert [layer.position for layer in layers] == [0, 0.25, 0.5, 0.75, 1]
    assert [layer.channels for layer in layers] == [32, 32, 32, 64, 64]
    values = [[] for _ in layers]
    for batch in batches:
        for layer in tapped(model, batch, taps=("grn",)):
            values[layer.index] += [brute_force(image.flatten(0, 1)) for image in layer.features]
    for layer, expected in zip(layers, values, strict=True):
        assert layer.images == 5
        # float64 sums of five numbers below 0.5; the deviation comes from a difference of squares
        assert layer.mean == pytest.approx(np.mean(expected), abs=1e-12)
        assert layer.std == pytest.approx(np.std(expected, ddof=1), abs=1e-7)


def test_two_halves_make_the_whole():
    # in float64: a GEMM of few rows may add in another order than one of many
    model, x = network().double(), images(6).double()
    whole, first, second = CosineByLayer(), CosineByLayer(), CosineByLayer()
    for collected, part in ((whole, x), (first, x[:2]), (second, x[2:])):
        for layer in tapped(model, part, taps=("act",)):
            collected.update(layer)
    first.merge(second)
    for one, other in zip(first.result(), whole.result(), strict=True):
        assert one.images == other.images == 6
        # the same values, added in another order
        assert one.mean == pytest.approx(other.mean, abs=1e-13)
        assert one.live_mean == pytest.approx(other.live_mean, abs=1e-13)
        assert one.dead_share == pytest.approx(other.dead_share, abs=1e-13)


def test_bad_input():
    with pytest.raises(ValueError, match=r"features must have shape .*got \[2, 3\]"):
        feature_cosine_distance(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"stages.0.0 \(grn\): features must be finite"):
        CosineByLayer().update(Tapped("stages.0.0", 0, 0, "grn", torch.full((1, 2, 2, 3), torch.nan)))
    with pytest.raises(ValueError, match=r"dead must lie in \[0, 1\), got 2"):
        feature_cosine_distance(torch.ones(1, 2, 2, 3), dead=2)
    with pytest.raises(ValueError, match="tap must be of"):
        cosine_by_layer(network(), [images(1)], tap="x")
