"""What files of weights tell of themselves, and how a run or an evaluation takes them."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from convnextv2_kernels.checkpoints import convert_state_dict
from convnextv2_kernels.errors import UserError
from convnextv2_kernels.models import create_fcmae, create_model
from convnextv2_kernels.sizes import size_of
from convnextv2_kernels.train.checkpoint import export_encoder, export_weights
from convnextv2_kernels.train.weights import compare, describe, digest, read_weights

RUN = SimpleNamespace(model="convnextv2_atto", grn="default", img_size=(64, 96))
DATA = "flowers"


def about(classes, told=None):
    return describe(RUN, classes) | (told or {})


def refused(told, classes):
    with pytest.raises(UserError) as caught:
        compare(told, about(classes), "x.pt", DATA)
    return str(caught.value)


def test_a_description_is_text_and_equals_itself():
    told = about(["cat", "dog"])
    assert all(isinstance(value, str) for value in told.values())
    assert json.loads(told["img_size"]) == [64, 96] and json.loads(told["classes"]) == ["cat", "dog"]
    assert json.loads(told["mean"]) == [0.485, 0.456, 0.406] and (told["in_chans"], told["num_classes"]) == ("3", "2")
    assert compare(told, about(["cat", "dog"]), "x.pt", DATA) == []
    assert "classes" not in describe(RUN)


def test_other_classes_are_refused_by_name():
    told = about(["cat", "dog", "cow"])
    text = refused(told, ["cat", "dog", "hen"])
    assert text == "x.pt was trained on other classes than those of flowers: 'cow' only there, and 'hen' only here."
    text = refused(told, ["cat", "cow", "dog"])
    assert text == "x.pt has the classes of flowers in another order: class 1 is 'dog' there and 'cow' here."
    many = [f"class {number}" for number in range(100)]
    assert "and 92 more only there" in refused(about(many), [name.upper() for name in many])
    assert "\\x1b[31m" in refused(about(["\x1b[31m", "b"]), ["a", "b"])


def test_other_pixels_are_refused_and_another_size_is_noted():
    classes = ["a", "b"]
    assert "normalised with std [0.5, 0.5, 0.5]" in refused(about(classes, {"std": "[0.5, 0.5, 0.5]"}), classes)
    (note,) = compare(about(classes, {"img_size": "[224, 224]"}), about(classes), "x.pt", DATA)
    assert note == "x.pt was trained at 224x224 pixels, and is evaluated at 64x96 (--img-size)"


def test_weights_that_tell_nothing_are_taken_with_a_note():
    (note,) = compare({"format": "pt"}, about(["a", "b"]), "x.pt", DATA)
    assert note.startswith("x.pt does not name its classes: they are taken to be the 2 subfolders of flowers")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes", "cat,dog"),
        ("classes", '{"cat": 0}'),
        ("classes", "[1, 2]"),
        ("classes", "[" * 10_000),
        ("classes", '["' + "x" * (17 << 20) + '"]'),
        ("img_size", '["64", 64]'),
        ("img_size", f"[{'9' * 5000}]"),
        ("mean", "[null]"),
        ("std", "\udcff"),
    ],
)
def test_a_damaged_description_is_one_sentence(name, text):
    message = refused(about(["a", "b"], {name: text}), ["a", "b"])
    assert f"'{name}' in the metadata of x.pt" in message and len(message) < 300 and "\n" not in message


def test_names_of_22k_classes_survive_a_file(tmp_path):
    names = [f"n{number:08d} Größe \udcff\n'" for number in range(21841)]
    export_weights(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, about(names))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        told = file.metadata()
    assert compare(told, about(names), "x", DATA) == []
    assert "'n00000000 Gr" in refused(told, ["other", *names[1:]])


def classifier(**settings):
    torch.manual_seed(0)
    return create_model("convnextv2_atto", **{"num_classes": 2, **settings})


def test_it_says_which_weights_these_are(tmp_path):
    save_file(classifier().state_dict(), tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors", False)
    weights.require("convnextv2_atto", "default")
    with pytest.raises(
        UserError, match=r"this is convnextv2_atto, --model is convnextv2_tiny; give --model convnextv2_atto"
    ):
        weights.require("convnextv2_tiny", "default")
    with pytest.raises(UserError, match="has a head of 2 classes, and flowers has 3"):
        weights.require_head(3, DATA)
    with pytest.raises(UserError, match="no averaged weights, which --ema asks for"):
        read_weights(tmp_path / "a.safetensors", True)
    assert size_of((3, 3, 27, 3), (96, 192, 384, 768)) == "convnextv2_small" and size_of((1,) * 4, (8,) * 4) is None
    save_file(classifier(in_chans=4).state_dict(), tmp_path / "four.safetensors")
    with pytest.raises(UserError, match="for images of 4 channels, and images are read as 3"):
        read_weights(tmp_path / "four.safetensors", False).require("convnextv2_atto", "default")


@pytest.mark.parametrize("source", ["official", "official-sparse", "timm", "transformers", "fcmae", "encoder"])
def test_an_autoencoder_takes_what_there_is(tmp_path, source):
    torch.manual_seed(1)
    path = tmp_path / "weights.safetensors"
    own = source in ("official-sparse", "fcmae")
    network = create_fcmae("convnextv2_atto") if own or source == "encoder" else classifier()
    if source == "encoder":
        export_encoder(path, network, describe(RUN))
    else:
        save_file(convert_state_dict(network.state_dict(), to=source), path)
    torch.manual_seed(2)
    model = create_fcmae("convnextv2_atto")
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = read_weights(path, False)
    weights.require("convnextv2_atto", "default")
    weights.require_decoder(1, 512)
    before = digest(model)
    text = weights.load_into(model)
    assert digest(model) != before
    prefix = "encoder." if own or source == "encoder" else ""
    name = "stages.2.3.pwconv1.weight"
    assert torch.equal(model.state_dict()[f"encoder.{name}"], network.state_dict()[prefix + name])
    decoder = network if own else SimpleNamespace(state_dict=lambda: first)
    assert torch.equal(model.state_dict()["pred.weight"], decoder.state_dict()["pred.weight"])
    loaded = "encoder and decoder of" if own else "encoder of"
    assert text.startswith(loaded) and ("; initial: decoder" in text) == (not own)
    assert ("; left out: norm and head" in text) == (not own and source != "encoder")
    if own:
        with pytest.raises(
            UserError, match="a decoder of --decoder-depth 1 and --decoder-width 512, and they are 1 and 64"
        ):
            weights.require_decoder(1, 64)


def test_the_folder_of_a_run_is_told_to_be_one(tmp_path):
    (tmp_path / "checkpoint-7.pt").touch()
    (tmp_path / "checkpoint-20.pt").touch()
    with pytest.raises(UserError, match=r"is the folder of a run: give a file of it, such as .*checkpoint-20\.pt"):
        read_weights(tmp_path, False)
    with pytest.raises(UserError, match="--init .*nothing: there is no such file"):
        read_weights(tmp_path / "nothing", False)


def test_settings_that_another_program_stored_are_no_description(tmp_path):
    config = {"grn": "default", "img_size": [32, 32], "model": {1: 2}, "num_classes": b"2"}
    # no description of ours: classes that would be refused mean something else
    theirs = {"classes": '{"0": "cat"}', "img_size": "224", "mean": "[0, 0, 0]"}
    safetensors.torch.save_file(classifier().state_dict(), tmp_path / "a.safetensors", theirs)
    assert read_weights(tmp_path / "a.safetensors", False).about == {}
    torch.save({"model": classifier().state_dict(), "config": config, "task": {"about": [1]}}, tmp_path / "a.pt")
    told = read_weights(tmp_path / "a.pt", False).about
    assert told == {"grn": "default", "img_size": "[32, 32]"}
