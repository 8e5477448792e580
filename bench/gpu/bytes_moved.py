"""Fewest bytes each operator can move through memory: every map and per-row statistic crosses it once per operator.

Not counted, as they are small and stay in the cache: parameters and their gradients, index tables, and statistics of a
whole image. So a share of copy bandwidth computed from these is a little too low, never too high.
"""

from __future__ import annotations

STATISTIC = 4  # bytes of a float32 value per row


def maps(rows: int, channels: int, itemsize: int, count: int) -> int:
    """``count`` maps ``[rows, channels]``."""
    return rows * channels * itemsize * count


def conv_forward(rows: int, channels: int, itemsize: int, residual: bool = False) -> int:
    """Reads x, and with a residual that as well; writes y. The gradient with respect to x is the same kernel."""
    return maps(rows, channels, itemsize, 3 if residual else 2)


def conv_normalize(rows: int, channels: int, itemsize: int) -> int:
    """Reads x, writes z and 1/std of each row."""
    return maps(rows, channels, itemsize, 2) + rows * STATISTIC


def conv_weight_grad(rows: int, channels: int, itemsize: int) -> int:
    """Reads x and the output's gradient."""
    return maps(rows, channels, itemsize, 2)


def layer_norm_forward(rows: int, channels: int, itemsize: int) -> int:
    """Reads x; writes y, mean and 1/std."""
    return maps(rows, channels, itemsize, 2) + 2 * rows * STATISTIC


def layer_norm_backward(rows: int, channels: int, itemsize: int) -> int:
    """Reads the gradient, x, mean and 1/std; writes the gradient of x."""
    return maps(rows, channels, itemsize, 3) + 2 * rows * STATISTIC


def normalized_backward(rows: int, channels: int, itemsize: int) -> int:
    """Reads the gradient, z and 1/std; writes the gradient of x."""
    return maps(rows, channels, itemsize, 3) + rows * STATISTIC


def space_to_depth(rows: int, channels: int, itemsize: int) -> int:
    """Reads x ``[rows, channels]``; writes as much, and 1/std."""
    return maps(rows, channels, itemsize, 2) + rows * STATISTIC


def space_to_depth_backward(rows: int, channels: int, itemsize: int) -> int:
    """Reads the gradient, z and 1/std; writes the gradient of x."""
    return normalized_backward(rows, channels, itemsize)


def gather_normalize(rows: int, channels: int, itemsize: int) -> int:
    """Reads the visible rows of a map; writes them normalised, and 1/std."""
    return maps(rows, channels, itemsize, 2) + rows * STATISTIC


def grn_forward(rows: int, channels: int, itemsize: int) -> int:
    """Reads x, writes y. The norm is needed before the first output, so x is read twice, the second time at best from
    the cache: the share of copy bandwidth is of a bound that a large map cannot reach."""
    return maps(rows, channels, itemsize, 2)


def grn_backward(rows: int, channels: int, itemsize: int) -> int:
    """Reads the gradient and x, writes the gradient of x; two passes, as :func:`grn_forward`."""
    return maps(rows, channels, itemsize, 3)


def layer_norm_grn_forward(rows: int, channels: int, itemsize: int) -> int:
    """Reads x; writes y, mean and 1/std. x is read twice, as by :func:`grn_forward`."""
    return layer_norm_forward(rows, channels, itemsize)


def layer_norm_grn_backward(rows: int, channels: int, itemsize: int) -> int:
    """Reads the gradient, x, mean and 1/std, all twice; writes the gradient of x."""
    return layer_norm_backward(rows, channels, itemsize)


def gelu_statistics(rows: int, channels: int, itemsize: int, keeps_h: bool) -> int:
    """Reads a; writes h where it is wanted."""
    return maps(rows, channels, itemsize, 2 if keeps_h else 1)


def gelu_scale(rows: int, channels: int, itemsize: int) -> int:
    """Reads a, writes h * scale."""
    return maps(rows, channels, itemsize, 2)


def mlp_backward_statistics(rows: int, channels: int, itemsize: int) -> int:
    """Reads a and ds."""
    return maps(rows, channels, itemsize, 2)


def mlp_backward_pointwise(rows: int, channels: int, itemsize: int, keeps_hs: bool) -> int:
    """Reads a and ds; writes da, and h * scale where it is wanted."""
    return maps(rows, channels, itemsize, 4 if keeps_hs else 3)


def column_sum(rows: int, channels: int, itemsize: int) -> int:
    """Reads x."""
    return maps(rows, channels, itemsize, 1)


def gather(rows: int, channels: int, itemsize: int) -> int:
    """Reads and writes the visible ``rows``."""
    return maps(rows, channels, itemsize, 2)


def scatter(rows: int, all_rows: int, channels: int, itemsize: int) -> int:
    """Reads the visible rows, writes all of them."""
    return maps(rows + all_rows, channels, itemsize, 1)


def patch_pixels(rows: int, channels: int, itemsize: int) -> int:
    """Reads the visible pixels of 16 * ``channels`` values a row, and writes them as rows."""
    return maps(rows, 16 * channels, itemsize, 2)
