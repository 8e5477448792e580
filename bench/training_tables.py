"""Tables of docs/training.md from bench/results/training_evidence.json."""

from __future__ import annotations

import statistics


def training(report: dict) -> str:
    """Digits from each start, then the cosine distance of the networks by stage."""
    images, size = report["images"], report["img_size"]
    lines = [
        f"{report['model']}, {size} px, scikit-learn's digits: {images['fine-tuning']} labelled images to train on, "
        f"{images['evaluation']} to evaluate on, {images['pre-training']} without labels for the pre-training on "
        f"digits. Top-1 in percent; fine-tuning: mean of {len(report['seeds'])} seeds (lowest to highest).",
        "",
        "| first weights | fine-tuned | 20 nearest neighbours, frozen | linear probe, frozen |",
        "|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        top1 = arm["finetune_top1"]
        lines.append(
            f"| {name} | {statistics.mean(top1):.1f} ({min(top1):.1f} to {max(top1):.1f}) | {arm['knn_top1']:.1f} | "
            f"{arm['probe_top1']:.1f} |"
        )
    lines += [
        "",
        "Frozen features see all training digits with their labels. `python -m bench training` makes the data, runs "
        "the commands and writes `bench/results/training_evidence.json`.",
        "",
        "| feature cosine distance, mean over a stage | " + " | ".join(f"stage {s + 1}" for s in range(4)) + " |",
        "|---|---|---|---|---|",
    ]
    for network in report["cosine"]["networks"]:
        label = network["label"]
        layers = [row for row in report["cosine"]["results"] if row["network"] == label]
        means = [statistics.mean(row["mean"] for row in layers if row["stage"] == s) for s in range(4)]
        dead = [statistics.mean(row["dead_share"] for row in layers if row["stage"] == s) for s in range(4)]
        cells = " | ".join(f"{m:.3f} ({100 * d:.0f} % dead)" for m, d in zip(means, dead, strict=True))
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)
