"""Hostile, damaged, huge and unusual image files."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.limits import within
from helpers.pictures import nested_folder, picture, png_chunk, write_png, write_tiff
from helpers.training import command, config_of
from PIL import Image

from convnextv2_kernels.analysis.inputs import Crops
from convnextv2_kernels.cli import main
from convnextv2_kernels.data import MAX_PIXELS
from convnextv2_kernels.data import folder as image_folder
from convnextv2_kernels.data.augment import eval_transform
from convnextv2_kernels.data.decoding import FORMATS, STORED, Decoding, Traits, inspect, open_rgb
from convnextv2_kernels.data.folder import check_image, open_folder
from convnextv2_kernels.data.images import CropDataset, load_crop
from convnextv2_kernels.data.labelled import EvalDataset, LabelledDataset
from convnextv2_kernels.data.value_range import choose_range, differing_range, range_of, range_text
from convnextv2_kernels.errors import FileError, UserError
from convnextv2_kernels.train.config import require_same_config

ROOT = Path(__file__).resolve().parents[2]
RAMP = np.linspace(0, 1, 128 * 128).reshape(128, 128)


def grey_levels(path, rule=Decoding()):  # noqa: B008  (immutable)
    return np.asarray(open_rgb(path, rule))[..., 0]


# -- grey values of more than 8 bits


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("uint16", 0, 4095), ("int16", -1024, 3071), ("int32", -5, 100_000), ("uint32", 9, 4e9), ("float32", -2, 2)],
)
def test_a_value_range_keeps_every_level(tmp_path, order, kind, low, high):
    if (order, kind) == (">", "uint32"):
        pytest.skip("Pillow reads no such file")
    path = write_tiff(tmp_path / "a.tif", (low + RAMP * (high - low)).astype(kind), order)
    grey = grey_levels(path, Decoding((low, high)))
    # half a level of 255, and one step of the coarsest type, of 4096
    assert np.abs(grey / 255 - RAMP).max() <= 0.5 / 255 + 1 / 4095 and len(np.unique(grey)) == 256
    traits = inspect(path)
    assert traits.stored == kind.replace("float32", "float")
    assert (traits.low, traits.high) == pytest.approx((low, high), abs=1e-6)


def test_every_16_bit_value_is_what_it_was_without_a_range(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = (values / 257).clip(0, 255).round().astype(np.uint8)
    assert np.array_equal(grey_levels(tmp_path / "a.png"), expected)
    assert np.array_equal(grey_levels(tmp_path / "a.png", Decoding((0, 65535))), expected)


def test_12_bits_packed_are_taken_as_such(tmp_path):
    pairs = (RAMP * 4095).astype(np.uint32).reshape(128, 64, 2)
    packed = np.stack([pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255], -1)
    path = write_tiff(tmp_path / "a.tif", packed.reshape(128, 192).astype(np.uint8), t256=(128,), t258=(12,))
    assert inspect(path) == Traits("uint12", 0, 4095) and len(np.unique(grey_levels(path))) == 256


def test_one_rule_for_all_images(tmp_path):
    """The same value is the same grey, whatever else an image holds."""
    for name, highest in (("a", 255), ("b", 256), ("c", 60_000)):
        values = np.full((32, 32), 200, np.int32)
        values[0, 0] = highest
        write_tiff(tmp_path / f"{name}.tif", values)
    for rule in (Decoding((0, 500)), Decoding()):
        assert len({int(grey_levels(tmp_path / f"{name}.tif", rule)[9, 9]) for name in "abc"}) == 1
    assert grey_levels(tmp_path / "c.tif", Decoding((0, 500)))[9, 9] == 102


def test_one_wild_value_does_not_erase_the_others(tmp_path):
    paths = []
    for index, wild in enumerate((np.inf, -np.inf, np.nan, -9999, 3e38)):
        values = RAMP.astype(np.float32)
        values[5, 5] = wild
        paths.append(write_tiff(tmp_path / f"{index}.tif", values))
    chosen = choose_range("percentile", {path: inspect(path) for path in paths})
    assert chosen.value_range == pytest.approx((0.005, 0.995), abs=1e-3)
    assert any("3 images" in note and "hold NaN or infinite values" in note for note in chosen.notes)
    for path, expected in zip(paths, (255, 0, 0, 0, 255), strict=True):
        grey = grey_levels(path, Decoding(chosen.value_range))
        assert len(np.unique(grey)) == 256 and grey[5, 5] == expected


def test_no_data_of_a_geotiff_is_no_value(tmp_path):
    values = np.where(RAMP < 0.6, -9999, RAMP).astype(np.float32)
    path = write_tiff(tmp_path / "a.tif", values, t42113=b"-9999\0")
    assert choose_range("percentile", {path: inspect(path)}).value_range[0] > 0.59


def test_the_choice_is_stated(tmp_path):
    def deep(stored, low, high):
        return {Path(f"{stored}.tif"): Traits(stored, low, high)}

    sixteen = choose_range(None, deep("uint16", 3, 4095))
    assert (sixteen.value_range, sixteen.rule) == ((0, 65535), "assumed")
    assert sixteen.notes == [
        "warning: 1 image with grey values of more than 8 bits (uint16; the values seen are 3 to 4095): assumed 0 to "
        "65535, the range of the type; --value-range sets it"
    ]
    given = choose_range((0.0, 1000.0), deep("uint16", 3, 4095))
    assert given.value_range == (0, 1000) and given.notes[0].endswith("clipped") and "note: " in given.notes[0]
    assert choose_range("dtype", deep("int16", -5, 5)).value_range == STORED["int16"]
    with pytest.raises(UserError, match="dtype: the images store float, uint16; give --value-range LOW HIGH"):
        choose_range("dtype", deep("uint16", 0, 1) | deep("float", 0, 1))
    recorded = choose_range(None, deep("int16", -5, 5), recorded=(-1000.0, 1000.0))
    assert recorded.value_range == (-1000, 1000) and "recorded with the weights" in recorded.notes[0]
    # whichever of its images are left, a run keeps the range that it began with
    for left in (deep("int16", -5, 5), deep("uint16", 0, 9), {}):
        for wanted in (None, "percentile"):
            assert choose_range(wanted, left, kept=(-7.5, 7.0)).value_range == (-7.5, 7)
    path = write_tiff(tmp_path / "flat.tif", np.full((9, 9), 7, np.int16))
    with pytest.raises(UserError, match="nearly all grey values .* in 1 image are 7, which gives no range"):
        choose_range(None, {path: inspect(path)})
    assert choose_range(None, {}).notes == [] and choose_range("dtype", {}).value_range is None
    assert "has no effect" in choose_range((0.0, 9.0), {}).notes[0]
    assert differing_range((0.0, 9.0), (0.0, 9.0), "w") == differing_range(None, (0.0, 9.0), "w") == []
    assert "0 to 8, and these are mapped from 0 to 9" in differing_range((0.0, 9.0), (0.0, 8.0), "w")[0]


@pytest.mark.parametrize("value", [(-1000.0, 3071.0), (0.1, 1 / 3), (-1e300, 1e300)])
def test_a_recorded_range_is_read_back_exactly(value):
    assert range_of(range_text(value)) == range_of(list(value)) == value


@pytest.mark.parametrize(
    "value", [None, "", "x to y", "3 to 1", "0 to inf", [1], [1, 2, 3], {}, 7, ["a", "b"], "nan to 1"]
)
def test_a_recorded_range_that_is_none(value):
    assert range_of(value) is None


def test_runs_of_before_go_on():
    from dataclasses import replace

    from helpers.training import CONFIG

    saved = CONFIG.to_dict()
    saved.pop("value_range")
    require_same_config(saved, CONFIG, "x")
    require_same_config(saved, replace(CONFIG, value_range=(0.0, 65535.0)), "x")  # what 16 bits were mapped from
    with pytest.raises(UserError, match=r"value_range: None in the checkpoint, \[0.0, 4095.0\] now"):
        require_same_config(saved, replace(CONFIG, value_range=(0.0, 4095.0)), "x")


@pytest.mark.parametrize("words", ["9 3", "3", "min max", "0 inf", "0 1 2", "nan 1", "-3 -5", "dtype 3"])
def test_a_senseless_range_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as usage:
        main(["pretrain", "--data", "x", "--value-range", *words.split()])
    assert usage.value.code == 2
    assert f"expected LOW HIGH with LOW below HIGH, dtype or percentile, got {words}" in capsys.readouterr().err


def test_a_run_states_keeps_and_hands_on_its_range(tmp_path, capsys):
    data, run = tmp_path / "ct", tmp_path / "run"
    for label in "ab":
        (data / label).mkdir(parents=True)
        for index in range(4):
            values = (RAMP * 3000 - 1000 + 10 * index).astype(np.int16)
            write_tiff(data / label / f"{index}.tif", values if label == "a" else values[::-1])
    assert main(command("pretrain", data, run, "--max-steps", "1")) == 0
    said = capsys.readouterr().out
    assert "warning: 8 images with grey values of more than 8 bits (int16; the values seen are -1000 to 2030)" in said
    low, high = config_of(run)["value_range"]
    assert -1000 < low < -950 and 1950 < high < 2030
    # Another sample would give another range: the one of the start is kept, and another one is refused by name.
    (data / "a" / "0.tif").unlink()
    assert main(command("pretrain", data, run, "--value-range", "0", "9")) == 1
    assert "value_range: [" in capsys.readouterr().err
    assert main(command("pretrain", data, run)) == 0
    said = capsys.readouterr().out
    assert "as when the run began" in said and "1 image of the run cannot be read any more" in said
    assert config_of(run)["value_range"] == [low, high]
    # The weights tell.
    encoder = run / "encoder.safetensors"
    words = ["--recipe", "default", "--aa", "none", "--epochs", "1", "--init", str(encoder)]
    tuned = command("finetune", data, tmp_path / "tuned", *words)
    assert main(tuned) == 0
    assert "(recorded with the weights)" in capsys.readouterr().out
    assert config_of(tmp_path / "tuned")["value_range"] == [low, high]
    judged = [*tuned, "--init", str(tmp_path / "tuned" / "best.safetensors"), "--eval-only", "--value-range", "dtype"]
    assert main([*judged, "--output", str(tmp_path / "judged")]) == 0
    assert "was trained on grey values of" in capsys.readouterr().out
    look = ["analyze", "cosine", str(encoder), "--data", str(data), "--output", str(tmp_path / "look"), "--images", "3"]
    assert main([*look, "--img-size", "32"]) == 0
    assert "(recorded with the weights)" in capsys.readouterr().out
    assert main([*look, "--img-size", "32", "--value-range", "-1024", "3071"]) == 0
    assert "are mapped from -1024 to 3071" in capsys.readouterr().out
    assert json.loads((tmp_path / "look" / "cosine.json").read_text())["settings"]["value_range"] == [-1024, 3071]


# -- bands, frames and other contents that 8-bit RGB has no room for


def bands(count, kind=np.uint8):
    return np.dstack([RAMP * 255] * count).astype(kind)


@pytest.mark.parametrize(
    ("values", "tags", "oddities"),
    [
        (bands(4), {}, ("bands",)),  # no ExtraSamples: four bands, although Pillow says RGBA
        (bands(4), {"t338": (0,)}, ("bands",)),
        (bands(5), {"t338": (0, 0)}, ("bands",)),
        (bands(5), {"t338": (2, 0)}, ("bands",)),
        (bands(2), {"t338": (0,)}, ("bands",)),
        (bands(4), {"t338": (2,)}, None),
        (bands(4), {"t338": (1,)}, None),
        (bands(2), {"t338": (2,)}, None),
        (bands(4), {"t262": (5,)}, ("cmyk",)),
        (bands(5), {"t262": (5,), "t338": (0,)}, ("bands", "cmyk")),
        (bands(3, np.uint16), {}, ("deep colour",)),
        (bands(4, np.uint16), {"t338": (0,)}, ("bands", "deep colour")),
        (bands(3), {}, None),
    ],
)
def test_a_band_is_never_lost_without_a_word(tmp_path, values, tags, oddities):
    path = write_tiff(tmp_path / "a.tif", values, **tags)
    traits = inspect(path)
    assert (traits.oddities if traits else None) == oddities
    notes = choose_range(None, {path: traits} if traits else {}).notes
    assert len(notes) == len(oddities or ()) and all(f"1 image (the first: {path})" in note for note in notes)
    assert open_rgb(path).mode == "RGB"


def test_other_oddities_are_told(tmp_path):
    row = b"\0" + np.linspace(0, 4095, 64).astype(">u2").repeat(3).tobytes()
    traits = inspect(write_png(tmp_path / "a.png", (64, 64), 16, 2, row * 64))
    assert traits.oddities == ("deep colour",) and traits.high == 15
    assert choose_range(None, {Path("a"): traits}).notes[0].endswith("the greatest is 15 of 255")
    frames = [picture(index) for index in range(3)]
    for name in ("a.gif", "a.webp", "a.tif", "b.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert inspect(tmp_path / name).oddities == ("frames",), name
        frames[0].save(tmp_path / name)
        assert inspect(tmp_path / name) is None, name
    path = write_tiff(tmp_path / "a.tif", (RAMP * 65535).astype(np.uint16), t262=(0,))
    assert inspect(path).oddities == ("white is 0",)
    frames[0].convert("CMYK").save(tmp_path / "a.jpg")
    assert inspect(tmp_path / "a.jpg").oddities == ("cmyk",)


def test_what_holds_no_more_than_rgb_has_no_traits(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        picture(1).convert(mode).save(tmp_path / "a.png")
        assert inspect(tmp_path / "a.png") is None, mode


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_cropped_as_it_stands_upright(tmp_path, orientation):
    """Pillow swaps the sides of a TIFF when it opens it, and turns it when it decodes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(3, (96, 48)).save(tmp_path / "a.tif", exif=exif)
    picture(3, (96, 48)).save(tmp_path / "a.png", exif=exif)
    for seed in range(3):
        crops = [load_crop(tmp_path / name, (32, 48), np.random.default_rng(seed)) for name in ("a.tif", "a.png")]
        assert torch.equal(*crops)


# -- formats


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    log = tmp_path / "started"
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho started >> {log}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    assert "x.png is no image of the formats JPEG, PNG" in check_image(path).reason
    assert CropDataset([path], (32, 32), 0)[(0, 0)].image is None
    assert EvalDataset([path], [0], eval_transform((32, 32)))[0].label == -1
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        list(Crops([path], (32, 32), 1))
    assert not log.exists()


@pytest.mark.parametrize("name", ["ICO", "TGA", "PCX", "DDS", "SGI", "JPEG2000", "PDF", "EPS", "ICNS"])
def test_other_formats_are_not_opened(tmp_path, name):
    picture(1, (64, 64)).save(tmp_path / "x.png", format=name)
    assert "UnidentifiedImageError" in check_image(tmp_path / "x.png").reason


def test_every_extension_has_its_format():
    known = Image.registered_extensions()
    assert {known[extension] for extension in image_folder.IMAGE_EXTENSIONS} == set(FORMATS)


def test_images_are_opened_in_one_place():
    """Image.open goes by content, through every format that Pillow knows."""
    files = [path for part in ("convnextv2_kernels", "bench", "examples") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    found = [str(path) for path in files if re.search(r"Image\.open\(|imread\(|read_image\(", path.read_text())]
    assert found == []


# -- sizes


def blank_png(path, width, height, depth=8, colour=0):
    bits = depth * {0: 1, 2: 3, 6: 4}[colour]
    return write_png(path, (width, height), depth, colour, bytes((1 + width * bits // 8) * height))


def test_the_limit_counts_before_decoding(tmp_path):
    path = blank_png(tmp_path / "a.png", 13300, 13300, 16)
    begun = time.monotonic()
    with pytest.raises(
        FileError, match=f"a.png has 13300x13300 pixels of more than 8 bits, .*limit of {MAX_PIXELS} .--max-pixels"
    ):
        open_rgb(path)
    assert time.monotonic() - begun < 5 and path.stat().st_size < 400_000
    assert "--max-pixels" in check_image(path).reason
    small = blank_png(tmp_path / "b.png", 100, 100)
    assert open_rgb(small, Decoding(max_pixels=10_000)).size == (100, 100)
    with pytest.raises(FileError, match="b.png has 100x100 pixels, above the limit of 9999 .--max-pixels"):
        load_crop(small, (32, 32), None, decoding=Decoding(max_pixels=9999))
    deep = blank_png(tmp_path / "c.png", 100, 100, 16)
    assert check_image(deep, 20_000).reason is None and "count double" in check_image(deep, 19_999).reason


def test_a_large_photograph_is_read_without_a_warning(tmp_path, recwarn):
    """90 megapixels: more than Pillow warns of."""
    path = blank_png(tmp_path / "a.png", 15_000, 6000)
    assert load_crop(path, (32, 32), None).shape == (32, 32, 3)
    assert not [w for w in recwarn if "DecompressionBomb" in w.category.__name__]


@pytest.mark.thorough
def test_a_limit_above_pillows_own(tmp_path):
    path = blank_png(tmp_path / "a.png", 20_000, 10_000)
    assert "above the limit" in check_image(path).reason
    assert check_image(path, 10**9).reason is None


def test_16_bits_are_converted_in_little_memory(tmp_path):
    """Beside Pillow's images, of 2, 1 and 4 bytes a pixel, there are arrays of a strip at a time; they took 18."""
    path = blank_png(tmp_path / "a.png", 4000, 4000, 16)
    tracemalloc.start()
    try:
        open_rgb(path)
        check_image(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * 4000 * 4000


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "iCCP"])
def test_compressed_chunks_do_not_unpack_without_bound(tmp_path, chunk):
    bomb = zlib.compress(bytes(1 << 27), 9)
    content = {"zTXt": b"k\0\0", "iTXt": b"k\0\1\0\0\0", "iCCP": b"k\0\0"}[chunk] + bomb
    path = write_png(tmp_path / "a.png", (32, 32), 8, 0, bytes(33 * 32), *[png_chunk(chunk.encode(), content)] * 4)
    begun = time.monotonic()
    check_image(path)
    assert time.monotonic() - begun < 5


def test_images_without_pixels(tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.zeros((1, 1), np.uint8), t256=(0,))
    assert check_image(path).reason is not None
    assert CropDataset([path], (32, 32), 0)[(0, 0)].image is None


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_no_damaged_file_does_more_than_fail(tmp_path):
    """Flips and truncations of every format: an image or one line, within time."""
    frames = {
        f"a{suffix}": picture(2, (40, 36)) for suffix in (".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".ppm")
    }
    for name, image in frames.items():
        image.save(tmp_path / name)
    write_tiff(tmp_path / "deep.tif", (RAMP[:40, :36] * 4095).astype(np.int16))
    rng, begun = np.random.default_rng(0), time.monotonic()
    for path in sorted(tmp_path.iterdir()):
        sound = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(sound)
            for place in rng.integers(len(sound), size=rng.integers(1, 6)):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged[: rng.integers(len(sound))] if rng.random() < 0.2 else damaged)
            found = check_image(path, 10**7)
            assert found.reason is None or "\n" not in found.reason
            if found.reason is None:
                load_crop(path, (32, 32), None, decoding=Decoding(max_pixels=10**7))
    assert time.monotonic() - begun < 80


# -- what is no regular file


@pytest.fixture
def irregular(tmp_path):
    """Paths named as images that are a FIFO, a device and a socket."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path)  # the name of a socket is short
    server.bind("socket.png")
    os.chdir(here)
    yield {"FIFO": tmp_path / "fifo.png", "device": tmp_path / "zero.png", "socket": tmp_path / "socket.png"}
    server.close()


def test_what_is_no_regular_file_is_reported_and_replaced(tmp_path, irregular):
    sound = tmp_path / "z.jpg"
    picture(4).save(sound)
    (tmp_path / "folder.png").mkdir()
    transform = eval_transform((32, 32))
    for kind, path in irregular.items():
        readers = {
            "check": lambda path=path: check_image(path).reason,
            "crops": lambda path=path: CropDataset([path, sound], (32, 32), 0)[(0, 0)].failures,
            "labelled": lambda path=path: LabelledDataset([path, sound], [0, 1], transform, 0)[(0, 0)].failures,
            "evaluation": lambda path=path: EvalDataset([path], [0], transform)[0].failures,
        }
        for name, read in readers.items():
            assert f"is a {kind}, expected a regular file" in str(within(10, read)), name
        crops = Crops([path, sound], (32, 32), 4)
        assert within(10, lambda crops=crops: list(crops))[0][1] == [1] and kind in crops.failures[0][1]
    (tmp_path / "run").mkdir()
    found = within(10, lambda: open_folder(tmp_path, tmp_path / "run", 1))
    assert found.images == ["z.jpg"] and len(found.skipped) == 3


def test_a_file_that_becomes_a_fifo_in_mid_run(tmp_path):
    nested_folder(tmp_path / "data")
    dataset = CropDataset(sorted((tmp_path / "data").rglob("*.png")), (32, 32), 0)
    before = dataset[(0, 0)]
    path = dataset.sources[0]
    path.unlink()
    os.mkfifo(path)
    after = within(10, lambda: dataset[(0, 0)])
    assert before.failures == [] and "FIFO" in after.failures[0][1] and after.image is not None
