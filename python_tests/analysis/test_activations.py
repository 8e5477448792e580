import numpy as np
import pytest
import torch
from helpers.networks import images, network
from PIL import Image

from convnextv2_kernels.analysis import (
    activation_maps,
    channels_near_constant,
    channels_near_zero,
    save_activation_maps,
    tapped,
)

LAYER = "stages.1.1"
RED, ORANGE = np.array([0xDC, 0x26, 0x26]), np.array([0xF5, 0x9E, 0x0B])


def dead_network():
    """GELU turns a very negative bias into a dead channel, a very large one into a saturated one."""
    model = network()
    block = model.get_submodule(LAYER)
    with torch.no_grad():
        block.pwconv1.weight[[1, 4, 6]] *= 1e-3
        block.pwconv1.bias[[1, 4]] = -30.0
        block.pwconv1.bias[6] = 5.0
    return model


def test_maps_are_those_of_the_tap():
    model, image = network(), images(1)
    result = activation_maps(model, image[0], LAYER, tap="act", channels=5)
    features = next(t.features for t in tapped(model, image, taps=("act",)) if t.name == LAYER)
    assert result.channels.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(result.maps, features[0].permute(2, 0, 1)[:5])
    assert len(result.dead) == len(result.saturated) == 32
    torch.testing.assert_close(result.mean, features.double().mean((0, 1, 2)))
    assert activation_maps(model, image, LAYER, channels=1000).maps.shape == (32, 8, 8)


def test_random_channels_depend_on_the_seed_alone():
    draws = [activation_maps(network(), images(1), LAYER, channels=6, seed=s) for s in (1, 1, 2)]
    assert torch.equal(draws[0].channels, draws[1].channels) and not torch.equal(draws[0].channels, draws[2].channels)
    assert draws[0].channels.tolist() == sorted(set(draws[0].channels.tolist()))


def test_dead_and_saturated_channels_are_found():
    result = activation_maps(dead_network(), images(1), LAYER, tap="act")
    assert result.dead[[1, 4]].all() and result.saturated[6] and not result.dead[6]
    x = result.maps.double()
    rms = x.square().mean().sqrt()
    dead = x.abs().amax((1, 2)) <= 0.01 * rms
    saturated = ~dead & (x.std((1, 2), correction=0) <= 0.05 * x.mean((1, 2)).abs())
    assert torch.equal(result.dead, dead) and torch.equal(result.saturated, saturated)
    assert result.dead_share == pytest.approx(int(dead.sum()) / 32)
    assert result.saturated_share == pytest.approx(int(saturated.sum()) / 32)


def test_corner_cases_of_channels():
    assert channels_near_zero(torch.zeros(4, 3)).all() and not channels_near_constant(torch.zeros(4, 3)).any()
    assert channels_near_zero(torch.zeros(0, 3)).all()
    assert not channels_near_constant(torch.ones(1, 3)).any()
    assert channels_near_constant(torch.ones(2, 3)).all()


def near(pixels: np.ndarray, colour: np.ndarray) -> int:
    return int((np.abs(pixels.astype(int) - colour).max(-1) < 12).sum())


@pytest.mark.parametrize("scale", ["shared", "map"])
def test_picture_marks_what_does_nothing(tmp_path, scale):
    pixels = torch.full((64, 64, 3), 255, dtype=torch.uint8)
    pixels[..., 0] = 40  # cyan, as nothing else in the picture
    drawn = {}
    for name, model in (("well", network()), ("ill", dead_network())):
        path = tmp_path / f"{name}.png"
        result = activation_maps(model, images(1), LAYER, tap="act", channels=9)
        save_activation_maps(path, result, pixels, "a title", scale)
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 900 and image.height > 400
            drawn[name] = np.asarray(image.convert("RGB"))
    assert near(drawn["ill"], np.array([40, 255, 255])) > 10000
    assert near(drawn["ill"], RED) > near(drawn["well"], RED) + 300
    assert near(drawn["ill"], ORANGE) > near(drawn["well"], ORANGE) + 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ill.png", "well.png"]


def test_a_constant_map_can_be_drawn(tmp_path):
    result = activation_maps(network(), images(1, 32, 32), "stages.3.0", channels=1)
    assert result.maps.shape == (1, 1, 1)
    for scale in ("shared", "map"):
        save_activation_maps(tmp_path / "one.png", result, torch.zeros(32, 32, 3, dtype=torch.uint8), "t", scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "stages.9.0"}, "layer must be a block from stages.0.0 to stages.3.0, got 'stages.9.0'"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"image": torch.zeros(2, 3, 64, 64)}, "image must be one image"),
        ({"tap": "x"}, "tap must be of act, grn, block, got 'x'"),
        ({"saturated": -1.0}, r"saturated must lie in \[0, 1\), got -1.0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        activation_maps(**{"model": network(), "image": images(1), "layer": LAYER, **change})
