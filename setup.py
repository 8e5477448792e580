"""Builds the extension ``convnextv2_kernels._C`` from the sources listed in ``csrc/sources.txt``.

Without a C++ compiler the package installs as pure Python and runs on its reference path; a compiler that is there and
fails is an error. ``CONVNEXTV2_KERNELS_NO_EXTENSION=1`` skips the extension, ``MAX_JOBS`` limits parallel compilation,
``CXX`` and ``CXXFLAGS`` are respected, ``CONVNEXTV2_KERNELS_SANITIZE=address,undefined`` instruments the build.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BASE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
BASE_FLAGS += ["-Wno-psabi"]  # GCC's note on passing vectors; no vector crosses a function boundary here
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest PyTorch the binary serves


def package_version() -> str:
    text = (ROOT / "convnextv2_kernels" / "version.py").read_text()
    return text.split('__version__ = "', 1)[1].split('"', 1)[0]


def read_sources() -> list[tuple[str, Path, list[str]]]:
    """``(kind, path, extra flags)`` of each source that this machine's architecture builds."""
    sources = []
    for line in (CSRC / "sources.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        kind, path, *flags = line.split()
        if kind == "x86_64":
            if platform.machine().lower() not in ("x86_64", "amd64"):
                continue
            kind = "kernel"
        sources.append((kind, Path("csrc") / path, flags))
    return sources


def find_compiler() -> str | None:
    """The C++ compiler setuptools would run, or None."""
    wish = os.environ.get("CXX", "").split()
    for name in [*wish[:1], "c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    return None


def jobs() -> int:
    limit = os.environ.get("MAX_JOBS")
    return max(1, int(limit)) if limit else os.cpu_count() or 1


class BuildKernels(build_ext):
    """Compiles each source with its own instruction-set flags, in parallel, and links one module."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            raise SystemExit(
                f"convnextv2_kernels: building the extension needs {error.name}, which is not installed here. Install "
                "torch and pybind11 first and build with `pip install --no-build-isolation .`"
            ) from error
        import setuptools  # noqa: F401  (its compiler shims must be in place before customize_compiler)
        from setuptools._distutils.sysconfig import customize_compiler

        compiler = find_compiler()
        customize_compiler(self.compiler)
        command = [*(os.environ["CXX"].split() if os.environ.get("CXX") else [compiler])]
        extra = os.environ.get("CXXFLAGS", "").split()
        sanitize = os.environ.get("CONVNEXTV2_KERNELS_SANITIZE")
        if sanitize:
            extra += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"]
        includes = {
            "kernel": [],
            "torch": [f"-I{p}" for p in cpp_extension.include_paths()],
            "python": [f"-I{pybind11.get_include()}", f"-I{self._python_include()}"],
        }
        defines = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            f"-DCNX_PACKAGE_VERSION={package_version()}",
            f"-DCNX_TORCH_VERSION={torch.__version__}",
        ]
        build_dir = Path(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)

        def compile_one(source: tuple[str, Path, list[str]]) -> str:
            kind, path, flags = source
            target = build_dir / (path.stem + f".{kind}.o")
            self.spawn(
                [*command, *BASE_FLAGS, *flags, *includes[kind], *defines, *extra, "-c", str(path), "-o", str(target)]
            )
            return str(target)

        # the longest compilations are the kernels, so start with those
        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(compile_one, read_sources()))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
        shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.spawn([*command, *shared, *extra, *objects, *libraries, "-o", str(target)])

    @staticmethod
    def _python_include() -> str:
        import sysconfig

        return sysconfig.get_paths()["include"]


def extensions() -> list[Extension]:
    if os.environ.get("CONVNEXTV2_KERNELS_NO_EXTENSION") == "1":
        return []
    if find_compiler() is None:
        print(
            "convnextv2_kernels: no C++ compiler was found (CXX, c++, g++, clang++); installing without the compiled "
            "kernels. Every op will run on the reference path.",
            file=sys.stderr,
        )
        return []
    return [Extension("convnextv2_kernels._C", sources=[str(path) for _, path, _ in read_sources()])]


setup(version=package_version(), ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
