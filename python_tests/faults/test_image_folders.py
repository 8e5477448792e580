"""Folders of images in bad times: disks that fail, lists that somebody edited, images that vanish, pictures of runs."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.limits import within
from helpers.pictures import class_folder, nested_folder, picture
from helpers.training import command, config_of, losses
from PIL import PngImagePlugin

from convnextv2_kernels._files import PNG_METADATA
from convnextv2_kernels.analysis.inputs import Crops
from convnextv2_kernels.cli import main
from convnextv2_kernels.data import decoding
from convnextv2_kernels.data import folder as image_folder
from convnextv2_kernels.data.classes import open_classes, split_train_val
from convnextv2_kernels.data.folder import (
    CACHE_NAME,
    IMAGES_NAME,
    SKIPPED_NAME,
    append_skipped,
    check_image,
    open_folder,
    reopen_folder,
    verify_files,
)
from convnextv2_kernels.data.labelled import EvalDataset, LabelledDataset
from convnextv2_kernels.data.threads import in_threads
from convnextv2_kernels.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


# -- checking: what fails for a moment, what is interrupted, what hangs


@pytest.fixture
def data(tmp_path):
    (tmp_path / "run").mkdir()
    return nested_folder(tmp_path / "data")


def fail_once(monkeypatch, error, name="3.png"):
    """Let decoding ``name`` raise ``error``."""
    real = decoding.inspect

    def failing(path, *more):
        if path.name == name:
            raise error
        return real(path, *more)

    monkeypatch.setattr(image_folder, "inspect", failing)


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in (errno.EIO, errno.ENOENT, errno.EACCES, errno.ESTALE)),
        MemoryError(),
        OSError("out of memory error when reading image file"),
    ],
)
def test_a_disk_that_fails_for_a_moment_is_no_verdict(data, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        fail_once(patch, error)
        assert len(open_folder(data, tmp_path / "run", 2).skipped) == 1
    assert open_folder(data, tmp_path / "run", 2).skipped == []


def test_an_error_of_the_disk_under_a_decoder_is_no_verdict(data, tmp_path, monkeypatch):
    """libtiff says that it cannot decode where it could not read."""
    with monkeypatch.context() as patch:
        fail_once(patch, OSError("decoding error -2"))
        patch.setattr(image_folder, "open_regular", lambda path: exec("raise OSError(5, 'Input/output error')"))
        assert len(open_folder(data, tmp_path / "run", 2).skipped) == 1
    assert open_folder(data, tmp_path / "run", 2).skipped == []
    with monkeypatch.context() as patch:
        fail_once(patch, OSError("decoding error -2"))
        assert len(open_folder(data, tmp_path / "run", 2).skipped) == 0  # known
        (data / "3.png").touch()
        assert len(open_folder(data, tmp_path / "run", 2).skipped) == 1
    assert len(open_folder(data, tmp_path / "run", 2).skipped) == 1  # a verdict on the bytes


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_was_checked_survives_any_end(data, tmp_path, stop):
    cache = tmp_path / "run" / CACHE_NAME

    def tick(done):
        if done == 4:
            raise stop

    names = image_folder.scan_folder(data)
    with pytest.raises(stop):
        verify_files(data, names, cache, tick)
    assert len(json.loads(cache.read_text())["files"]) == 4


def test_what_was_checked_is_written_on_the_way(data, tmp_path, monkeypatch):
    cache, counts = tmp_path / "run" / CACHE_NAME, []
    monkeypatch.setattr(image_folder, "CACHE_EVERY", -1e9)

    def tick(done):
        counts.append(len(json.loads(cache.read_text())["files"]) if cache.exists() else 0)

    verify_files(data, image_folder.scan_folder(data), cache, tick)
    assert counts[:2] == [0, 1]


def test_a_cache_that_cannot_be_written_is_one_sentence(data, tmp_path):
    with pytest.raises(UserError, match="cannot write .*nowhere.*No such file"):
        verify_files(data, ["0.png"], tmp_path / "nowhere" / CACHE_NAME)


def test_names_with_control_characters_keep_their_lines(data, tmp_path):
    for name in ("a\nb.png", "a\tb.png", "a\x1b[2Jb.png", "a\x85b.png"):
        (data / name).write_text("no picture")
    for _ in range(2):
        open_folder(data, tmp_path / "run", 2)
        reopen_folder(data, tmp_path / "run")
        lines = (tmp_path / "run" / SKIPPED_NAME).read_text().strip("\n").split("\n")
        assert sorted(line.split("\t")[0] for line in lines) == [
            "a\\nb.png",
            "a\\tb.png",
            "a\\x1b[2Jb.png",
            "a\x85b.png",
        ]


def test_a_list_of_skipped_files_that_is_a_fifo(data, tmp_path):
    os.mkfifo(tmp_path / SKIPPED_NAME)
    with pytest.raises(UserError, match="is a FIFO, expected a regular file"):
        within(10, lambda: append_skipped(tmp_path / SKIPPED_NAME, [("a", "b")]))


def test_a_file_that_never_comes_is_named_and_holds_nobody_up():
    release = threading.Event()

    def work(item):
        return release.wait(30) if item == "hung\x1b.png" else item

    begun = time.monotonic()
    with pytest.raises(UserError, match=r"hung\\x1b.png: reading it has not returned for 0.2 s"):
        list(in_threads(work, ["a", "hung\x1b.png", *"bcd"], 2, patience=0.2))
    assert time.monotonic() - begun < 10
    results = in_threads(work, ["a", "b", "hung\x1b.png"], 1)
    assert next(results) == ("a", "a")
    results.close()  # as an interrupt does: it does not wait
    assert time.monotonic() - begun < 10
    release.set()


def test_threads_keep_order_and_hand_on_errors():
    def work(item):
        time.sleep(0.001 * (item % 3))
        if item == 70:
            raise ValueError("70")
        return -item

    outcomes = list(in_threads(work, iter(range(200)), 3))
    assert [item for item, _ in outcomes] == list(range(200))
    assert [result for item, result in outcomes if item != 70] == [-i for i in range(200) if i != 70]
    assert isinstance(outcomes[70][1], ValueError)


# -- files of earlier runs, edited


CACHES = {
    "no JSON": '{"0.png": [1, 2',
    "deep": "[" * 100_000,
    "a list": "[1, 2]",
    "another format": '{"0.png": [1, 2, null]}',
    "huge number": '{"format": 2, "max_pixels": 178956970, "files": {"0.png": [' + "9" * 400 + ", 1, null, null]}}",
    "files is a text": '{"format": 2, "max_pixels": 178956970, "files": "x"}',
    "bytes": b"\xff\xfe\x00",
}
ENTRIES = {
    "short": [1],
    "text": "x",
    "null": None,
    "reason is a number": ["size", "time", 3, None],
    "reason and traits": ["size", "time", "x", ["", 0, 0, []]],
    "traits is a number": ["size", "time", None, 3],
    "traits short": ["size", "time", None, ["uint16"]],
    "unknown type": ["size", "time", None, ["x", 0, 1, []]],
    "type is a list": ["size", "time", None, [["uint16"], 0, 1, []]],
    "low above high": ["size", "time", None, ["uint16", 2, 1, []]],
    "no numbers": ["size", "time", None, ["uint16", "a", None, []]],
    "not finite": ["size", "time", None, ["uint16", 0, float("nan"), []]],
    "booleans": ["size", "time", None, ["uint16", False, True, []]],
    "unknown oddity": ["size", "time", None, ["", 0, 1, ["x"]]],
    "oddity is a list": ["size", "time", None, ["", 0, 1, [[]]]],
    "oddities is a text": ["size", "time", None, ["", 0, 1, "cmyk"]],
}


@pytest.mark.parametrize("content", CACHES.values(), ids=CACHES)
def test_a_damaged_cache_costs_time_only(data, tmp_path, content):
    (tmp_path / "run" / CACHE_NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = open_folder(data, tmp_path / "run", 2)
    assert len(found.images) == 9 and found.skipped == [] and found.traits == {}
    assert json.loads((tmp_path / "run" / CACHE_NAME).read_text())["format"] == image_folder.CACHE_FORMAT


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_damaged_entry_is_made_again(data, tmp_path, entry):
    open_folder(data, tmp_path / "run", 2)
    cache = json.loads((tmp_path / "run" / CACHE_NAME).read_text())
    size, changed = cache["files"]["0.png"][:2]
    if isinstance(entry, list):
        entry = [{"size": size, "time": changed}.get(part, part) if isinstance(part, str) else part for part in entry]
    cache["files"]["0.png"] = entry
    (tmp_path / "run" / CACHE_NAME).write_text(json.dumps(cache))
    found = open_folder(data, tmp_path / "run", 2)
    assert len(found.images) == 9 and found.skipped == [] and found.traits == {}


def test_verdicts_belong_to_a_limit(data, tmp_path):
    assert len(open_folder(data, tmp_path / "run", 2, max_pixels=80 * 72).images) == 9
    with pytest.raises(UserError, match="0 readable images"):
        open_folder(data, tmp_path / "run", 2, max_pixels=80 * 72 - 1)


LISTS = {
    "no JSON": '{"images": [',
    "deep": "[" * 100_000,
    "no object": "[]",
    "no list": '{"images": {"a": 1}, "skipped": []}',
    "nothing": '{"images": [], "skipped": []}',
    "numbers": '{"images": [1, 2], "skipped": []}',
    "above": '{"images": ["../0.png"], "skipped": []}',
    "above inside": '{"images": ["sub/../../0.png"], "skipped": []}',
    "absolute": '{"images": ["/etc/passwd"], "skipped": []}',
    "empty name": '{"images": [""], "skipped": []}',
    "NUL": '{"images": ["a\\u0000.png"], "skipped": []}',
    "surrogate": '{"images": ["\\ud800.png"], "skipped": []}',
    "twice": '{"images": ["0.png", "0.png"], "skipped": []}',
    "skipped is a number": '{"images": ["0.png"], "skipped": 3}',
    "skipped of numbers": '{"images": ["0.png"], "skipped": [[1, 2]]}',
    "skipped missing": '{"images": ["0.png"]}',
    "huge number": '{"images": [' + "9" * 5000 + '], "skipped": []}',
}


@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS)
def test_a_damaged_list_is_one_sentence(data, tmp_path, content):
    (tmp_path / "run" / IMAGES_NAME).write_text(content)
    with pytest.raises(UserError, match=f"{IMAGES_NAME}: cannot read the run's list of images") as error:
        reopen_folder(data, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_tampered_list_is_not_that_of_the_checkpoint(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command("pretrain", data, run, "--max-steps", "1")) == 0
    saved = json.loads((run / IMAGES_NAME).read_text())
    saved["images"] = saved["images"][::-1]
    (run / IMAGES_NAME).write_text(json.dumps(saved))
    capsys.readouterr()
    assert main(command("pretrain", data, run)) == 1
    assert "the list of files is not that of the checkpoint" in capsys.readouterr().err


# -- fine-tuning: images that vanish


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder of two classes and a fine-tuning run on it, stopped after its first step."""
    place = tmp_path_factory.mktemp("tuned")
    class_folder(place / "data", 2, 6)
    assert main(tune(place / "data", place / "run", "--max-steps", "1")) == 0
    return place


def tune(data, output, *more):
    plain = ["--recipe", "default", "--aa", "none", "--reprob", "0", "--val-share", "0.3"]
    return command("finetune", data, output, *plain, *more)


def complaint(capsys):
    return capsys.readouterr().err


def test_a_run_goes_on_without_an_image_that_vanished(tuned, capsys):
    data, run = tuned / "data", tuned / "run"
    lists = json.loads((run / IMAGES_NAME).read_text())
    lost = data / lists["training"]["images"][0]
    content = lost.read_bytes()
    picture(77).save(data / "class0" / "added.png")
    (data / "class0" / "run9").mkdir()
    lost.unlink()
    assert main(tune(data, run, "--max-steps", "2")) == 0
    said = capsys.readouterr().out
    assert "1 image of the run cannot be read any more" in said and "1 image added since" in said
    lost.write_bytes(content)
    assert main(tune(data, run)) == 0
    assert len(losses(run)) == 4
    again = json.loads((run / IMAGES_NAME).read_text())
    assert again == lists and config_of(run)["num_images"] == 8
    assert main(tune(data, run, "--val-share", "0.4")) == 1
    assert "begun with a share of 0.3 of each class to evaluate on, and this is a share of 0.4" in complaint(capsys)
    (data / "class2").mkdir()
    picture(5).save(data / "class2" / "0.png")
    assert main(tune(data, run)) == 1
    assert "'class2' is none of the 2 classes of the run" in capsys.readouterr().err
    (data / "class2" / "0.png").unlink()
    (data / "class2").rmdir()
    for damage in ({"classes": []}, {"classes": ["class0"]}, {"classes": 3}, {"val_share": "x"}, {"training": []}):
        (run / IMAGES_NAME).write_text(json.dumps({**lists, **damage}))
        assert main(tune(data, run)) == 1
        assert "cannot read the run's list of images" in capsys.readouterr().err
    (run / IMAGES_NAME).write_text(json.dumps(lists))


@pytest.mark.thorough
def test_a_resumed_run_has_the_same_losses(tmp_path):
    """With the list of the start: an image that was added in between changes nothing."""
    data = class_folder(tmp_path / "data", 2, 6)
    assert main(tune(data, tmp_path / "whole")) == 0
    assert main(tune(data, tmp_path / "parts", "--max-steps", "2")) == 0
    picture(77).save(data / "class0" / "added.png")
    assert main(tune(data, tmp_path / "parts")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_nothing_left_to_evaluate_on_is_an_error(tuned, tmp_path, capsys, monkeypatch):
    data = class_folder(tmp_path / "data", 2, 3)
    real = LabelledDataset._open

    def gone(self, index, failures):
        if isinstance(self, EvalDataset):
            failures.append((str(self.sources[index]), "OSError: [Errno 5] Input/output error"))
            return None
        return real(self, index, failures)

    monkeypatch.setattr(EvalDataset, "_open", gone)
    words = ["--init", str(tuned / "run" / "best.safetensors"), "--eval-only"]
    assert main(tune(data, tmp_path / "out", *words)) == 1
    caught = capsys.readouterr()
    assert "none of the 2 images to evaluate on can be read (the first: " in caught.err and "nan" not in caught.out
    assert not (tmp_path / "out" / "evaluation.json").exists()


# -- pictures that an earlier run wrote


def test_pictures_of_earlier_runs_are_no_training_images(data, tmp_path):
    for name, record in (("old", {"config": {"images_sha256": "x"}}), ("mine", {"config": {}})):
        (data / name).mkdir()
        (data / name / "config.json").write_text(json.dumps(record))
        picture(1).save(data / name / "reconstruction.png")
    (data / "look").mkdir()
    (data / "look" / "cosine.json").write_text(json.dumps({"analysis": "x", "versions": {}}))
    picture(2).save(data / "look" / "cosine.png")
    about = PngImagePlugin.PngInfo()
    about.add_text(*next(iter(PNG_METADATA.items())))
    picture(3).save(data / "renamed.png", pnginfo=about)
    found = open_folder(data, tmp_path / "run", 2)
    assert len(found.images) == 10 and "mine/reconstruction.png" in found.images
    assert found.notes == ["3 pictures that this program wrote left out (the first: look/cosine.png)"]
    assert [name for name, _ in found.skipped] == ["renamed.png"]
    crops = Crops([data / "renamed.png", data / "0.png"], (32, 32), 4)
    assert [indices for _, indices in crops] == [[1]] and "this program wrote" in crops.failures[0][1]


def test_every_picture_of_this_program_says_so(tmp_path):
    from convnextv2_kernels.train.reconstruction import Reconstruction, save_picture

    images = torch.rand(2, 32, 32, 3)
    save_picture(tmp_path / "a.png", Reconstruction(images, images, images, 0.0, 0.0, 0.0), "title")
    assert "this program wrote" in check_image(tmp_path / "a.png").reason
    writers = [path for path in (ROOT / "convnextv2_kernels").rglob("*.py") if "savefig(" in path.read_text()]
    assert len(writers) >= 4
    for path in writers:
        text = path.read_text()
        assert text.count("savefig(") == text.count("metadata=PNG_METADATA"), path


def test_a_run_inside_the_folder_of_its_classes_is_no_class(tmp_path):
    """ImageNet's layout with the run's own output and an earlier one in it: "train" and "val" are no classes."""
    data = tmp_path / "data"
    class_folder(data / "train", 2, 3)
    class_folder(data / "val", 2, 2)
    (data / "run").mkdir()
    (data / "earlier").mkdir()
    (data / "earlier" / "config.json").write_text(json.dumps({"config": {"images_sha256": "x"}}))
    picture(1).save(data / "earlier" / "reconstruction.png")
    assert split_train_val(data, data / "run") == (data / "train", data / "val")
    (data / "train" / "judged").mkdir()
    (data / "train" / "judged" / CACHE_NAME).write_text("{}")
    found = open_classes(data / "train", tmp_path / "cache.json")
    assert found.classes == ["class0", "class1"] and found.notes == ["judged is the output of a run, no class"]
    assert main(tune(data, data / "run", "--max-steps", "1")) == 0
    assert json.loads((data / "run" / "classes.json").read_text()) == ["class0", "class1"]


def test_a_run_may_write_to_the_folder_of_its_images(tmp_path):
    nested_folder(tmp_path)
    assert len(open_folder(tmp_path, tmp_path, 2).images) == 9
    (tmp_path / "config.json").write_text(json.dumps({"config": {"images_sha256": "x"}}))
    picture(1).save(tmp_path / "reconstruction.png")
    assert len(open_folder(tmp_path, tmp_path, 2).images) == 9
