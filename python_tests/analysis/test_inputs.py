"""Checkpoints become networks, folders become batches."""

import pytest
import safetensors.torch
import torch
from helpers.networks import DEPTHS, DIMS, autoencoder, images, network
from helpers.pictures import class_folder

from convnextv2_kernels.analysis import draw_masks, errors_by_image, load_network, tapped, untrained_network
from convnextv2_kernels.analysis.inputs import Crops, spread_over_folders
from convnextv2_kernels.analysis.results import file_name, plain
from convnextv2_kernels.data.images import load_crop
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import create_model
from convnextv2_kernels.train.checkpoint import export_encoder
from convnextv2_kernels.train.reconstruction import reconstruct


def training_checkpoint(path, network, /, **config):
    torch.save({"format": 1, "model": network.state_dict(), "step": 7, "config": config}, path)
    return path


def same_features(one, other):
    x = images(2)
    for a, b in zip(tapped(one, x, taps=("grn", "block")), tapped(other, x, taps=("grn", "block")), strict=True):
        assert torch.equal(a.features, b.features)


def test_training_checkpoint_tells_everything(tmp_path):
    model = autoencoder(grn="l1,no-skip", grn_scope="batch", decoder_depth=2, patch_size=64, norm_pix_loss=False)
    config = {"model": "x", "img_size": [64, 128], "patch_size": 64, "mask_ratio": 0.5, "norm_pix_loss": False}
    path = training_checkpoint(tmp_path / "a.pt", model, **config, grn="l1,no-skip", grn_scope="batch")
    found = load_network(path, "a")
    same_features(model, found.model)
    assert (found.img_size, found.mask_ratio) == ((64, 128), 0.5)
    assert (found.about["step"], found.about["depths"]) == (7, list(DEPTHS))
    assert found.about["checkpoint"] == "a.pt" and len(found.about["sha256"]) == 64 and not found.model.training
    whole = load_network(path, "a", decoder=True).model
    assert not whole.norm_pix_loss and whole.patch_size == 64 and whole.img_size == (64, 128)
    x = images(2, 64, 128)
    mask = torch.tensor([[[True, False]], [[False, True]]])
    assert all(torch.equal(a, b) for a, b in zip(whole(x, mask), model.eval()(x, mask), strict=True))


def test_older_checkpoint_has_the_papers_defaults(tmp_path):
    found = load_network(training_checkpoint(tmp_path / "a.pt", autoencoder(), model="x"), "a", decoder=True)
    assert found.model.norm_pix_loss and found.model.patch_size == 32 and found.mask_ratio == 0.6
    assert found.img_size == (224, 224) and found.about["grn"] == "default"


def test_encoder_file_tells_its_grn(tmp_path):
    model = autoencoder(grn="none")
    export_encoder(tmp_path / "told.safetensors", model, {"model": "x", "img_size": "[64, 96]"})
    tensors = safetensors.torch.load_file(tmp_path / "told.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "plain.safetensors", {"format": "pt", "model": "x"})
    found = load_network(tmp_path / "told.safetensors", "a")
    assert found.about["grn"] == "none" and str(found.model.grn) == "none"
    same_features(model, found.model)
    plain = load_network(tmp_path / "plain.safetensors", "a")
    assert plain.about["grn"] == "default" and (found.img_size, plain.img_size) == ((64, 96), (224, 224))


@pytest.mark.parametrize(
    "config",
    [
        {"img_size": [64]},
        {"img_size": "x"},
        {"img_size": [0, 64]},
        {"mask_ratio": [1]},
        {"grn": "l3"},
        {"patch_size": 0},
    ],
)
def test_settings_of_no_training_are_told_with_the_file(tmp_path, config):
    path = training_checkpoint(tmp_path / "a.pt", autoencoder(), **config)
    with pytest.raises(ValueError, match=r"a\.pt cannot be rebuilt from its settings: "):
        load_network(path, "a", decoder=True)


def test_classifier_and_size(tmp_path):
    torch.manual_seed(0)
    model = create_model("convnextv2_atto", num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    found = load_network(tmp_path / "a.pth", "a", model_name="convnextv2_atto")
    assert found.about["model"] == "convnextv2_atto" and found.about["format"] == "official"
    with pytest.raises(ValueError, match="this is convnextv2_atto, expected convnextv2_tiny"):
        load_network(tmp_path / "a.pth", "a", model_name="convnextv2_tiny")
    with pytest.raises(ValueError, match="has no decoder"):
        load_network(tmp_path / "a.pth", "a", decoder=True)
    with pytest.raises(ValueError, match="has no averaged weights"):
        load_network(tmp_path / "a.pth", "a", use_ema=True)


@pytest.mark.parametrize(
    "config",
    [
        {"grn": "median"},
        {"grn": ["l1"]},
        {"grn_scope": "patch"},
        {"img_size": "224"},
        {"img_size": [1, 2, 3]},
        {"img_size": -32},
        {"mask_ratio": "most"},
        {"mask_ratio": [0.6]},
        {"patch_size": None},
    ],
)
def test_settings_that_no_network_has_are_refused(tmp_path, config):
    path = training_checkpoint(tmp_path / "a.pt", autoencoder(), **config)
    with pytest.raises(ValueError, match="a.pt cannot be rebuilt from its settings: ."):
        load_network(path, "a", decoder=True)


def test_shapes_are_compared_before_a_network_of_their_widths_is_built(tmp_path):
    state = autoencoder().state_dict()
    for name in ("dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias"):
        key = f"encoder.stages.3.0.{name}"
        state[key] = torch.ones(10**6, *state[key].shape[1:])
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt has shapes that contradict each other: encoder.downsample_layers.3"):
        load_network(tmp_path / "a.pt", "a")


def test_untrained_network_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (untrained_network(DEPTHS, DIMS, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    same_features(one.model, same.model)
    assert not torch.equal(one.model.stages[0][0].pwconv1.weight, other.model.stages[0][0].pwconv1.weight)


def test_images_of_other_channels_are_refused(tmp_path):
    torch.save(network(in_chans=1).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="images of 1 channels, expected 3"):
        load_network(tmp_path / "a.pt", "a")


def test_folders_take_turns():
    names = ["a/1.png", "a/2.png", "a/deep/3.png", "b/1.png", "c/1.png", "c/2.png", "top.png"]
    order = spread_over_folders(names, seed=0)
    assert sorted(order) == list(range(7)) and order == spread_over_folders(names, seed=0)
    first = [names[i].partition("/")[0] for i in order]
    assert first[:4] == ["a", "b", "c", "top.png"] and first[4:6] == ["a", "c"] and first[6] == "a"
    many = [f"a/{i}" for i in range(50)]
    assert spread_over_folders(many, 0) != spread_over_folders(many, 1)


def test_crops_come_in_order_and_skip_what_is_broken(tmp_path):
    folder = class_folder(tmp_path, 2, 4)
    sources = sorted(folder.rglob("*.png"))
    sources[2].write_bytes(b"no image")
    crops = Crops(sources, (32, 64), batch_size=3, limit=6, workers=2)
    for _ in range(2):  # it can be gone through again
        batches = list(crops)
        assert [indices for _, indices in batches] == [[0, 1, 3], [4, 5, 6]]
        assert len(crops.failures) == 1 and crops.failures[0][0].endswith("2.png")
    assert torch.equal(batches[1][0][0], load_crop(sources[4], (32, 64), None))
    rest = list(Crops(sources, (32, 32), batch_size=4))
    assert [len(indices) for _, indices in rest] == [4, 3]
    with pytest.raises(UserError, match="none of the 1 images can be read .the first: .*2.png"):
        list(Crops(sources[2:3], (32, 32), batch_size=4))


def test_masks_depend_on_seed_and_place_alone():
    masks = draw_masks(5, (4, 6), 0.75, seed=3)
    assert masks.shape == (5, 4, 6) and (masks.flatten(1).sum(1) == 18).all()
    assert torch.equal(draw_masks(2, (4, 6), 0.75, seed=3), masks[:2])
    assert not torch.equal(draw_masks(5, (4, 6), 0.75, seed=4), masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5
    with pytest.raises(ValueError, match="hides all 4 patches"):
        draw_masks(2, (2, 2), 0.8, seed=3)


def test_errors_of_images_add_up_to_that_of_all():
    pixels = torch.randint(0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mask = torch.tensor([[[True, False], [True, True]], [[True, False], [False, False]], [[False, False]] * 2])
    result = reconstruct(autoencoder(), pixels, mask)
    errors = errors_by_image(result, mask)
    # the overall error weights each hidden patch alike; float32 sums there
    assert (3 * errors[0] + errors[1]) / 4 == pytest.approx(result.model_mse, rel=1e-5)
    assert errors[2] != errors[2]


def test_plain_types():
    assert plain({"a": (1, float("nan")), 2: torch.tensor([0.5])}) == {"a": [1, None], "2": [0.5]}
    assert file_name("run 1/encoder") == "run-1-encoder" and file_name("..") == "network"
