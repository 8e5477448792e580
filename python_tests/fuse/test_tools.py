"""Everything people do with a model also works with a fused one."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers.reference_models import timm
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import convnextv2_kernels as ck

from .networks import close, official_model, output_of, results_of, small_timm_model, transformers_model

IMAGES = (2, 3, 64, 48)


@pytest.fixture
def images():
    return torch.randn(IMAGES)


@pytest.fixture
def model():
    model = small_timm_model()
    ck.fuse(model)
    return model


def forward_of(model):
    return model.stages[2].blocks[1].forward


def test_copies_are_fused_and_independent(model, images):
    """deepcopy, as every EMA does it."""
    expected = model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(images), expected)
    assert ck.unfuse(twin) == 5 and ck.unfuse(model) == 5


def test_ema_of_a_fused_model(model, images):
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    results_of(model, images, torch.randn(2, 10))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.update(model)
    plain = copy.deepcopy(ema.module)
    assert ck.unfuse(plain) == 5
    close(ema.module(images), plain(images))


@pytest.mark.parametrize("make", [small_timm_model, transformers_model, official_model])
def test_pickles(make, images):
    model = make()
    ck.fuse(model)
    expected = output_of(model, images)
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(output_of(restored, images), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(output_of(torch.load(file, weights_only=False), images), expected)
    assert ck.unfuse(restored) > 0


def test_a_dropped_model_is_freed(images):
    """Immediately, not at the next garbage collection: the model may occupy gigabytes of a GPU."""
    model = small_timm_model()
    ck.fuse(model)
    output_of(model, images).sum().backward()
    block = weakref.ref(model.stages[0].blocks[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [small_timm_model, transformers_model])
def test_compiles_in_one_graph(make, images):
    model = make(drop_path_rate=0.0)
    ck.fuse(model)
    cotangent = torch.randn(2, 10)
    expected = results_of(model, images, cotangent)
    got = results_of(torch.compile(model, fullgraph=True, backend="aot_eager"), images, cotangent)
    for name, value in expected.items():
        close(got[name.removeprefix("_orig_mod.")] if name in got else got[f"_orig_mod.{name}"], value)


def test_compiled_models_notice_fusing(images):
    """Compiled code made before fusing or unfusing is not used after it."""
    graphs = []
    model = small_timm_model()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def is_fused(graph: torch.fx.GraphModule) -> bool:
        nodes = [node for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes]
        return any("block_forward" in str(node.target) for node in nodes)

    expected = compiled(images)
    ck.fuse(model)
    close(compiled(images), expected)
    assert [is_fused(graph) for graph in graphs] == [False, True]
    ck.unfuse(model)
    assert torch.equal(compiled(images), expected)
    torch._dynamo.reset()


def test_trains_with_drop_path_under_compile(images):
    model = small_timm_model(drop_path_rate=0.5).train()
    ck.fuse(model)
    cotangent, results = torch.randn(2, 10), []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        results.append(list(results_of(network, images, cotangent).values()))
    for eager, compiled in zip(*results, strict=True):
        close(compiled, eager)


@pytest.mark.parametrize("training", [False, True])
def test_exports(model, images, training):
    model.train(training)
    expected = model(images)
    program = torch.export.export(model, (images,))
    assert any("block_forward" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    close(exported(images), expected)
    cotangent = torch.randn(2, 10)
    gradients = results_of(model, images, cotangent)
    for name, value in results_of(exported, images, cotangent).items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_traces_into_plain_operators(model, images):
    """torch.jit.trace, and with it the ONNX exporter built on it, records the block's own forward."""
    traced = torch.jit.trace(model.eval(), images)
    assert "convnextv2_kernels" not in str(traced.inlined_graph)
    close(traced(images), model(images))
    with pytest.raises(AttributeError, match="torch.jit.script cannot compile a fused block: call .*unfuse"):
        torch.jit.script(model)


def test_checkpointing_gives_the_same_gradients(model, images):
    cotangent = torch.randn(2, 10)
    expected = results_of(model, images, cotangent)
    model.set_grad_checkpointing(True)
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        got = results_of(network, images, cotangent)
        assert all(torch.allclose(g, e, 1e-4, 1e-4) for g, e in zip(got.values(), expected.values(), strict=True))


def test_checkpointing_repeats_the_draws_of_drop_path(images):
    gradients = []
    for checkpointing in (False, True):
        model = small_timm_model(drop_path_rate=0.5).train()
        ck.fuse(model)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        gradients.append(results_of(model, images, torch.ones(2, 10)))
    assert all(torch.equal(gradients[0][name], value) for name, value in gradients[1].items())


@pytest.mark.parametrize("make", [small_timm_model, transformers_model])
def test_drop_path_draws_what_the_model_would_draw(make):
    images = torch.randn(16, 3, 32, 32)
    model = make(drop_path_rate=0.5).train()
    cotangent = torch.randn(16, 10)
    results = []
    for fuse in (False, True):
        if fuse:
            ck.fuse(model)
        torch.manual_seed(11)
        results.append(results_of(model, images, cotangent) | {"state": torch.get_rng_state()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def test_drop_path_has_a_mode_of_its_own():
    """Stochastic depth at evaluation, or none in training, by the mode of the drop path module alone."""
    model = small_timm_model(drop_path_rate=0.5)
    ck.fuse(model)
    images = torch.randn(16, 3, 32, 32)
    for training in (False, True):
        model.train(training)
        for module in model.modules():
            if type(module).__name__ == "DropPath":
                module.train(not training)
        assert torch.equal(model(images), model(images)) == training


def test_outputs_may_be_changed_in_place(images):
    model = small_timm_model(features_only=True, num_classes=0)
    weight, cotangent, gradients = model.stages_0.blocks[0].conv_dw.weight, torch.randn(2, 48, 2, 1), []
    for fuse in (False, True):
        if fuse:
            ck.fuse(model)
        out = torch.nn.functional.relu_(model(images)[3])
        gradients.append(torch.autograd.grad(out, weight, cotangent)[0])
    close(gradients[1], gradients[0])
    block, x, cotangent = ck.nn.ConvNeXtV2Block(8), torch.randn(1, 4, 4, 8, requires_grad=True), torch.randn(1, 4, 4, 8)
    expected = torch.autograd.grad(block(x), x, cotangent)
    own = block(x)
    own += 1
    assert torch.equal(torch.autograd.grad(own, x, cotangent)[0], expected[0])


def test_features_only(images):
    model = small_timm_model(features_only=True, num_classes=0)
    expected = model(images)
    assert len(ck.fuse(model).replaced) == 5
    for got, value in zip(model(images), expected, strict=True):
        assert got.shape == value.shape and got.stride() == value.stride()
        close(got, value)


def test_forward_intermediates(model, images):
    final, maps = model.forward_intermediates(images)
    ck.unfuse(model)
    expected_final, expected = model.forward_intermediates(images)
    for got, value in zip([final, *maps], [expected_final, *expected], strict=True):
        close(got, value)


def test_fx_feature_extraction(model, images):
    nodes = {f"stages.{i}": f"stage {i}" for i in range(4)}
    extractor = create_feature_extractor(model, nodes)
    assert sum("fused_block" in name for name in get_graph_node_names(model)[0]) == 5
    for mode in (True, False):
        extractor.train(mode)
        got = extractor(images)
        with torch.no_grad():
            maps = model.forward_intermediates(images, intermediates_only=True)
        for i, value in enumerate(maps):
            close(got[f"stage {i}"], value)
    got["stage 3"].sum().backward()
    assert model.stages[0].blocks[0].conv_dw.weight.grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(extractor))(images)["stage 2"], got["stage 2"])


def test_hidden_states_of_transformers(images):
    model = transformers_model().eval()
    expected = model(images, output_hidden_states=True).hidden_states
    ck.fuse(model)
    got = model(images, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 5
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def test_data_parallel_replicas_use_their_own_parameters(model, images):
    block = model.stages[0].blocks[0]
    replica = block._replicate_for_data_parallel()
    assert replica.forward is not block.forward and forward_of(model)._block() is model.stages[2].blocks[1]
    assert replica.forward._block() is replica


def test_hooks_on_the_block_itself_run(model, images):
    seen = []
    model.stages[1].blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.stages[1].blocks[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model(images).sum().backward()
    assert seen == [(2, 24, 8, 6), "backward"]


@pytest.mark.parametrize("scale", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, scale, images):
    """16-bit GEMMs as in PyTorch: at most twice as far from float32 as the unfused model."""
    model = small_timm_model(ls_init_value=scale)
    cotangent = torch.randn(2, 10)
    truth = results_of(copy.deepcopy(model).double(), images.double(), cotangent.double())

    def under_autocast():
        with torch.autocast("cpu", dtype):
            logits = model(images)
        return {"logits": logits.detach()} | gradients(logits)

    def gradients(logits):
        model.zero_grad()
        logits.backward(cotangent.to(logits.dtype))
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = under_autocast()
    ck.fuse(model)
    fused = under_autocast()
    for name, value in plain.items():
        assert fused[name].dtype == value.dtype and torch.isfinite(fused[name]).all()
        error, ordinary = (float((r[name].double() - truth[name]).norm()) for r in (fused, plain))
        floor = 4 * torch.finfo(dtype).eps * float(truth[name].norm())
        assert error <= 2 * ordinary + floor, f"{name}: {error:.2e}, PyTorch {ordinary:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_without_autocast(dtype):
    model = small_timm_model(ls_init_value=0.5).to(dtype)
    images = torch.randn(IMAGES, dtype=dtype)
    ck.fuse(model)
    results = results_of(model, images, torch.randn(2, 10, dtype=dtype))
    assert all(value.dtype == dtype and torch.isfinite(value).all() for value in results.values())
