"""The kernels as large as the MLP's weights."""

from __future__ import annotations

from .bytes_moved import STATISTIC
from .cases import Case, StageShape


def parameter_cases(ops, shape: StageShape, itemsize: int) -> list[Case]:
    """Operands of the products and the gradients behind them; products per image where the schedule makes them."""
    c, hidden, images = shape.width, 4 * shape.width, shape.images
    weight, per_image = c * hidden, images * c * hidden

    def weights(draw):
        return draw.parameters(hidden, c), draw.parameters(c, hidden)

    def prepare(draw, sets):
        (w1, w2), like = weights(draw), draw.features(1, 1)[0]
        b1, beta, b2 = draw.parameters(hidden), draw.parameters(hidden), draw.parameters(c)
        gain, shift = draw.parameters(c), draw.parameters(c)
        return [lambda: ops.mlp_parameters.default(w1, b1, w2, b2, beta, gain, shift, like)] * sets

    def unfold(draw, sets):
        (w1, _), gain, shift, db1 = weights(draw), draw.parameters(c), draw.parameters(c), draw.parameters(hidden)
        dw1 = draw.parameters(hidden, c)
        return [lambda: ops.unfold_layer_norm.default(w1, gain, shift, db1, dw1)] * sets

    def reduce(draw, sets):
        w2 = draw.features(1, c, hidden)[0]
        products = [draw.statistics(images, c, hidden) for _ in range(sets)]
        return [lambda g=g: ops.products_reduce.default(g, w2) for g in products]

    def gradient(draw, sets):
        scale, d_sum, beta = draw.statistics(images, hidden), draw.parameters(c), draw.parameters(hidden)
        products = [draw.statistics(images, c, hidden) for _ in range(sets)]
        return [lambda g=g: ops.products_weight.default(g, scale, d_sum, beta) for g in products]

    cases = [
        Case(f"mlp_parameters {shape.label}", 2 * weight * (STATISTIC + itemsize), prepare),
        Case(f"unfold_layer_norm {shape.label}", 3 * weight * STATISTIC, unfold),
    ]
    if shape.kept * shape.side**2 > 2 * c:
        cases += [
            Case(f"products_reduce {shape.label}", per_image * STATISTIC, reduce),
            Case(f"products_weight {shape.label}", (per_image + weight) * STATISTIC, gradient),
        ]
    return cases
