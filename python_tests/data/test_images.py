import numpy as np
import pytest
import torch
from helpers.pictures import picture
from PIL import Image

from convnextv2_kernels.data.decoding import Decoding, open_rgb, to_rgb
from convnextv2_kernels.data.images import (
    CropDataset,
    RepeatedCrops,
    StepSampler,
    centre_box,
    collate,
    denormalize,
    load_crop,
    normalize,
    random_resized_crop_box,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = picture(1).convert("P" if mode == "PA" else mode)
    image = image.convert(mode)
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "LAB": "tif", "PA": "png", "HSV": "png"}.get(mode)
    if mode in ("HSV", "PA"):  # No common file format stores these.
        assert to_rgb(image).mode == "RGB"
        return
    path = saved(tmp_path, image, f"image.{suffix or 'png'}")
    assert open_rgb(path).mode == "RGB"
    crop = load_crop(path, (64, 32), rng())
    assert crop.shape == (64, 32, 3) and crop.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_deep_grey_is_scaled_not_clipped(tmp_path, kind):
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    values = ramp.astype(np.float32) if kind == "float32" else (ramp * 65535).astype(kind)
    path = saved(tmp_path, Image.fromarray(values), "deep.tif")
    # Pillow's 32-bit integers have a range of 2**32, of which these fill little
    grey = np.asarray(open_rgb(path, Decoding((0, 65535)) if kind == "int32" else Decoding()))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(grey[..., 0] / 255 - ramp).max() <= 0.5 / 255 + 2 / 65535


def test_exif_orientation_is_applied(tmp_path):
    image = picture(3, (96, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, image, "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(open_rgb(path)), np.asarray(upright))
    # The crop is drawn in the upright image: the same one as of a file stored upright.
    assert torch.equal(load_crop(path, (32, 32), rng(4)), load_crop(upright, (32, 32), rng(4)))


def test_reduced_jpeg_decoding_shows_the_same_crop(tmp_path):
    image = picture(2, (1600, 1200))
    path = saved(tmp_path, image, "large.jpg", quality=95)
    for seed in range(3):
        fast = load_crop(path, (64, 64), rng(seed)).float()
        slow = load_crop(open_rgb(path), (64, 64), rng(seed)).float()
        assert (fast - slow).abs().mean() < 2
        assert (fast - slow).abs().max() < 24


def test_crop_boxes_follow_the_recipe():
    boxes = [random_resized_crop_box((640, 480), rng(seed)) for seed in range(400)]
    shares = np.array([(r - x) * (b - y) / (640 * 480) for x, y, r, b in boxes])
    ratios = np.array([(r - x) / (b - y) for x, y, r, b in boxes])
    assert all(0 <= x < r <= 640 and 0 <= y < b <= 480 for x, y, r, b in boxes)
    assert 0.195 < shares.min() < 0.25 and 0.9 < shares.max() <= 1
    assert 0.74 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.35


def test_crop_of_an_extreme_shape_falls_back_to_the_centre():
    assert random_resized_crop_box((1000, 10), rng()) == (493, 0, 506, 10)
    assert random_resized_crop_box((1, 1), rng()) == (0, 0, 1, 1)
    left, top, right, bottom = random_resized_crop_box((10, 1000), rng())
    assert (left, right) == (0, 10) and bottom - top == 13


def test_wide_output_keeps_the_shape_of_things():
    boxes = [random_resized_crop_box((640, 480), rng(seed), aspect=2.0) for seed in range(200)]
    ratios = [(r - x) / (b - y) for x, y, r, b in boxes]
    assert min(ratios) > 1.49 and max(ratios) < 2.68
    assert centre_box((640, 480), 2.0) == (0, 80, 640, 400)
    assert centre_box((640, 480), 1.0) == (80, 0, 560, 480)


def test_sample_depends_on_seed_epoch_and_index_alone(sources):
    first, again = (CropDataset(sources, (64, 64), seed=3) for _ in range(2))
    again[(5, 1)]
    assert torch.equal(first[(2, 4)].image, again[(2, 4)].image)
    others = [first[(3, 4)], CropDataset(sources, (64, 64), seed=4)[(2, 4)]]
    assert not any(torch.equal(first[(2, 4)].image, other.image) for other in others)


def test_half_of_the_crops_are_flipped():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
    crops = [load_crop(ramp, (8, 8), rng(seed)) for seed in range(200)]
    flipped = sum(bool(crop[0, 0, 0] > crop[0, -1, 0]) for crop in crops)
    assert 70 < flipped < 130


def test_a_file_that_breaks_is_replaced_and_reported(tmp_path, sources):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    sample = CropDataset([broken, *sources], (64, 64), seed=0)[(0, 0)]
    assert sample.image.shape == (64, 64, 3)
    assert [name for name, _ in sample.failures] == [str(broken)]
    gone = CropDataset([tmp_path / "a.png", tmp_path / "b.png"], (64, 64), seed=0)[(0, 0)]
    assert gone.image is None and len(gone.failures) == 2
    batch = collate([sample, gone])
    assert batch.images is None and len(batch.failures) == 3


def test_sampler_resumes_anywhere_and_covers_each_epoch():
    whole = list(StepSampler(10, 3, seed=1, start=0, stop=9))
    assert len(whole) == 9
    for start in range(10):
        assert list(StepSampler(10, 3, seed=1, start=start, stop=9)) == whole[start:]
    for epoch in range(3):
        keys = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert len({i for _, i in keys}) == 9
    assert [i for _, i in whole[0]] != [i for _, i in whole[3]]


def test_repeated_crops_take_photos_in_turn():
    dataset = RepeatedCrops([picture(0), picture(1)], (32, 32), seed=0, length=100)
    assert len(dataset) == 100
    assert not torch.equal(dataset[(0, 0)].image, dataset[(0, 2)].image)


def test_normalize_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    images = normalize(pixels)
    assert images.shape == (1, 3, 16, 16) and images.is_contiguous()
    expected = (torch.tensor([0.0, 1.0]) - 0.485) / 0.229
    assert torch.allclose(images[0, 0, [0, 15], [0, 15]], expected)
    assert torch.allclose(denormalize(images) * 255, pixels.float(), atol=1e-3)
