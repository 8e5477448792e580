"""What imports what: the kernels need PyTorch and safetensors alone, and the package's parts depend one way."""

import ast
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import convnextv2_kernels

PACKAGE = Path(convnextv2_kernels.__file__).parent
OPTIONAL = ("numpy", "PIL", "rich", "matplotlib", "timm", "torchvision", "sklearn", "skimage", "tensorboard")
# From the bottom up: a part imports those before it. All that is not named here is the core, below them.
PARTS = ("_progress", "data", "benchmark", "train", "analysis", "cli")
NEVER = {("benchmark", "data"), ("analysis", "benchmark")}
HIDE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def core_modules() -> list[str]:
    """Every module of the core; Triton's kernels only where Triton is."""
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "convnextv2_kernels.")]
    parts = re.compile(rf"convnextv2_kernels\.({'|'.join(PARTS)}|__main__|_C)(\.|$)")
    kept = [name for name in names if not parts.match(name)]
    return [name for name in kept if find_spec("triton") or not name.startswith("convnextv2_kernels.backends.triton.")]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", HIDE + code], capture_output=True, text=True)


def test_the_core_needs_pytorch_and_safetensors_alone():
    modules = core_modules()
    assert {"convnextv2_kernels.ops.mlp", "convnextv2_kernels.checkpoints.load"} <= set(modules) and len(modules) > 50
    code = f"""
import importlib
for name in {modules}:
    importlib.import_module(name)
import convnextv2_kernels as ck
import torch
loss, _, _ = ck.models.create_fcmae("convnextv2_atto", img_size=64)(torch.randn(1, 3, 64, 64))
loss.backward()
assert "convnextv2_atto" in ck.models.CONFIGS and "torch" in ck.info()
found = {{name.partition(".")[0] for name in sys.modules}} & set({OPTIONAL})
assert not found, found
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrain --data x", "pretrain needs numpy, Pillow and rich: pip install numpy Pillow rich"),
        (
            "pretrain --demo",
            "pretrain --demo needs numpy, Pillow, rich and matplotlib: pip install numpy Pillow rich matplotlib",
        ),
        ("finetune --data x", "finetune needs numpy, Pillow and rich: pip install numpy Pillow rich"),
        ("analyze knn a.pt --data x", "analyze knn needs numpy, Pillow and rich: pip install numpy Pillow rich"),
        ("bench --quick", "bench needs rich: pip install rich"),
    ],
)
def test_a_command_names_what_it_lacks(tmp_path, words, message):
    done = run(f"import convnextv2_kernels.cli as cli; sys.exit(cli.main({words.split()}))")
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


@pytest.mark.parametrize("words", ["info", "--help", "pretrain --help", "finetune --help", "analyze knn --help"])
def test_commands_that_need_nothing_more(words):
    done = run(f"import convnextv2_kernels.cli as cli; sys.exit(cli.main({words.split()}))")
    assert done.returncode == 0 and done.stdout, done.stderr


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a module imports anywhere in it, "" for the core."""
    place = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*place[: len(place) - node.level], *(node.module or "").split(".")]
            target = [name for name in target if name]
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("convnextv2_kernels."):
            found.add(node.module.split(".")[1])
    return {name if name in PARTS else "" for name in found}


@pytest.mark.parametrize("part", ["", *PARTS])
def test_parts_depend_one_way(part):
    rank = {name: place for place, name in enumerate(("", *PARTS))}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if (name if name in PARTS else "") == part and name != "__main__":
            for other in imported_parts(path):
                assert rank[other] <= rank[part] and (part, other) not in NEVER, f"{path} imports {other or 'the core'}"
