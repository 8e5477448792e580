import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from convnextv2_kernels import random_mask
from convnextv2_kernels.benchmark import counts
from convnextv2_kernels.benchmark.baseline import keep_map, masked_mlp


def brute_force_taps(mask, side, kernel_size):
    visible = keep_map(mask, side, torch.int64)[..., 0].tolist()
    reach = kernel_size // 2
    total = 0
    for image in visible:
        for r, row in enumerate(image):
            for c, site in enumerate(row):
                if site:
                    total += sum(
                        sum(line[max(0, c - reach) : c + reach + 1])
                        for line in image[max(0, r - reach) : r + reach + 1]
                    )
    return total


@pytest.mark.parametrize("side", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kernel_size", [3, 7, 11])
def test_visible_taps_match_brute_force(side, kernel_size):
    mask = random_mask(3, (4, 5), 0.6, torch.Generator().manual_seed(side))
    mask[1] = True
    mask[2] = False
    expected = brute_force_taps(mask, side, kernel_size)
    assert counts.visible_taps(mask, side, kernel_size) == expected


def test_no_patches_no_work():
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    assert counts.visible_taps(mask, 8) == 0
    assert counts.depthwise_conv(0, 0, 40).flops == 0


def test_taps_per_site_of_fcmae():
    # The design's estimate for 39 % visible: 36, 26, 16.5 and 11 of 49 taps in the four stages.
    mask = random_mask(64, (7, 7), 0.6, torch.Generator().manual_seed(0))
    patches = int((~mask).sum())
    taps = [counts.visible_taps(mask, s) / (patches * s * s) for s in (8, 4, 2, 1)]
    assert taps == pytest.approx([36, 26, 16.5, 11], rel=0.08)


def counted(function, *inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        function(*leaves).sum().backward()
    return counter.get_total_flops()


def test_mlp_flops_match_the_counter_of_pytorch():
    rows, width, hidden = 12, 8, 32
    shapes = [(1, 3, 4, width), (hidden, width), (hidden,), (hidden,), (hidden,), (width, hidden)]
    inputs = [torch.randn(shape) for shape in [*shapes, (width,)]]
    measured = counted(lambda *a: masked_mlp(a[0], a[1:], None, "linear"), *inputs)
    assert counts.pointwise_mlp(rows, width, hidden).flops == measured


def test_downsample_and_stem_flops_match_the_counter_of_pytorch():
    x, weight = torch.randn(2, 8, 4, 6), torch.randn(16, 8, 2, 2)
    measured = counted(lambda a, b: F.conv2d(a, b, stride=2), x, weight)
    assert counts.downsample(2 * 4 * 6, 8, 16).flops == measured
    measured = counted(lambda b: F.conv2d(x, b, stride=2), weight)
    assert counts.matrix_product(12, 32, 16, input_grad=False).flops == measured


def test_depthwise_flops_are_three_forward_passes_by_the_counter_of_pytorch():
    # The counter is wrong for the backward of grouped convolutions and counts taps in the padding.
    x, weight = torch.randn(1, 4, 14, 14), torch.randn(4, 1, 7, 7)
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, weight, groups=4)
    assert counts.depthwise_conv(64, 64 * 49, 4).flops == 3 * counter.get_total_flops()


def test_bytes_of_a_layer_norm():
    # Input, output, gradient in, input again, gradient out; two vectors three times.
    assert counts.layer_norm(10, 8, itemsize=2).bytes == 2 * (5 * 80 + 3 * 16)


def test_bytes_of_ops_on_whole_maps():
    rows, whole, width = 6, 16, 8
    # visible rows read and written, their gradient read, and the gradient of the map written
    assert counts.gathered(rows, whole, width).bytes == 4 * width * (rows + rows + rows + whole)
    # rows read, the map written, the gradient at visible rows read, that of the rows written
    assert counts.scattered(rows, whole, width).bytes == 4 * width * (rows + whole + rows + rows)
    mlp, gathered = counts.pointwise_mlp(rows, width, 32), counts.gathered_pointwise_mlp(rows, whole, width, 32)
    assert gathered.flops == mlp.flops and gathered.bytes == mlp.bytes + 4 * width * (whole - rows)
    with_norm = counts.gathered_pointwise_mlp(rows, whole, width, 32, layer_norm=True)
    assert with_norm.bytes == gathered.bytes + 4 * 3 * 2 * width


def test_bytes_of_a_stem_and_of_norms_in_a_row():
    assert counts.patch_embed(10, 8).bytes == 4 * (10 * (2 * 48 + 2 * 8) + 3 * 49 * 8)
    assert counts.patch_embed(10, 8, layer_norm=True).bytes - counts.patch_embed(10, 8).bytes == 4 * 3 * 2 * 8
    assert counts.layer_norm_grn(10, 8).bytes == 4 * (5 * 80 + 3 * 4 * 8)


def test_a_block_moves_its_maps_once():
    rows, taps, width = 64, 64 * 49, 8
    block = counts.block(rows, taps, width)
    conv = counts.depthwise_conv_layer_norm(rows, taps, width)
    mlp = counts.pointwise_mlp(rows, width, 4 * width)
    assert block.flops == conv.flops + mlp.flops
    assert block.bytes == conv.bytes + mlp.bytes - 4 * 5 * rows * width


def test_rates():
    rates = counts.Work(2e9, 5e8).rates(milliseconds=100)
    assert rates == pytest.approx({"gflops": 20, "gbytes": 5})


def test_step_flops_of_visible_patches_alone():
    nothing_hidden = torch.zeros(2, 7, 7, dtype=torch.bool)
    sizes = ([2, 2, 6, 2], [40, 80, 160, 320])
    everything = counts.fcmae_step(nothing_hidden, *sizes)
    assert everything == counts.fcmae_step(nothing_hidden, *sizes, dense=True)
    mask = random_mask(2, (7, 7), 0.6, torch.Generator().manual_seed(0))
    assert counts.fcmae_step(mask, *sizes) < 0.6 * counts.fcmae_step(mask, *sizes, dense=True)
