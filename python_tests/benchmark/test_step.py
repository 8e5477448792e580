"""The comparison of variants: what is skipped, what ends it, and its ratios."""

import pytest
import torch

from convnextv2_kernels.benchmark import variants
from convnextv2_kernels.benchmark.baseline import Baseline
from convnextv2_kernels.benchmark.correctness import CorrectnessError
from convnextv2_kernels.benchmark.step import Effort, compare, compare_graphs, is_eager, ratios, with_graphs
from convnextv2_kernels.benchmark.variants import Variant, make_batch, make_dense, make_sparse, run_by

LINEAR, CONV = Baseline("nchw", "linear"), Baseline("channels_last", "conv1x1")


@pytest.fixture
def batch():
    return make_batch(1, 64, seed=0)


@pytest.fixture(scope="module")
def sparse():
    return make_sparse("convnextv2_atto", seed=0)


def test_the_control_is_a_baseline_with_weights_of_its_own(sparse, batch):
    found = compare([sparse, *make_dense(sparse, [LINEAR, CONV])], batch, Effort(3))
    assert list(found.times) == ["sparse", "dense nchw linear eager", "dense channels_last conv1x1 eager"]
    assert found.control.of in list(found.times)[1:] and found.control.ratio > 0 and found.skipped == {}
    report = found.to_json()
    assert report["control"]["of"] == found.control.of and "copy" not in " ".join(report["variants"])
    assert all(len(row["samples_ms"]) == 3 and row["saved_bytes"] > 0 for row in report["variants"].values())
    original = found.times[found.control.of].variant
    copy = original.copy()
    assert copy.name == f"{original.name} copy" and copy.model is not original.model
    pointers = [{p.data_ptr() for p in model.parameters()} for model in (copy.model, original.model)]
    assert not pointers[0] & pointers[1]


def test_without_a_baseline_ours_is_its_own_control(sparse, batch):
    found = compare([sparse], batch, Effort(1, saved=False))
    assert found.control.of == "sparse" and ratios(found.rows(), "sparse") == {}


@pytest.mark.thorough
def test_a_wrong_loss_ends_the_comparison_or_is_skipped(sparse, batch):
    (dense,) = make_dense(sparse, [LINEAR])
    right = dense.model

    def wrong(images, mask):
        loss, pred = right(images, mask)
        return 2 * loss, pred

    dense.run = wrong
    with pytest.raises(CorrectnessError, match="loss of 'dense nchw linear eager' differs"):
        compare([sparse, dense], batch, Effort(1))
    found = compare([sparse, dense], batch, Effort(1, keep_going=True))
    assert list(found.times) == ["sparse"] and "CorrectnessError" in found.skipped[dense.name]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("can't allocate memory: you tried")])
def test_a_variant_without_memory_is_skipped(sparse, batch, error):
    (dense,) = make_dense(sparse, [LINEAR])

    def fails(images, mask):
        raise error

    dense.run = fails
    assert compare([sparse, dense], batch, Effort(1)).skipped == {dense.name: "out of memory"}
    with pytest.raises(RuntimeError, match="out of memory|no|allocate"):
        compare([Variant("ours", sparse.model, fails), dense], batch, Effort(1))


def test_a_control_without_memory_says_so(sparse, batch, monkeypatch):
    (dense,) = make_dense(sparse, [LINEAR])

    def copy(self):
        def fails(images, mask):
            raise torch.OutOfMemoryError("no")

        return Variant(f"{self.name} copy", self.model, fails, baseline=self.baseline)

    monkeypatch.setattr(Variant, "copy", copy)
    found = compare([sparse, dense], batch, Effort(1, saved=False))
    assert found.control.ratio is None and not found.control.valid and found.control.reason == "out of memory"
    assert found.skipped == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs can be captured")
def test_graphs_need_a_gpu_and_do_not_cost_the_comparison(sparse, batch):
    (dense,) = make_dense(sparse, [LINEAR])
    graph = run_by(sparse, "reference").graphed()
    assert graph.name == "sparse reference graph" and graph.described()["execution"] == "graph"
    assert dense.graphed().name == "dense nchw linear graph"
    with pytest.raises(ValueError, match="a CUDA graph is captured"):
        graph.prepare(batch)
    with pytest.raises(RuntimeError, match="sparse graph: ValueError"):
        compare_graphs([sparse], [dense], batch, Effort(1))
    found = compare([sparse, dense], batch, Effort(1, saved=False))
    joined = with_graphs(found, sparse, (lambda v: not v.ours,), batch, Effort(1))
    assert list(joined.times) == ["sparse", dense.name] and "a CUDA graph is captured" in joined.skipped["sparse graph"]


def row(ms, execution="eager", dense=True, saved=100, peak=None, **more):
    baseline = {"layout": "nchw", "pointwise": "linear"} if dense else None
    peak = None if peak is None else {"bytes": peak}
    return {"median_ms": ms, "execution": execution, "baseline": baseline, "saved_bytes": saved, "peak": peak, **more}


def test_ratios_are_of_the_fastest_and_like_with_like():
    rows = {
        "sparse cuda": row(4.0, dense=False, saved=10, peak=20, backend="cuda"),
        "sparse cuda graph": row(2.0, "graph", dense=False, saved=None, backend="cuda"),
        "sparse reference": row(1.0, dense=False, saved=1, backend="reference"),
        "a": row(12.0, saved=80, peak=60),
        "b": row(10.0, "compile", peak=90),
        "c": row(6.0, "graph", saved=None),
    }
    found = ratios(rows, "sparse cuda graph")
    assert found["fastest_dense"] == "c" and found["throughput"] == 3.0
    assert found["throughput_eager"] == 3.0 and found["throughput_graph"] == 3.0
    assert found["frugal_dense"] == "a" and found["saved"] == 8.0
    assert found["least_peak_dense"] == "a" and found["peak"] == 3.0


def test_of_two_measurements_the_slower_and_the_worse_control_count(sparse, batch):
    first, second = (compare([sparse, *make_dense(sparse, [LINEAR])], batch, Effort(1, saved=False)) for _ in range(2))
    first.times["sparse"].seconds, second.times["sparse"].seconds = [1.0], [2.0]
    joined = first.joined(second)
    assert joined.times["sparse"].seconds == [2.0]
    assert abs(joined.control.ratio - 1) == max(abs(c.control.ratio - 1) for c in (first, second))


@pytest.fixture
def pretended_graphs(monkeypatch):
    """Without a GPU: what a graph would replay runs eagerly; returns the names of the models' classes."""
    captured = []

    def make(model, images, loss, autocast=None):
        captured.append(type(model).__name__)

        def step(batch):
            value = loss(model, batch)
            value.backward()
            return value.detach().clone()

        return step

    monkeypatch.setattr(variants, "make_graphed_step", make)
    return captured


def test_graphs_on_both_sides(sparse, batch, pretended_graphs):
    dense = make_dense(sparse, [LINEAR, CONV])
    eager = compare([run_by(sparse, "reference"), *dense], batch, Effort(2))
    found = with_graphs(eager, run_by(sparse, "reference"), (is_eager,), batch, Effort(2))
    best = eager.fastest(is_eager).name
    graph = best.removesuffix(" eager") + " graph"
    assert list(found.times) == [*eager.times, "sparse reference graph", graph]
    assert pretended_graphs == ["FCMAE", "MaskedDenseFCMAE"]
    rows = found.rows()
    assert rows[graph]["execution"] == "graph" and rows[graph]["saved_bytes"] is None
    ratio = ratios(rows, "sparse reference graph")
    assert ratio["fastest_graph"] == graph and ratio["fastest_eager"] == best and ratio["saved"] > 1
    alone = compare_graphs([sparse], dense, batch, Effort(1))
    assert set(alone.times) == {"sparse graph", "dense nchw linear graph", "dense channels_last conv1x1 graph"}
    assert alone.control.of in alone.times  # of graphs the same one, replayed


def test_a_wrong_graph_is_seen(sparse, batch, monkeypatch):
    def make(model, images, loss, autocast=None):
        return lambda batch: 2 * loss(model, batch).detach()

    monkeypatch.setattr(variants, "make_graphed_step", make)
    with pytest.raises(CorrectnessError, match="loss of 'sparse graph' differs"):
        compare([sparse.graphed()], batch, Effort(1))
