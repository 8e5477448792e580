"""Every op a second time in float64 numpy, with explicit loops over pixels and the formulas of the paper.

Nothing from the package is used. Packed features are described by ``sites``: for each slot the image and the row and
column of its patch, found by walking over the mask.
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])


def sites_of(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """``[N, Gh, Gw]`` bool, True = hidden -> visible patches, image by image, row by row."""
    n, gh, gw = mask.shape
    return [(i, r, c) for i in range(n) for r in range(gh) for c in range(gw) if not mask[i, r, c]]


def pixels_of(shape: tuple[int, ...], mask: np.ndarray | None) -> dict[tuple[int, int, int], tuple[int, int, int]]:
    """Pixel (image, y, x) of the whole image -> index of its feature row in an array ``[P or N, h, w, C]``."""
    first, h, w = shape[:3]
    if mask is None:
        return {(n, y, x): (n, y, x) for n in range(first) for y in range(h) for x in range(w)}
    return {
        (n, r * h + y, c * w + x): (slot, y, x)
        for slot, (n, r, c) in enumerate(sites_of(mask))
        for y in range(h)
        for x in range(w)
    }


def gather_patches(x, mask):
    side = x.shape[1] // mask.shape[1]
    out = [x[n, r * side : (r + 1) * side, c * side : (c + 1) * side] for n, r, c in sites_of(mask)]
    return np.stack(out) if out else np.zeros((0, side, side, x.shape[-1]))


def scatter_patches(x, mask, fill=None):
    n, gh, gw = mask.shape
    _, side, _, channels = x.shape
    out = np.zeros((n, gh * side, gw * side, channels)) + (0.0 if fill is None else fill)
    for pixel, row in pixels_of(x.shape, mask).items():
        out[pixel] = x[row]
    return out


def submanifold_depthwise_conv2d(x, weight, bias, mask):
    radius = weight.shape[-1] // 2
    pixels = pixels_of(x.shape, mask)
    out = np.zeros_like(x)
    for (n, y, c), row in pixels.items():
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                neighbour = pixels.get((n, y + dy, c + dx))
                if neighbour is not None:
                    out[row] += x[neighbour] * weight[:, 0, dy + radius, dx + radius]
        if bias is not None:
            out[row] += bias
    return out


def layer_norm(x, weight=None, bias=None, eps=1e-6):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    return (y if weight is None else y * weight) + (0.0 if bias is None else bias)


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2))) if x.size else x


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def global_response_norm(x, gamma, beta, mask, scope, eps=1e-6):
    """Paper Algorithm 1 over the rows of each image (or of the batch)."""
    pixels = pixels_of(x.shape, mask)
    out = np.zeros_like(x)
    groups: dict[int, list] = {}
    for (n, _, _), row in pixels.items():
        groups.setdefault(n if scope == "image" else 0, []).append(row)
    for rows in groups.values():
        gx = np.sqrt(sum(x[row] ** 2 for row in rows))
        nx = gx / (gx.mean() + eps)
        for row in rows:
            out[row] = gamma.ravel() * (x[row] * nx) + beta.ravel() + x[row]
    return out


def gelu_grn(x, gamma, beta, mask, scope):
    return global_response_norm(gelu(x), gamma, beta, mask, scope)


def layer_norm_grn(x, ln_weight, ln_bias, gamma, beta, mask, scope):
    return global_response_norm(layer_norm(x, ln_weight, ln_bias), gamma, beta, mask, scope)


def depthwise_conv_layer_norm(x, weight, bias, ln_weight, ln_bias, mask):
    return layer_norm(submanifold_depthwise_conv2d(x, weight, bias, mask), ln_weight, ln_bias)


def linear(x, weight, bias=None):
    out = np.zeros((*x.shape[:-1], weight.shape[0]))
    for row in np.ndindex(*x.shape[:-1]):
        for o in range(weight.shape[0]):
            out[(*row, o)] = sum(x[row] * weight[o]) + (0.0 if bias is None else bias[o])
    return out


def pointwise_mlp(
    x, w1, b1, gamma, beta, w2, b2, mask, residual, drop_path_scale, scope, act, eps=1e-6, layer_scale=1.0
):
    activation = gelu if act == "gelu" else gelu_tanh
    y = activation(linear(x, w1, b1))
    y = y if gamma is None else global_response_norm(y, gamma, beta, mask, scope, eps)
    y = linear(y, w2, b2) * layer_scale
    if drop_path_scale is not None:
        for (n, _, _), row in pixels_of(x.shape, mask).items():
            y[row] = y[row] * drop_path_scale[n]
    return y if residual is None else residual + y


def gathered_pointwise_mlp(
    x, w1, b1, gamma, beta, w2, b2, mask, residual, drop_path_scale, scope, act, ln_weight, ln_bias
):
    x = gather_patches(x, mask)
    if ln_weight is not None:
        x = layer_norm(x, ln_weight, ln_bias)
    return pointwise_mlp(x, w1, b1, gamma, beta, w2, b2, mask, residual, drop_path_scale, scope, act)


def _windows(x, weight, bias, size):
    """Convolution of stride ``size`` of NHWC ``x`` with ``weight [O, C, size, size]``, window by window."""
    n, h, w, _ = x.shape
    out = np.zeros((n, h // size, w // size, weight.shape[0]))
    for i, y, c in np.ndindex(*out.shape[:3]):
        window = x[i, y * size : (y + 1) * size, c * size : (c + 1) * size]
        for o in range(weight.shape[0]):
            out[i, y, c, o] = sum(
                (window[dy, dx] * weight[o, :, dy, dx]).sum() for dy in range(size) for dx in range(size)
            )
    return out if bias is None else out + bias


def patch_embed(images, weight, bias, mask):
    dense = _windows(images.transpose(0, 2, 3, 1), weight, bias, 4)
    return dense if mask is None else gather_patches(dense, mask)


def patch_embed_layer_norm(images, weight, bias, ln_weight, ln_bias, mask):
    return layer_norm(patch_embed(images, weight, bias, mask), ln_weight, ln_bias)


def downsample(x, ln_weight, ln_bias, weight, bias):
    return _windows(layer_norm(x, ln_weight, ln_bias), weight, bias, 2)


def convnextv2_block(
    x,
    dw_weight,
    dw_bias,
    ln_weight,
    ln_bias,
    w1,
    b1,
    gamma,
    beta,
    w2,
    b2,
    mask,
    drop_path_scale,
    scope,
    act,
    grn_eps,
    layer_scale=1.0,
):
    y = depthwise_conv_layer_norm(x, dw_weight, dw_bias, ln_weight, ln_bias, mask)
    eps = 1e-6 if grn_eps is None else grn_eps
    return pointwise_mlp(y, w1, b1, gamma, beta, w2, b2, mask, x, drop_path_scale, scope, act, eps, layer_scale)
