"""Derives the coefficients of the float32 GELU in ``gelu.h`` and prints their error.

For x >= 0 the tail of the normal distribution is ``Phi(-x) = exp(-x^2 / 2) * q(x)``. With ``t = 1 / (1 + p x)`` the
factor q is smooth in t on (0, 1], so a polynomial ``t * P(t)`` fits it to float32 precision. Weighted least squares
at Chebyshev nodes, iterated towards equal relative error (Lawson's method).
"""

import math

import numpy as np

P = 0.33
DEGREE = 8


def tail_factor(x: np.ndarray) -> np.ndarray:
    exact = [0.5 * math.erfc(v / math.sqrt(2)) * math.exp(v * v / 2) for v in x]
    return np.array(exact)


def fit() -> tuple[np.ndarray, float]:
    nodes = np.cos(np.linspace(0, np.pi, 4001))
    t_min = 1 / (1 + P * 14.0)
    t = 0.5 * (1 + t_min) + 0.5 * (1 - t_min) * nodes
    q = tail_factor((1 / t - 1) / P)
    basis = t[:, None] ** np.arange(1, DEGREE + 2)[None, :]
    weight = np.ones_like(t)
    best, best_error = np.zeros(DEGREE + 1), np.inf
    for _ in range(200):
        root = np.sqrt(weight)[:, None]
        coefficients = np.linalg.lstsq(root * basis / q[:, None], root[:, 0], rcond=None)[0]
        error = np.abs(basis @ coefficients / q - 1)
        if error.max() < best_error:
            best, best_error = coefficients, error.max()
        weight = weight * error
        weight /= weight.sum()
    return best, best_error


if __name__ == "__main__":
    coefficients, error = fit()
    print(f"p = {P}, maximum relative error {error:.2e}; low to high power of t:")
    for c in coefficients:
        print(f"  {c:.9e}")
