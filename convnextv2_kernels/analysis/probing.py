"""``analyze knn`` and ``analyze probe``: what frozen features are worth, without fine-tuning."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backends import use_backend
from ..train.augment import eval_transform
from ..train.classes import ClassFolder, hold_out, open_classes, split_train_val
from ..train.features import extract_features
from ..train.files import CACHE_NAME, fingerprint
from ..train.knn import knn_classify
from ..train.labelled import EvalDataset
from ..train.prepare import prepare_output
from ..train.probe import linear_probe
from ..train.progress import Reporter, count
from .arms import Arm
from .inputs import finish, networks
from .results import write_result, write_rows


def run_knn(args: Namespace) -> int:
    """``analyze knn``."""
    return _run(
        args, "knn", "k-nearest-neighbour classification of frozen features",
        {"k": args.k, "temperature": args.temperature},
        lambda *features: knn_classify(*features, k=args.k, temperature=args.temperature),
    )  # fmt: skip


def run_probe(args: Namespace) -> int:
    """``analyze probe``."""
    return _run(
        args, "probe", "linear probe of frozen features", {"C": args.c, "max_iter": args.max_iter},
        lambda *features: linear_probe(*features, C=args.c, max_iter=args.max_iter),
    )  # fmt: skip


def _run(args: Namespace, name: str, title: str, settings: dict[str, Any], classify: Callable[..., Any]) -> int:
    arms = networks(args)
    prepare_output(args.output)
    training, held_out = _open(args)
    size = args.img_size or arms[0].img_size or (224, 224)
    rows, failures = [], []
    for arm in arms:
        with use_backend(args.backend or "auto"):
            features = [t for part in (training, held_out) for t in _features(args, arm, part, size, failures)]
        result = dataclasses.asdict(classify(*features))
        rows.append({"network": arm.label, **result})
        more = f" ({result['note']})" if result.get("note") else ""
        if result.get("converged") is False:
            more = f" (the solver stopped at --max-iter {args.max_iter} before it converged)"
        print(f"{arm.label}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % of {result['images']}{more}")
    for path, reason in dict(failures).items():
        print(f"warning: {path} cannot be read ({reason}); it is left out")
    data = {
        "folder": args.data.name,
        "classes": training.classes,
        "training_images": len(training.images),
        "images": len(held_out.images),
        "names_sha256": fingerprint(training.images + held_out.images),
    }
    write_rows(args.output / f"{name}.csv", rows)
    about = {**settings, "pool": "mean", "img_size": list(size), "seed": args.seed, "data": data}
    write_result(args.output / f"{name}.json", title, about, arms, rows)
    return finish(args, [f"{name}.csv", f"{name}.json"])


def _open(args: Namespace) -> tuple[ClassFolder, ClassFolder]:
    folder, val = split_train_val(args.data)
    val = args.val or val
    with Reporter("verified", 0) as report:
        training = open_classes(folder, args.output / CACHE_NAME, advance=report.advance, exclude=args.output)
    if val is None:
        training, held_out = hold_out(training, args.val_share, args.seed)
    else:
        with Reporter("verified", 0) as report:
            cache = args.output / f"val_{CACHE_NAME}"
            held_out = open_classes(val, cache, training.classes, "--val", report.advance, exclude=args.output)
    skipped = [*training.skipped, *held_out.skipped]
    if skipped:
        print(f"{count(len(skipped), 'image')} left out (the first: {': '.join(skipped[0])})")
    return training, held_out


def _features(
    args: Namespace, arm: Arm, found: ClassFolder, size: tuple[int, int], failures: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    dataset = EvalDataset(found.paths(), found.labels, eval_transform(size, args.crop_pct))
    device = next(arm.model.parameters()).device
    with Reporter(f"features of {arm.label}", len(found.images)) as report:
        features, labels = extract_features(
            arm.model, dataset, device, args.batch_size, args.workers, report.update, failures=failures
        )
    return features, labels
