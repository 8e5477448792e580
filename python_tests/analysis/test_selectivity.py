import math

import numpy as np
import pytest
import torch
from helpers.networks import images, network

from convnextv2_kernels import PatchLayout
from convnextv2_kernels.analysis import (
    ClassSelectivity,
    Tapped,
    class_selectivity_index,
    selectivity_by_layer,
    selectivity_density,
    tapped,
)

LABELS = torch.tensor([0, 2, 0, 3, 3, 3, 2])  # no image of class 1


def directly(activations: np.ndarray, labels: np.ndarray, eps: float = 0.0) -> list[float]:
    """The definition, unit by unit, from one activation per image and unit."""
    indices = []
    for unit in activations.T:
        means = [unit[labels == label].mean() for label in np.unique(labels)]
        best = int(np.argmax(means))
        others = np.mean([m for i, m in enumerate(means) if i != best])
        total = means[best] + others + eps
        indices.append((means[best] - others) / total if total else 0.0)
    return indices


@pytest.mark.parametrize("tap", ["block", "act"])
@pytest.mark.parametrize(("rectify", "eps"), [("relu", 0.0), ("abs", 0.0), ("abs", 0.3), ("none", 0.0)])
def test_equals_the_direct_computation(tap, rectify, eps):
    model, x = network(), images(7)
    batches = [(x[:3], LABELS[:3]), (x[3:4], LABELS[3:4]), (x[4:], LABELS[4:])]
    found = selectivity_by_layer(model, batches, 5, tap, rectify, eps)
    rectifier = {"relu": lambda a: np.maximum(a, 0), "abs": np.abs, "none": lambda a: a}[rectify]
    for layer, result in zip(tapped(model, x, taps=(tap,)), found, strict=True):
        activations = rectifier(layer.features.double().numpy()).mean((1, 2))
        expected = np.array(directly(activations, LABELS.numpy(), eps))
        # features of the same image differ by float32 rounding between batches of other sizes; the ratio magnifies it
        # where the denominator is small
        np.testing.assert_allclose(result.index_of_unit.numpy(), expected, rtol=2e-4, atol=2e-5)
        assert (result.name, result.images, result.classes) == (layer.name, 7, 3)
        if rectify != "none":
            assert result.index_of_unit.min() >= 0 and result.index_of_unit.max() <= 1


def test_values_of_the_index():
    means = torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.0], [1.0, 0.0, 2.0, 0.0, 0.0], [1.0, 5.0, 6.0, 0.0, 0.0]])
    expected = [0, 1, (6 - 2) / (6 + 2), 1, 0]
    assert class_selectivity_index(means).tolist() == pytest.approx(expected, abs=1e-15)
    assert class_selectivity_index(means, eps=2.0)[1].item() == pytest.approx(5 / 7)
    signed = class_selectivity_index(torch.tensor([[1.0, -1.0], [-1.0, -3.0]]))
    assert math.isnan(signed[0]) and signed[1].item() == pytest.approx(2 / -4)
    alike = class_selectivity_index(torch.full((7, 1), 0.1))
    assert alike.item() == 0


def test_two_halves_make_the_whole():
    model, x = network(), images(7)
    whole, first, second = (ClassSelectivity(4) for _ in range(3))
    for layer in tapped(model, x, taps=("block",)):
        whole.update(layer, LABELS)
        first.update(layer._replace(features=layer.features[:4]), LABELS[:4])
        second.update(layer._replace(features=layer.features[4:]), LABELS[4:])
    first.merge(second)
    for one, other in zip(first.result(), whole.result(), strict=True):
        assert one.images == other.images == 7
        # float64 sums in another order
        torch.testing.assert_close(one.index_of_unit, other.index_of_unit, rtol=1e-12, atol=1e-13)


def test_packed_features_are_averaged_over_visible_sites():
    layout = PatchLayout.from_mask(torch.tensor([[[True, False]], [[False, False]], [[True, True]]]))
    x = torch.rand(3, 2, 2, 6)
    collected = ClassSelectivity(2)
    collected.update(Tapped("stages.0.0", 0, 0, "block", x), torch.tensor([1, 0, 0]), layout)
    expected = torch.stack([x[1:].double().mean((0, 1, 2)), x[0].double().mean((0, 1))])
    torch.testing.assert_close(collected.class_means("stages.0.0"), expected, rtol=1e-12, atol=0)
    assert collected.result()[0].images == 2  # the third has no visible site


def test_silent_channels_and_quartiles():
    x = torch.zeros(4, 1, 1, 5)
    x[0, ..., 0], x[..., 1], x[2:, ..., 2] = 1, 1, 4
    x[..., 3] = -1
    collected = ClassSelectivity(2)
    collected.update(Tapped("stages.0.0", 0, 0, "block", x), torch.tensor([0, 0, 1, 1]))
    (layer,) = collected.result()
    assert layer.index_of_unit.tolist() == [1, 0, 1, 0, 0]
    assert layer.silent == pytest.approx(2 / 5)
    assert layer.quartiles() == (0, 0, 1)


def test_density_has_integral_one_and_tells_what_is_outside():
    values = torch.cat([torch.rand(1000, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.5, -0.1, torch.nan])])
    edges, density, outside = selectivity_density(values, bins=20)
    assert (density * np.diff(edges)).sum() == pytest.approx(1)
    expected, _ = np.histogram(values[:1002].numpy(), bins=20, range=(0, 1), density=True)
    np.testing.assert_allclose(density, expected, rtol=1e-12)
    assert outside == pytest.approx(3 / 1005)
    assert not selectivity_density(torch.tensor([2.0])).density.any()


def test_bad_input():
    layer = Tapped("stages.0.0", 0, 0, "block", torch.ones(2, 2, 2, 3))
    with pytest.raises(ValueError, match="labels must lie in 0..2, got 0 to 3"):
        ClassSelectivity(3).update(layer, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="labels must have one entry per image, 2 in all"):
        ClassSelectivity(3).update(layer, torch.tensor([0]))
    with pytest.raises(ValueError, match="rectify must be one of relu, abs, none, got 'gelu'"):
        ClassSelectivity(3, "gelu")
    with pytest.raises(ValueError, match="other must have num_classes 3"):
        ClassSelectivity(3).merge(ClassSelectivity(4))
    one_class = ClassSelectivity(3)
    one_class.update(layer, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="with at least 2 classes"):
        one_class.result()
    with pytest.raises(ValueError, match="features must be finite"):
        ClassSelectivity(3).update(layer._replace(features=layer.features / 0), torch.tensor([0, 1]))
