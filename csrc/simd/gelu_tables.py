"""Writes gelu_tables.h beside itself: the fitted constants of math.h. Needs mpmath.

Every polynomial interpolates its function at Chebyshev nodes, in 40-digit arithmetic; its worst
relative error before the coefficients are rounded is measured and written into the header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from mpmath import cos, erfc, expm1, ln, log, lu_solve, matrix, mp, mpf, nint, pi, sqrt

mp.dps = 40
Function = Callable[[mpf], mpf]

LOG2E = 1 / ln(2)
HALF_SQUARE = -LOG2E / 2  # exp(-t^2/2) = 2^(HALF_SQUARE t^2)
TANH_LINEAR = -2 * sqrt(2 / pi) * LOG2E  # exp(-2 sqrt(2/pi) (t + 0.044715 t^3)) in powers of 2
TANH_CUBIC = TANH_LINEAR * mpf("0.044715")
QUICK = -mpf("1.702") * LOG2E


def f32(x: mpf) -> mpf:
    """The nearest float32."""
    return mpf(struct.unpack("f", struct.pack("f", float(x)))[0])


def f64(x: mpf) -> mpf:
    """The nearest float64."""
    return mpf(float(x))


def fit(f: Function, low: mpf, high: mpf, centre: mpf, degree: int) -> list[mpf]:
    """Coefficients of the polynomial in t - centre through the Chebyshev nodes of [low, high]."""
    n = degree + 1
    nodes = [(low + high) / 2 + (high - low) / 2 * cos(pi * (i + mpf("0.5")) / n) for i in range(n)]
    powers = matrix([[(t - centre) ** k for k in range(n)] for t in nodes])
    return list(lu_solve(powers, matrix([f(t) for t in nodes])))


def error(f: Function, low: mpf, high: mpf, centre: mpf, coefficients: list[mpf]) -> mpf:
    """Worst relative error of the polynomial on [low, high]."""
    worst = mpf(0)
    for i in range(201):
        t = low + (high - low) * i / 200
        p = sum(c * (t - centre) ** k for k, c in enumerate(coefficients))
        worst = max(worst, abs(p / f(t) - 1))
    return worst


def tail_ratio(t: mpf) -> mpf:
    """Phi(-t) / 2^(c t^2) with the float32 c, so that the rounding of c cancels in the product."""
    return erfc(t / sqrt(2)) / 2 * mpf(2) ** (-f32(HALF_SQUARE) * t * t)


def tail_interval(i: int) -> tuple[mpf, list[mpf], mpf]:
    """Centre, coefficients and error for the t that round to i."""
    low, high = max(mpf(0), i - mpf("0.5")), i + mpf("0.5")
    # A centre where the leading coefficient is nearly a float32 makes its rounding harmless.
    candidates = [f32(i + mpf(q) / 4096) for q in range(-200, 201)] if i else [mpf(0)]
    centre = min(candidates, key=lambda t: abs(f32(tail_ratio(t)) / tail_ratio(t) - 1))
    coefficients = fit(tail_ratio, low, high, centre, 7)
    return centre, coefficients, error(tail_ratio, low, high, centre, coefficients)


def exp2_slope(f: mpf) -> mpf:
    """(2^f - 1) / f."""
    return expm1(f * ln(2)) / f if f else ln(2)


def split(x: mpf, rounded: Function, grid: int | None = None) -> tuple[mpf, mpf]:
    """Parts x = high + low; the high one a multiple of 2^-grid where one is given."""
    high = nint(x * 2**grid) / mpf(2) ** grid if grid is not None else rounded(x)
    return high, rounded(x - high)


def literal(x: mpf, single: bool) -> str:
    """A C++ literal that reads back exactly."""
    return f"{float(x):.8e}f" if single else f"{float(x):.16e}"


def emit_row(values: list[mpf], single: bool) -> str:
    """Literals between braces, a few to a line."""
    words = [literal(v, single) for v in values]
    per_line = 4 if single else 3
    lines = [", ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)]
    return "{" + ",\n     ".join(lines) + "}"


def main() -> str:
    """The header's text."""
    tail = [tail_interval(i) for i in range(16)]
    rows = [[t[0] for t in tail]] + [[t[1][k] for t in tail] for k in range(8)]
    half = mpf("0.5")
    single, double = (fit(exp2_slope, -half, half, mpf(0), n) for n in (5, 11))
    errors = [
        float(log(e, 2))
        for e in (
            max(t[2] for t in tail),
            error(exp2_slope, -half, half, mpf(0), single),
            error(exp2_slope, -half, half, mpf(0), double),
        )
    ]
    out = [
        "// Written by gelu_tables.py; change that.",
        "// clang-format off",
        "#pragma once",
        "",
        "namespace fusedops {",
        "",
        "// Phi(-t) / 2^(c t^2), c the float32 -log2(e)/2, as polynomials in t - centre for the t",
        f"// rounding to each of 0..15: centres, then coefficients 0..7. Error 2^{errors[0]:.1f}.",
        "alignas(64) constexpr float kTail[9][16] = {",
        ",\n".join("    " + emit_row(row, True) for row in rows) + "};",
        "",
        f"// (2^f - 1) / f on [-0.5, 0.5]. Errors 2^{errors[1]:.1f} and 2^{errors[2]:.1f}.",
        f"constexpr float kExp2F32[6] =\n    {emit_row(single, True)};",
        f"constexpr double kExp2F64[12] =\n    {emit_row(double, False)};",
        "",
        "// Exponents of 2 and sqrt(1/2), as high + low parts. tanh_linear[0] ends in zeros enough",
        "// for (tanh_cubic t^2 + tanh_linear) - tanh_linear to be exact.",
        "template <class T>",
        "struct Exponents {",
        "  T half_square[2], tanh_linear[2], tanh_cubic[2], quick[2], sqrt_half[2];",
        "};",
    ]
    for name, type_name, rounded, grid in (("F32", "float", f32, 16), ("F64", "double", f64, 45)):
        parts = [
            split(HALF_SQUARE, rounded),
            split(TANH_LINEAR, rounded, grid),
            split(TANH_CUBIC, rounded),
            split(QUICK, rounded),
            split(sqrt(half), rounded),
        ]
        lines = [f"    {emit_row(list(pair), name == 'F32')}" for pair in parts]
        out += [f"constexpr Exponents<{type_name}> kExponents{name} = {{", ",\n".join(lines) + "};"]
    return "\n".join([*out, "", "}  // namespace fusedops", ""])


if __name__ == "__main__":
    Path(__file__).with_name("gelu_tables.h").write_text(main())
