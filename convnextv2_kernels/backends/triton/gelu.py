"""GELU(a) = a gate(a) and its slope gate(a) + a gate'(a), in the accumulators' dtype; see ``docs/kernels/mlp.md``.

``ACT`` is "gelu", "gelu_tanh" or "none". ``NARROW`` says that the result is rounded to bfloat16: the exact form then
uses a polynomial of nine odd terms, since the math library's erf takes 32 issue slots per element; its error, below
4e-5, is a hundredth of the rounding error. The tanh form is one exponential: with ``e = exp(-|2u|)`` and ``r = 1 / (1 +
e)`` the gate is r or ``e r`` and its slope ``e r^2 d(2u)/da``; neither cancels, and e cannot overflow.
"""

import triton
import triton.language as tl


@triton.jit
def _normal_cdf(a, NARROW: tl.constexpr):
    if NARROW:
        u = a * a
        p = u * 3.58239029e-11 - 3.76448339e-09
        p = p * u + 1.7443223e-07
        p = p * u - 4.73105501e-06
        p = p * u + 8.4356514e-05
        p = p * u - 0.00105536974
        p = p * u + 0.00964426063
        p = p * u - 0.0660783723
        p = p * u + 0.398762643
        # beyond the fitted range the polynomial overshoots, so that 0 and 1 are reached exactly
        return tl.minimum(tl.maximum(a * p + 0.5, 0.0), 1.0)
    else:
        return tl.erf(a * 0.70710678118654752440) * 0.5 + 0.5


@triton.jit
def _tanh_parts(a):
    # beyond 32 the gate is 0 or 1; the limit keeps its slope 0 where the square would be infinite
    square = tl.minimum(a * a, 1024.0)
    twice = a * (1.5957691216057307118 + 0.071354816272600248776 * square)
    e = tl.exp(-tl.abs(twice))
    r = 1.0 / (1.0 + e)
    tail = e * r
    gate = tl.where(a < 0, tail, r)
    slope = tail * r * (1.5957691216057307118 + 3 * 0.071354816272600248776 * square)
    return gate, slope


@triton.jit
def activate(a, ACT: tl.constexpr, NARROW: tl.constexpr):
    """act(a) of float32 or float64."""
    if ACT == "gelu":
        return a * _normal_cdf(a, NARROW)
    elif ACT == "gelu_tanh":
        gate, _slope = _tanh_parts(a)
        return a * gate
    else:
        return a


@triton.jit
def activate_with_slope(a, ACT: tl.constexpr, NARROW: tl.constexpr):
    """``(act(a), act'(a))`` of float32 or float64."""
    if ACT == "gelu":
        cdf = _normal_cdf(a, NARROW)
        return a * cdf, cdf + a * (0.39894228040143267794 * tl.exp(-0.5 * a * a))
    elif ACT == "gelu_tanh":
        gate, slope = _tanh_parts(a)
        return a * gate, gate + a * slope
    else:
        return a, tl.full(a.shape, 1.0, a.dtype)


@triton.jit
def widen(x):
    """x in the dtype of accumulators and statistics: float64 for float64, else float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)
