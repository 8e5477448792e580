import numpy as np
import pytest
import torch
from torch.nn import functional as F

from convnextv2_kernels.data.augment import timm
from convnextv2_kernels.data.mixing import Mixing, criterion


def batch(count=6, side=32, classes=4):
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, torch.arange(count) % classes


def make(mixup=0.0, cutmix=0.0, prob=1.0, switch_prob=0.5, smoothing=0.1, num_classes=4) -> Mixing:
    return Mixing(mixup, cutmix, prob, switch_prob, smoothing, num_classes)


def timm_losses():
    timm()  # before any other import of timm
    from timm import loss

    return loss


def weight_of(targets, labels, smoothing, classes):
    """The mixing weight that makes smoothed one-hot labels and their reverse these targets."""
    hot = F.one_hot(labels, classes).double() * (1 - smoothing) + smoothing / classes
    difference = hot - hot.flip(0)
    share = ((targets.double() - hot.flip(0)) * difference).sum() / (difference**2).sum()
    # float32 targets
    assert torch.allclose(targets.double(), share * hot + (1 - share) * hot.flip(0), atol=1e-6)
    return share.item()


def test_mixup_weighs_images_and_labels_alike():
    images, labels = batch()
    for step in range(5):
        mixed, targets = make(mixup=0.8).mix(images.clone(), labels, (7, step))
        share = weight_of(targets, labels, 0.1, 4)
        assert 0 <= share <= 1 and targets.shape == (6, 4) and targets.dtype == torch.float32
        expected = images.double() * share + images.flip(0).double() * (1 - share)
        # rounding of float32 images of size 4, and of the share as it was read off float32 targets
        assert torch.allclose(mixed.double(), expected, atol=1e-5)


def test_cutmix_weighs_labels_by_area():
    images, labels = batch()
    seen = set()
    for step in range(20):
        mixed, targets = make(cutmix=1.0).mix(images.clone(), labels, (7, step))
        kept, pasted = (mixed == images).all(1), (mixed == images.flip(0)).all(1)
        assert (kept | pasted).all() and all(torch.equal(pasted[0], other) for other in pasted)
        share = weight_of(targets, labels, 0.1, 4)
        assert share == pytest.approx(1 - pasted[0].float().mean().item(), abs=1e-5)
        seen.add(round(share, 4))
    assert len(seen) > 10


def test_draws_are_a_function_of_seed_and_counters():
    images, labels = batch()
    mixing = make(mixup=0.8, cutmix=1.0)
    np.random.seed(0)
    expected = np.random.rand(4)
    np.random.seed(0)
    first = mixing.mix(images.clone(), labels, (7, 3, 0))
    assert np.array_equal(np.random.rand(4), expected)
    mixing.mix(images.clone(), labels, (7, 4, 0))
    again = mixing.mix(images.clone(), labels, (7, 3, 0))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for other in [(8, 3, 0), (7, 5, 0), (7, 3, 6)]:
        assert not torch.equal(first[1], mixing.mix(images.clone(), labels, other)[1])


def kinds(mixing, steps=200):
    """How many batches were left alone, mixed by Mixup, mixed by CutMix."""
    images, labels = batch(2, 8)
    counted = {"none": 0, "mixup": 0, "cutmix": 0}
    for step in range(steps):
        mixed, targets = mixing.mix(images.clone(), labels, (1, step))
        if weight_of(targets, labels, 0.1, 4) > 1 - 1e-6:
            counted["none"] += 1
        else:
            counted["cutmix" if ((mixed == images) | (mixed == images.flip(0))).all() else "mixup"] += 1
    return counted


def test_probabilities_of_mixing_and_of_switching():
    # 200 draws: 6 standard deviations are 42 of p = 1/2, 37 of 1/4
    assert kinds(make(mixup=5.0, prob=0.0)) == {"none": 200, "mixup": 0, "cutmix": 0}
    assert kinds(make(mixup=5.0))["cutmix"] == 0
    some = kinds(make(mixup=5.0, prob=0.5))
    assert abs(some["none"] - 100) < 42 and some["cutmix"] == 0
    both = kinds(make(mixup=5.0, cutmix=1.0, switch_prob=0.25))
    assert both["none"] < 10 and abs(both["cutmix"] - 50) < 37


def test_an_odd_batch_is_refused():
    images, labels = batch(5)
    with pytest.raises(ValueError, match="images must be an even number to be mixed in pairs, got 5"):
        make(mixup=0.8).mix(images, labels, (0, 0))
    assert make().mix(images, labels, (0, 0)) == (images, labels)


def test_loss_without_mixing_is_timms():
    losses = timm_losses()
    logits = torch.randn(8, 4, dtype=torch.float64) * 3
    labels = torch.arange(8) % 4
    for smoothing in (0.0, 0.1, 0.6):
        ours = criterion(make(smoothing=smoothing))(logits, labels)
        theirs = losses.LabelSmoothingCrossEntropy(smoothing)(logits, labels)
        # float64, a mean of eight: the same formula summed in another order
        assert torch.allclose(ours, theirs, rtol=1e-13)


def test_loss_with_mixing_is_timms():
    losses = timm_losses()
    images, labels = batch()
    mixing = make(mixup=0.8, cutmix=1.0)
    assert mixing.active and not make().active
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = mixing.mix(images, labels, (3, 1))[1].double()
    ours, theirs = criterion(mixing)(logits, targets), losses.SoftTargetCrossEntropy()(logits, targets)
    assert torch.allclose(ours, theirs, rtol=1e-13)
    gradients = [torch.autograd.grad(loss * 1.7, logits)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)


def test_loss_of_mixed_targets_under_autocast():
    images, labels = batch()
    mixing = make(mixup=0.8)
    logits = torch.randn(6, 4).bfloat16()
    targets = mixing.mix(images, labels, (3, 1))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(mixing)(logits, targets)
    expected = -(targets.double() * logits.double().log_softmax(1)).sum(1).mean()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=1e-6)  # float32, on the same bfloat16 logits


@pytest.mark.parametrize(
    "argument, value",
    [
        ("mixup", -0.1),
        ("cutmix", float("nan")),
        ("prob", 1.1),
        ("switch_prob", -1),
        ("smoothing", 1.0),
        ("num_classes", 0),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be .*got"):
        make(**{argument: value})
