"""From parsed arguments to networks and images, the same for every analysis."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._progress import Progress
from ..backends import use_backend
from ..data.folder import fingerprint, scan_folder
from ..data.images import Source, normalize
from ..data.sample_photos import load_photos
from ..models import get_config
from ..train.setup import prepare_output, resolve_device
from .images import Crops, spread_over_folders
from .networks import Arm, load_arm, untrained_arm


def networks(args: Namespace, decoder: bool = False) -> list[Arm]:
    """The networks of a command line, each with a label of its own."""
    paths, labels = args.checkpoints, args.label or []
    random = getattr(args, "random", False)
    if not paths and not random:
        raise ValueError("give at least one CHECKPOINT, or --random with --model")
    if labels and len(labels) != len(paths):
        raise ValueError(f"--label must be given once for each of the {len(paths)} checkpoints, got {len(labels)}")
    labels = labels or ["/".join(path.resolve().with_suffix("").parts[-2:]) for path in paths]
    twice = [label for label in labels if labels.count(label) > 1 or (random and label == "untrained")]
    if twice:
        raise ValueError(f"--label must tell the checkpoints apart, got {twice[0]!r} more than once")
    device = resolve_device(args.device)
    arms = [
        load_arm(path, label, args.model, args.ema, decoder, device) for path, label in zip(paths, labels, strict=True)
    ]
    if random:
        if not arms and args.model is None:
            raise ValueError("--random without a checkpoint needs --model")
        like = arms[0].model if arms else get_config(args.model)
        arms.append(untrained_arm(tuple(like.depths), tuple(like.dims), seed=args.seed, device=device))
    return arms


def images_of(args: Namespace, spread: bool = True) -> tuple[list[str], list[Source], dict[str, Any]]:
    """Names, sources and a description of the images of a command line, in the order they are taken in."""
    prepare_output(args.output)
    if args.photos:
        names, sources = load_photos()
        return names, sources, {"folder": "bundled photographs", "names_sha256": fingerprint(names)}
    names = scan_folder(args.data, exclude=args.output)
    about = {"folder": args.data.resolve().name, "names_sha256": fingerprint(names)}
    if spread:
        names = [names[index] for index in spread_over_folders(names, args.seed)]
    return names, [args.data / name for name in names], about


def crops_of(args: Namespace, arms: list[Arm], sources: list[Source]) -> Crops:
    """Centred crops of the sources, in the size asked for or that of the first network's training."""
    return Crops(sources, args.img_size or arms[0].img_size, args.batch_size, args.images, args.workers)


def look(args: Namespace, arms: list[Arm], crops: Crops, update: Callable[[Arm, Tensor, list[int]], None]) -> int:
    """Show every batch to every network; return how many images that were. Each image is decoded once."""
    total, done = min(len(crops.sources), args.images or len(crops.sources)), 0
    device = next(arms[0].model.parameters()).device
    with backend(args), Progress("images", total) as progress:
        for pixels, indices in crops:
            images = normalize(pixels.to(device))
            for arm in arms:
                update(arm, images, indices)
            done += len(indices)
            progress.update(done)
    for name, reason in crops.failures[:5]:
        print(f"left out: {name} ({reason})")
    if len(crops.failures) > 5:
        print(f"left out: {len(crops.failures) - 5} more")
    return done


@contextmanager
def backend(args: Namespace) -> Iterator[None]:
    """The kernels of ``--backend``; that they cannot serve is an error of the command line."""
    if args.backend is None:
        yield
        return
    with use_backend(args.backend):
        try:
            yield
        except RuntimeError as error:
            raise ValueError(f"--backend {args.backend}: {error}") from error


def find_image(wanted: str, names: list[str]) -> int:
    """Index of an image given by its name or its index."""
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise ValueError(f"--image must be a name among {len(names)} such as {names[0]!r}, or its place, got {wanted!r}")


def settings_of(args: Namespace, crops: Crops) -> dict[str, Any]:
    """The settings that every result records."""
    return {"img_size": list(crops.size), "seed": args.seed, "left_out": len(crops.failures)}


def size_text(size: tuple[int, int]) -> str:
    """(H, W) for people."""
    return f"{size[0]}x{size[1]} px"


def finish(args: Namespace, written: list[str]) -> int:
    """Say what was written; return the exit code."""
    print(f"Written to {args.output}: {', '.join(written)}")
    return 0
