"""``analyze cosine`` and ``analyze selectivity``: curves of several networks, image by image."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from .._progress import Progress, count
from ..data.classes import open_classes
from ..data.folder import CACHE_NAME, fingerprint
from ..data.rng import ORDER, numpy_stream
from ..train.setup import prepare_output
from .cosine import CosineByLayer
from .images import spread_over_folders
from .inputs import crops_of, finish, images_of, look, networks, settings_of, size_text
from .layer_features import TAPS, tapped
from .networks import Arm
from .plots import save_cosine_plot, save_selectivity_plot
from .results import write_result, write_rows
from .selectivity import ClassSelectivity, LayerSelectivity, selectivity_density


def run_cosine(args: Namespace) -> int:
    """``analyze cosine``."""
    arms = networks(args)
    _names, sources, data = images_of(args)
    crops = crops_of(args, arms, sources)
    curves = {arm.label: CosineByLayer(args.dead) for arm in arms}

    def update(arm: Arm, images: Tensor, indices: list[int]) -> None:
        for layer in tapped(arm.model, images, taps=(args.tap,)):
            curves[arm.label].update(layer)

    data["images"] = look(args, arms, crops, update)
    results = {label: curve.result() for label, curve in curves.items()}
    rows = [{"network": label, **dataclasses.asdict(row)} for label, layers in results.items() for row in layers]
    settings = {"tap": args.tap, "dead": args.dead, **settings_of(args, crops), "data": data}
    write_rows(args.output / "cosine.csv", rows)
    write_result(args.output / "cosine.json", "feature cosine distance", settings, arms, rows)
    title = f"Feature cosine distance over {count(data['images'], 'image')}, {size_text(crops.size)}"
    save_cosine_plot(args.output / "cosine.png", results, args.tap, title)
    for label, layers in results.items():
        mean, dead = (sum(getattr(row, key) for row in layers) / len(layers) for key in ("mean", "dead_share"))
        print(f"{label}: mean distance over {count(len(layers), 'layer')} {mean:.4f}, {dead:.1%} of channels dead")
    return finish(args, ["cosine.png", "cosine.csv", "cosine.json"])


def run_selectivity(args: Namespace) -> int:
    """``analyze selectivity``."""
    arms = networks(args)
    prepare_output(args.output)
    with Progress("verified", 0) as progress:
        found = open_classes(args.data, args.output / CACHE_NAME, advance=progress.update, exclude=args.output)
    if found.skipped:
        print(f"{count(len(found.skipped), 'image')} left out (the first: {': '.join(found.skipped[0])})")
    order = spread_over_folders(found.images, args.seed)
    paths, labels = found.paths(), torch.tensor([found.labels[index] for index in order])
    crops = crops_of(args, arms, [paths[index] for index in order])
    shuffled = labels[torch.from_numpy(numpy_stream(args.seed, ORDER, len(labels)).permutation(len(labels)))]
    kinds = {"": labels, " (labels shuffled)": shuffled} if args.shuffled else {"": labels}
    curves = {arm.label + kind: ClassSelectivity(len(found.classes), args.rectify) for arm in arms for kind in kinds}

    def update(arm: Arm, images: Tensor, indices: list[int]) -> None:
        for layer in tapped(arm.model, images, taps=(args.tap,)):
            for kind, truth in kinds.items():
                curves[arm.label + kind].update(layer, truth[indices])

    images = look(args, arms, crops, update)
    results = {label: curve.result(args.eps) for label, curve in curves.items()}
    settings = {"tap": args.tap, "rectify": args.rectify, "eps": args.eps, **settings_of(args, crops)}
    settings["data"] = {
        "folder": args.data.name,
        "images": images,
        "classes": found.classes,
        "names_sha256": fingerprint(found.images),
    }
    rows = [
        {"network": label, "layer": row.name, "index": row.index, "channel": channel, "selectivity": value}
        for label, layers in results.items()
        for row in layers
        for channel, value in enumerate(row.index_of_unit.tolist())
    ]
    write_rows(args.output / "selectivity.csv", rows)
    summaries = [{"network": label, **_summary(row)} for label, layers in results.items() for row in layers]
    write_result(args.output / "selectivity.json", "class selectivity index", settings, arms, summaries)
    limits = (0.0, 1.0) if args.rectify != "none" else (-2.0, 2.0)
    title = (
        f"Class selectivity over {count(images, 'image')} of {len(found.classes)} classes, {size_text(crops.size)}\n"
        f"features: {TAPS[args.tap]}; rectified: {args.rectify}"
    )
    save_selectivity_plot(args.output / "selectivity.png", results, title, limits=limits)
    for label, layers in results.items():
        units = torch.cat([row.index_of_unit for row in layers])
        print(f"{label}: median index {units.nanmedian():.3f} over {count(len(units), 'channel')}")
    return finish(args, ["selectivity.png", "selectivity.csv", "selectivity.json"])


def _summary(row: LayerSelectivity) -> dict[str, Any]:
    lower, median, upper = row.quartiles()
    edges, density, outside = selectivity_density(row.index_of_unit)
    return {
        "layer": row.name,
        "index": row.index,
        "channels": len(row.index_of_unit),
        "lower_quartile": lower,
        "median": median,
        "upper_quartile": upper,
        "mean": row.index_of_unit.nanmean().item(),
        "silent": row.silent,
        "outside_0_1": outside,
        "classes": row.classes,
        "images": row.images,
        "density": density,
        "density_edges": edges,
    }
