import random
from pathlib import Path

import pytest
from helpers.pictures import picture

from convnextv2_kernels.data.classes import ClassFolder, hold_out, open_classes, split_train_val
from convnextv2_kernels.errors import UserError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name), (9, 7)).save(folder / name)
    return folder


@pytest.fixture
def pets(tmp_path):
    names = ["dog/a.png", "dog/deep/er/b.png", "cat/c.png", "cat/d.png", "a-cat/e.png", "a/f.png"]
    return make(tmp_path / "pets", *names)


def opened(folder, **options):
    return open_classes(folder, folder.parent / "cache.json", **options)


def test_subfolders_are_classes_in_sorted_order(pets):
    found = opened(pets)
    assert found.classes == ["a", "a-cat", "cat", "dog"] and found.skipped == []
    labelled = {name: found.classes[label] for name, label in zip(found.images, found.labels, strict=True)}
    assert labelled == {name: name.split("/")[0] for name in labelled} and len(labelled) == 6
    assert "dog/deep/er/b.png" in labelled
    assert all(path.is_file() for path in found.paths())


def test_what_is_no_image_of_a_class_is_listed_not_fatal(pets):
    (pets / "dog" / "broken.jpg").write_bytes(b"no picture")
    make(pets, "stray.png", ".hidden/x.png", "run/loss.png")
    (pets / "notes.txt").write_text("not an image")
    ticks = []
    found = opened(pets, advance=lambda done, total: ticks.append((done, total)), exclude=pets / "run")
    assert found.classes == ["a", "a-cat", "cat", "dog"] and len(found.images) == 6
    assert {name for name, _ in found.skipped} == {"dog/broken.jpg", "stray.png"}
    assert ticks[-1] == (7, 7)


def test_labels_follow_the_training_set(pets):
    found = opened(pets, classes=["zebra", "dog", "cat", "a-cat", "a"])
    assert found.classes == ["zebra", "dog", "cat", "a-cat", "a"]
    assert [found.classes[label] for label in found.labels] == [name.split("/")[0] for name in found.images]
    (pets / "cat" / "c.png").write_bytes(b"")
    (pets / "cat" / "d.png").write_bytes(b"")  # a class without images is no error in a validation set
    assert len(opened(pets, classes=found.classes).skipped) == 2
    with pytest.raises(UserError, match=r"--val .*pets.*'cat' is none of the 3 classes"):
        opened(pets, classes=["a", "a-cat", "dog"], flag="--val")


def test_errors_name_the_flag_and_the_folder(tmp_path, pets):
    flat = make(tmp_path / "flat", "a.png", "b.png")
    with pytest.raises(UserError, match=r"--train .*flat: the images lie directly in the folder"):
        opened(flat, flag="--train")
    with pytest.raises(UserError, match=r"--data .*one: found one class, 'x'"):
        opened(make(tmp_path / "one", "x/a.png"))
    with pytest.raises(UserError, match=r"--val .*nowhere: there is no such folder"):
        opened(tmp_path / "nowhere", flag="--val")
    with pytest.raises(UserError, match=r"--val .*a\.png: expected a folder of classes"):
        opened(flat / "a.png", flag="--val")
    (tmp_path / "void" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--val .*void: no image found"):
        opened(tmp_path / "void", flag="--val")
    (pets / "bird").mkdir()
    with pytest.raises(UserError, match=r"pets: the class 'bird' has no readable image\."):
        opened(pets)
    (pets / "bird" / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"'bird' has no readable image \(bird/b\.png: UnidentifiedImageError"):
        opened(pets)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_imagenet_layout_is_recognised(tmp_path, name):
    folder = make(tmp_path, "train/x/a.png", "train/y/b.png", f"{name}/x/c.png")
    assert split_train_val(folder) == (folder / "train", folder / name)
    make(folder, "val/y/d.png", "test/y/d.png")
    assert split_train_val(folder) == (folder / "train", folder / "val")


def test_training_images_alone_and_a_class_called_train(tmp_path):
    alone = make(tmp_path / "alone", "train/x/a.png", "train/y/b.png")
    assert split_train_val(alone) == (alone / "train", None)
    vehicles = make(tmp_path / "vehicles", "train/steam/a.png", "bus/b.png", "test/c.png")
    assert split_train_val(vehicles) == (vehicles, None)
    flat = make(tmp_path / "flat", "train/a.png", "val/b.png")
    assert split_train_val(flat) == (flat, None)
    assert split_train_val(tmp_path / "nowhere") == (tmp_path / "nowhere", None)


def folder_of(counts: dict[str, int]) -> ClassFolder:
    images = [f"{name}/{i:04d}.png" for name, number in counts.items() for i in range(number)]
    labels = [label for label, number in enumerate(counts.values()) for _ in range(number)]
    return ClassFolder(Path("somewhere"), list(counts), images, labels, [("x/y.png", "broken")])


def test_hold_out_is_stratified():
    found = folder_of({"one": 1, "two": 2, "some": 10, "many": 100})
    kept, held = hold_out(found, 0.2, seed=5)
    assert sorted(kept.images + held.images) == sorted(found.images)
    assert [held.labels.count(label) for label in range(4)] == [0, 1, 2, 20]
    for part in (kept, held):
        assert part.classes == found.classes
        assert [part.classes[label] for label in part.labels] == [name.split("/")[0] for name in part.images]
    assert kept.skipped == found.skipped
    kept, _ = hold_out(found, 0.99, seed=5)
    assert [kept.labels.count(label) for label in range(4)] == [1, 1, 1, 1]


def test_hold_out_depends_on_seed_class_and_names_alone():
    found = folder_of({"some": 20, "many": 100})
    _, first = hold_out(found, 0.3, seed=1)
    random.seed(99)
    assert hold_out(found, 0.3, seed=1)[1] == first
    assert hold_out(found, 0.3, seed=2)[1].images != first.images
    more = hold_out(folder_of({"another": 30, "some": 20, "many": 100}), 0.3, seed=1)[1]
    assert [name for name in more.images if not name.startswith("another")] == first.images
    # Two classes of as many images under the same file names do not lose the same ones.
    twins = hold_out(folder_of({"a": 50, "b": 50}), 0.5, seed=1)[1].images
    assert {n[2:] for n in twins if n[0] == "a"} != {n[2:] for n in twins if n[0] == "b"}


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_hold_out_wants_a_share(share):
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        hold_out(folder_of({"a": 2, "b": 2}), share, seed=0)
