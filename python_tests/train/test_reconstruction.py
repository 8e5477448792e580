import numpy as np
import pytest
import torch
from helpers.training import tiny_model
from PIL import Image

from convnextv2_kernels.data.images import denormalize, normalize
from convnextv2_kernels.data.sample_photos import PHOTOS, load_photos, photo_paths
from convnextv2_kernels.train.reconstruction import describe_errors, reconstruct, save_picture


def pixels(n=3):
    return torch.randint(0, 256, (n, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


MASK = torch.tensor([[[1, 0], [1, 1]], [[0, 1], [1, 1]], [[1, 1], [0, 1]]], dtype=torch.bool)


class Painter(torch.nn.Module):
    """Fills every hidden pixel with one grey."""

    def __init__(self, grey):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(grey))

    def forward(self, images, mask):
        assert not self.training
        return None, None, mask

    def reconstruct(self, images, pred, mask):
        grey = normalize(torch.zeros(1, 64, 64, 3)) * 0 + self.grey
        colour = (grey - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
            3, 1, 1
        )
        hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
        return torch.where(hidden, colour, images)


def test_errors_are_those_of_hidden_pixels():
    images = pixels()
    model = Painter(0.25)
    result = reconstruct(model, images, MASK)
    x = images.float().numpy() / 255
    hidden = MASK.numpy().repeat(32, 1).repeat(32, 2)
    assert result.model_mse == pytest.approx(((x[hidden] - 0.25) ** 2).mean(), rel=1e-4)
    visible = [((image[h] - image[~h].mean(0)) ** 2).mean() for image, h in zip(x, hidden, strict=True)]
    assert result.visible_mean_mse == pytest.approx(np.mean(visible), rel=1e-4)
    patches = x.reshape(3, 2, 32, 2, 32, 3)
    spread = ((patches - patches.mean((2, 4), keepdims=True)) ** 2).mean((2, 4, 5))
    assert result.patch_mean_mse == pytest.approx(spread[MASK.numpy()].mean(), rel=1e-4)
    assert torch.equal(result.reconstructed[~torch.tensor(hidden)], result.originals[~torch.tensor(hidden)])
    assert (result.masked[torch.tensor(hidden)] == 0.5).all()
    assert model.training and len(describe_errors(result)) == 3


def test_reconstruction_of_a_real_model_is_seen_through_its_own_convention():
    torch.manual_seed(0)
    model = tiny_model().train()
    result = reconstruct(model, pixels(), MASK)
    images = normalize(pixels())
    with torch.no_grad():
        _, pred, _ = model(images, MASK)
    expected = denormalize(model.reconstruct(images, pred, MASK)).clamp(0, 1)
    hidden = MASK.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.allclose(result.reconstructed[hidden], expected[hidden], atol=1e-6)
    assert model.training


def test_picture_has_three_rows(tmp_path):
    path = tmp_path / "picture.png"
    save_picture(path, reconstruct(Painter(0.25), pixels(), MASK), "a title")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 300 and image.height > 300
        image.load()
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_bundled_photographs_are_found_and_colour():
    paths = photo_paths()
    names, photos = load_photos()
    assert [path.stem for path in paths] == names and len(names) >= 2
    assert {path.name for path in paths} <= {n for _, files in PHOTOS.values() for n in files}
    assert all(photo.mode == "RGB" and min(photo.size) >= 224 for photo in photos)
