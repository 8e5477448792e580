"""Installation without a compiler, the info report, and the documents' claims."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import convnextv2_kernels as ck
from convnextv2_kernels.sizes import V2_NAMES

ROOT = Path(__file__).resolve().parents[1]


def run(code_or_args, cwd, **environment):
    args = [sys.executable, "-c", code_or_args] if isinstance(code_or_args, str) else [sys.executable, *code_or_args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    """The package as built where no C++ compiler is on the PATH."""
    target = tmp_path_factory.mktemp("pure")
    build = ["setup.py", "-q", "build", "--build-base", str(target / "base"), "--build-lib", str(target / "lib")]
    done = run(build, ROOT, PATH=str(target), CXX="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stderr
    return target / "lib"


def test_pure_python_install_works_and_says_so(without_compiler):
    # an editable install's import hook would find the built extension of this checkout
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import convnextv2_kernels as ck, torch
assert ck.__file__.startswith({str(without_compiler)!r}), ck.__file__
print(ck.info())
model = ck.models.FCMAE(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), img_size=64, decoder_embed_dim=16)
loss, _, _ = model(torch.randn(2, 3, 64, 64))
loss.backward()
print("loss", float(loss))
try:
    with ck.use_backend("cpu"):
        ck.ops.layer_norm(torch.ones(2, 3), None, None)
except RuntimeError as error:
    print("error:", error)
"""
    done = run(code, without_compiler, PYTHONPATH=str(without_compiler))
    assert done.returncode == 0, done.stderr
    assert re.search(r"extension +not loaded: the C\+\+ extension was not built", done.stdout)
    assert re.search(r"convnextv2_block +reference +reference", done.stdout)
    assert "error: layer_norm was asked of backend 'cpu', but the C++ extension was not built" in done.stdout


def info_of_a_copy(folder):
    """What info prints where Python imports from ``folder`` and does not find this checkout."""
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import convnextv2_kernels as ck
print(ck.info())
"""
    done = run(code, folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_without_the_extension(folder):
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    return Path(shutil.copytree(ROOT / "convnextv2_kernels", folder / "convnextv2_kernels", ignore=ignored))


def test_a_clone_without_the_extension_says_how_to_build_it(tmp_path):
    """What runs in a clone after an install that was not editable: Python imports from the clone."""
    copy_without_the_extension(tmp_path)
    shutil.copy(ROOT / "setup.py", tmp_path)
    told = info_of_a_copy(tmp_path)
    where = f"the C++ extension was not built in {tmp_path}, the source tree that Python imports from"
    assert where in told and "`pip install --no-build-isolation -e .` builds it there" in told


def test_info_names_every_op_and_backend():
    report = ck.info()
    for name in [*ck.ops.__all__, "reference", "cpu", "cuda", "triton"]:
        assert name in report
    with ck.use_backend("reference"):
        assert re.search(r"convnextv2_block +reference +reference +reference +reference", ck.info())


def test_info_does_not_call_cuda_available_without_a_gpu(monkeypatch):
    cuda = ck.backends.REGISTRY["cuda"]
    monkeypatch.setattr(type(cuda), "unsupported_reason", lambda *question: None)
    monkeypatch.setattr(type(cuda), "device_type", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(r"\n  cuda +not available: compiled, but PyTorch sees no GPU\n", ck.info())


def test_readme_python_examples_run(tmp_path):
    """As they stand, in the environment that `make` built: what it has to put right, nothing here puts right."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks and blocks[0].startswith("import timm\n")
    # the checkpoint that one block loads
    before = """
import os
import safetensors.torch
import convnextv2_kernels as ck
os.mkdir("run1")
encoder = ck.convert_state_dict(ck.models.create_fcmae("convnextv2_tiny").state_dict(), to="official")
safetensors.torch.save_file(encoder, "run1/encoder.safetensors")
"""
    # what follows builds on what came before; a block that needs a GPU runs where there is one
    first, *blocks = (b for b in blocks if ".cuda()" not in b or torch.cuda.is_available())
    done = run("\n".join([first, before, *blocks]), tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, f"{done.stderr}\n(`python tools/match_torchvision.py` mends torchvision)"


@pytest.mark.thorough
def test_an_example_runs_in_a_process_of_its_own(tmp_path):
    """timm imports without this repository's help."""
    options = ["--batch-size", "2", "--img-size", "64", "--steps", "2"]
    done = run([str(ROOT / "examples" / "fuse_timm.py"), *options], tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "fused 12 of 12 blocks of ConvNeXt" in done.stdout, done.stderr


def mismatched_torchvision(folder, registers="torchvision::nms"):
    """An installed torchvision whose extension did not load: no operators, and a fake that is registered for one."""
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import extension, fakes\n")
    (package / "extension.py").write_text("import torch\n\n\ndef _has_ops():\n    return False\n")
    fake = f"import torch\ntorch.library.register_fake({registers!r})(lambda dets, scores, iou_threshold: dets)\n"
    (package / "fakes.py").write_text(fake)
    information = folder / "torchvision-0.28.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return folder


def match(folder):
    return run([str(ROOT / "tools" / "match_torchvision.py")], folder, PYTHONPATH=str(folder), PIP_NO_INDEX="1")


def test_torchvision_of_another_pytorch_is_made_to_import(tmp_path):
    folder = mismatched_torchvision(tmp_path / "site")
    done = match(folder)
    assert done.returncode == 0, done.stderr
    assert "torchvision 0.28.0 is built for another PyTorch than " in done.stdout
    changed = (folder / "torchvision" / "extension.py").read_text()
    assert f"declared its missing operators in {folder / 'torchvision' / 'extension.py'}" in done.stdout
    again = match(folder)
    assert (again.returncode, again.stdout) == (0, "")
    assert (folder / "torchvision" / "extension.py").read_text() == changed


@pytest.mark.thorough
def test_torchvision_that_fails_otherwise_is_left_alone(tmp_path):
    folder = mismatched_torchvision(tmp_path / "site", registers="torchvision::roi_align")
    before = (folder / "torchvision" / "extension.py").read_text()
    done = match(folder)
    assert done.returncode == 1 and "for a reason that this program does not know: RuntimeError" in done.stderr
    assert (folder / "torchvision" / "extension.py").read_text() == before


def test_an_extension_that_does_not_load_says_what_it_was_built_for(tmp_path):
    package = copy_without_the_extension(tmp_path)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    (package / "_C.build.json").write_text(json.dumps({"torch": "2.10.0+cu130", "cuda": "13.0"}))
    found = f"PyTorch {torch.__version__} with {'CUDA ' + torch.version.cuda if torch.version.cuda else 'no CUDA'}"
    message = f"the C++ extension was built for PyTorch 2.10.0+cu130 with CUDA 13.0 and does not load with {found}"
    assert message in info_of_a_copy(tmp_path)


def test_documented_numbers_come_from_the_committed_results():
    done = run(["-m", "bench", "tables", "--check"], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_results_are_whole():
    report = json.loads((ROOT / "bench" / "results" / "cpu_figure6.json").read_text())
    assert [size["model"] for size in report["sizes"]] == list(V2_NAMES) and not report["left_out"]
    for size in report["sizes"]:
        assert size["arms"][size["ours"]]["median_ms"] > 0 and size["gate"]
        layouts = {(arm["variant"] or {}).get("layout") for arm in size["arms"].values()}
        assert layouts == {None, "nchw", "channels_last"}
        assert any(" plain " in name for name in size["arms"])


def test_every_environment_variable_is_documented():
    documented = (ROOT / "docs" / "environment.md").read_text()
    sources = [*ROOT.glob("convnextv2_kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    used = {name for path in sources for name in re.findall(r"CONVNEXTV2_KERNELS_[A-Z_]+", path.read_text())}
    assert used and all(f"`{name}`" in documented for name in used)
