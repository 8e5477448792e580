import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.pictures import picture
from PIL import Image

from convnextv2_kernels.data import augment
from convnextv2_kernels.data.augment import covering_size, eval_transform, seeded_globals, timm, train_transform
from convnextv2_kernels.data.images import denormalize
from convnextv2_kernels.errors import UserError

SIZES = [(80, 72), (61, 200), (333, 97), (500, 375), (224, 224), (40, 31), (257, 256)]  # width, height
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def official_eval(size: int, warp: bool = False, crop_pct: float = 224 / 256):
    """The official datasets.py, with torchvision."""
    timm()
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    if warp:
        steps = [transforms.Resize((size, size), interpolation=bicubic)]
    else:
        steps = [transforms.Resize(int(size / crop_pct), interpolation=bicubic), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


@pytest.mark.parametrize("size", [64, 100, 224])
def test_evaluation_is_the_official_one(size):
    ours, official = eval_transform((size, size)), official_eval(size)
    for image_size in SIZES:
        image = picture(3, image_size)
        result = ours(image)
        assert result.shape == (3, size, size) and result.dtype == torch.float32
        # the same Pillow calls and the same float32 operations: bit for bit
        assert torch.equal(result, official(image)), image_size


def test_from_384_pixels_on_the_image_is_warped():
    image = picture(3, (200, 97))
    assert torch.equal(eval_transform((384, 384))(image), official_eval(384, warp=True)(image))
    assert torch.equal(eval_transform((383, 383))(image), official_eval(383)(image))
    cropped = eval_transform((384, 384), crop_pct=1.0)(image)
    assert torch.equal(cropped, official_eval(384, crop_pct=1.0)(image))
    assert not torch.equal(cropped, eval_transform((384, 384))(image))


def test_non_square_evaluation_keeps_shapes():
    # A disc stays round whatever the output's shape, and the output shows the centre.
    y, x = np.mgrid[:300, :400]
    disc = ((x - 199.5) ** 2 + (y - 149.5) ** 2 < 60**2).astype(np.uint8) * 255
    image = Image.fromarray(disc).convert("RGB")
    for size in [(64, 128), (128, 64), (96, 100)]:
        seen = denormalize(eval_transform(size)(image)[None])[0, ..., 0] > 0.5
        assert seen.shape == size
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        full = covering_size(image.size, tuple(int(side / (224 / 256)) for side in size))
        assert full[0] >= int(size[1] * 8 / 7) and full[1] >= int(size[0] * 8 / 7)
        # One pixel for the edge's two ends: each is cut at half a grey value.
        assert abs(height - 120 * full[1] / 300) <= 1 and abs(width - 120 * full[0] / 400) <= 1
        rows = seen.any(1).nonzero()
        assert abs(rows.min() + rows.max() + 1 - size[0]) <= 2


def test_a_strip_does_not_fill_memory():
    strip = Image.new("RGB", (60_000, 2), (200, 100, 50))
    result = denormalize(eval_transform((64, 64))(strip)[None])[0]
    assert torch.allclose(result * 255, torch.tensor([200.0, 100.0, 50.0]), atol=1e-3)
    tall = picture(1, (4, 96))
    # Its ends are cut off, which the official crop does not see either; the scale and the centre stay the same.
    assert torch.equal(eval_transform((32, 32))(tall), official_eval(32)(tall))


def drawn(transform, image, seed):
    with seeded_globals(seed, 1):
        return transform(image)


def test_training_is_the_official_transform():
    official = timm().data.create_transform(
        input_size=64,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
    )
    ours = train_transform((64, 64))
    for seed in range(40):
        image = picture(seed % 5, SIZES[seed % len(SIZES)])
        result = drawn(ours, image, seed)
        assert result.shape == (3, 64, 64) and result.dtype == torch.float32
        assert torch.equal(result, drawn(official, image, seed))


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "augmix-m9-w3-d2", "v0", "original"])
def test_every_level_of_posterizing_works_with_this_pillow(aa):
    """At the strongest level, which the default policy reaches now and then, timm asks Pillow for 0 bits."""
    steps = train_transform((32, 32), aa=aa).steps.transforms
    operations = [op for step in steps for op in getattr(step, "ops", [])]
    operations += [op for step in steps for parts in getattr(step, "policy", []) for op in parts]
    found = [op for op in operations if op.name.startswith("Posterize")]
    assert found
    image = picture(3, (40, 40))
    for op in found:
        op.prob, op.magnitude_std = 1.0, 0.0
        for op.magnitude in range(11):
            result = np.asarray(op(image))
            (bits,) = op.level_fn(op.magnitude, op.hparams)
            # a channel keeps its highest bits
            assert np.array_equal(result, np.asarray(image) & (0xFF00 >> bits & 0xFF))


def test_options_reach_timm():
    ramp = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (96, 1))).convert("RGB")
    plain = {"aa": None, "reprob": 0, "scale": (1, 1)}
    for hflip in (0, 1):
        transform = train_transform((32, 32), hflip=hflip, **plain)
        slopes = [drawn(transform, ramp, seed) for seed in range(10)]
        assert all((s[0, 0, -1] < s[0, 0, 0]) == bool(hflip) for s in slopes)
    erased = drawn(train_transform((32, 32), hflip=0, **{**plain, "reprob": 1}, remode="const"), ramp, 0)
    assert (erased == 0).all(dim=0).sum() > 10
    # Ten percent of the area at most: a centre-to-corner range no larger than that of a crop of 32 px.
    small = train_transform((32, 32), hflip=0, aa=None, reprob=0, scale=(0.08, 0.1))
    spans = [float(v.max() - v.min()) * STD[0] * 255 for v in (drawn(small, ramp, s)[0] for s in range(20))]
    assert max(spans) <= 96 * (0.1 * 4 / 3) ** 0.5 + 1
    jittered = [drawn(train_transform((32, 32), hflip=0, color_jitter=0.4, **plain), ramp, s) for s in range(2)]
    assert not torch.equal(*jittered)


def test_wide_crops_keep_the_shape_of_things():
    timm()
    crop = train_transform((64, 128)).steps.transforms[0]
    assert crop.size == (64, 128) and crop.ratio == pytest.approx((1.5, 8 / 3))
    assert drawn(train_transform((64, 128)), picture(1), 0).shape == (3, 64, 128)


def test_transforms_are_pickled_as_options():
    for transform in (train_transform((32, 32)), train_transform((32, 64), aa=None, hflip=0), eval_transform((32, 32))):
        data = pickle.dumps(transform)
        assert b"timm.data" not in data and b"torchvision" not in data
        assert torch.equal(drawn(pickle.loads(data), picture(1), 3), drawn(transform, picture(1), 3))


def test_seeded_globals_put_everything_back():
    def draws():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()  # leaves a second normal draw in NumPy's state
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    with seeded_globals(5, 1, 2, 3):
        inside = draws()
    assert draws() == expected
    with pytest.raises(RuntimeError), seeded_globals(5, 1, 2, 3):
        assert draws() == inside
        raise RuntimeError
    for other in [(6, 1, 2, 3), (5, 2, 2, 3), (5, 1, 3, 3), (5, 1, 2, 4)]:
        with seeded_globals(*other):
            assert not set(draws()) & set(inside)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("size", (0, 32)),
        ("size", (32, 1.5)),
        ("aa", "nonsense"),
        ("aa", "rand-x9"),
        ("color_jitter", -1),
        ("hflip", 1.5),
        ("scale", (0, 1)),
        ("scale", (0.5, 0.2)),
        ("interpolation", "cubic"),
        ("reprob", -0.1),
        ("remode", "grey"),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be .*got"):
        train_transform(**{"size": (32, 32), argument: value})


def test_bad_evaluation_arguments_are_named():
    with pytest.raises(ValueError, match="^crop_pct must be .*got 1.5"):
        eval_transform((32, 32), crop_pct=1.5)
    with pytest.raises(ValueError, match="^size must be"):
        eval_transform((32,))


def test_timm_missing_is_said_with_what_to_install(monkeypatch):
    augment.timm.cache_clear()
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(UserError, match=r'pip install "torch==[\d.]+" timm,'):
        train_transform((32, 32))
    monkeypatch.undo()
    assert augment.timm() is sys.modules["timm"] and augment.timm() is augment.timm()


def test_another_trouble_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('another trouble')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from convnextv2_kernels.data import augment\n"
        "try: augment.timm()\n"
        "except RuntimeError as error: print(error, augment._declared)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "another trouble None", ran.stderr
