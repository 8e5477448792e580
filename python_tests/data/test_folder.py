import shutil

import pytest
from helpers.pictures import picture

from convnextv2_kernels.data import folder as image_folder
from convnextv2_kernels.errors import UserError


@pytest.fixture
def folder(photos, tmp_path):
    """A copy of the pictures with three files that do not decode."""
    folder = tmp_path / "data"
    shutil.copytree(photos, folder)
    whole = tmp_path / "whole.jpg"
    picture(1, (300, 300)).save(whole)
    (folder / "truncated.jpg").write_bytes(whole.read_bytes()[:-900])
    (folder / "text.png").write_text("this is no picture")
    (folder / "sub" / "empty.webp").touch()
    (folder / "notes.txt").write_text("not by extension")
    (folder / "._0.png").write_bytes(b"resource fork")
    return folder


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_scan_is_nested_sorted_and_by_extension(folder):
    picture(1).save(folder / "UPPER.JPG")
    names = image_folder.scan_folder(folder)
    assert names == sorted(names) and len(names) == 13
    assert {"0.png", "sub/5.png", "sub/deeper/8.png", "UPPER.JPG"} <= set(names)
    assert not {"notes.txt", "._0.png"} & set(names)


def test_scan_leaves_out_the_output_and_survives_a_loop_of_links(folder):
    inside = folder / "run"
    inside.mkdir()
    picture(1).save(inside / "reconstruction.png")
    (folder / "sub" / "back").symlink_to(folder)
    assert len(image_folder.scan_folder(folder, exclude=inside)) == 12


def test_unreadable_files_are_skipped_counted_and_listed(folder, output):
    found = image_folder.open_folder(folder, output, batch_size=4)
    assert len(found.images) == 9
    assert [name for name, _ in found.skipped] == ["sub/empty.webp", "text.png", "truncated.jpg"]
    lines = (output / "skipped_files.txt").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("truncated.jpg\t") and "truncated" in lines[2]


def test_verdicts_are_cached_until_a_file_changes(folder, output, monkeypatch):
    image_folder.open_folder(folder, output, batch_size=4)
    checked = []
    check = image_folder.check_image
    monkeypatch.setattr(image_folder, "check_image", lambda p, n: checked.append(p.name) or check(p, n))
    assert len(image_folder.open_folder(folder, output, batch_size=4).images) == 9
    assert checked == []
    picture(5).save(folder / "text.png")
    assert len(image_folder.open_folder(folder, output, batch_size=4).images) == 10
    assert checked == ["text.png"]


def test_interrupted_verification_keeps_what_it_knows(folder, output, monkeypatch):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image_folder.open_folder(folder, output, 4, interrupt)
    checked = []
    check = image_folder.check_image
    monkeypatch.setattr(image_folder, "check_image", lambda p, n: checked.append(p.name) or check(p, n))
    image_folder.open_folder(folder, output, 4)
    assert len(checked) == 11


def test_damaged_cache_only_costs_time(folder, output):
    (output / image_folder.CACHE_NAME).write_text('{"0.png": [1, 2')
    assert len(image_folder.open_folder(folder, output, batch_size=4).images) == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.write_text("x"), "expected a folder"),
        (lambda p: p.mkdir(), "no image found"),
    ],
)
def test_bad_folder_is_named(tmp_path, output, make, message):
    path = tmp_path / "given"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        image_folder.open_folder(path, output, 4)
    assert str(path) in str(error.value)


def test_too_few_images_for_a_batch(folder, output):
    with pytest.raises(UserError, match="9 readable images .* 64.*at most 9"):
        image_folder.open_folder(folder, output, batch_size=64)
    for path in list(folder.rglob("*.png")):
        path.write_text("broken")
    with pytest.raises(UserError, match="0 readable images .12 could not be read"):
        image_folder.open_folder(folder, output, batch_size=2)


def test_reopening_keeps_the_list_of_the_run(folder, output):
    first = image_folder.open_folder(folder, output, batch_size=4)
    picture(11).save(folder / "added.png")
    (folder / "3.png").unlink()
    again = image_folder.reopen_folder(folder, output)
    notes = again.notes
    assert again.images == first.images
    assert any("1 image of the run" in n and "3.png" in n for n in notes)
    assert any("1 image added" in n for n in notes)
    assert "3.png\t" in (output / "skipped_files.txt").read_text()
    assert len((output / "skipped_files.txt").read_text().splitlines()) == 4
    image_folder.reopen_folder(folder, output)
    assert len((output / "skipped_files.txt").read_text().splitlines()) == 4


def test_names_that_are_no_utf8(tmp_path, output):
    folder = tmp_path / "data"
    folder.mkdir()
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    try:
        picture(0).save(folder / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    (folder / b"bad\xe9.png".decode("utf-8", "surrogateescape")).write_text("x")
    assert image_folder.open_folder(folder, output, 1).images == [name]
    again = image_folder.reopen_folder(folder, output)
    assert again.images == [name] and again.notes == []
