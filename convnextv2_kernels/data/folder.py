"""Finding a folder's images and checking once that each of them decodes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._console import visible
from .._files import MAX_JSON_BYTES, atomic_file, open_regular, read_bytes, read_json, write_json
from .._progress import count
from ..errors import FileError, UserError, describe_error
from . import MAX_PIXELS
from .decoding import ODDITIES, OWN_PICTURE, STORED, Traits, inspect
from .threads import in_threads

IMAGE_EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".avif",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    ]
)
CACHE_NAME = "verified_files.json"
CACHE_FORMAT = 2
CACHE_EVERY = 30.0  # seconds between two writes of what is known so far; a killed run loses no more
IMAGES_NAME = "images.json"
SKIPPED_NAME = "skipped_files.txt"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What runs and analyses of this program record, see is_record.
RECORDS = (
    "config.json",
    *(f"{name}.json" for name in "cosine selectivity activations reconstruction knn probe".split()),
)
# Pictures of results; which file beside them makes them this program's is a matter of is_record.
_PICTURE = re.compile(r"(reconstruction|cosine|selectivity|activations)(-.+)?\.png")


@dataclass
class FolderImages:
    """The images of a run: paths relative to ``folder``, and (path, reason) of what was skipped.

    ``traits``: of those images that hold more than 8-bit RGB. ``notes``: for the user.
    """

    folder: Path
    images: list[str]
    skipped: list[tuple[str, str]]
    traits: dict[str, Traits] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def paths(self) -> list[Path]:
        """Return the images' absolute paths."""
        return [self.folder / name for name in self.images]


@dataclass(frozen=True)
class Checked:
    """Why a file cannot be used (None: it can), and what it holds that 8-bit RGB does not.

    ``lasting``: it is a verdict on the bytes, not on a disk or a memory that failed for the moment.
    """

    reason: str | None
    traits: Traits | None = None
    lasting: bool = True


def find_images(folder: Path, exclude: Path | None = None, flag: str = "--data") -> tuple[list[str], list[str]]:
    """List the image files below ``folder`` by extension: sorted POSIX paths relative to it. The second list holds
    pictures of results beside the records of the run of this program that drew them; they are not in the first.

    Links are followed, hidden names are not; ``exclude`` (the run's own output) is left out;
    ``flag`` is the option that errors name.
    Raises UserError where ``folder`` is no readable folder or holds no image.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder}: there is no such folder.")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: expected a folder of images, but this is a file.")
    excluded = exclude.resolve() if exclude is not None else None
    names, drawn = [], []
    for root, files in _walk(folder, excluded, flag):
        ours = pictures_of_a_run(root, files)
        for name in files:
            if Path(name).suffix.lower() in IMAGE_EXTENSIONS and not name.startswith("."):
                (drawn if name in ours else names).append((root / name).relative_to(folder).as_posix())
    if not names:
        kinds = " ".join(sorted(IMAGE_EXTENSIONS))
        but = f" but {count(len(drawn), 'picture')} that this program wrote" if drawn else ""
        raise UserError(f"{flag} {folder}: no image found in it or below it{but} (looked for {kinds}).")
    return sorted(names), sorted(drawn)


def scan_folder(folder: Path, exclude: Path | None = None, flag: str = "--data") -> list[str]:
    """The first list of :func:`find_images`."""
    return find_images(folder, exclude, flag)[0]


def _walk(folder: Path, excluded: Path | None, flag: str) -> Iterator[tuple[Path, list[str]]]:
    def fail(error: OSError) -> None:
        raise UserError(f"{flag} {folder}: cannot read the folder ({describe_error(error)}).")

    seen = set()
    for root, subfolders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = Path(root).resolve()
        # A link back up would otherwise never end; a run may write to the folder of its images itself.
        if real in seen or (real == excluded and Path(root) != folder):
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield Path(root), files


def pictures_of_a_run(root: Path, files: Iterable[str]) -> set[str]:
    """Which of the ``files`` of a folder are pictures of results of this program, by the records beside them."""
    found, records = set(), {}
    for name in files:
        if match := _PICTURE.fullmatch(name):
            beside = [f"{match[1]}.json", *(["config.json"] if match[1] == "reconstruction" else [])]
            for record in beside:
                if record not in records:
                    records[record] = is_record(root / record)
            if any(records[record] for record in beside):
                found.add(name)
    return found


def is_record(path: Path) -> bool:
    """Whether a file is the config.json of a run of this program, or the result of one of its analyses."""
    try:
        content = read_json(path)
    except (OSError, FileError):
        return False
    if not isinstance(content, dict):
        return False
    config = content.get("config")
    return (isinstance(config, dict) and "images_sha256" in config) or {"analysis", "versions"} <= content.keys()


def drawn_note(drawn: list[str]) -> list[str]:
    """A note on pictures of earlier runs that are left out, if there are any."""
    if not drawn:
        return []
    return [f"{count(len(drawn), 'picture')} that this program wrote left out (the first: {visible(drawn[0])})"]


def check_image(path: Path, max_pixels: int = MAX_PIXELS) -> Checked:
    """Decode a file completely and say whether it can be used."""
    try:
        return Checked(None, inspect(path, max_pixels))
    except Exception as error:  # Pillow's decoders raise whatever a broken file trips.
        return Checked(describe_error(error), None, _is_verdict(error, path))


def _is_verdict(error: Exception, path: Path) -> bool:
    """Whether an error says something about the bytes of a file that stays true of them."""
    if isinstance(error, (MemoryError, FileError)) or "out of memory" in str(error):
        return False  # what FileError says is found out again at no cost
    if isinstance(error, OSError) and error.errno is not None:
        return False
    try:  # A decoder may have turned an error of the disk into one of its own.
        with open_regular(path) as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def verify_files(
    folder: Path,
    names: list[str],
    cache_path: Path,
    advance: Callable[[int], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Checked]:
    """Check each name once.

    Verdicts on the bytes of files are cached in ``cache_path`` by name, size and time of change: every half minute, at
    the end, and where an exception ends the work. ``advance`` is called with how many files are done. Raises UserError
    where the cache cannot be written or reading a file does not return.
    """
    stamps, results = _stamps(folder, names)
    cache = _read_cache(cache_path, max_pixels)
    for name, stamp in stamps.items():
        if (known := _known(cache.get(name), stamp)) is not None:
            results[name] = known
    pending = [name for name in names if name not in results]

    def write() -> None:
        entries = {n: _entry(stamps[n], r) for n, r in results.items() if r.lasting}
        content = json.dumps({"format": CACHE_FORMAT, "max_pixels": max_pixels, "files": entries})
        with writing(cache_path), atomic_file(cache_path) as file:
            file.write(content.encode())

    due = time.monotonic() + CACHE_EVERY
    try:
        # Pillow releases the interpreter lock while it decodes, so threads are enough.
        for name, outcome in in_threads(lambda n: check_image(folder / n, max_pixels), pending, os.cpu_count() or 1):
            if isinstance(outcome, Exception):
                raise outcome
            results[name] = outcome
            if advance is not None:
                advance(len(results))
            if (now := time.monotonic()) >= due:
                write()
                due = time.monotonic() + max(CACHE_EVERY, 20 * (time.monotonic() - now))
        if pending:
            write()
    except BaseException:
        with suppress(UserError):
            write()
        raise
    if advance is not None:
        advance(len(results))
    return {name: results[name] for name in names}


def _stamps(folder: Path, names: list[str]) -> tuple[dict[str, list[int]], dict[str, Checked]]:
    """Size and time of change of each file, and what is wrong with those that have none."""
    stamps, results = {}, {}
    for name in names:
        try:
            stat = (folder / name).stat()
        except OSError as error:
            results[name] = Checked(describe_error(error), None, False)
        else:
            stamps[name] = [stat.st_size, stat.st_mtime_ns]
    return stamps, results


def _entry(stamp: list[int], checked: Checked) -> list[Any]:
    traits = checked.traits
    about = None if traits is None else [traits.stored, traits.low, traits.high, list(traits.oddities)]
    return [*stamp, checked.reason, about]


def _known(entry: Any, stamp: list[int]) -> Checked | None:
    """What the cache says of a file, None where it says nothing or makes no sense."""
    if not isinstance(entry, list) or len(entry) != 4 or entry[:2] != stamp:
        return None
    reason, about = entry[2:]
    if reason is not None:
        return Checked(reason) if isinstance(reason, str) and about is None else None
    if about is None:
        return Checked(None)
    if not isinstance(about, list) or len(about) != 4 or not isinstance(about[3], list):
        return None
    stored, *extremes, oddities = about
    sound = (
        stored in ("", *STORED)
        and all(type(value) in (int, float) and abs(value) < float("inf") for value in extremes)
        and extremes[0] <= extremes[1]
        and all(oddity in ODDITIES for oddity in map(str, oddities))
    )
    return Checked(None, Traits(stored, *map(float, extremes), tuple(map(str, oddities)))) if sound else None


def _read_cache(path: Path, max_pixels: int) -> dict[str, Any]:
    """The entries of a cache; none where there is no cache of this format and limit: every file is decoded again."""
    try:
        cache = read_json(path)
    except (OSError, FileError):
        return {}
    if not isinstance(cache, dict) or (cache.get("format"), cache.get("max_pixels")) != (CACHE_FORMAT, max_pixels):
        return {}
    files = cache.get("files")
    return files if isinstance(files, dict) else {}


def sort_out(names: list[str], results: dict[str, Checked]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """What :func:`verify_files` found: names of images, (name, reason) of the others, and names of those others that
    this program drew."""
    skipped = [(name, reason) for name in names if (reason := results[name].reason) is not None]
    drawn = [name for name, reason in skipped if reason.endswith(OWN_PICTURE)]
    return [name for name in names if results[name].reason is None], skipped, drawn


def traits_of(results: dict[str, Checked]) -> dict[str, Traits]:
    """Traits of the images that have any."""
    return {name: result.traits for name, result in results.items() if result.traits is not None}


def open_folder(
    folder: Path,
    output: Path,
    batch_size: int,
    advance: Callable[[int, int], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> FolderImages:
    """Scan and verify a folder for a new run; write the run's image list and what was skipped.

    ``advance(done, total)`` reports progress. Raises UserError where fewer than ``batch_size``
    images are readable.
    """
    names, drawn = find_images(folder, exclude=output)
    tick = None if advance is None else lambda done: advance(done, len(names))
    results = verify_files(folder, names, output / CACHE_NAME, tick, max_pixels)
    images, skipped, own = sort_out(names, results)
    (output / SKIPPED_NAME).unlink(missing_ok=True)
    append_skipped(output / SKIPPED_NAME, skipped)
    if len(images) < batch_size:
        because = f" ({len(skipped)} could not be read, see {output / SKIPPED_NAME})" if skipped else ""
        lower = f"lower --batch-size to at most {len(images)} or " if images else ""
        raise UserError(
            f"--data {folder}: {len(images)} readable images{because} are too few for one batch of "
            f"{batch_size}; {lower}add images."
        )
    with writing(output / IMAGES_NAME):
        write_json(output / IMAGES_NAME, {"images": images, "skipped": skipped})
    return FolderImages(folder, images, skipped, traits_of(results), drawn_note(sorted(drawn + own)))


def reopen_folder(
    folder: Path, output: Path, advance: Callable[[int, int], None] | None = None, max_pixels: int = MAX_PIXELS
) -> FolderImages:
    """Open the images of a run that is resumed.

    The list made at the run's start stays in force, for the order of an epoch depends on it: files
    added since are ignored, files that cannot be read any more are replaced as they come up.
    """
    images, skipped = _saved(output)
    names = scan_folder(folder, exclude=output)
    tick = None if advance is None else lambda done: advance(done, len(images))
    results = verify_files(folder, images, output / CACHE_NAME, tick, max_pixels)
    lost, notes = lost_images(images, results, f"--data {folder}")
    append_skipped(output / SKIPPED_NAME, lost)
    notes += added_note(len(set(names) - set(images) - {name for name, _ in skipped}))
    return FolderImages(folder, images, skipped + lost, traits_of(results), notes)


def lost_images(images: list[str], results: dict[str, Checked], where: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, reason) of a run's images that cannot be read any more, and a note; UserError where these are all."""
    lost = [(name, reason) for name in images if (reason := results[name].reason) is not None]
    if not lost:
        return [], []
    first = f"the first: {visible(lost[0][0])}, {visible(lost[0][1])}"
    if len(lost) == len(images):
        raise UserError(f"{where}: none of the run's {len(images)} images can be read any more ({first}).")
    return lost, [f"{count(len(lost), 'image')} of the run cannot be read any more, others take their place ({first})"]


def added_note(added: int) -> list[str]:
    """A note on images that a resumed run does not know, if there are any."""
    return [f"{count(added, 'image')} added since this run began will not be used"] if added else []


def saved_images(output: Path) -> list[str]:
    """Return the list of images made at a run's start; raise UserError where it cannot be read."""
    return _saved(output)[0]


def _saved(output: Path) -> tuple[list[str], list[tuple[str, str]]]:
    return checked_names(read_saved(output), output)


def read_saved(output: Path) -> Any:
    """The content of a run's list of images; UserError where it cannot be read."""
    try:
        return read_json(output / IMAGES_NAME)
    except (OSError, FileError) as error:
        raise damaged_list(output, describe_error(error)) from None


def checked_names(saved: Any, output: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The "images" and "skipped" of a list of images, every one of which may have been edited; UserError where they
    are not what a run writes."""
    images, skipped = (saved.get(key) if isinstance(saved, dict) else None for key in ("images", "skipped"))
    if not isinstance(images, list) or not images or not all(map(_is_name, images)):
        raise damaged_list(output, "expected a list of names below the folder")
    if len(set(images)) < len(images):
        raise damaged_list(output, "a name is in it twice")
    pairs = skipped if isinstance(skipped, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(part, str) for part in p) for p in pairs):
        raise damaged_list(output, "expected a name and a reason for each file that was skipped")
    return images, [(name, reason) for name, reason in pairs]


def damaged_list(output: Path, why: str) -> UserError:
    """The error of a list of images that no run has written."""
    return UserError(
        f"{output / IMAGES_NAME}: cannot read the run's list of images ({why}), without which it cannot be resumed; "
        "use another --output to start afresh."
    )


def _is_name(name: Any) -> bool:
    """Whether this may be the path of a file below a folder, as :func:`find_images` writes them."""
    if not isinstance(name, str) or not name or "\0" in name or name.startswith("/"):
        return False
    try:
        os.fsencode(name)  # of surrogates only those that stand for bytes
    except UnicodeEncodeError:
        return False
    return not {"", ".", ".."} & set(name.split("/")) and not Path(name).is_absolute()


def fingerprint(images: list[str]) -> str:
    """Return a digest of a list of images."""
    return hashlib.sha256("\0".join(images).encode("utf-8", "surrogateescape")).hexdigest()


def append_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Add one line 'name <tab> reason' for each file that is not listed yet; control characters are escaped."""
    try:
        text = read_bytes(path, MAX_JSON_BYTES).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        text = ""
    except FileError as error:
        raise UserError(f"{error}.") from error
    listed = {line.split("\t")[0] for line in text.split("\n")}
    named = [(_CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), name), reason) for name, reason in skipped]
    lines = [f"{name}\t{reason}\n" for name, reason in named if name not in listed]
    if lines:
        with writing(path), atomic_file(path) as file:
            file.write((text + "".join(lines)).encode("utf-8", "surrogateescape"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one sentence of a failure to write ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
