"""What a machine can do at most, and how far an op is from it."""

import json

import pytest
import torch

from bench import ceilings
from bench.__main__ import main
from bench.ceilings import Ceilings
from convnextv2_kernels.benchmark.counts import Work

MADE_UP = Ceilings(gflops=100.0, product="matmul 512", gbytes={1000: 50.0, 10_000: 20.0, 100_000: 10.0})


def test_bandwidth_is_never_less_for_less():
    slow_calls = Ceilings(1.0, "matmul 512", {1000: 5.0, 10_000: 40.0, 100_000: 10.0})
    assert [slow_calls.bandwidth(size) for size in (10, 1000, 50_000, 10**6)] == [40.0, 40.0, 40.0, 10.0]


@pytest.mark.parametrize(
    ("traffic", "rate"), [(1, 50.0), (1000, 50.0), (1001, 50.0), (10_000, 20.0), (99_999, 20.0), (10**9, 10.0)]
)
def test_bandwidth_is_that_of_the_cache_a_call_fits_in(traffic, rate):
    assert MADE_UP.bandwidth(traffic) == rate


def test_limit_is_the_longer_of_moving_and_computing():
    # 10^5 bytes at 10 GB/s are 10 us; 10^5 flops at 100 GFLOP/s are 1 us
    assert MADE_UP.limit_ms(Work(flops=1e5, bytes=1e5)) == pytest.approx(1e-2)
    assert MADE_UP.bound(Work(flops=1e5, bytes=1e5)) == "memory"
    assert MADE_UP.limit_ms(Work(flops=1e8, bytes=1e5)) == pytest.approx(1.0)
    assert MADE_UP.bound(Work(flops=1e8, bytes=1e5)) == "compute"


def test_the_better_of_two_measurements_counts_rate_by_rate():
    other = Ceilings(90.0, "conv1x1 512", {1000: 60.0, 10_000: 15.0, 100_000: 10.0})
    best = MADE_UP.best(other)
    assert (best.gflops, best.product) == (100.0, "matmul 512")
    assert best.gbytes == {1000: 60.0, 10_000: 20.0, 100_000: 10.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_count_what_is_moved_and_computed(monkeypatch, dtype):
    # One second for every call: the rate is then the count itself, in units of 10^9.
    monkeypatch.setattr(ceilings, "seconds_of", lambda call, device: call() is None or 1.0)
    assert ceilings.traffic_rate(6 * 1024, dtype, "cpu") == pytest.approx(6 * 1024e-9)
    assert ceilings.copy_rate(6 * 1024, dtype, "cpu", lambda call: 1.0) == 6 * 1024
    assert ceilings.product_rates(8, dtype, "cpu") == {"matmul 8": 2e-9 * 512, "conv1x1 8": 2e-9 * 512}


def test_ops_alone_leave_shares_of_the_limit_and_a_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "TRAFFIC", (1 << 16, 1 << 20))
    monkeypatch.setattr(ceilings, "PRODUCTS", {"cpu": (64,)})
    arguments = ["ops", "--quick", "--img-size", "64", "--batch-size", "1", "--repeats", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    report, chart = sorted(tmp_path.iterdir())
    assert chart.suffix == ".png" and chart.read_bytes().startswith(b"\x89PNG")
    result = json.loads(report.read_text())
    assert result["kind"] == "ops" and set(result["host"]) == {"convnextv2_atto"}
    ops = result["ops"]["convnextv2_atto"]
    assert [copy["traffic_bytes"] for copy in ops["ceilings"]["copies"]] == [1 << 16, 1 << 20]
    for row in ops["rows"]:
        for variant in row["variants"].values():
            assert variant["share"] == pytest.approx(variant["limit_ms"] / variant["median_ms"]) and variant["bound"]
            assert variant["share"] > 0
        # the dense side has more to do
        assert all(variant["limit_ms"] >= row["variants"]["sparse"]["limit_ms"] for variant in row["variants"].values())
    out = capsys.readouterr().out
    assert "This machine at most" in out and "host time of a block of width 40" in out
