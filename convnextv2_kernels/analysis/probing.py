"""``analyze knn`` and ``analyze probe``: what frozen features are worth, without fine-tuning."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._progress import Progress, count
from ..data.augment import eval_transform
from ..data.classes import ClassFolder, open_split
from ..data.folder import fingerprint
from ..data.labelled import EvalDataset
from ..train.setup import prepare_output
from .features import extract_features
from .inputs import backend, finish, networks
from .knn import knn_classify
from .linear_probe import linear_probe
from .networks import Arm
from .results import write_result, write_rows


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
    arms = networks(args)
    prepare_output(args.output)
    training, held_out = _open(args)
    size = args.img_size or arms[0].img_size or (224, 224)
    rows, failures = [], []
    with backend(args):
        for arm in arms:
            features = [t for part in (training, held_out) for t in _features(args, arm, part, size, failures)]
            rows.append({"network": arm.label, **dataclasses.asdict(classify(*features))})
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
        about |= {"batch_size": args.batch_size, "val_share": args.val_share, "seed": args.seed, "data": data}
        write_result(args.output / f"{name}.json", title, about, arms, rows)
    return finish(args, [f"{name}.csv", f"{name}.json"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of results for the terminal, one network each, and below it what needs to be said of them."""
    last = "k" if "k" in rows[0] else "solver"
    lines = [["network", "top-1 %", "top-5 %", "images", last]]
    notes: list[str] = []
    for row in rows:
        if last == "k":
            told = str(row["k"])
        else:
            told = f"{'converged' if row['converged'] else 'stopped'} after {count(row['iterations'], 'iteration')}"
            if not row["converged"]:
                notes.append("a solver stopped at --max-iter before it converged: give it more")
        lines.append([row["network"], f"{row['top1']:.2f}", f"{row['top5']:.2f}", str(row["images"]), told])
        notes += [row["note"]] if row.get("note") else []
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    shown = ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines]
    return shown + [f"note: {note}" for note in dict.fromkeys(notes)]


def _open(args: Namespace) -> tuple[ClassFolder, ClassFolder]:
    training, held_out = open_split(args.data, args.val, args.val_share, args.seed, args.output)
    skipped = [*training.skipped, *held_out.skipped]
    if skipped:
        print(f"{count(len(skipped), 'image')} left out (the first: {': '.join(skipped[0])})")
    return training, held_out


def _features(
    args: Namespace, arm: Arm, found: ClassFolder, size: tuple[int, int], failures: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    dataset = EvalDataset(found.paths(), found.labels, eval_transform(size, args.crop_pct))
    device = next(arm.model.parameters()).device
    with Progress(f"features of {arm.label}", len(found.images)) as progress:
        features, labels = extract_features(
            arm.model, dataset, device, args.batch_size, args.workers, progress.update, failures=failures
        )
    return features, labels
