"""Builds the extension ``convnextv2_kernels._C`` from the sources listed in ``csrc/sources.txt``.

The CUDA kernels are compiled where nvcc is there and PyTorch is a CUDA build; no GPU is needed. ``FORCE_CUDA=1``
compiles them whatever PyTorch is and makes a missing nvcc an error, ``FORCE_CUDA=0`` leaves them out;
``TORCH_CUDA_ARCH_LIST`` names the architectures. Without a C++ compiler the package installs as pure Python and runs on
its reference path; a compiler that is there and fails is an error. ``CONVNEXTV2_KERNELS_NO_EXTENSION=1`` skips the
extension. Ninja compiles ``MAX_JOBS`` sources at a time, and again only what is out of date. ``CXX``, ``CXXFLAGS``,
``NVCC_FLAGS`` and ``CUDA_HOME`` are respected, ``CONVNEXTV2_KERNELS_SANITIZE=address,undefined`` instruments the build.
``python setup.py build_emulation`` compiles the CUDA sources for the CPU, for tests.
"""

import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
INCLUDE = "-Icsrc/include"  # cnx/*.h, the C++ API; commands run in ROOT
BASE_FLAGS = ["-std=c++20", INCLUDE, "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
BASE_FLAGS += ["-Wno-psabi"]  # GCC's note on passing vectors; no vector crosses a function boundary here
NVCC_FLAGS = ["-std=c++20", INCLUDE, "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# type punning is what vector accesses of device code are
EMULATION_FLAGS = ["-std=c++20", INCLUDE, "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
EMULATION_FLAGS += ["-DCNX_EMULATION", "-DCNX_LIBRARY=convnextv2_kernels_emulated"]
EMULATION_FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas", "-x", "c++"]
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest PyTorch the binary serves
BUILT_FOR = "_C.build.json"  # beside the module


def package_version() -> str:
    text = (ROOT / "convnextv2_kernels" / "version.py").read_text()
    return text.split('__version__ = "', 1)[1].split('"', 1)[0]


def read_sources(*kinds: str) -> list[tuple[str, Path, list[str]]]:
    """``(kind, path, extra flags)`` of each source of these kinds that this machine's architecture builds."""
    sources = []
    for line in (CSRC / "sources.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        kind, path, *flags = line.split()
        if kind == "x86_64":
            if platform.machine().lower() not in ("x86_64", "amd64"):
                continue
            kind = "kernel"
        if kind in kinds:
            sources.append((kind, Path("csrc") / path, flags))
    return sources


def find_compiler() -> str | None:
    """The C++ compiler setuptools would run, or None."""
    requested = os.environ.get("CXX", "").split()
    for name in [*requested[:1], "c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or where the nvcc of PATH or of /usr/local/cuda lies."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.insert(2, Path(nvcc).resolve().parent.parent)
    # a wrapper script on PATH may lie elsewhere than the toolkit, so its headers are looked for too
    needs = ("bin/nvcc", "include/cuda_runtime_api.h")
    return next((Path(h) for h in homes if h and all((Path(h) / need).exists() for need in needs)), None)


def nvcc_version(home: Path) -> str:
    """Release of the toolkit, such as 13.0."""
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ", 1)[1].split(",", 1)[0]


def wants_cuda() -> bool:
    import torch

    force = os.environ.get("FORCE_CUDA", "")
    if force == "0":
        return False
    if force == "1" and cuda_home() is None:
        raise SystemExit("convnextv2_kernels: FORCE_CUDA=1, but no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda)")
    return force == "1" or (torch.version.cuda is not None and cuda_home() is not None)


def default_architectures() -> str:
    """The GPUs of ``csrc/architectures.json``, as in TORCH_CUDA_ARCH_LIST."""
    gpus = json.loads((CSRC / "architectures.json").read_text())["cuda"]
    names = [(gpu["name"].removeprefix("sm_"), "+PTX" if gpu.get("ptx") else "") for gpu in gpus]
    return ";".join(f"{number[:-1]}.{number[-1]}{ptx}" for number, ptx in names)


def architectures() -> list[str]:
    """nvcc's -gencode options for TORCH_CUDA_ARCH_LIST, by default the GPUs of this machine or all that are listed."""
    import torch

    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not requested and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        requested = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    options = []
    for item in (requested or default_architectures()).replace(" ", ";").split(";"):
        number = item.removesuffix("+PTX").replace(".", "")
        if not number or not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be versions such as 8.0;9.0+PTX, got {requested!r}")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if item.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def jobs() -> int:
    """MAX_JOBS, or as many as there are cores and 2 GiB of memory for each."""
    limit = os.environ.get("MAX_JOBS")
    if limit:
        return max(1, int(limit))
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 8
    return max(1, min(os.cpu_count() or 1, int(gib / 2)))


class NinjaBuild:
    """Writes a build file for ninja: compilations, then one shared library. Ninja runs them in parallel and repeats
    what is out of date: an object depends on its command, its compiler, and every file that the compiler read."""

    def __init__(self, folder: Path):
        try:
            import ninja
        except ImportError:
            raise SystemExit(missing("ninja")) from None
        self.program, self.folder = Path(ninja.BIN_DIR) / "ninja", folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.compiler = os.environ["CXX"].split() if os.environ.get("CXX") else [find_compiler()]
        self.extra = os.environ.get("CXXFLAGS", "").split()
        sanitize = os.environ.get("CONVNEXTV2_KERNELS_SANITIZE")
        if sanitize:
            self.extra += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"]
        self.objects: list[str] = []
        self.text = io.StringIO()
        self.file = ninja.ninja_syntax.Writer(self.text, width=120)
        self.file.variable("builddir", dollars(self.folder))  # of ninja's own records
        compile_one = "$compile -MD -MF $out.d -c $in -o $out"
        self.file.rule("compile", compile_one, description="compile $in", depfile="$out.d", deps="gcc")
        self.file.rule("link", "$link $in $libraries -o $out", description="link $out")

    def compile(self, command: list[str], source: Path) -> None:
        """Adds an object to the library; ``command`` is without input and output."""
        target = dollars(self.folder / "_".join(source.with_suffix(".o").parts[1:]))
        variables = {"compile": dollars(shlex.join(command))}
        self.file.build(target, "compile", str(source), implicit=shutil.which(command[0]), variables=variables)
        self.objects.append(target)

    def link(self, libraries: list[str], target: Path) -> None:
        """Builds the library."""
        shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        command = [*self.compiler, *shared, *self.extra]
        variables = {"link": dollars(shlex.join(command)), "libraries": dollars(shlex.join(libraries))}
        self.file.build(dollars(target.resolve()), "link", self.objects, variables=variables)
        path = self.folder / "build.ninja"
        path.write_text(self.text.getvalue())
        done = subprocess.run([self.program, "--quiet", "-f", path, "-j", str(jobs())], cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"convnextv2_kernels: building {target.name} failed; the compiler's message is above")


def dollars(text: str | Path) -> str:
    """Text as a build file has it, where a dollar begins a variable."""
    return str(text).replace("$", "$$")


def missing(package: str) -> str:
    return (
        f"convnextv2_kernels: building the extension needs {package}, which is not installed here. Install torch, "
        "pybind11 and ninja first and build with `pip install --no-build-isolation -e .`"
    )


def torch_flags() -> tuple[list[str], list[str]]:
    """Include and link options of PyTorch."""
    import torch
    from torch.utils import cpp_extension

    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-DCNX_PACKAGE_VERSION={package_version()}",
        f"-DCNX_TORCH_VERSION={torch.__version__}",
    ]
    paths = cpp_extension.library_paths()
    libraries = [f"-L{p}" for p in paths] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    if any((Path(p) / "libtorch_cuda.so").exists() for p in paths):
        libraries += ["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"]
    return [*(f"-I{p}" for p in cpp_extension.include_paths()), *defines], libraries


class BuildKernels(build_ext):
    """The module ``_C``: CPU kernels each with its own instruction-set flags, CUDA kernels, bindings."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise SystemExit(missing(error.name)) from error
        # An editable build is given a temporary folder, in which no object would be found again.
        build = NinjaBuild(ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp))
        torch_options, libraries = torch_flags()
        cpp = [*build.compiler, *BASE_FLAGS]
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        cuda = wants_cuda()
        if cuda:
            home = cuda_home()
            nvcc = [str(home / "bin" / "nvcc"), *NVCC_FLAGS, *architectures()]
            nvcc += os.environ.get("NVCC_FLAGS", "").split()
            for _, path, flags in read_sources("cuda"):
                build.compile([*nvcc, *flags], path)
            folders = [home / name for name in ("lib64", "lib") if (home / name / "libcudart_static.a").exists()]
            libraries += [*(f"-L{f}" for f in folders[:1]), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            python.append(f"-DCNX_CUDA_VERSION={nvcc_version(home)}")
            python.append(f"-DCNX_CUDA_ARCHITECTURES={','.join(a.rsplit('=')[-1] for a in architectures())}")
        bindings = [*torch_options, *(["-DCNX_WITH_CUDA"] if cuda else [])]
        options = {"kernel": [], "torch": bindings, "python": [*torch_options, *python]}
        for kind, path, flags in read_sources(*options):
            build.compile([*cpp, *flags, *options[kind], *build.extra], path)
        target = Path(self.get_ext_fullpath(ext.name))
        library = build.folder / target.name
        build.link(libraries, library)
        # renamed into place: a process that has the old module open keeps it whole
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.new")
        shutil.copy2(library, temporary)
        temporary.replace(target)
        # read when the module itself cannot be loaded, to say what it was built for
        built = {"torch": torch.__version__, "cuda": nvcc_version(cuda_home()) if cuda else None}
        target.with_name(BUILT_FOR).write_text(json.dumps(built))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            package = Path(self.get_finalized_command("build_py").get_package_dir("convnextv2_kernels"))
            shutil.copy(built.with_name(BUILT_FOR), package / BUILT_FOR)


class BuildEmulation(Command):
    """The CUDA sources compiled for the CPU, as operators on CPU tensors; for tests, never part of a wheel."""

    description = "compile the CUDA kernels for the CPU (csrc/emulation)"
    user_options: ClassVar = [("output=", "o", "shared library to write")]

    def initialize_options(self):
        self.output = "build/emulation/libconvnextv2_kernels_emulated.so"

    def finalize_options(self):
        pass

    def run(self):
        if cuda_home() is None:
            raise SystemExit("the emulation needs the CUDA toolkit's headers (CUDA_HOME, or nvcc on PATH)")
        build = NinjaBuild(Path(self.output).parent)
        torch_options, libraries = torch_flags()
        cpp = [*build.compiler, *EMULATION_FLAGS, "-isystem", str(cuda_home() / "include"), *build.extra]
        for kind, path, _ in read_sources("cuda", "emulation", "torch"):
            build.compile([*cpp, *(torch_options if kind == "torch" else [])], path)
        build.link(libraries, Path(self.output))


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
    sources = read_sources("kernel", "torch", "python", "cuda")
    return [Extension("convnextv2_kernels._C", sources=[str(path) for _, path, _ in sources])]


setup(
    version=package_version(),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "build_emulation": BuildEmulation},
)
