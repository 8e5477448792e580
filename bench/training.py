"""Whether training works: digits from random and from pre-trained weights, and the paper's Figure 4 after a short run.

Every number comes out of the command line's own runs; this script only prepares scikit-learn's digits as an image
folder, calls the commands, and collects what they wrote into one JSON file. The data are small: the result shows that
the pieces work together, and nothing about ImageNet.

    python -m bench training --photos-v2 RUN --photos-v1 RUN --work FOLDER --out bench/results

RUN are output folders of `pretrain --demo`, the second one with `--grn none`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from convnextv2_kernels._files import write_json
from convnextv2_kernels.benchmark import machine, results

SIZE = 96
SEEDS = (0, 1, 2)
LABELLED = 10  # training images of each digit that fine-tuning sees; pre-training sees all, without labels
FINETUNE = (
    "--recipe default --epochs 40 --warmup-epochs 4 --batch-size 20 --lr 1e-3 --weight-decay 0.05 --layer-decay 0.9 "
    "--aa none --hflip 0 --crop-scale 0.6 --reprob 0 --smoothing 0.1 --eval-every 40 --keep 1 --workers 0"
)
PRETRAIN = "--epochs 60 --batch-size 64 --lr 1e-3 --workers 0 --no-norm-pix-loss --mask-ratio 0.6 --keep 1"


def write_digits(folder: Path) -> dict[str, int]:
    """Write the digits as PNGs: ``all`` training images, ``few`` of each class, and ``val``, a fifth of each class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    counts = {"all": 0, "few": 0, "val": 0}
    for digit in range(10):
        places = np.flatnonzero(data.target == digit)
        order = np.random.default_rng([7, digit]).permutation(places)
        held = len(order) // 5
        parts = {"val": order[:held], "all": order[held:], "few": order[held : held + LABELLED]}
        for part, indices in parts.items():
            target = folder / part / str(digit)
            target.mkdir(parents=True, exist_ok=True)
            for index in indices:
                pixels = (data.images[index] * (255 / 16)).round().astype(np.uint8)
                Image.fromarray(pixels).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(
                    target / f"{index}.png"
                )
            counts[part] += len(indices)
    return counts


def run(*words: object) -> None:
    """Run a command of the package and stop with its output where it fails."""
    command = [sys.executable, "-m", "convnextv2_kernels", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def last_line(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench training", description=__doc__.splitlines()[0])
    parser.add_argument("--photos-v2", type=Path, required=True)
    parser.add_argument("--photos-v1", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file and the pictures")
    args = parser.parse_args(argv)
    work = args.work
    counts = write_digits(work / "digits")
    pretrained = work / "pretrained_digits"
    run("pretrain", "--data", work / "digits" / "all", "--img-size", SIZE, "--output", pretrained, *PRETRAIN.split())
    arms = {
        "random weights": None,
        "pre-trained on 11 photographs": args.photos_v2 / "encoder.safetensors",
        "pre-trained on the digits": pretrained / "encoder.safetensors",
    }
    found: dict[str, dict] = {}
    for name, init in arms.items():
        found[name] = {"finetune_top1": []}
        for seed in SEEDS:
            output = work / f"finetune_{len(found)}_{seed}"
            more = ["--init", init] if init else []
            run(
                "finetune",
                "--data",
                work / "digits" / "few",
                "--val",
                work / "digits" / "val",
                "--img-size",
                SIZE,
                "--seed",
                seed,
                "--output",
                output,
                *more,
                *FINETUNE.split(),
            )
            found[name]["finetune_top1"].append(last_line(output / "metrics.jsonl")["top1"])
        print(name, found[name], flush=True)
    pictures = args.out
    for name, init in arms.items():
        for kind in ("knn", "probe"):
            output = work / f"{kind}_{len(found[name])}_{list(arms).index(name)}"
            what = ["--random", "--model", "convnextv2_atto"] if init is None else [init]
            run(
                "analyze",
                kind,
                *what,
                "--data",
                work / "digits" / "all",
                "--val",
                work / "digits" / "val",
                "--img-size",
                SIZE,
                "--output",
                output,
            )
            found[name][f"{kind}_top1"] = json.loads((output / f"{kind}.json").read_text())["results"][0]["top1"]
    weights = (args.photos_v2 / "encoder.safetensors", args.photos_v1 / "encoder.safetensors")
    labels = ("--label", "V2 (GRN)", "--label", "V1-style (no GRN)")
    run("analyze", "cosine", *weights, *labels, "--photos", "--random", "--output", work / "cosine")
    (pictures / "cosine_distance.png").write_bytes(next((work / "cosine").glob("*.png")).read_bytes())
    write_json(
        args.out / "training_evidence.json",
        {
            "format": results.FORMAT,
            "kind": "training",
            "machine": machine.describe(),
            "model": "convnextv2_atto",
            "img_size": SIZE,
            "images": {"pre-training": counts["all"], "fine-tuning": counts["few"], "evaluation": counts["val"]},
            "pretrain": PRETRAIN,
            "finetune": FINETUNE,
            "photographs": {
                name: {
                    "steps": json.loads((run_ / "config.json").read_text())["config"]["num_images"] // 8,
                    "last_losses": _mean_loss(run_),
                }
                for name, run_ in (("GRN", args.photos_v2), ("no GRN", args.photos_v1))
            },
            "seeds": list(SEEDS),
            "arms": found,
            "cosine": json.loads(next((work / "cosine").glob("*.json")).read_text()),
        },
    )
    return 0


def _mean_loss(folder: Path) -> float:
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()[-100:]]
    return float(np.mean(losses))
