"""A folder of classes, one subfolder each, and its division into training and held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._progress import Progress
from ..errors import UserError, describe_error
from .folder import CACHE_NAME, fingerprint, scan_folder, verify_files
from .rng import SPLIT, numpy_stream

HELD_OUT_NAMES = ("val", "validation", "test")  # in order of preference


@dataclass(frozen=True)
class ClassFolder:
    """Labelled images: paths relative to ``folder``, labels that index ``classes``, and (path, reason) of what was
    skipped."""

    folder: Path
    classes: list[str]
    images: list[str]
    labels: list[int]
    skipped: list[tuple[str, str]]

    def paths(self) -> list[Path]:
        """Return the images' absolute paths."""
        return [self.folder / name for name in self.images]


def open_classes(
    folder: Path,
    cache_path: Path,
    classes: Sequence[str] | None = None,
    flag: str = "--data",
    advance: Callable[[int, int], None] | None = None,
    exclude: Path | None = None,
) -> ClassFolder:
    """Find and verify the labelled images of a folder: every direct subfolder is a class, nested folders belong to it.

    Classes are numbered by their sorted names, or as in ``classes``, those of the training set, of which some may be
    missing here. Unreadable images, and images outside of the subfolders, are listed in ``skipped``; what does not
    decode is remembered in ``cache_path``. ``advance(done, total)`` reports progress; ``exclude``, the run's own
    output, is no class.

    Raises:
        UserError: the folder cannot be read or holds no image; images but no subfolder; fewer than two classes, or
            one without a readable image (both without ``classes`` only); a subfolder that is none of ``classes``.
    """
    folders = _subfolders(folder, flag, exclude)
    names = scan_folder(folder, exclude, flag)
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
    return _verified(folder, names, known, cache_path, flag, advance, all_needed=classes is None)


def _verified(
    folder: Path,
    names: list[str],
    classes: list[str],
    cache_path: Path,
    flag: str,
    advance: Callable[[int, int], None] | None,
    all_needed: bool,
) -> ClassFolder:
    inside = [name for name in names if "/" in name]
    skipped = [(name, "it lies outside of the classes' subfolders") for name in names if "/" not in name]
    tick = None if advance is None else lambda done: advance(done, len(inside))
    verdicts = verify_files(folder, inside, cache_path, tick)
    skipped += [(name, verdicts[name]) for name in inside if verdicts[name] is not None]
    images = [name for name in inside if verdicts[name] is None]
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[name.partition("/")[0]] for name in images]
    present = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in present] if all_needed else []
    if empty or not images:
        where = f"the class {empty[0]!r} has" if empty else "there is"
        reason = next((f" ({n}: {r})" for n, r in skipped if not empty or n.startswith(f"{empty[0]}/")), "")
        raise UserError(f"{flag} {folder}: {where} no readable image{reason}.")
    return ClassFolder(folder, list(classes), images, labels, skipped)


def _subfolders(folder: Path, flag: str, exclude: Path | None) -> list[str]:
    """Return the sorted names of the visible direct subfolders."""
    excluded = exclude.resolve() if exclude is not None else None
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: there is no such folder.") from None
    except NotADirectoryError:
        raise UserError(f"{flag} {folder}: expected a folder of classes, but this is a file.") from None
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot read the folder ({describe_error(error)}).") from None
    return sorted(entry.name for entry in entries if entry.resolve() != excluded)


def split_train_val(folder: Path) -> tuple[Path, Path | None]:
    """Return where the training and the validation images are: ``folder/train`` and ``folder/val`` (or ``validation``,
    or ``test``) in ImageNet's layout, else the folder itself and None.

    It is that layout where ``train`` holds subfolders and beside it there are at most those three; a class called
    "train" among others is a class.
    """
    train = folder / "train"
    if not train.is_dir() or not _subfolders(train, "--data", None):
        return folder, None
    if set(_subfolders(folder, "--data", None)) - {"train", *HELD_OUT_NAMES}:
        return folder, None
    held_out = [folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()]
    return train, held_out[0] if held_out else None


def open_split(data: Path, val: Path | None, share: float, seed: int, output: Path) -> tuple[ClassFolder, ClassFolder]:
    """Open the classes to train and to evaluate on: ``val`` where given, else the validation part of ``data``, else a
    ``share`` of each class, see :func:`hold_out`. ``output`` is the run's own folder, which keeps what was verified.

    Raises:
        UserError: see :func:`open_classes`; or nothing is left to evaluate on.
    """
    folder, part = split_train_val(data)
    val = val or part
    with Progress("checking images", 1) as progress:
        found = open_classes(folder, output / CACHE_NAME, advance=progress.update, exclude=output)
    if val is not None:
        with Progress("checking images to evaluate on", 1) as progress:
            cache = output / f"val_{CACHE_NAME}"
            return found, open_classes(val, cache, found.classes, "--val", progress.update, exclude=output)
    training, held_out = hold_out(found, share, seed)
    if not held_out.images:
        raise UserError(
            f"--data {data}: every class has one readable image alone, so that none is left to test on; add images, or "
            "give --val."
        )
    return training, held_out


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
    return _select(found, rest, found.skipped), _select(found, sorted(held), [])


def _select(found: ClassFolder, indices: list[int], skipped: list[tuple[str, str]]) -> ClassFolder:
    images, labels = [found.images[i] for i in indices], [found.labels[i] for i in indices]
    return ClassFolder(found.folder, found.classes, images, labels, skipped)
