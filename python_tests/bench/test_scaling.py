import os

import pytest
import torch

from bench import profiler as profiled
from bench.scaling import fit as scaling_fit
from bench.scaling import memory as scaling_memory
from convnextv2_kernels import backends, random_mask, schedule
from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.variants import make_batch, make_sparse
from convnextv2_kernels.models import CONFIGS
from convnextv2_kernels.settings import override

XS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
needs_schedule = pytest.mark.skipif(
    backends.unsupported_reason("cpu", "cpu", torch.float32) is not None, reason="the reference runs no schedule"
)


# -- lines


def fitted(ys, **noise):
    return scaling_fit.fit(XS, ys, [3 * x for x in XS], 0.1, **noise)


def test_a_line_with_a_fixed_cost_is_linear_and_not_proportional():
    found = fitted([5 + 2 * x for x in XS])
    assert (found["slope"], found["intercept"], found["r2"]) == pytest.approx((2, 5, 1))
    assert found["linear"] is True and found["worst_deviation"] == pytest.approx(0)
    assert found["exponent"] < 0.8 and found["ideal_exponent"] == pytest.approx(1)
    assert found["most_over_ideal"] == pytest.approx(7 / 3)


@pytest.mark.parametrize("power", [2.0, 0.5])
def test_a_power_is_not_linear(power):
    found = fitted([x**power for x in XS])
    assert found["linear"] is False
    assert found["exponent"] == pytest.approx(power)


def test_noise_leaves_the_verdict_open_but_does_not_excuse_a_curve():
    ys = [2 * x for x in XS]
    ys[3] *= 1.4
    assert fitted(ys)["linear"] is False
    low, high = [0.6 * y for y in ys], [1.4 * y for y in ys]
    assert fitted(ys, low=low, high=high)["linear"] is None
    curve = [x**3 for x in XS]
    narrow = {"low": [0.9 * y for y in curve], "high": [1.1 * y for y in curve]}
    assert fitted(curve, **narrow)["linear"] is False


def test_two_points_say_nothing():
    assert scaling_fit.fit([1.0, 2.0, 2.0], [1.0, 4.0, 4.0], [1.0, 2.0, 2.0], 0.1) is None


# -- ideal


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny"])
@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.9])
def test_shares_of_flops_make_the_counted_step(name, ratio):
    mask = random_mask(3, (5, 7), ratio, torch.Generator().manual_seed(0))
    mask[1] = True
    shares = scaling_fit.split_flops(mask, *CONFIGS[name])
    # Whole numbers below 2^53: the sum is exact in any order.
    assert sum(shares.values()) == counts.fcmae_step(mask, *CONFIGS[name])
    hidden = scaling_fit.split_flops(torch.ones_like(mask), *CONFIGS[name])
    assert hidden["visible"] == 0 and hidden["every"] == shares["every"]


def test_ideal_is_proportional_to_the_batch_and_a_line_over_visible_patches():
    mask = random_mask(4, (7, 7), 0.0)
    flops = scaling_fit.split_flops(mask, *CONFIGS["convnextv2_atto"])
    weights = scaling_fit.flop_weights(flops, 196, 196)
    assert weights.cost(196, 196) == pytest.approx(sum(flops.values()), rel=1e-12)
    assert weights.cost(38, 98) == pytest.approx(weights.cost(19, 49) * 2, rel=1e-12)
    everything_hidden = scaling_fit.split_flops(~mask, *CONFIGS["convnextv2_atto"])
    assert weights.cost(0, 196) == pytest.approx(sum(everything_hidden.values()), rel=1e-12)
    half = (weights.cost(0, 196) + weights.cost(196, 196)) / 2
    assert weights.cost(98, 196) == pytest.approx(half, rel=1e-12)


# -- memory


def test_peak_of_known_allocations():
    def step():
        a = torch.ones(1000)
        b = torch.ones(500)
        del a
        return [b, torch.ones(600), torch.ones(100)]

    peak, in_chunks = scaling_memory.allocations(step, "cpu")
    assert peak == 4 * 1500
    assert in_chunks == {}


def test_only_notices_of_the_profiler_are_dropped(capfd):
    with profiled._without_notices():
        os.write(2, b"USDT:start\nan error\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "an error\nlater\n"


def hidden_chunks(batches, img_size=64):
    """Of atto with one visible patch of four an image: 64 rows an image in stage 1."""
    sparse = make_sparse("convnextv2_atto", seed=0)
    blocks = scaling_memory.names_of_blocks(CONFIGS["convnextv2_atto"].depths, 1)
    points = []
    for size in batches:
        batch = make_batch(size, img_size, seed=0)
        sparse.step(batch)
        points.append(
            (size, scaling_memory.step_memory(lambda batch=batch: sparse.step(batch), blocks, "cpu")["hidden"])
        )
    return points


@needs_schedule
def test_hidden_chunk_does_not_grow_with_the_batch():
    with override(chunk_bytes=2 * 64 * 160 * 4):
        points = hidden_chunks((2, 4, 6))
    verdict = scaling_memory.chunk_verdict(points)
    assert verdict["bounded"] is True and verdict["cut"] == ["stage 1"]
    for size, hidden in points:
        stage = hidden["stage 1"]
        assert (stage["chunk_bytes"], stage["chunks"]) == (2 * 64 * 160 * 4, size // 2)
        # Two blocks, each with the activations of backward and their gradient, and with those of forward unless it has
        # one chunk, which has no range.
        each = 3 if stage["chunks"] > 1 else 2
        assert stage["storages"] == 2 * each * size // 2


@needs_schedule
def test_one_chunk_for_the_whole_batch_is_told():
    with override(chunk_bytes=1 << 30):
        points = hidden_chunks((2, 4))
    first, last = (hidden["stage 1"]["chunk_bytes"] for _, hidden in points)
    assert last == 2 * first
    verdict = scaling_memory.chunk_verdict(points)
    assert verdict["bounded"] is False and "fit in one chunk of every stage" in verdict["reason"]


@needs_schedule
def test_a_schedule_that_ignores_its_rule_is_told(monkeypatch):
    def one_chunk(images, rows, hidden, itemsize, budget):
        return [schedule.Chunk(0, images.count, 0, rows, images)]

    monkeypatch.setattr(schedule, "chunks", one_chunk)
    with override(chunk_bytes=1):
        verdict = scaling_memory.chunk_verdict(hidden_chunks((1, 4)))
    assert verdict["bounded"] is False
    # 80 rows, half the hidden width, are allowed; four images have 256.
    assert f"stage 1: a hidden tensor has {256 * 640} bytes, the rule allows {80 * 640}" in verdict["reason"]


def stage(**changes):
    good = {"chunks": 4, "chunk_bytes": 100, "whole_bytes": 400, "limit_bytes": 100, "storages": 3}
    return {"stage 1": {**good, "largest_storage_bytes": 100, "rounding": 0, **changes}}


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        (stage(largest_storage_bytes=400), "the allocator handed out 400 bytes inside of a chunk"),
        (stage(storages=0), "no storage of 100 bytes"),
        (stage(chunk_bytes=200, limit_bytes=200), "a hidden tensor has 200 bytes, the rule allows 100"),
        ({}, "no chunks"),
    ],
)
def test_the_allocator_and_the_smallest_batch_are_believed(largest, message):
    assert scaling_memory.chunk_verdict([(1, stage()), (4, stage())])["bounded"] is True
    verdict = scaling_memory.chunk_verdict([(1, stage()), (4, largest)])
    assert verdict["bounded"] is False and message in verdict["reason"]


def test_hidden_activations_kept_for_backward_are_not_bounded():
    assert scaling_memory.chunk_verdict([(1, stage()), (4, stage())], save="hidden")["bounded"] is False
