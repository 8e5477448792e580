"""The analyses of ``analyze``, one function each: networks and images of the command line in, PNG, CSV and JSON out."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._progress import Progress, count
from ..data import MAX_PIXELS
from ..data.augment import eval_transform
from ..data.classes import ClassFolder, open_classes, open_split
from ..data.decoding import Decoding
from ..data.folder import CACHE_NAME, fingerprint
from ..data.images import load_crop, normalize
from ..data.labelled import EvalDataset
from ..data.rng import ORDER, numpy_stream
from ..layout import mask_fault
from ..sizes import size_text
from ..train.loading import Loading, require_shared_memory
from ..train.reconstruction import (
    Reconstruction,
    describe_errors,
    draw_masks,
    errors_by_image,
    reconstruct,
    save_picture,
)
from ..train.setup import prepare_output
from .activations import activation_maps, save_activation_maps
from .cosine import CosineByLayer
from .features import TAPS, block_names, extract_features, labelled_loader, tapped
from .inputs import (
    SURVEYED,
    backend,
    crops_of,
    decoding_of,
    find_image,
    finish,
    images_of,
    open_networks,
    run_batches,
    settings_of,
    spread_over_folders,
    survey,
)
from .knn import knn_classify
from .linear_probe import linear_probe
from .networks import Network
from .plots import save_cosine_plot, save_selectivity_plot
from .results import file_name, write_result, write_rows
from .selectivity import ClassSelectivity, LayerSelectivity, selectivity_density


def run_cosine(args: Namespace) -> int:
    """``analyze cosine``."""
    networks = open_networks(args)
    _names, sources, data = images_of(args)
    crops = crops_of(args, networks, sources)
    curves = {network.label: CosineByLayer(args.dead) for network in networks}

    def update(network: Network, images: Tensor, indices: list[int]) -> None:
        for layer in tapped(network.model, images, taps=(args.tap,)):
            curves[network.label].update(layer)

    data["images"] = run_batches(args, networks, crops, update)
    results = {label: curve.result() for label, curve in curves.items()}
    rows = [{"network": label, **dataclasses.asdict(row)} for label, layers in results.items() for row in layers]
    settings = {"tap": args.tap, "dead": args.dead, **settings_of(args, crops), "data": data}
    write_rows(args.output / "cosine.csv", rows)
    write_result(args.output / "cosine.json", "feature cosine distance", settings, networks, rows)
    title = f"Feature cosine distance over {count(data['images'], 'image')}, {size_text(crops.size)} px"
    save_cosine_plot(args.output / "cosine.png", results, args.tap, title)
    for label, layers in results.items():
        mean, dead = (sum(getattr(row, key) for row in layers) / len(layers) for key in ("mean", "dead_share"))
        print(f"{label}: mean distance over {count(len(layers), 'layer')} {mean:.4f}, {dead:.1%} of channels dead")
    return finish(args, ["cosine.png", "cosine.csv", "cosine.json"])


def run_selectivity(args: Namespace) -> int:
    """``analyze selectivity``."""
    networks = open_networks(args)
    prepare_output(args.output)
    with Progress("verified", 0) as progress:
        cache, limit = args.output / CACHE_NAME, args.max_pixels or MAX_PIXELS
        found = open_classes(args.data, cache, None, "--data", progress.update, args.output, limit)
    _say_left_out(found)
    decoding = decoding_of(args, networks, found.traits_by_path())
    order = spread_over_folders(found.images, args.seed)
    paths, labels = found.paths(), torch.tensor([found.labels[index] for index in order])
    crops = crops_of(args, networks, [paths[index] for index in order], decoding)
    shuffled = labels[torch.from_numpy(numpy_stream(args.seed, ORDER, len(labels)).permutation(len(labels)))]
    kinds = {"": labels, " (labels shuffled)": shuffled} if args.shuffled else {"": labels}
    curves = {
        network.label + kind: ClassSelectivity(len(found.classes), args.rectify)
        for network in networks
        for kind in kinds
    }

    def update(network: Network, images: Tensor, indices: list[int]) -> None:
        for layer in tapped(network.model, images, taps=(args.tap,)):
            for kind, truth in kinds.items():
                curves[network.label + kind].update(layer, truth[indices])

    images = run_batches(args, networks, crops, update)
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
    write_result(args.output / "selectivity.json", "class selectivity index", settings, networks, summaries)
    limits = (0.0, 1.0) if args.rectify != "none" else (-2.0, 2.0)
    title = (
        f"Class selectivity over {count(images, 'image')} of {len(found.classes)} classes, {size_text(crops.size)} px\n"
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


def run_activations(args: Namespace) -> int:
    """``analyze activations``."""
    networks = open_networks(args)
    names, sources, data = images_of(args, spread=False)
    index = find_image(args.image, names)
    size = args.img_size or networks[0].img_size
    # The value range is the folder's, not that of the one image.
    surveyed = [*sources[index : index + 1], *sources[:: max(1, -(-len(sources) // SURVEYED))]]
    decoding = decoding_of(args, networks, survey(surveyed, args.max_pixels or MAX_PIXELS))
    pixels = load_crop(sources[index], size, None, decoding=decoding)
    seed = args.seed if args.order == "random" else None
    rows, written = [], []
    with backend(args):
        for network in networks:
            image = normalize(pixels[None].to(next(network.model.parameters()).device))
            blocks = block_names(network.model)
            third_stage = [name for name in blocks if name.startswith("stages.2.")]
            for layer in args.layer or (third_stage or blocks)[-1:]:
                result = activation_maps(
                    network.model, image, layer, args.tap, args.channels, seed, args.dead, args.saturated
                )
                stem = f"activations-{file_name(network.label)}-{layer}"
                title = f"{network.label}: activation maps of {names[index]}"
                save_activation_maps(args.output / f"{stem}.png", result, pixels, title, args.scale)
                shown = set(result.channels.tolist())
                columns = zip(result.mean, result.std, result.largest, result.dead, result.saturated, strict=True)
                write_rows(
                    args.output / f"{stem}.csv",
                    [
                        {
                            "channel": channel,
                            "mean": mean.item(),
                            "std": std.item(),
                            "largest": largest.item(),
                            "dead": int(dead),
                            "saturated": int(saturated),
                            "shown": int(channel in shown),
                        }
                        for channel, (mean, std, largest, dead, saturated) in enumerate(columns)
                    ],
                )
                shares = {"dead_share": result.dead_share, "saturated_share": result.saturated_share}
                rows.append({"network": network.label, "layer": layer, "channels": len(result.dead), **shares})
                written += [f"{stem}.png", f"{stem}.csv"]
                print(
                    f"{network.label}, {layer}: {result.dead_share:.1%} of {len(result.dead)} channels dead, "
                    f"{result.saturated_share:.1%} saturated"
                )
    keys = ("tap", "channels", "order", "scale", "dead", "saturated", "seed")
    settings = {key: getattr(args, key) for key in keys}
    settings |= {"value_range": decoding.value_range, "img_size": list(size), "data": {**data, "image": names[index]}}
    write_result(args.output / "activations.json", "activation maps", settings, networks, rows)
    return finish(args, [*written, "activations.json"])


def run_reconstruct(args: Namespace) -> int:
    """``analyze reconstruct``."""
    networks = open_networks(args, decoder=True)
    names, sources, data = images_of(args)
    crops = crops_of(args, networks, sources)
    ratios = [network.mask_ratio if args.mask_ratio is None else args.mask_ratio for network in networks]
    grids = [
        _grid(crops.size, network.model.patch_size, ratio) for network, ratio in zip(networks, ratios, strict=True)
    ]
    rows, results, written = [], [], []
    parts = list(crops)
    pixels = torch.cat([part for part, _ in parts])
    shown = [names[index] for _, indices in parts for index in indices]
    for network, ratio, grid in zip(networks, ratios, grids, strict=True):
        mask = draw_masks(len(pixels), grid, ratio, args.seed)
        with backend(args):
            result = _reconstruct(network, pixels, mask, args.batch_size)
        name = f"reconstruction-{file_name(network.label)}.png"
        save_picture(args.output / name, result, f"{network.label}: {mask.float().mean():.0%} of the patches hidden")
        errors = errors_by_image(result, mask)
        rows += [{"network": network.label, "image": n, "mse": e} for n, e in zip(shown, errors, strict=True)]
        overall = {key: getattr(result, key) for key in ("model_mse", "visible_mean_mse", "patch_mean_mse")}
        results.append({"network": network.label, "mask_ratio": ratio, **overall, "mse_by_image": errors})
        written.append(name)
        print(f"{network.label}: mean squared error over the hidden pixels (0..1 scale), predicting with")
        print("\n".join(f"  {line}" for line in describe_errors(result)))
    settings = {**settings_of(args, crops), "data": {**data, "images": shown}}
    write_rows(args.output / "reconstruction.csv", rows)
    write_result(args.output / "reconstruction.json", "reconstruction", settings, networks, results)
    return finish(args, [*written, "reconstruction.csv", "reconstruction.json"])


def _grid(size: tuple[int, int], patch: int, ratio: float) -> tuple[int, int]:
    """Patches per column and per row; ValueError where a mask of ``ratio`` would hide all or none of them."""
    if any(side % patch for side in size):
        raise ValueError(f"--img-size {size_text(size)} must have sides that are multiples of {patch} pixels, a patch")
    grid = size[0] // patch, size[1] // patch
    if (fault := mask_fault(grid, ratio, patch, "--mask-ratio", "--img-size")) is not None:
        raise ValueError(fault)
    return grid


def _reconstruct(network: Network, pixels: Tensor, mask: Tensor, batch_size: int) -> Reconstruction:
    """Of all images, ``batch_size`` at a time; the errors are weighted by the hidden patches."""
    parts = [
        (reconstruct(network.model, some, hidden), int(hidden.sum()))
        for some, hidden in zip(pixels.split(batch_size), mask.split(batch_size), strict=True)
    ]
    total = max(1, sum(weight for _, weight in parts))
    return Reconstruction(
        *(torch.cat([getattr(part, key) for part, _ in parts]) for key in ("originals", "masked", "reconstructed")),
        *(
            sum(getattr(part, key) * weight for part, weight in parts) / total
            for key in ("model_mse", "visible_mean_mse", "patch_mean_mse")
        ),
    )


def run_knn(args: Namespace) -> int:
    """``analyze knn``."""
    return _run(
        args,
        "knn",
        "k-nearest-neighbour classification of frozen features",
        {"k": args.k, "temperature": args.temperature},
        lambda *features: knn_classify(*features, k=args.k, temperature=args.temperature),
    )


def run_probe(args: Namespace) -> int:
    """``analyze probe``."""
    return _run(
        args,
        "probe",
        "linear probe of frozen features",
        {"C": args.c, "max_iter": args.max_iter},
        lambda *features: linear_probe(*features, C=args.c, max_iter=args.max_iter),
    )


def _run(args: Namespace, name: str, title: str, settings: dict[str, Any], classify: Callable[..., Any]) -> int:
    networks = open_networks(args)
    prepare_output(args.output)
    training, held_out, decoding = _open(args, networks)
    size = args.img_size or networks[0].img_size
    require_shared_memory(args.workers, args.batch_size * 3 * 4 * size[0] * size[1])  # float32
    rows, failures = [], []
    with backend(args):
        for network in networks:
            datasets = [
                EvalDataset(part.paths(), part.labels, eval_transform(size, args.crop_pct), decoding)
                for part in (training, held_out)
            ]
            features = [t for dataset in datasets for t in _features(args, network, dataset, failures)]
            rows.append({"network": network.label, **dataclasses.asdict(classify(*features))})
        unreadable = dict(failures)
        for path, reason in unreadable.items():
            print(f"warning: {path} cannot be read ({reason}); it is left out")
        print("\n".join(table(rows)))
        data = {
            "folder": args.data.resolve().name,
            "tested_on": args.val.resolve().name if args.val else None,
            "classes": training.classes,
            "training_images": len(training.images),
            "images": len(held_out.images),
            "left_out": len(training.skipped) + len(held_out.skipped) + len(unreadable),
            "names_sha256": fingerprint(training.images + held_out.images),
        }
        write_rows(args.output / f"{name}.csv", rows)
        about = {**settings, "pool": "mean", "img_size": list(size), "crop_pct": args.crop_pct}
        about |= {"value_range": decoding.value_range, "batch_size": args.batch_size, "val_share": args.val_share}
        about |= {"seed": args.seed, "data": data}
        write_result(args.output / f"{name}.json", title, about, networks, rows)
    return finish(args, [f"{name}.csv", f"{name}.json"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of results for the terminal, one network each, and below it what needs to be said of them."""
    last = "k" if "k" in rows[0] else "solver"
    lines = [["network", "top-1 %", "top-5 %", "images", last]]
    notes: list[str] = []
    for row in rows:
        if last == "k":
            outcome = str(row["k"])
        else:
            outcome = f"{'converged' if row['converged'] else 'stopped'} after {count(row['iterations'], 'iteration')}"
            if not row["converged"]:
                notes.append("a solver stopped at --max-iter before it converged: give it more")
        lines.append([row["network"], f"{row['top1']:.2f}", f"{row['top5']:.2f}", str(row["images"]), outcome])
        notes += [row["note"]] if row.get("note") else []
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    shown = ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines]
    return shown + [f"note: {note}" for note in dict.fromkeys(notes)]


def _open(args: Namespace, networks: list[Network]) -> tuple[ClassFolder, ClassFolder, Decoding]:
    limit = args.max_pixels or MAX_PIXELS
    training, held_out = open_split(args.data, args.val, args.val_share, args.seed, args.output, limit)
    _say_left_out(training, held_out)
    decoding = decoding_of(args, networks, {**training.traits_by_path(), **held_out.traits_by_path()})
    return training, held_out, decoding


def _say_left_out(*parts: ClassFolder) -> None:
    skipped = [pair for part in parts for pair in part.skipped]
    if skipped:
        print(f"{count(len(skipped), 'image')} left out (the first: {': '.join(skipped[0])})")
    for note in (text for part in parts for text in part.notes):
        print(f"note: {note}")


def _features(
    args: Namespace, network: Network, dataset: EvalDataset, failures: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    device = next(network.model.parameters()).device
    batches = labelled_loader(dataset, args.batch_size, Loading(args.workers, args.loader_timeout), device)
    with Progress(f"features of {network.label}", len(dataset)) as progress:
        features, labels = extract_features(network.model, batches, device, progress.update, failures=failures)
    return features, labels
