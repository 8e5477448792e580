"""From parsed arguments to networks and images, the same for every analysis: which images, in which order, decoded in
threads to centred crops.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._console import visible
from .._progress import Progress
from ..backends import use_backend
from ..data import MAX_PIXELS
from ..data.decoding import PLAIN, Decoding, Traits, header_traits, inspect
from ..data.folder import drawn_note, find_images, fingerprint
from ..data.images import Source, load_crop, normalize
from ..data.rng import ORDER, numpy_stream
from ..data.sample_photos import load_photos
from ..data.threads import in_threads
from ..data.value_range import choose_range, differing_range
from ..errors import UserError, describe_error
from ..models import get_config
from ..sizes import V1_NAMES
from ..train.distributed import resolve_device
from ..train.setup import prepare_output
from .features import OtherNetwork
from .networks import Network, load_network, untrained_network
from .timm_networks import is_timm, label_of, load_timm_network

SURVEYED = 1000  # images whose headers are read for the value range, where no limit says how many are taken


def spread_over_folders(names: Sequence[str], seed: int) -> list[int]:
    """Order in which to take ``names``, POSIX paths: one of each top-level folder by turns, at random within it.

    So the first n are of as many classes as there are, as Figure 4 asks for, where a folder is a class. A pure function
    of (seed, names).
    """
    folders: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        folders.setdefault(name.partition("/")[0] if "/" in name else "", []).append(index)
    shuffled = [
        [members[i] for i in numpy_stream(seed, ORDER, number).permutation(len(members))]
        for number, members in enumerate(folders.values())
    ]
    return [index for turn in zip_longest(*shuffled) for index in turn if index is not None]


@dataclass
class Crops:
    """Batches of the largest centred crops of ``sources``, resized to ``size`` = (H, W).

    A source that cannot be read is left out and the next one takes its place; ``failures`` holds (name, reason).
    ``limit``: how many images at most. ``decoding``: how files become 8-bit RGB.
    """

    sources: Sequence[Source]
    size: tuple[int, int]
    batch_size: int
    limit: int | None = None
    workers: int = 1
    decoding: Decoding = PLAIN
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield pixels, uint8 ``[N, H, W, 3]``, and the indices of their sources.

        Raises UserError where no source can be read.
        """
        self.failures.clear()
        pixels, indices, done = [], [], 0
        for index, crop in self._decoded():
            pixels.append(crop)
            indices.append(index)
            done += 1
            last = done == self.limit
            if last or len(pixels) == self.batch_size:
                yield torch.stack(pixels), indices
                pixels, indices = [], []
            if last:
                return
        if pixels:
            yield torch.stack(pixels), indices
        if not done:
            first = f" (the first: {': '.join(self.failures[0])})" if self.failures else ""
            raise UserError(f"none of the {len(self.sources)} images can be read{first}.")

    def _decoded(self) -> Iterator[tuple[int, Tensor]]:
        def decode(source: Source) -> Tensor:
            if isinstance(source, Path) and source.suffix.lower() == ".png":
                header_traits(source, self.decoding.max_pixels)  # refuses pictures that this program wrote
            return load_crop(source, self.size, None, decoding=self.decoding)

        for index, (source, crop) in enumerate(in_threads(decode, self.sources, self.workers)):
            if isinstance(crop, Exception):  # Pillow's decoders raise whatever a broken file trips.
                self.failures.append((str(source), describe_error(crop)))
            else:
                yield index, crop


def open_networks(args: Namespace, decoder: bool = False) -> list[Network]:
    """The networks of a command line, each with a label of its own."""
    paths, labels = args.checkpoints, args.label or []
    random = getattr(args, "random", False)
    if not paths and not random:
        raise ValueError("give at least one CHECKPOINT, or --random with --model")
    if labels and len(labels) != len(paths):
        raise ValueError(f"--label must be given once for each of the {len(paths)} checkpoints, got {len(labels)}")
    labels = labels or [
        label_of(path) if is_timm(path) else "/".join(path.resolve().with_suffix("").parts[-2:]) for path in paths
    ]
    twice = [label for label in labels if labels.count(label) > 1 or (random and label == "untrained")]
    if twice:
        raise ValueError(f"--label must tell the checkpoints apart, got {twice[0]!r} more than once")
    device = resolve_device(args.device)
    for path in filter(is_timm, paths):
        if decoder or not hasattr(args, "tap"):
            raise ValueError(
                f"{visible(str(path))} is a network of timm, which cosine, selectivity and activations take"
            )
        if args.ema:
            raise ValueError(f"--ema takes averaged weights of training checkpoints, got {visible(str(path))}")
    networks = [
        load_timm_network(str(path), label, args.seed, device)
        if is_timm(path)
        else load_network(path, label, args.model, args.ema, decoder, device)
        for path, label in zip(paths, labels, strict=True)
    ]
    if random:
        own = [network.model for network in networks if not isinstance(network.model, OtherNetwork)]
        if not own and args.model is None:
            raise ValueError("--random without a checkpoint needs --model")
        like = own[0] if own else get_config(args.model)
        v1 = own[0].layer_scale is not None if own else args.model in V1_NAMES
        networks.append(untrained_network(tuple(like.depths), tuple(like.dims), seed=args.seed, device=device, v1=v1))
    return networks


def images_of(args: Namespace, spread: bool = True) -> tuple[list[str], list[Source], dict[str, Any]]:
    """Names, sources and a description of the images of a command line, in the order they are taken in."""
    prepare_output(args.output)
    if args.photos:
        names, sources = load_photos()
        return names, sources, {"folder": "bundled photographs", "names_sha256": fingerprint(names)}
    names, drawn = find_images(args.data, exclude=args.output)
    for note in drawn_note(drawn):
        print(f"note: {note}")
    about = {"folder": args.data.resolve().name, "names_sha256": fingerprint(names)}
    if spread:
        names = [names[index] for index in spread_over_folders(names, args.seed)]
    return names, [args.data / name for name in names], about


def crops_of(
    args: Namespace, networks: list[Network], sources: list[Source], decoding: Decoding | None = None
) -> Crops:
    """Centred crops of the sources, in the requested size, or the size of the first network's training.

    ``decoding`` where the files have been verified; else their headers are read.
    """
    size, limit = args.img_size or networks[0].img_size, getattr(args, "images", None)
    if decoding is None:
        paths = [source for source in sources[: limit or SURVEYED] if isinstance(source, Path)]
        decoding = decoding_of(args, networks, survey(paths, args.max_pixels or MAX_PIXELS))
    return Crops(sources, size, args.batch_size, limit, args.workers, decoding)


def survey(paths: Sequence[Path], max_pixels: int, threads: int = 4) -> dict[Path, Traits]:
    """Traits of those files that hold more than 8-bit RGB: by their headers, with extremes where values have more than
    8 bits. Files that cannot be read have none; they are reported when they are needed."""

    def look(path: Path) -> Traits | None:
        traits = header_traits(path, max_pixels)
        return inspect(path, max_pixels) if traits is not None and traits.stored else traits

    found = in_threads(look, paths, threads)
    return {path: traits for path, traits in found if isinstance(traits, Traits)}


def decoding_of(args: Namespace, networks: Sequence[Network], traits: Mapping[Path, Traits]) -> Decoding:
    """How the images of a command line become 8-bit RGB; says what needs to be said of it."""
    max_pixels = args.max_pixels or MAX_PIXELS
    recorded = next((network.value_range for network in networks if network.value_range is not None), None)
    chosen = choose_range(args.value_range, traits, recorded, None, max_pixels)
    notes = [n for net in networks for n in differing_range(chosen.value_range, net.value_range, net.label)]
    for text in [*chosen.notes, *notes]:
        print(text)
    return Decoding(chosen.value_range, max_pixels)


def run_batches(
    args: Namespace, networks: list[Network], crops: Crops, update: Callable[[Network, Tensor, list[int]], None]
) -> int:
    """Show every batch to every network; return how many images that were. Each image is decoded once."""
    total, done = min(len(crops.sources), args.images or len(crops.sources)), 0
    device = next(networks[0].model.parameters()).device
    with backend(args), Progress("images", total) as progress:
        for pixels, indices in crops:
            images = normalize(pixels.to(device))
            for network in networks:
                update(network, images, indices)
            done += len(indices)
            progress.update(done)
    for name, reason in crops.failures[:5]:
        print(f"left out: {name} ({reason})")
    if len(crops.failures) > 5:
        print(f"left out: {len(crops.failures) - 5} more")
    return done


@contextmanager
def backend(args: Namespace) -> Iterator[None]:
    """Run by ``--backend``; where it cannot run an op, that is an error of the command line."""
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
    about = {"value_range": crops.decoding.value_range, "img_size": list(crops.size), "seed": args.seed}
    return {**about, "left_out": len(crops.failures)}


def finish(args: Namespace, written: list[str]) -> int:
    """Say what was written; return the exit code."""
    print(f"Written to {args.output}: {', '.join(written)}")
    return 0
