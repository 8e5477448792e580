"""How each command of the documents is tested. To add one, add a line, with the command as the document has it:

* to ``RUN`` if it can be run: ``"the command": Run("options that make it small")``. It runs in a copy of the
  repository's files, as it stands and with these options after its own, of which the last one counts, so an option that
  was renamed fails. Only the options of ``SMALLER`` may be appended. ``put={"FORMAT": "timm"}`` puts words in the place
  of others. Files that it reads are either made by an earlier command of the same document, whose ``--output`` the path
  begins with, or get a line in ``files.FILES``, such as ``"A.json": committed("cpu_figure6.json")``.
* to ``CHECKED`` if it cannot: ``"the command": Checked("why", check)`` with a check of ``checks``: ``make_target``,
  ``pip_requirements``, ``options`` (the program's ``--help`` has them), ``parsed_by``, ``refused``.

A command of a document's shell variable is written as there, ``$A knn ...``. Comments are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import (
    Check,
    build_requirements,
    collected,
    make_target,
    options,
    options_and_those_of,
    parsed_by,
    pip_requirements,
    refused,
)
from .running import Run


@dataclass(frozen=True)
class Checked:
    """A command that is not run, why not, and what is checked of it."""

    reason: str
    check: Check


# What may be appended, and what for.
SMALLER = {
    "--max-steps": "stops early",
    "--epochs": "stops early",
    "--steps": "stops early",
    "--repeats": "rounds of a benchmark",
    "--benchmark-max-time": "rounds of a benchmark",
    "--benchmark-min-rounds": "rounds of a benchmark",
    "-k": "ops of a benchmark: which",
    "--batch-size": "fewer images",
    "--accumulate": "fewer parts, as there are fewer images",
    "--img-size": "smaller images",
    "--min-lr": "the learning rate of so few images is below the last of the recipe",
    "--model": "a smaller model",
    "--models": "a smaller model",
    "--no-compile": "no compilation, which takes a minute",
    "--workers": "no processes that load images",
    "--device": "no GPU",
    "--no-peak": "no processes that measure peak memory",
    "--batch-sizes": "fewer points",
    "--img-sizes": "fewer points",
    "--mask-ratios": "fewer points",
}
PRETRAIN = "--epochs 1 --batch-size 12 --img-size 64 --workers 0 --device cpu"
FINETUNE = "--epochs 1 --batch-size 5 --img-size 32 --workers 0 --device cpu"
PROCESSES = f"{PRETRAIN} --batch-size 4 --max-steps 1"
ANALYZE = "--img-size 64 --device cpu"
BENCH = "--models atto --batch-size 1 --img-size 64 --repeats 1 --no-compile --device cpu"
FIGURE6 = "--models atto --batch-size 1 --img-size 64 --repeats 1 --no-compile --no-peak --device cpu"
OPS = "--models atto --batch-size 1 --img-size 64 --repeats 1 --no-compile --device cpu"
SCALING = "--batch-sizes 1 2 --img-sizes --mask-ratios --img-size 64 --repeats 1 --device cpu"
FUSED = "--models convnextv2_atto --batch-size 2 --img-size 32 --repeats 1 --no-compile --device cpu"
DEMO = "--max-steps 1 --batch-size 2 --workers 0 --device cpu"

RUN = {
    "python -m convnextv2_kernels info": Run(process=True),
    "python -m convnextv2_kernels info --model tiny": Run(),
    "python -m convnextv2_kernels info --model huge --img-size 512 --mask-ratio 0.75": Run(),
    "python -m convnextv2_kernels convert convnextv2_tiny_1k_224_ema.pt tiny.safetensors --to timm": Run(),
    "python -m convnextv2_kernels convert SOURCE TARGET --to FORMAT": Run(
        put={"TARGET": "target.safetensors", "FORMAT": "transformers"}
    ),
    "python -m convnextv2_kernels info --recipes": Run(),
    "python -m convnextv2_kernels info --recipes paper-800 convnextv2_huge-22k-1k-512 coco ade20k": Run(),
    # training
    "python -m convnextv2_kernels pretrain --data FOLDER --model convnextv2_atto --epochs 100 --batch-size 64 "
    "--output runs/atto": Run(PRETRAIN),
    "python -m convnextv2_kernels finetune --data CLASSES --init runs/atto/encoder.safetensors --recipe default "
    "--output runs/classes": Run(FINETUNE),
    "python -m convnextv2_kernels finetune --data CLASSES --init runs/classes/best.safetensors --eval-only": Run(
        FINETUNE
    ),
    "python -m convnextv2_kernels pretrain --data FOLDER --output runs/pre": Run(PRETRAIN),
    "python -m convnextv2_kernels pretrain --data FOLDER --init runs/pre/checkpoint-8000.pt --seed 1 "
    "--output runs/more": Run(PRETRAIN, put={"runs/pre/checkpoint-8000.pt": "runs/pre/checkpoint-1.pt"}),
    "python -m convnextv2_kernels finetune --data CLASSES --init runs/pre/encoder.safetensors --output runs/fine": Run(
        FINETUNE
    ),
    "torchrun --nproc-per-node 8 -m convnextv2_kernels pretrain --data FOLDER --recipe paper --amp --output runs/paper": Run(
        PROCESSES
    ),
    "torchrun --nproc-per-node 8 -m convnextv2_kernels pretrain --data FOLDER --model convnextv2_huge --recipe paper "
    "--parallel fsdp --accumulate 8 --amp --output runs/huge": Run(
        f"--model convnextv2_atto --accumulate 2 {PROCESSES}"
    ),
    "python -m convnextv2_kernels pretrain --data FOLDER --encoding dense --output runs/dense": Run(PRETRAIN),
    "python -m convnextv2_kernels pretrain --data FOLDER --decoder unet --output runs/unet": Run(PRETRAIN),
    "python -m convnextv2_kernels pretrain --data FOLDER --decoder transformer --decoder-depth 8 "
    "--output runs/transformer": Run(PRETRAIN),
    "python -m convnextv2_kernels pretrain --data FOLDER --grn se --output runs/se": Run(PRETRAIN),
    "python -m convnextv2_kernels finetune --data CLASSES --init runs/se/encoder.safetensors --grn se --recipe default "
    "--output runs/se-classes": Run(FINETUNE),
    "python -m convnextv2_kernels finetune --data CLASSES --init runs/pre/encoder.safetensors --grn none "
    "--init-grn drop --recipe default --output runs/dropped": Run(FINETUNE),
    "python -m convnextv2_kernels pretrain --data FOLDER --grn none --output runs/none": Run(PRETRAIN),
    "python -m convnextv2_kernels finetune --data CLASSES --init runs/none/encoder.safetensors --init-grn add "
    "--recipe default --output runs/added": Run(FINETUNE),
    "python -m convnextv2_kernels pretrain --demo --output v2": Run(DEMO),
    "python -m convnextv2_kernels pretrain --demo --grn none --output none": Run(DEMO),
    # analyses
    "python -m convnextv2_kernels analyze probe runs/atto/encoder.safetensors --random --data CLASSES": Run(ANALYZE),
    '$A cosine runs/v2/checkpoint-1000.pt runs/v1/checkpoint-1000.pt --label GRN --label "no GRN" --data val': Run(
        ANALYZE
    ),
    "$A cosine runs/v2/checkpoint-1000.pt timm:convnext_base.fb_in1k@v1.pth timm:vit_base_patch16_224.mae@mae.pth "
    "--tap act --data val": Run(
        "--img-size 160 --device cpu",
        put={
            "timm:convnext_base.fb_in1k@v1.pth": "timm:test_convnext@random",
            "timm:vit_base_patch16_224.mae@mae.pth": "timm:test_vit@random",
        },
    ),
    "$A selectivity finetuned.safetensors --random --data val --shuffled": Run(ANALYZE),
    "$A activations encoder.safetensors --photos --image coffee --layer stages.2.5 --tap act": Run(ANALYZE),
    "$A reconstruct runs/v2/checkpoint-1000.pt --photos --mask-ratio 0.75": Run(ANALYZE),
    "$A knn runs/v2/encoder.safetensors --random --data classes": Run(ANALYZE),
    "$A probe runs/v2/checkpoint-1000.pt --ema --label averaged --data classes --val others --C 0.1": Run(ANALYZE),
    # benchmarks
    "python -m convnextv2_kernels bench": Run(BENCH),
    "python -m convnextv2_kernels bench --quick": Run(BENCH),
    "python -m convnextv2_kernels bench --figure6": Run(FIGURE6),
    "python -m bench ops": Run(OPS),
    "python -m bench ops --models atto": Run(OPS),
    "python -m bench ops --models atto tiny": Run(OPS),
    "python -m bench scaling": Run(SCALING),
    "python -m bench compare A.json B.json": Run(),
    "pytest python_tests/bench/test_ops_benchmark.py --benchmark-enable --benchmark-only": Run(
        "-k layer_norm-C320 --benchmark-max-time 0.01 --benchmark-min-rounds 1"
    ),
    "python -m bench fused --output bench/results/cpu_fused.json": Run(FUSED),
    "python -m bench fused --libraries official --device cuda --dtype bfloat16 --batch-size 128 "
    "--output gpu_fused.json": Run(FUSED),
    "python -m bench tables": Run(),
    # examples
    "python -m convnextv2_kernels pretrain --data FOLDER --output run1": Run(PRETRAIN),
    "python examples/fcmae_to_timm.py --checkpoint run1/encoder.safetensors --model convnextv2_atto --classes 10": Run(),
    "python examples/fuse_timm.py": Run("--batch-size 2 --img-size 64 --steps 2"),
    "python examples/fuse_timm.py --model convnextv2_tiny --batch-size 16 --compare": Run(
        "--model convnextv2_atto --batch-size 2 --img-size 64 --steps 2"
    ),
    "python examples/masked_features.py --image photo.jpg --model convnextv2_tiny --checkpoint tiny_fcmae.pt": Run(
        "--model convnextv2_atto"
    ),
}

# Of docs/paper.md: the paper's own settings, on a few small images; deep, as other tests have each option.
_V2 = Run(f"--model convnextv2_atto {PRETRAIN}", thorough=True)
_V2_FINE = Run(f"--model convnextv2_atto {FINETUNE} --batch-size 4", thorough=True)
_V1 = Run(f"--model convnext_atto {PRETRAIN}", thorough=True)
_V1_FINE = Run(f"--model convnext_atto {FINETUNE} --batch-size 4", thorough=True)
_V2_LAST, _V1_LAST = (Run(f"{run.more} --min-lr 0", thorough=True) for run in (_V2_FINE, _V1_FINE))
_PRE = "$ck pretrain --data FOLDER --model"
_FINE = "$ck finetune --data CLASSES --model"
RUN |= {
    "$pre --output runs/v2": Run(_V2.more),
    "$fine --init runs/v2/encoder.safetensors --output runs/v2-fine": Run(_V2_FINE.more),
    "$fine --init runs/v2-fine/best.safetensors --eval-only": _V2_FINE,
    "$fine --recipe convnextv2_base-supervised --output runs/supervised": _V2_FINE,
    "$fine --init runs/v2/encoder.safetensors --grn none --init-grn drop --output runs/dropped": _V2_FINE,
    "$fine --init runs/none/encoder.safetensors --init-grn add --output runs/added": _V2_FINE,
    **{
        f"$pre {options} --output runs/{output}": _V2
        for options, output in (
            ("--mask-ratio 0.6", "v2"),
            ("--encoding masked_dense", "masked-dense"),
            ("--encoding dense", "dense"),
            ("--decoder-depth 1 --decoder-width 512", "v2"),
            ("--norm-pix-loss", "v2"),
            ("--decoder unet", "unet"),
            ("--decoder unet-no-skip", "unet-no-skip"),
            ("--decoder transformer --decoder-depth 8", "transformer"),
            ("--decoder-depth 12", "depth12"),
            ("--decoder-width 128", "width128"),
            *((f"--grn {grn}", grn) for grn in ("none", "mean", "l1", "standardize", "inverse", "no-skip")),
            *((f"--grn {grn}", grn) for grn in ("lrn", "bn", "ln", "se", "cbam")),
            *((f"--grn {grn}", grn) for grn in ("affine", "aggregate-only", "normalize-only")),
            ("--mask-ratio 0.5", "ratio0.5"),
        )
    },
    **{
        f"{_PRE} {model} --recipe {recipe} --output runs/{output}": small
        for model, recipe, output, small in (
            ("convnext_base", "paper-800", "v1", _V1),
            ("convnext_large", "paper-800", "v1-large", _V1),
            ("convnextv2_base", "paper-800", "v2", _V2),
            ("convnextv2_base", "paper", "base", _V2),
            ("convnextv2_base", "paper", "v2-1600", _V2),
            ("convnextv2_large", "paper-800", "large", _V2),
            ("convnextv2_huge", "paper --amp", "huge", _V2),
            ("convnextv2_huge", "paper-800", "huge-800", _V2),
            ("convnextv2_atto", "paper", "atto", _V2),
        )
    },
    "$ck pretrain --data FOLDER --recipe paper --output runs/atto": _V2,
    **{
        f"{_FINE} {words} --output runs/{output}": small
        for words, output, small in (
            ("convnext_base --recipe convnext_base-fcmae", "v1-100", _V1_FINE),
            ("convnext_base", "v1-300", _V1_FINE),
            ("convnext_base --recipe convnext_base-fcmae --init runs/v1/encoder.safetensors", "v1-fine", _V1_FINE),
            ("convnext_large", "v1-large-300", _V1_FINE),
            (
                "convnext_large --recipe convnext_large-fcmae --init runs/v1-large/encoder.safetensors",
                "v1-large-fine",
                _V1_FINE,
            ),
            ("convnextv2_large --recipe convnextv2_large-supervised", "large-supervised", _V2_FINE),
            ("convnextv2_large --init runs/large/encoder.safetensors", "large-fine", _V2_FINE),
            ("convnextv2_huge --init runs/huge/encoder.safetensors", "huge-fine", _V2_FINE),
            (
                "convnextv2_huge --recipe convnextv2_huge-22k-384 --init runs/huge/encoder.safetensors",
                "huge-22k",
                _V2_FINE,
            ),
            (
                "convnextv2_huge --recipe convnextv2_huge-22k-1k-384 --init runs/huge-22k/model.safetensors",
                "huge-384",
                _V2_LAST,
            ),
            (
                "convnextv2_huge --recipe convnextv2_huge-22k-1k-512 --init runs/huge-22k/model.safetensors",
                "huge-512",
                _V2_LAST,
            ),
            ("convnextv2_atto --init runs/atto/encoder.safetensors", "atto-fine", _V2_FINE),
            ("convnextv2_atto --recipe convnextv2_atto-supervised", "atto-supervised", _V2_FINE),
            ("convnext_atto", "v1-atto", _V1_FINE),
            ("convnextv2_tiny", "tiny-fine", _V2_FINE),
            ("convnextv2_base --recipe convnextv2_base-paper", "base-fine", _V2_FINE),
            ("convnextv2_base --layer-decay 0.6 --layer-decay-kind group", "grouped", _V2_FINE),
            ("convnextv2_base --recipe convnextv2_base-supervised", "supervised", _V2_FINE),
            ("convnextv2_nano --recipe convnextv2_nano-22k", "nano-22k", _V2_FINE),
            (
                "convnextv2_nano --recipe convnextv2_nano-22k-1k --init runs/nano-22k/model.safetensors",
                "nano-1k",
                _V2_LAST,
            ),
            (
                "convnextv2_base --recipe convnextv2_base-22k-384 --init runs/base/encoder.safetensors",
                "base-22k",
                _V2_FINE,
            ),
            (
                "convnextv2_base --recipe convnextv2_base-22k-1k-384 --init runs/base-22k/model.safetensors",
                "base-1k",
                _V2_LAST,
            ),
            ("convnext_xlarge --recipe convnext_xlarge-22k", "xlarge-22k", _V1_FINE),
            (
                "convnext_xlarge --recipe convnext_xlarge-22k-1k-384 --init runs/xlarge-22k/model.safetensors",
                "xlarge-1k",
                _V1_LAST,
            ),
        )
    },
    **dict.fromkeys(
        (
            "$ck info --recipes",
            "$ck info --recipes coco",
            "$ck info --recipes ade20k",
            "$ck info --recipes coco ade20k",
            "$ck info --recipes paper convnextv2_atto convnextv2_tiny convnextv2_base-paper convnextv2_huge-22k "
            "convnextv2_huge-22k-1k",
            "$ck info --model convnextv2_atto",
            "$ck info --model convnextv2_base",
            "$ck info --model convnextv2_large",
            "$ck info --model convnextv2_huge",
            "$ck info --model convnext_base",
        ),
        Run(),
    ),
    "$ck convert SOURCE TARGET --to FORMAT": Run(put={"TARGET": "target.safetensors", "FORMAT": "timm"}),
    "$ck convert finetuned.safetensors backbone.pth --to mmpretrain": Run(),
    "$ck analyze reconstruct runs/v2/checkpoint-1000.pt --data FOLDER": Run(
        ANALYZE, put={"runs/v2/checkpoint-1000.pt": "runs/v2/checkpoint-1.pt"}, thorough=True
    ),
    "$ck analyze cosine timm:convnext_base.fb_in1k@convnext.pth timm:vit_base_patch16_224.mae@mae.pth --tap act --data CLASSES": Run(
        "--device cpu",
        put={
            "timm:convnext_base.fb_in1k@convnext.pth": "timm:convnext_atto@random",
            "timm:vit_base_patch16_224.mae@mae.pth": "timm:vit_tiny_patch16_224@random",
        },
        thorough=True,
    ),
    **dict.fromkeys(
        (
            "$ck analyze activations runs/v2/encoder.safetensors --photos --image coffee --layer stages.2.5 --tap act",
            "$ck analyze cosine runs/v2/encoder.safetensors runs/v1/encoder.safetensors --label V2 --label V1 "
            "--tap act --data CLASSES",
            "$ck analyze selectivity finetuned.safetensors --data val",
            "$ck analyze selectivity runs/v2/encoder.safetensors runs/v1/encoder.safetensors --label V2 --label V1 "
            "--data CLASSES --shuffled",
        ),
        Run(ANALYZE, thorough=True),
    ),
}

BY_PIP = "changes the environment and needs a network"
BY_GPU = "needs a GPU and minutes"
MENTION = "a name of the program, which needs more arguments; documented with them elsewhere"

BY_TESTS = "is part of make test"

CHECKED = {
    **{
        f"pytest python_tests/conformance/test_{name}.py": Checked(BY_TESTS, collected)
        for name in ("reference", "values", "gradcheck", "no_leak")
    },
    'pip install torch ninja pybind11 "setuptools>=77" wheel': Checked(BY_PIP, build_requirements),
    "pip install --no-build-isolation -e .": Checked(BY_PIP, pip_requirements),
    'pip install --no-build-isolation -e ".[timm]"': Checked(BY_PIP, pip_requirements),
    'pip install --no-build-isolation "torch==2.13.0" -e ".[timm]"': Checked(BY_PIP, pip_requirements),
    'pip install --no-build-isolation -e ".[train]"': Checked(BY_PIP, pip_requirements),
    'pip install --no-build-isolation "torch==2.13.0" -e ".[train]"': Checked(BY_PIP, pip_requirements),
    "pip install onnx onnxruntime onnxscript": Checked(BY_PIP, pip_requirements),
    "python tools/match_torchvision.py": Checked("changes the environment", options),
    "make demo": Checked("takes minutes; what it calls, `pretrain --demo`, is run", make_target),
    "python -m bench gate": Checked("`make gate` runs it", options),
    "python -m bench gate --update": Checked("rewrites the committed baseline", options),
    "make gate": Checked("takes a minute; its parts are tested in test_regression_gate.py", make_target),
    "make test": Checked("would run this test", make_target),
    "make test-all": Checked("would run this test", make_target),
    "make mutations": Checked("compiles for minutes", make_target),
    "make fuzz": Checked("runs for an hour, and needs atheris", make_target),
    "make test-emulated": Checked("would run half of the tests again", make_target),
    "make test-triton": Checked("would run half of the tests again", make_target),
    "make sanitize": Checked("compiles for minutes", make_target),
    "make format": Checked("changes the sources", make_target),
    "make gpu-check": Checked(BY_GPU, make_target),
    "python setup.py build_emulation": Checked("compiles for minutes", options),
    "python -m convnextv2_kernels analyze": Checked(MENTION, options),
    "python -m convnextv2_kernels tune": Checked(BY_GPU, refused("tune needs a GPU")),
    "python -m convnextv2_kernels tune --model convnextv2_tiny --batch-size 256": Checked(
        BY_GPU, refused("tune needs a GPU")
    ),
    "python -m bench --help": Checked(MENTION, options),
    "python -m bench gpu": Checked(MENTION, options),
    "python -m bench fused": Checked(MENTION, options),
    "python -m bench cpu_choices": Checked(MENTION, options),
    "python -m bench composed --output bench/results/cpu_composed.json": Checked(
        "takes minutes of an idle machine", options
    ),
    "python -m bench training": Checked(MENTION, options),
    "python -m bench gpu --out DIR": Checked(BY_GPU, parsed_by("parse")),
    "python -m bench gpu --out DIR --only step,compile": Checked(BY_GPU, parsed_by("parse")),
    "python -m bench training --photos-v2 v2 --photos-v1 none --work runs --out bench/results": Checked(
        "trains for an hour", options_and_those_of(PRETRAIN="pretrain", FINETUNE="finetune")
    ),
    "python examples/graphed_pretraining.py --steps 100": Checked(BY_GPU, refused("a CUDA graph needs a CUDA device")),
}
