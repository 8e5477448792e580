"""Make ``import torchvision``, and with it timm, work beside the PyTorch that is installed.

    python tools/match_torchvision.py

torchvision's wheels on PyPI are built for PyTorch's CUDA builds. Beside a CPU build their extension does not load, and
importing them ends in "operator torchvision::nms does not exist". This installs the build for the installed PyTorch
from PyTorch's own index. Where that index cannot be reached, it declares the two missing operators in the installed
torchvision, after which all of it works but what the extension holds: ``torchvision.ops`` and the decoders of
``torchvision.io``. Where torchvision can be imported, or is not installed, it does nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

BROKEN = "operator torchvision::nms does not exist"
INDEX = "https://download.pytorch.org/whl"
DECLARATIONS = """

# Added by tools/match_torchvision.py of convnextv2_kernels. The extension is built for another PyTorch: these are the
# operators for which torchvision registers fakes.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def import_error() -> str | None:
    """The last line of what importing torchvision prints, or None if it can be imported."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip() or "no message").splitlines()[-1]


def install_matching_build() -> bool:
    """Whether PyTorch's index had torchvision for the installed PyTorch, and it was installed."""
    variant = importlib.metadata.version("torch").partition("+")[2]  # "cpu" of 2.13.0+cpu
    if not variant:
        return False
    version = importlib.metadata.version("torchvision").partition("+")[0]
    options = ["-q", "--no-deps", "--retries", "0", "--timeout", "15", "--index-url", f"{INDEX}/{variant}"]
    command = [sys.executable, "-m", "pip", "install", *options, f"torchvision=={version}+{variant}"]
    return subprocess.run(command, capture_output=True).returncode == 0 and import_error() is None


def declare_operators() -> Path:
    """Adds the declarations to the installed torchvision and returns the file that was changed."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None, "it was found by import_error"
    path = Path(spec.origin).with_name("extension.py")
    text = path.read_text()
    if DECLARATIONS not in text:
        new = path.with_name("extension.py.new")  # the file may share its data with an installer's cache
        new.write_text(text + DECLARATIONS)
        new.replace(path)
    return path


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision is not installed")
        return 0
    error = import_error()
    if error is None:
        return 0
    if BROKEN not in error:
        print(f"torchvision cannot be imported, for a reason that this program does not know: {error}", file=sys.stderr)
        return 1
    torch, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    print(f"torchvision {vision} is built for another PyTorch than {torch}, which is installed")
    if install_matching_build():
        print(f"installed torchvision {importlib.metadata.version('torchvision')} from {INDEX}")
        return 0
    print(f"{INDEX} has no other that can be installed; declared its missing operators in {declare_operators()}")
    error = import_error()
    if error is not None:
        print(f"torchvision still cannot be imported: {error}", file=sys.stderr)
    return int(error is not None)


if __name__ == "__main__":
    sys.exit(main())
