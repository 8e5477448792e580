"""The compiled module ``convnextv2_kernels._C``: loading it registers ``torch.ops.convnextv2_kernels``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch


def _built_for() -> str:
    """What the module was compiled against, as far as the note beside it says."""
    try:
        built = json.loads(Path(__file__).parent.with_name("_C.build.json").read_text())
    except (OSError, ValueError):
        return "an unknown PyTorch"
    return _versions(built.get("torch"), built.get("cuda"))


def _versions(torch_version: str | None, cuda: str | None) -> str:
    return f"PyTorch {torch_version} with {'CUDA ' + cuda if cuda else 'no CUDA'}"


def _not_built() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").exists():
        return "the C++ extension was not built (no compiler was found at installation)"
    # Python imports from the folder it is started in before it looks for what is installed.
    return (
        f"the C++ extension was not built in {root}, the source tree that Python imports from; with a C++ compiler "
        "`pip install --no-build-isolation -e .` builds it there"
    )


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("convnextv2_kernels._C"), None
    except ModuleNotFoundError:
        return None, _not_built()
    except ImportError as error:
        found = _versions(torch.__version__, torch.version.cuda)
        return None, f"the C++ extension was built for {_built_for()} and does not load with {found}: {error}"


module, load_error = _load()
