"""A folder of classes, one subfolder each, and its division into training and held-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .._console import visible
from .._files import write_json
from .._progress import Progress
from ..errors import UserError, describe_error
from . import MAX_PIXELS
from .decoding import OWN_PICTURE, Traits
from .folder import (
    CACHE_NAME,
    IMAGES_NAME,
    RECORDS,
    added_note,
    checked_names,
    damaged_list,
    drawn_note,
    find_images,
    fingerprint,
    is_record,
    lost_images,
    read_saved,
    scan_folder,
    sort_out,
    traits_of,
    verify_files,
    writing,
)
from .rng import SPLIT, numpy_stream

HELD_OUT_NAMES = ("val", "validation", "test")  # in order of preference
VAL_CACHE_NAME = f"val_{CACHE_NAME}"


@dataclass(frozen=True)
class ClassFolder:
    """Labelled images: paths relative to ``folder``, labels that index ``classes``, and (path, reason) of what was
    skipped. ``traits``: of those images that hold more than 8-bit RGB. ``notes``: for the user."""

    folder: Path
    classes: list[str]
    images: list[str]
    labels: list[int]
    skipped: list[tuple[str, str]]
    traits: dict[str, Traits] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def paths(self) -> list[Path]:
        """Return the images' absolute paths."""
        return [self.folder / name for name in self.images]

    def traits_by_path(self) -> dict[Path, Traits]:
        """Return the traits by the images' paths."""
        return {self.folder / name: about for name, about in self.traits.items()}


def open_classes(
    folder: Path,
    cache_path: Path,
    classes: Sequence[str] | None = None,
    flag: str = "--data",
    advance: Callable[[int, int], None] | None = None,
    exclude: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ClassFolder:
    """Find and verify the labelled images of a folder: every direct subfolder is a class, nested folders belong to it.

    Classes are numbered by their sorted names, or as in ``classes``, those of the training set, of which some may be
    missing here. Unreadable images, and images outside of the subfolders, are listed in ``skipped``; what does not
    decode is remembered in ``cache_path``. ``advance(done, total)`` reports progress; ``exclude``, the run's own
    output, is no class, nor is that of another run.

    Raises:
        UserError: the folder cannot be read or holds no image; images but no subfolder; fewer than two classes, or
            one without a readable image (both without ``classes`` only); a subfolder that is none of ``classes``.
    """
    folders, runs = _subfolders(folder, flag, exclude)
    names, drawn = find_images(folder, exclude, flag)
    if not folders:
        raise UserError(
            f"{flag} {folder}: the images lie directly in the folder; expected one subfolder of images for each class."
        )
    if classes is None:
        if len(folders) < 2:
            raise UserError(
                f"{flag} {folder}: found one class, {folders[0]!r}; expected a subfolder for each of at least two."
            )
        known = folders
    else:
        known = list(classes)
        unknown = sorted(set(folders) - set(known))
        if unknown:
            raise UserError(
                f"{flag} {folder}: the subfolder {unknown[0]!r} is none of the {len(known)} classes "
                "of the training set."
            )
    found = _verified(folder, names, known, cache_path, flag, advance, max_pixels)
    if classes is None:
        _require_all_classes(found, flag)
    ours = [*drawn, *(name for name, reason in found.skipped if reason.endswith(OWN_PICTURE))]
    notes = [f"{visible(name)} is the output of a run, no class" for name in runs]
    return replace(found, notes=[*notes, *drawn_note(sorted(ours))])


def _verified(
    folder: Path,
    names: list[str],
    classes: list[str],
    cache_path: Path,
    flag: str,
    advance: Callable[[int, int], None] | None,
    max_pixels: int,
) -> ClassFolder:
    known = set(classes)
    inside = [name for name in names if "/" in name and name.partition("/")[0] in known]
    strays = [name for name in names if "/" not in name]
    tick = None if advance is None else lambda done: advance(done, len(inside))
    results = verify_files(folder, inside, cache_path, tick, max_pixels)
    images, unreadable, _ = sort_out(inside, results)
    skipped = [*((name, "it lies outside of the classes' subfolders") for name in strays), *unreadable]
    if not images:
        reason = f" ({': '.join(skipped[0])})" if skipped else ""
        raise UserError(f"{flag} {folder}: there is no readable image{reason}.")
    return ClassFolder(folder, list(classes), images, _labels(images, classes), skipped, traits_of(results))


def _labels(images: list[str], classes: Sequence[str]) -> list[int]:
    number = {name: label for label, name in enumerate(classes)}
    return [number[name.partition("/")[0]] for name in images]


def _require_all_classes(found: ClassFolder, flag: str) -> None:
    present = set(found.labels)
    empty = next((name for label, name in enumerate(found.classes) if label not in present), None)
    if empty is not None:
        reason = next((f" ({n}: {r})" for n, r in found.skipped if n.startswith(f"{empty}/")), "")
        raise UserError(f"{flag} {found.folder}: the class {empty!r} has no readable image{reason}.")


def _subfolders(folder: Path, flag: str, exclude: Path | None) -> tuple[list[str], list[str]]:
    """Return the sorted names of the visible direct subfolders: those that may be classes, and outputs of runs."""
    excluded = exclude.resolve() if exclude is not None else None
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: there is no such folder.") from None
    except NotADirectoryError:
        raise UserError(f"{flag} {folder}: expected a folder of classes, but this is a file.") from None
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot read the folder ({describe_error(error)}).") from None
    names = sorted(entry.name for entry in entries if entry.resolve() != excluded)
    runs = [name for name in names if _is_output(folder / name)]
    return [name for name in names if name not in runs], runs


def _is_output(folder: Path) -> bool:
    """Whether a folder holds the records of this program and no image besides its pictures."""
    try:
        names = {CACHE_NAME, VAL_CACHE_NAME, *RECORDS} & {path.name for path in folder.glob("*.json")}
        if not any(name not in RECORDS or is_record(folder / name) for name in names):
            return False
        scan_folder(folder)
    except OSError:
        return False
    except UserError:
        return True
    return False


def split_train_val(folder: Path, exclude: Path | None = None) -> tuple[Path, Path | None]:
    """Return where the training and the validation images are: ``folder/train`` and ``folder/val`` (or ``validation``,
    or ``test``) in ImageNet's layout, else the folder itself and None.

    It is that layout where ``train`` holds subfolders and beside it there are at most those three, and outputs of runs
    (``exclude`` is one); a class called "train" among others is a class.
    """
    train = folder / "train"
    if not train.is_dir() or not _subfolders(train, "--data", exclude)[0]:
        return folder, None
    if set(_subfolders(folder, "--data", exclude)[0]) - {"train", *HELD_OUT_NAMES}:
        return folder, None
    held_out = [folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()]
    return train, held_out[0] if held_out else None


def open_split(
    data: Path, val: Path | None, share: float, seed: int, output: Path, max_pixels: int = MAX_PIXELS
) -> tuple[ClassFolder, ClassFolder]:
    """Open the classes to train and to evaluate on: ``val`` where given, else the validation part of ``data``, else a
    ``share`` of each class, see :func:`hold_out`. ``output`` is the run's own folder, which keeps what was verified.

    Raises:
        UserError: see :func:`open_classes`; or nothing is left to evaluate on.
    """
    folder, part = split_train_val(data, output)
    val = val or part
    with Progress("checking images", 1) as progress:
        found = open_classes(folder, output / CACHE_NAME, None, "--data", progress.update, output, max_pixels)
    if val is not None:
        return found, _open_val(val, found.classes, output, max_pixels)
    training, held_out = hold_out(found, share, seed)
    if not held_out.images:
        raise UserError(
            f"--data {data}: every class has one readable image alone, so that none is left to test on; add images, or "
            "give --val."
        )
    return training, held_out


def _open_val(val: Path, classes: Sequence[str], output: Path, max_pixels: int) -> ClassFolder:
    with Progress("checking images to evaluate on", 1) as progress:
        return open_classes(val, output / VAL_CACHE_NAME, classes, "--val", progress.update, output, max_pixels)


def save_split(output: Path, training: ClassFolder, held_out: ClassFolder, share: float | None) -> None:
    """Write the lists of a run's images, which stay in force when it is resumed; ``share`` as for
    :func:`reopen_split`."""
    lists = [{"images": found.images, "skipped": found.skipped} for found in (training, held_out)]
    record = {"classes": training.classes, "val_share": share, "training": lists[0], "held_out": lists[1]}
    with writing(output / IMAGES_NAME):
        write_json(output / IMAGES_NAME, record)


def held_out_share(data: Path, val: Path | None, share: float, output: Path) -> float | None:
    """``share`` where :func:`open_split` would hold out a share of each class, else None."""
    return share if (val or split_train_val(data, output)[1]) is None else None


def reopen_split(
    data: Path, val: Path | None, share: float, output: Path, max_pixels: int = MAX_PIXELS
) -> tuple[ClassFolder, ClassFolder] | None:
    """:func:`open_split` for a run that is resumed: the lists of :func:`save_split` stay in force, None where there
    are none (an older version wrote the run). Images added since are ignored, those that cannot be read any more are
    replaced as they come up, and notes say so.

    Raises:
        UserError: the lists are damaged, all training images are lost, a class was added, or another share is held out.
    """
    if not (output / IMAGES_NAME).exists():
        return None
    saved = read_saved(output)
    if isinstance(saved, dict) and "images" in saved:
        return None  # of a pre-training run, whose settings will be found to differ
    classes, before, lists = _checked_split(saved, output)
    folder, part = split_train_val(data, output)
    val, now = val or part, held_out_share(data, val, share, output)
    if before != now:
        said = [f"a share of {value:g} of each class" if value else "a folder of its own" for value in (before, now)]
        raise UserError(
            f"{output} was begun with {said[0]} to evaluate on, and this is {said[1]}; restore --val and --val-share, "
            "or give a new --output."
        )
    unknown = sorted(set(_subfolders(folder, "--data", output)[0]) - set(classes))
    if unknown:
        raise UserError(
            f"--data {folder}: the subfolder {unknown[0]!r} is none of the {len(classes)} classes of the run in "
            f"{output}; move it away, or give a new --output."
        )
    (images, skipped), (held_out, held_out_skipped) = lists
    names = scan_folder(folder, output)
    both = images + held_out if val is None else images
    with Progress("checking images", len(both)) as progress:
        results = verify_files(
            folder, both, output / CACHE_NAME, lambda done: progress.update(done, len(both)), max_pixels
        )
    lost, notes = lost_images(images, results, f"--data {folder}")
    notes += added_note(len(set(names) - set(both) - {name for name, _ in skipped}))
    traits = traits_of(results)
    training = ClassFolder(folder, classes, images, _labels(images, classes), skipped + lost, traits, notes)
    if val is not None:
        return training, _open_val(val, classes, output, max_pixels)
    return training, ClassFolder(folder, classes, held_out, _labels(held_out, classes), held_out_skipped)


def _checked_split(saved: Any, output: Path) -> tuple[list[str], float | None, list[tuple[list[str], list]]]:
    """Classes, share and (images, skipped) of both parts out of what :func:`save_split` wrote."""
    parts = [saved.get(key) if isinstance(saved, dict) else None for key in ("training", "held_out")]
    lists = [checked_names(part, output) for part in parts]
    classes, share = saved.get("classes"), saved.get("val_share")
    known = set(classes) if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else set()
    if not known or len(known) < len(classes) or not (share is None or (isinstance(share, float) and 0 < share < 1)):
        raise damaged_list(output, "expected the names of the classes and the share that is held out")
    if any(name.partition("/")[0] not in known or "/" not in name for name in lists[0][0]):
        raise damaged_list(output, "an image is in none of the classes")
    return classes, share, lists


def hold_out(found: ClassFolder, share: float, seed: int) -> tuple[ClassFolder, ClassFolder]:
    """Split into training and held-out images, class by class.

    ``share`` of each class, rounded, is held out, at least one image and never all; the only image of a class is
    trained on. Which ones is a pure function of (seed, class, names of its images), whatever else is in the folder.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    held = set()
    members: list[list[int]] = [[] for _ in found.classes]
    for index, label in enumerate(found.labels):
        members[label].append(index)
    for name, indices in zip(found.classes, members, strict=True):
        if len(indices) < 2:
            continue
        number = min(max(1, round(share * len(indices))), len(indices) - 1)
        digest = fingerprint([name, *(found.images[i] for i in indices)])
        order = numpy_stream(seed, SPLIT, int(digest[:16], 16)).permutation(len(indices))
        held.update(indices[i] for i in order[:number])
    rest = [index for index in range(len(found.images)) if index not in held]
    return _select(found, rest, found.skipped), replace(_select(found, sorted(held), []), notes=[])


def _select(found: ClassFolder, indices: list[int], skipped: list[tuple[str, str]]) -> ClassFolder:
    images, labels = [found.images[i] for i in indices], [found.labels[i] for i in indices]
    return replace(found, images=images, labels=labels, skipped=skipped)
