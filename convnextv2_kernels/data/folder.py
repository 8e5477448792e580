"""Finding a folder's images and checking once that each of them decodes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .._files import atomic_file, write_json
from .._progress import count
from ..errors import UserError, describe_error
from .images import open_rgb

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
IMAGES_NAME = "images.json"
VERIFY_CHUNK = 1024  # files handed to the threads at once; millions of tasks would fill memory
SKIPPED_NAME = "skipped_files.txt"


@dataclass
class FolderImages:
    """The images of a run: paths relative to ``folder``, and (path, reason) of what was skipped."""

    folder: Path
    images: list[str]
    skipped: list[tuple[str, str]]

    def paths(self) -> list[Path]:
        """Return the images' absolute paths."""
        return [self.folder / name for name in self.images]


def scan_folder(folder: Path, exclude: Path | None = None, flag: str = "--data") -> list[str]:
    """List the image files below ``folder`` by extension: sorted POSIX paths relative to it.

    Links are followed, hidden names are not; ``exclude`` (the run's own output) is left out;
    ``flag`` is the option that errors name.
    Raises UserError where ``folder`` is no readable folder or holds no image.
    """
    if not folder.exists():
        raise UserError(f"{flag} {folder}: there is no such folder.")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: expected a folder of images, but this is a file.")
    excluded = exclude.resolve() if exclude is not None else None
    names = sorted(
        (root / name).relative_to(folder).as_posix()
        for root, files in _walk(folder, excluded, flag)
        for name in files
        if Path(name).suffix.lower() in IMAGE_EXTENSIONS and not name.startswith(".")
    )
    if not names:
        kinds = " ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError(f"{flag} {folder}: no image found in it or below it (looked for {kinds}).")
    return names


def _walk(folder: Path, excluded: Path | None, flag: str) -> Iterator[tuple[Path, list[str]]]:
    def fail(error: OSError) -> None:
        raise UserError(f"{flag} {folder}: cannot read the folder ({describe_error(error)}).")

    seen = set()
    for root, subfolders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = Path(root).resolve()
        if real in seen or real == excluded:  # A link back up would otherwise never end.
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield Path(root), files


def check_image(path: Path) -> str | None:
    """Decode a file completely; return None, or one line that says why it cannot be used.

    Reading the header is not enough: a truncated JPEG has a valid one.
    """
    try:
        image = open_rgb(path)
    except Exception as error:  # Pillow's decoders raise whatever a broken file trips.
        return describe_error(error)
    return None if min(image.size) > 0 else "the image has no pixels"


def verify_files(
    folder: Path, names: list[str], cache_path: Path, advance: Callable[[int], None] | None = None
) -> dict[str, str | None]:
    """Return for each name None or the reason why it does not decode.

    Verdicts are cached in ``cache_path`` by name, size and time of change. ``advance`` is called with how
    many files are done.
    """
    cache = _read_cache(cache_path)
    stamps, verdicts, pending = {}, {}, []
    for name in names:
        try:
            stat = (folder / name).stat()
        except OSError as error:
            verdicts[name] = describe_error(error)
            continue
        stamps[name] = [stat.st_size, stat.st_mtime_ns]
        known = cache.get(name)
        if known is not None and known[:2] == stamps[name]:
            verdicts[name] = known[2]
        else:
            pending.append(name)
    # Pillow releases the interpreter lock while it decodes, so threads are enough.
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    try:
        for begin in range(0, len(pending), VERIFY_CHUNK):
            chunk = pending[begin : begin + VERIFY_CHUNK]
            reasons = pool.map(lambda name: check_image(folder / name), chunk)
            for name, reason in zip(chunk, reasons, strict=True):
                verdicts[name] = reason
                if advance is not None:
                    advance(len(verdicts))
        if advance is not None:
            advance(len(verdicts))
    finally:
        pool.shutdown(cancel_futures=True)
        if pending:
            done = {n: [*stamps[n], verdicts[n]] for n in stamps if n in verdicts}
            write_json(cache_path, done)
    return verdicts


def _read_cache(path: Path) -> dict[str, list]:
    try:
        cache = json.loads(path.read_text())
        return {str(k): v for k, v in cache.items() if isinstance(v, list) and len(v) == 3}
    except (OSError, ValueError, AttributeError):
        return {}  # Only a cache: without it every file is decoded again.


def open_folder(
    folder: Path, output: Path, batch_size: int, advance: Callable[[int, int], None] | None = None
) -> FolderImages:
    """Scan and verify a folder for a new run; write the run's image list and what was skipped.

    ``advance(done, total)`` reports progress. Raises UserError where fewer than ``batch_size``
    images are readable.
    """
    names = scan_folder(folder, exclude=output)
    tick = None if advance is None else lambda done: advance(done, len(names))
    verdicts = verify_files(folder, names, output / CACHE_NAME, tick)
    images = [name for name in names if verdicts[name] is None]
    skipped = [(name, verdicts[name]) for name in names if verdicts[name] is not None]
    (output / SKIPPED_NAME).unlink(missing_ok=True)
    append_skipped(output / SKIPPED_NAME, skipped)
    if len(images) < batch_size:
        because = f" ({len(skipped)} could not be read, see {output / SKIPPED_NAME})" if skipped else ""
        lower = f"lower --batch-size to at most {len(images)} or " if images else ""
        raise UserError(
            f"--data {folder}: {len(images)} readable images{because} are too few for one batch of "
            f"{batch_size}; {lower}add images."
        )
    write_json(output / IMAGES_NAME, {"images": images, "skipped": skipped})
    return FolderImages(folder, images, skipped)


def reopen_folder(
    folder: Path, output: Path, advance: Callable[[int, int], None] | None = None
) -> tuple[FolderImages, list[str]]:
    """Open the images of a run that is resumed, and return them with notes for the user.

    The list made at the run's start stays in force, for the order of an epoch depends on it: files
    added since are ignored, files that cannot be read any more are replaced as they come up.
    """
    images, skipped = _saved(output)
    names = scan_folder(folder, exclude=output)
    tick = None if advance is None else lambda done: advance(done, len(images))
    verdicts = verify_files(folder, images, output / CACHE_NAME, tick)
    lost = [(name, reason) for name, reason in verdicts.items() if reason is not None]
    if len(lost) == len(images):
        raise UserError(
            f"--data {folder}: none of the run's {len(images)} images can be read any more "
            f"(the first: {lost[0][0]}, {lost[0][1]})."
        )
    notes = []
    if lost:
        notes.append(
            f"{count(len(lost), 'image')} of the run cannot be read any more, others take "
            f"their place (the first: {lost[0][0]}, {lost[0][1]})"
        )
        append_skipped(output / SKIPPED_NAME, lost)
    added = len(set(names) - set(images) - {name for name, _ in skipped})
    if added:
        notes.append(f"{count(added, 'image')} added since this run began will not be used")
    return FolderImages(folder, images, skipped + lost), notes


def saved_images(output: Path) -> list[str]:
    """Return the list of images made at a run's start; raise UserError where it cannot be read."""
    return _saved(output)[0]


def _saved(output: Path) -> tuple[list[str], list[tuple[str, str]]]:
    try:
        saved = json.loads((output / IMAGES_NAME).read_text())
        images = [str(name) for name in saved["images"]]
        return images, [(str(name), str(reason)) for name, reason in saved["skipped"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{output / IMAGES_NAME}: cannot read the run's list of images ({describe_error(error)}), "
            "without which it cannot be resumed; use another --output to start afresh."
        ) from None


def fingerprint(images: list[str]) -> str:
    """Return a digest of a list of images."""
    return hashlib.sha256("\0".join(images).encode("utf-8", "surrogateescape")).hexdigest()


def append_skipped(path: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Add one line 'name <tab> reason' for each file that is not listed yet."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        text = ""
    listed = {line.split("\t")[0] for line in text.splitlines()}
    lines = [f"{name}\t{reason}\n" for name, reason in skipped if name not in listed]
    if lines:
        with atomic_file(path) as file:
            file.write((text + "".join(lines)).encode("utf-8", "surrogateescape"))
