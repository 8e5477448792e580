"""Fused models as ONNX, torch.export and AOTInductor programs, saved and loaded."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.exported import assert_runs_as, onnx_session
from torch import nn

import convnextv2_kernels as ck

from .networks import close, official_model, output_of, small_timm_model, transformers_model

MAKERS = {"timm": small_timm_model, "transformers": transformers_model, "official": official_model}
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 48)


def first_block(model: nn.Module) -> nn.Module:
    """In a module, as the exporters need one whose forward is its class's."""
    ck.fuse(model)
    return nn.Sequential(next(m for m in model.modules() if "forward" in vars(m)))


@EXPORTERS
@pytest.mark.parametrize(
    "make", [small_timm_model, *(pytest.param(MAKERS[name], marks=pytest.mark.thorough) for name in list(MAKERS)[1:])]
)
def test_a_fused_block_in_onnxruntime(make, dynamo):
    block = first_block(make().eval())
    x = [torch.randn(n, 16, 9, 7) for n in (2, 3)]
    # alone, the official block's sides are unknown to the older exporter where its batch is
    session = onnx_session(block, (x[0],), dynamo, dynamic=dynamo)
    assert_runs_as(block, session, [(each,) for each in (x if dynamo else x[:1])])


@pytest.mark.thorough
@EXPORTERS
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fused_models_in_onnxruntime(make, dynamo):
    model = make().eval()
    ck.fuse(model)
    dynamic = dynamo or make is not official_model  # whose norms take their size from the map
    session = onnx_session(model, (images(2),), dynamo, dynamic)
    assert_runs_as(model, session, [(images(n),) for n in ((2, 3, 1) if dynamic else (2,))])


@torch.no_grad()
def test_a_program_that_dynamo_captures_is_plain_too():
    """Where the exporter falls back on Dynamo's capture, which answers questions about exports itself."""
    from convnextv2_kernels.tracing import exporting

    block = first_block(small_timm_model().eval())
    x = torch.randn(2, 16, 9, 7)
    program = torch.export.export(block, (x,), strict=True)
    assert any("block_forward" in str(node.target) for node in program.graph.nodes) and not exporting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        program = torch.export.export(block, (x,), strict=True)
    assert not any("convnextv2_kernels" in str(node.target) for node in program.graph.nodes)


@torch.no_grad()
@pytest.mark.parametrize("make", [small_timm_model, pytest.param(transformers_model, marks=pytest.mark.thorough)])
def test_programs_of_torch_export_are_saved_and_loaded(make, tmp_path):
    """With this library's operators, for any batch, and in a process that imports this library."""
    model = make().eval()
    ck.fuse(model)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any("convnextv2_kernels.block_forward" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (2, 3, 1):
        x = images(n)
        assert torch.equal(output_of(loaded, x), output_of(model, x))


@pytest.mark.thorough
@torch.no_grad()
def test_aoti_packages_run_in_another_process(tmp_path):
    model = small_timm_model().eval()
    ck.fuse(model)
    x = images(2), images(3)
    program = torch.export.export(model, x[:1], dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save([(each, model(each)) for each in x], tmp_path / "expected.pt")
    code = f"""
import sys, torch
import convnextv2_kernels
run = torch._inductor.aoti_load_package({path!r})
for x, expected in torch.load({str(tmp_path / "expected.pt")!r}):
    torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)
assert "timm" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_an_export_leaves_the_model_fused():
    model = small_timm_model().eval()
    ck.fuse(model)
    twin, x = copy.deepcopy(model), images(2)
    torch.jit.trace(model, x)
    assert torch.equal(model(x), twin(x)) and len(ck.fuse(model).already_fused) == 5
    ck.unfuse(twin)
    close(model(x), twin(x))


@torch.no_grad()
def test_programs_of_torch_export_take_images_of_any_side():
    model, auto = small_timm_model().eval(), torch.export.Dim.AUTO
    ck.fuse(model)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    x = torch.randn(3, 3, 75, 118)
    close(program.module()(x), model(x))


PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


@pytest.mark.thorough
def test_the_examples_of_the_documents_run(tmp_path, monkeypatch):
    """Each block builds on those before it."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
