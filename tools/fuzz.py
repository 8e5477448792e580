"""Fuzzes everything that reads a user's file: images, weights, training checkpoints, results, plan caches, records.

    python tools/fuzz.py --minutes 60                 # every target in turn; `make fuzz` installs atheris first
    python tools/fuzz.py --minutes 5 --targets images
    python tools/fuzz.py --replay images FILE         # one input, with its traceback

Needs atheris (libFuzzer for Python), which is guided by the coverage of this package, Pillow and the unpickler of
PyTorch. An input is a finding where reading it ends in anything but a result or the exceptions that the reader
documents, takes more than SECONDS or MEGABYTES, kills the process, or is accepted though it should have been noticed.
Findings are kept in build/fuzz/<target>/found, the sums in build/fuzz/report.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "fuzz"
SECONDS = 10  # of a single input; none of the seeds takes a tenth of one
# Triton's interpreter stands in for a GPU, whose name the plan caches hold.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
MEGABYTES = 2048  # of the whole process, a third of which is PyTorch and the instrumented packages
LARGEST = 256 << 10  # bytes of an input
INSTRUMENTED = ["convnextv2_kernels", "PIL", "safetensors"]
READERS = ["backends.triton.plans", "benchmark.results", "checkpoints.convert", "data.folder", "data.images"]
READERS += ["train.checkpoint", "train.loggers", "train.setup"]

Mutate = Callable[[bytes, int], bytes]


@dataclass(frozen=True)
class Target:
    """``seeds()`` are valid files by name; ``read(path, raw)`` reads one and raises where that is a finding (``raw``:
    whether its bytes were changed without mending checksums); ``mutate`` changes bytes below the checksums."""

    name: str
    suffix: str
    seeds: Callable[[], dict[str, bytes]]
    read: Callable[[Path], None]
    mutate: Callable[[bytes, Mutate, random.Random], bytes] | None = None


# -- mutations that keep a file's outer form, so that what lies behind the checksums is reached


def mutate_archive(data: bytes, mutate: Mutate, rng: random.Random) -> bytes:
    """Change one member of a zip archive, mostly the pickle, and write the archive anew with right checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return mutate(data, LARGEST)
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")]
    chosen = rng.choice(pickles) if pickles and rng.random() < 0.8 else rng.randrange(len(members) or 1)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for index, (name, content) in enumerate(members):
            if index == chosen:
                content = mutate(content or b"\0", LARGEST)
            archive.writestr(name, content)
    return out.getvalue()


def mutate_safetensors(data: bytes, mutate: Mutate, rng: random.Random) -> bytes:
    """Change the header and mend its length."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        return mutate(data, LARGEST)
    header = mutate(data[8 : 8 + length], LARGEST)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate_weights(data: bytes, mutate: Mutate, rng: random.Random) -> bytes:
    return (mutate_archive if data[:2] == b"PK" else mutate_safetensors)(data, mutate, rng)


def mutate_png(data: bytes, mutate: Mutate, rng: random.Random) -> bytes:
    """Change one chunk of a PNG and mend its length and checksum; other formats have none."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return mutate(data, LARGEST)
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return mutate(data, LARGEST)
    chosen = rng.randrange(len(chunks))
    kind, body = chunks[chosen]
    chunks[chosen] = (kind, mutate(body or b"\0", LARGEST))
    parts = [data[:8]]
    for kind, body in chunks:
        parts += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(kind + body))]
    return b"".join(parts)


HOSTILE = (
    0,
    -1,
    1,
    2**31,
    2**40,
    2**63,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "x",
    "\x1b[2J",
)
HOSTILE += ("\udc80", "../../x", "/dev/zero", "a\0b", [], {}, [None], {"": 0}, "9" * 5000, [[[[[[[[0]]]]]]]])


def mutate_json(data: bytes, mutate: Mutate, rng: random.Random) -> bytes:
    """Change one value of a JSON text: another one, a hostile one, or none; or a line of a text of several."""
    lines = data.splitlines() if data.count(b"\n{") else [data]
    chosen = rng.randrange(len(lines) or 1)
    try:
        value = json.loads(lines[chosen])
    except (ValueError, RecursionError, IndexError):
        return mutate(data, LARGEST)
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            stack.append(item)
    if not places:
        return mutate(data, LARGEST)
    node, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        del node[key]
    elif what < 0.3 and isinstance(node, dict):
        node[rng.choice(("", "x", "step", "\udc80", "key"))] = node.pop(key)
    elif what < 0.4:
        node[key] = [node[key]] * rng.choice((1, 2, 40))
    else:
        node[key] = rng.choice((*HOSTILE, rng.choice(places)[1]))
    try:
        lines[chosen] = json.dumps(value).encode()
    except (ValueError, RecursionError):
        return mutate(data, LARGEST)
    return b"\n".join(lines) + (b"\n" if data.endswith(b"\n") else b"")


# -- targets


def image_seeds() -> dict[str, bytes]:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65535, (9, 12), dtype=np.uint16))
    images = {"rgb": rgb, "grey": rgb.convert("L"), "palette": rgb.quantize(8), "alpha": rgb.convert("RGBA")}
    images |= {"deep": deep, "float": Image.fromarray(rng.normal(size=(9, 12)).astype(np.float32))}
    seeds = {}
    for name, image in images.items():
        for kind in ("PNG", "TIFF", "GIF", "JPEG", "BMP", "WEBP", "PPM", "AVIF", "EPS"):
            out = io.BytesIO()
            try:
                image.save(out, kind)
            except (OSError, ValueError, KeyError):
                continue  # this format has no such mode
            seeds[f"{name}.{kind.lower()}"] = out.getvalue()
    return seeds


def read_image(path: Path) -> None:
    import numpy as np

    from convnextv2_kernels.data.folder import check_image
    from convnextv2_kernels.data.images import CropDataset

    reason = check_image(path).reason
    assert reason is None or reason.isprintable(), reason
    sample = CropDataset([path], (16, 16), seed=0)[0, 0]
    if reason is None:
        assert sample.image is not None, f"accepted by the check, but not read: {sample.failures}"
        assert sample.image.shape == (16, 16, 3)
        assert np.asarray(sample.image).dtype == np.uint8


def small_fcmae() -> Any:
    import torch

    from convnextv2_kernels.models import FCMAE

    torch.manual_seed(0)
    return FCMAE((1, 1, 1, 1), (4, 4, 4, 4), in_chans=1, decoder_embed_dim=2, img_size=64)


def weight_seeds() -> dict[str, bytes]:
    import safetensors.torch
    import torch

    from convnextv2_kernels.checkpoints.convert import convert_state_dict

    state = small_fcmae().state_dict()
    seeds = {}
    for to in ("fcmae", "official", "timm", "official-sparse"):
        converted = convert_state_dict(state, to)
        seeds[f"{to}.safetensors"] = safetensors.torch.save(converted, {"format": "pt", "model": "x"})
        for legacy in (False, True):
            out = io.BytesIO()
            content = {"model": converted, "args": argparse.Namespace(lr=1.0, betas=(0.9, 0.95)), "epoch": 3}
            torch.save(content, out, _use_new_zipfile_serialization=not legacy)
            seeds[f"{to}{'.legacy' if legacy else ''}.pth"] = out.getvalue()
    return seeds


def read_weights(path: Path) -> None:
    from convnextv2_kernels.checkpoints.convert import convert_file

    target = path.with_name("converted.pt")
    try:
        convert_file(path, target, "timm", overwrite=True)
    except (OSError, ValueError):
        assert not list(path.parent.glob(".*.tmp")), "a temporary file was left"


@functools.cache
def training_run() -> Any:
    """A task with its optimiser and average, as a run of one step leaves them, and what its checkpoints must hold."""
    import dataclasses
    from types import SimpleNamespace

    import torch

    sys.path.insert(0, str(ROOT / "python_tests"))
    from helpers.training import CONFIG

    from convnextv2_kernels.train.checkpoint_checks import Expected
    from convnextv2_kernels.train.optim import Average, make_optimizer
    from convnextv2_kernels.train.pretrain import PretrainTask

    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    task = PretrainTask(small_fcmae(), [], config)
    optimizer = make_optimizer(task.parameter_groups(), config.lr, config.betas)
    for parameter in task.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    average = Average(task.model, 0.9)
    expected = Expected.of(task, optimizer, average)
    return SimpleNamespace(task=task, optimizer=optimizer, average=average, expected=expected)


def training_seeds() -> dict[str, bytes]:
    import torch

    from convnextv2_kernels.train import checkpoint
    from convnextv2_kernels.train.checkpoint_checks import FORMAT
    from convnextv2_kernels.train.config import environment

    run = training_run()
    state = checkpoint.gather_state(run.task.model, run.optimizer, run.average)
    more = {"epoch": 0, "position": 1, "rng": checkpoint.rng_state(), "config": run.task.config.to_dict()}
    more |= {"task": run.task.state(), "environment": environment(), "evaluation_pending": False}
    out = io.BytesIO()
    torch.save({"format": FORMAT, "step": 1, **state, **more}, out)
    return {"checkpoint-1.pt": out.getvalue()}


def read_training(path: Path) -> None:
    from convnextv2_kernels.errors import UserError
    from convnextv2_kernels.train.checkpoint import load_checkpoint, restore_state, set_rng_state
    from convnextv2_kernels.train.checkpoint_checks import check_settings, check_state
    from convnextv2_kernels.train.distributed import World

    run = training_run()
    try:
        state = load_checkpoint(path)
        check_settings(state, run.task.config)
        check_state(state, 1, run.expected)
    except (UserError, ValueError) as error:
        assert str(error).isprintable(), error
        return
    restore_state(run.task.model, run.optimizer, run.average, state, World())
    set_rng_state(state["rng"])
    run.optimizer.step()


def result_seeds() -> dict[str, bytes]:
    found = sorted((ROOT / "bench" / "results").glob("*.json"))
    return {path.name: path.read_bytes() for path in found if path.stat().st_size <= LARGEST}


def read_result(path: Path) -> None:
    from convnextv2_kernels.benchmark import results

    try:
        found = results.read(path)
    except results.NotAResult as error:
        str(error).encode()  # printable
        return
    results.write(path, found)


def plan_seeds() -> dict[str, bytes]:
    import torch

    from convnextv2_kernels.backends.triton import plans

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        shape = plans.Shape(dtype, 96, 384, 96, 64)
        tiles = {name: [64, 64, 32, 4, 2] for name in plans.KERNELS}
        rows.append({"key": list(plans._key(shape)), "source": "measured", **tiles})
    built_in = json.loads((Path(plans.__file__).with_name("plans.json")).read_text())
    return {
        "cache.json": json.dumps({"machine": {}, "plans": rows}).encode(),
        "table.json": json.dumps(built_in).encode(),
    }


def read_plans(path: Path) -> None:
    import warnings

    from convnextv2_kernels.backends.triton import plans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plans._read.cache_clear()
        found = plans._read(path)
    for key, plan in found.items():
        assert isinstance(key, tuple), key
        for name in plans.KERNELS:
            tile = getattr(plan, name)
            if tile is not None:
                assert all(isinstance(value, (int, bool)) and 0 <= value <= 1024 for value in tile), (name, tile)


def record_seeds() -> dict[str, bytes]:
    from convnextv2_kernels.data.folder import CACHE_FORMAT

    files = {
        "a.png": [10, 20, None, None],
        "b.png": [1, 2, "broken", None],
        "c.png": [3, 4, None, ["uint16", 0, 9, []]],
    }
    verified = {"format": CACHE_FORMAT, "max_pixels": 1000, "files": files}
    images = {"images": ["a.png", "c/d.png"], "skipped": [["b.png", "broken"]]}
    log = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo'
    return {
        "verified.json": json.dumps(verified).encode(),
        "images.json": json.dumps(images).encode(),
        "log.jsonl": log,
    }


def read_records(path: Path) -> None:
    from convnextv2_kernels.data import folder
    from convnextv2_kernels.errors import UserError
    from convnextv2_kernels.train.loggers import StepLog

    for entry in folder._read_cache(path, 1000).values():
        checked = folder._known(entry, entry[:2] if isinstance(entry, list) else [])
        assert checked is None or checked.reason is None or isinstance(checked.reason, str)
    copy = path.with_name(folder.IMAGES_NAME)
    copy.write_bytes(path.read_bytes())
    try:
        names = folder.saved_images(copy.parent)
        assert all(isinstance(name, str) for name in names)
    except UserError as error:
        str(error)
    log = path.with_name("log.jsonl")
    log.write_bytes(path.read_bytes())
    with contextlib.suppress(UserError):
        StepLog(log, 2).close()


TARGETS = {
    target.name: target
    for target in (
        Target("images", ".png", image_seeds, read_image, mutate_png),
        Target("weights", ".pth", weight_seeds, read_weights, mutate_weights),
        Target("training", ".pt", training_seeds, read_training, mutate_archive),
        Target("results", ".json", result_seeds, read_result, mutate_json),
        Target("plans", ".json", plan_seeds, read_plans, mutate_json),
        Target("records", ".json", record_seeds, read_records, mutate_json),
    )
}


# -- running


def fuzz_one(target: Target, arguments: list[str]) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris
    import torch
    import torch.distributed.checkpoint.state_dict  # before the rest, so as not to be instrumented with it

    with atheris.instrument_imports(include=INSTRUMENTED):
        import PIL.Image
        import safetensors.torch

        for reader in READERS:
            importlib.import_module(f"convnextv2_kernels.{reader}")
    del sys.modules["torch._weights_only_unpickler"]
    with atheris.instrument_imports(include=["torch._weights_only_unpickler"]):
        torch.serialization._weights_only_unpickler = importlib.import_module("torch._weights_only_unpickler")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = folder / f"input{target.suffix}"
    options: dict[str, Any] = {}
    if target.mutate is not None:

        def mutate(data: bytes, max_size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            change = partial(target.mutate, mutate=atheris.Mutate, rng=rng) if rng.random() < 0.7 else None
            data = change(data) if change is not None else atheris.Mutate(data, min(max_size, LARGEST))
            return data[:max_size]

        options["custom_mutator"] = mutate

    def run(data: bytes) -> None:
        path.write_bytes(data)
        target.read(path)

    del PIL, safetensors
    atheris.Setup([sys.argv[0], *arguments], run, **options)
    atheris.Fuzz()


def fuzz(target: Target, seconds: float) -> dict[str, Any]:
    """Fuzz one target for a time, in processes of their own; start again after each finding."""
    folder = OUTPUT / target.name
    corpus, seeds, found = (folder / name for name in ("corpus", "seeds", "found"))
    for each in (corpus, seeds, found):
        each.mkdir(parents=True, exist_ok=True)
    made = [sys.executable, __file__, "--write-seeds", target.name, str(seeds)]
    done = subprocess.run(made, cwd=ROOT, env=ENVIRONMENT, check=False)
    if done.returncode:
        raise SystemExit(f"the seeds of {target.name} could not be made")
    result: dict[str, Any] = {"runs": 0, "seconds": 0.0, "peak_rss_mb": 0, "findings": []}
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1 and len(result["findings"]) < 100:
        begun = time.monotonic()
        log = folder / "log.txt"
        with log.open("wb") as file:
            flags = [
                f"-max_total_time={max(1, int(left))}",
                f"-timeout={SECONDS}",
                f"-rss_limit_mb={MEGABYTES}",
                f"-max_len={LARGEST}",
                f"-artifact_prefix={found}/",
                "-print_final_stats=1",
                "-close_fd_mask=1",
            ]
            command = [sys.executable, __file__, "--run", target.name, *flags, str(corpus), str(seeds)]
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=ENVIRONMENT, check=False).returncode
        text = log.read_text(errors="replace")
        result["seconds"] += time.monotonic() - begun
        runs = [int(n) for n in re.findall(r"^#(\d+)\s", text, re.M)] + [0]
        runs += [int(n) for n in re.findall(r"number_of_executed_units: (\d+)", text)]
        result["runs"] += max(runs)
        peaks = [int(n) for n in re.findall(r"rss: (\d+)Mb", text)] + [0]
        result["peak_rss_mb"] = max(result["peak_rss_mb"], *peaks)
        if code == 0:
            break
        artefact = re.search(r"Test unit written to (\S+)", text)
        name = Path(artefact[1]).name if artefact else None
        finding = {"code": code, "reason": _reason(target, found / name) if name else text[-300:], "input": name}
        result["findings"].append(finding)
        print(f"  {target.name}: {finding['reason']} ({finding['input']})", flush=True)
        if artefact is None and time.monotonic() - begun < 5:
            raise SystemExit(f"the fuzzer itself fails, see {log}")
    return result


def _reason(target: Target, file: Path) -> str:
    """What reading one input ends in: the last line of its traceback, or how the process ended."""
    command = [sys.executable, __file__, "--replay", target.name, str(file)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=6 * SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not read within {6 * SECONDS} s"
    lines = done.stderr.decode(errors="replace").splitlines()
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    return lines[-1][:300] if done.returncode and lines else "not repeated alone: slow, or large, in the long run only"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    parser.add_argument("--run", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--write-seeds", nargs=2, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.run:
        fuzz_one(TARGETS[args.run], rest)
        return 0
    if rest:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if args.write_seeds:
        name, folder = args.write_seeds
        for seed, content in TARGETS[name].seeds().items():
            (Path(folder) / seed).write_bytes(content)
        return 0
    if args.replay:
        name, file = args.replay
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"input{TARGETS[name].suffix}"
            path.write_bytes(Path(file).read_bytes())
            TARGETS[name].read(path)
        print("read, or refused as documented")
        return 0
    report = {}
    for name in args.targets:
        print(f"{name}:", flush=True)
        report[name] = fuzz(TARGETS[name], 60 * args.minutes / len(args.targets))
        print(f"  {report[name]['runs']} runs in {report[name]['seconds']:.0f} s", flush=True)
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return 1 if any(result["findings"] for result in report.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
