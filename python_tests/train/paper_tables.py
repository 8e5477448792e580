"""The tables of recipes of both ConvNeXt papers in their own notation, apart from ``train/recipes.py``.

A cell holds one value for all sizes, or values by size, ``0.1 (B), 0.2 (L), 0.3 (H)``; so written here for both papers.
"""

import re

LETTERS = {"A": "atto", "F": "femto", "P": "pico", "N": "nano", "T": "tiny", "S": "small", "B": "base", "L": "large",
           "XL": "xlarge", "H": "huge"}  # fmt: skip

TABLES = {
    "8": """
        base learning rate | 1.5e-4
        weight decay | 0.05
        optimizer momentum | 0.9, 0.95
        batch size | 4096
        warmup epochs | 40
        training epochs | 800 or 1600
        augmentation | RandomResizedCrop
    """,
    "9": """
        base learning rate | 2e-4
        weight decay | 0.05 (F), 0.3 (A/P/N)
        optimizer momentum | 0.9, 0.999
        layer-wise lr decay | 0.9
        batch size | 1024
        warmup epochs | 0
        training epochs | 600
        augmentation | RandAug
        label smoothing | 0.2
        mixup | 0.0 (A), 0.3 (F/P), 0.5 (N)
        cutmix | 0.0 (A), 0.3 (F/P), 0.5 (N)
        drop path | 0.1 (A/N), 0.0 (F/P)
        head init | 0.001
        ema | 0.9999
    """,
    "10": """
        base learning rate | 8e-4
        weight decay | 0.05
        optimizer momentum | 0.9, 0.999
        layer-wise lr decay | 0.9
        batch size | 1024
        warmup epochs | 40
        training epochs | 300
        augmentation | RandAug
        label smoothing | 0.1
        mixup | 0.8
        cutmix | 1.0
        drop path | 0.2
        head init | 0.001
        ema | 0.9999
    """,
    "11": """
        base learning rate | 6.25e-3 (B/L), 1.25e-3 (H)
        weight decay | 0.05
        optimizer momentum | 0.9, 0.999
        layer-wise lr decay | 0.6 (B/L), 0.75 (H)
        batch size | 1024
        warmup epochs | 20 (B/L), 10 (H)
        training epochs | 100 (B/L), 50 (H)
        augmentation | RandAug
        label smoothing | 0.1
        mixup | 0.8
        cutmix | 1.0
        drop path | 0.1 (B), 0.2 (L), 0.3 (H)
        head init | 0.001
        ema | 0.9999
    """,
    "12": """
        base learning rate | 2.5e-4
        weight decay | 0.05
        optimizer momentum | 0.9, 0.999
        layer-wise lr decay | 0.8 (B/L/H), 0.9 (N/T)
        batch size | 4096
        warmup epochs | 5
        training epochs | 90
        augmentation | RandAug
        label smoothing | 0.1
        mixup | 0.8
        cutmix | 1.0
        drop path | 0. (N/T), 0.1 (B/L), 0.3 (H)
        head init | 0.001
        ema | None
    """,
    "13": """
        base learning rate | 2.5e-5
        weight decay | 1e-8
        optimizer momentum | 0.9, 0.999
        layer-wise lr decay | 0.8 (B/L), 0.85 (H), 0.9 (N/T)
        batch size | 512
        warmup epochs | None
        training epochs | 30 (B/L/H), 90 (N/T)
        augmentation | RandAug
        label smoothing | 0.1
        mixup | None
        cutmix | None
        drop path | 0.1 (N/T), 0.2 (B), 0.3 (L), 0.5 (H)
        head init | 0.001
        ema | 0.9999 (N/T/B/L), None (H)
    """,
    "V1 5, 1K": """
        base learning rate | 4e-3
        weight decay | 0.05
        optimizer momentum | 0.9, 0.999
        batch size | 4096
        training epochs | 300
        warmup epochs | 20
        layer-wise lr decay | None
        augmentation | RandAug
        mixup | 0.8
        cutmix | 1.0
        random erasing | 0.25
        label smoothing | 0.1
        drop path | 0.1 (T), 0.4 (S), 0.5 (B), 0.5 (L)
        head init | None
        gradient clip | None
        ema | 0.9999
    """,
    "V1 5, 22K": """
        base learning rate | 4e-3
        weight decay | 0.05
        optimizer momentum | 0.9, 0.999
        batch size | 4096
        training epochs | 90
        warmup epochs | 5
        layer-wise lr decay | None
        augmentation | RandAug
        mixup | 0.8
        cutmix | 1.0
        random erasing | 0.25
        label smoothing | 0.1
        drop path | 0.0 (T), 0.0 (S), 0.1 (B), 0.1 (L), 0.2 (XL)
        head init | None
        gradient clip | None
        ema | None
    """,
    "V1 6, after 22K": """
        base learning rate | 5e-5
        weight decay | 1e-8
        optimizer momentum | 0.9, 0.999
        batch size | 512
        training epochs | 30
        layer-wise lr decay | 0.8
        warmup epochs | None
        augmentation | RandAug
        mixup | None
        cutmix | None
        random erasing | 0.25
        label smoothing | 0.1
        drop path | 0.0 (T), 0.1 (S), 0.2 (B), 0.3 (L), 0.4 (XL)
        head init | 0.001
        gradient clip | None
        ema | None (T/S/B/L), 0.9999 (XL)
    """,
}
# name of a value of a recipe, and what None of a table is there
NAMES = {
    "base learning rate": ("blr", None),
    "weight decay": ("weight_decay", None),
    "optimizer momentum": ("betas", None),
    "layer-wise lr decay": ("layer_decay", 1.0),
    "batch size": ("batch_size", None),
    "warmup epochs": ("warmup_epochs", 0.0),
    "training epochs": ("epochs", None),
    "augmentation": ("aa", None),
    "label smoothing": ("smoothing", None),
    "mixup": ("mixup", 0.0),
    "cutmix": ("cutmix", 0.0),
    "drop path": ("drop_path", None),
    "head init": ("head_init_scale", 1.0),
    "ema": ("ema_decay", None),
    "random erasing": ("reprob", None),
    "gradient clip": ("clip_grad", None),
}


def values_of(table: str, size: str) -> dict:
    """The values of a table of fine-tuning for a size, such as "base", by the names of recipes; its rates of learning
    as they are in the table."""
    found = {}
    for line in TABLES[table].strip().splitlines():
        row, cell = (part.strip() for part in line.split("|"))
        name, none = NAMES[row]
        text = _of_size(cell, size)
        found[name] = none if text == "None" else _number(text)
    return found


def _of_size(cell: str, size: str) -> str:
    parts = re.findall(r"([^,(]+) \(([A-Z/]+)\)", cell)
    if not parts:
        return cell
    (text,) = (text for text, letters in parts if size in [LETTERS[letter] for letter in letters.split("/")])
    return text.strip()


def _number(text: str):
    if text == "RandAug":
        return "rand-m9-mstd0.5-inc1"  # RandAug (9, 0.5) in all tables; timm's name for it
    numbers = tuple(map(float, text.split(",")))
    return numbers if len(numbers) > 1 else numbers[0]
