"""The CUDA extension compiles, links and loads on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .test_resources import needs_nvcc

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built():
    """``FORCE_CUDA=1`` builds the kernels beside a PyTorch without CUDA too."""
    base = ROOT / "build" / "forced_cuda"  # kept, so that unchanged objects are not compiled again
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(base), "--build-lib", str(base / "lib")]
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return base / "lib"


@pytest.mark.thorough  # minutes of nvcc
@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="with a CUDA build of PyTorch the normal build does this")
def test_the_extension_with_cuda_kernels_loads_without_a_gpu(built):
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import convnextv2_kernels as ck, torch
assert ck.__file__.startswith({str(built)!r}), ck.__file__
from convnextv2_kernels import backends
from convnextv2_kernels.backends import cuda, native
build = native.module.build_info()
print("architectures", *build["cuda_architectures"])
print("error", cuda.load_error())
print("serves cpu:", backends.unsupported_reason("cuda", "cpu", torch.float32))
has = torch._C._dispatch_has_kernel_for_dispatch_key
reason = lambda x: backends.unsupported_reason("cuda", "cuda", x.dtype, 0)
serves = torch.compile(lambda x: x + (reason(x) is None), fullgraph=True, backend="eager")
print("traceable", serves(torch.zeros(1)).item())
print("kernel", native.module.cuda_conv_kernel("bfloat16", 8, 96, normalize=True)["kernel"])
assert "conv_tile, with LayerNorm" in ck.info(), ck.info()
print("registered", has("convnextv2_kernels::depthwise_conv_forward", "CUDA"))
loss = ck.models.FCMAE((1, 1, 1, 1), (8, 8, 8, 8), img_size=64, decoder_embed_dim=16)(torch.randn(2, 3, 64, 64))[0]
loss.backward()
print("cpu kernels still work", bool(torch.isfinite(loss)))
"""
    environment = {**os.environ, "PYTHONPATH": str(built)}
    environment.pop("CONVNEXTV2_KERNELS_CUDA_EMULATION", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=built, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        "architectures sm_90 compute_90",
        "error None",
        "serves cpu: its kernels serve tensors on cuda, and the input lies on cpu",
        "traceable 1.0",
        "kernel conv_tile",
        "registered True",
        "cpu kernels still work True",
    ]


def run_setup(**environment):
    command = [sys.executable, "-c", "import setup; setup.wants_cuda(); print(*setup.architectures())"]
    stub = "import setuptools; setuptools.setup = lambda **_: None\n"
    command[2] = stub + command[2]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_missing_nvcc_is_an_error_when_cuda_is_forced(tmp_path):
    fake = {"CUDA_HOME": str(tmp_path), "CUDA_PATH": "", "PATH": str(tmp_path)}
    code = "import setuptools; setuptools.setup = lambda **_: None\nimport setup, pathlib\n"
    code += "setup.cuda_home = lambda: None\nsetup.wants_cuda()"
    env = {**os.environ, **fake, "FORCE_CUDA": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "FORCE_CUDA=1, but no nvcc was found" in done.stderr


def test_the_architecture_list_is_respected():
    done = run_setup(TORCH_CUDA_ARCH_LIST="8.6 9.0a+PTX")
    assert done.stdout.split() == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    done = run_setup(TORCH_CUDA_ARCH_LIST="hopper")
    assert done.returncode == 1 and "TORCH_CUDA_ARCH_LIST must be versions such as 8.0;9.0+PTX" in done.stderr
