"""``analyze activations`` and ``analyze reconstruct``: pictures of single images."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from ..data.images import load_crop, normalize
from ..train.reconstruction import Reconstruction, describe_errors, reconstruct, save_picture
from .activations import activation_maps, save_activation_maps
from .inputs import backend, crops_of, find_image, finish, images_of, networks, settings_of, size_text
from .layer_features import block_names
from .networks import Arm
from .reconstruct import draw_masks, errors_by_image
from .results import file_name, write_result, write_rows


def run_activations(args: Namespace) -> int:
    """``analyze activations``."""
    arms = networks(args)
    names, sources, data = images_of(args, spread=False)
    index = find_image(args.image, names)
    size = args.img_size or arms[0].img_size
    pixels = load_crop(sources[index], size, None)
    rows, written = [], []
    with backend(args):
        for arm in arms:
            image = normalize(pixels[None].to(next(arm.model.parameters()).device))
            for layer in args.layer or [next(n for n in reversed(block_names(arm.model)) if n.startswith("stages.2."))]:
                result = activation_maps(
                    arm.model, image, layer, args.tap, args.channels, args.order, args.seed, args.dead, args.saturated
                )
                stem = f"activations-{file_name(arm.label)}-{layer}"
                title = f"{arm.label}: activation maps of {names[index]}"
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
                rows.append({"network": arm.label, "layer": layer, "channels": len(result.dead), **shares})
                written += [f"{stem}.png", f"{stem}.csv"]
                print(
                    f"{arm.label}, {layer}: {result.dead_share:.1%} of {len(result.dead)} channels dead, "
                    f"{result.saturated_share:.1%} saturated"
                )
    keys = ("tap", "channels", "order", "scale", "dead", "saturated", "seed")
    settings = {key: getattr(args, key) for key in keys}
    settings |= {"img_size": list(size), "data": {**data, "image": names[index]}}
    write_result(args.output / "activations.json", "activation maps", settings, arms, rows)
    return finish(args, [*written, "activations.json"])


def run_reconstruct(args: Namespace) -> int:
    """``analyze reconstruct``."""
    arms = networks(args, decoder=True)
    names, sources, data = images_of(args)
    crops = crops_of(args, arms, sources)
    rows, results, written = [], [], []
    parts = list(crops)
    pixels = torch.cat([part for part, _ in parts])
    shown = [names[index] for _, indices in parts for index in indices]
    for arm in arms:
        ratio = arm.mask_ratio if args.mask_ratio is None else args.mask_ratio
        patch = arm.model.patch_size
        if any(side % patch for side in crops.size):
            raise ValueError(f"--img-size {size_text(crops.size)} must be a multiple of the patches' {patch} px")
        mask = draw_masks(len(pixels), (crops.size[0] // patch, crops.size[1] // patch), ratio, args.seed)
        with backend(args):
            result = _reconstruct(arm, pixels, mask, args.batch_size)
        name = f"reconstruction-{file_name(arm.label)}.png"
        save_picture(args.output / name, result, f"{arm.label}: {mask.float().mean():.0%} of the patches hidden")
        errors = errors_by_image(result, mask)
        rows += [{"network": arm.label, "image": n, "mse": e} for n, e in zip(shown, errors, strict=True)]
        overall = {key: getattr(result, key) for key in ("model_mse", "visible_mean_mse", "patch_mean_mse")}
        results.append({"network": arm.label, "mask_ratio": ratio, **overall, "mse_by_image": errors})
        written.append(name)
        print(f"{arm.label}: mean squared error over the hidden pixels (0..1 scale), predicting with")
        print("\n".join(f"  {line}" for line in describe_errors(result)))
    settings = {**settings_of(args, crops), "data": {**data, "images": shown}}
    write_rows(args.output / "reconstruction.csv", rows)
    write_result(args.output / "reconstruction.json", "reconstruction", settings, arms, results)
    return finish(args, [*written, "reconstruction.csv", "reconstruction.json"])


def _reconstruct(arm: Arm, pixels: Tensor, mask: Tensor, batch_size: int) -> Reconstruction:
    """Of all images, ``batch_size`` at a time; the errors are weighted by the hidden patches."""
    parts = [
        (reconstruct(arm.model, some, hidden), int(hidden.sum()))
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
