"""Writes gelu_tables.h beside itself: the fitted constants of math.h. Needs mpmath.

Every polynomial interpolates its function at Chebyshev nodes, in 40-digit arithmetic; its worst
error before the coefficients are rounded is measured and written into the header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from mpmath import cos, erfc, expm1, findroot, ln, log, lu_solve, matrix, mp, mpf, nint, sqrt
from mpmath import pi as PI

mp.dps = 40
Function = Callable[[mpf], mpf]
Interval = tuple[mpf, mpf]

LOG2E = 1 / ln(2)
HALF = mpf("0.5")
HALF_SQUARE = -LOG2E / 2  # exp(-t^2/2) = 2^(HALF_SQUARE t^2)
TANH_LINEAR = -2 * sqrt(2 / PI) * LOG2E  # exp(-2 sqrt(2/pi) (t + 0.044715 t^3)) in powers of 2
TANH_CUBIC = TANH_LINEAR * mpf("0.044715")
QUICK = -mpf("1.702") * LOG2E
SILU = -LOG2E


def f32(x: mpf) -> mpf:
    """The nearest float32."""
    return mpf(struct.unpack("f", struct.pack("f", float(x)))[0])


def f64(x: mpf) -> mpf:
    """The nearest float64."""
    return mpf(float(x))


# --- what is tabulated ----------------------------------------------------------------------------


def tail(t: mpf) -> mpf:
    """Phi(-t), the normal distribution's."""
    return erfc(t / sqrt(2)) / 2


def tail_ratio(t: mpf) -> mpf:
    """Phi(-t) / 2^(c t^2) with the float32 c, so that the rounding of c cancels in the product."""
    return tail(t) * mpf(2) ** (-f32(HALF_SQUARE) * t * t)


def gelu_bend(t: mpf) -> mpf:
    """log2 of Phi(-t) without the c t^2 of the float32 c."""
    return log(tail_ratio(t), 2)


def tanh_exponent(t: mpf) -> mpf:
    """log2 of exp(-v), v what gelu_tanh gives to the sigmoid."""
    return (TANH_LINEAR + TANH_CUBIC * t * t) * t


def logistic_bend(exponent: Function) -> Function:
    """log2 of the sigmoid at -v without the exponent, v = -exponent / log2(e)."""
    return lambda t: -log(1 + mpf(2) ** exponent(t), 2)


def logistic(exponent: Function) -> Function:
    """log2 of the sigmoid at -v."""
    return lambda t: exponent(t) - log(1 + mpf(2) ** exponent(t), 2)


def exp2_slope(f: mpf) -> mpf:
    """(2^f - 1) / f."""
    return expm1(f * ln(2)) / f if f else ln(2)


# --- fits -----------------------------------------------------------------------------------------


def chebyshev(low: mpf, high: mpf, n: int) -> list[mpf]:
    """The n Chebyshev nodes of [low, high]."""
    return [(low + high) / 2 + (high - low) / 2 * cos(PI * (i + HALF) / n) for i in range(n)]


def solve(f: Function, nodes: list[mpf], centre: mpf, first: int = 0) -> list[mpf]:
    """Coefficients of (t - centre)^first, ... of the polynomial through the nodes."""
    powers = range(first, first + len(nodes))
    system = matrix([[(t - centre) ** k for k in powers] for t in nodes])
    return [mpf(0)] * first + list(lu_solve(system, matrix([f(t) for t in nodes])))


def points(low: mpf, high: mpf) -> list[mpf]:
    """Where errors are measured."""
    return [low + (high - low) * i / 100 for i in range(101)]


def value(c: list[mpf], x: mpf) -> mpf:
    """The polynomial."""
    return sum(a * x**k for k, a in enumerate(c))


def intervals(offset: mpf, scale: mpf) -> list[Interval]:
    """The t of each quarter octave of u = scale t + offset, offset a power of two, 4 octaves."""
    edges = [offset * 2**e * (1 + mpf(j) / 4) for e in range(4) for j in range(4)] + [16 * offset]
    return [((a - offset) / scale, (b - offset) / scale) for a, b in pairwise(edges)]


def by_index(rows: list[list[mpf]], offset: mpf) -> list[list[mpf]]:
    """Columns, each in the order of the index: bits 21 to 24 of a float32 u."""
    first = (struct.unpack("I", struct.pack("f", float(offset)))[0] >> 21) % 16
    return [[rows[(i - first) % 16][k] for i in range(16)] for k in range(len(rows[0]))]


def bend_table(f: Function, scale: mpf, degree: int) -> tuple[list[list[mpf]], mpf, mpf]:
    """Centres, values there, coefficients 1 to degree; the worst error; the largest |f - value|.

    The centre is where f is a multiple of 2^-14, so that adding it to whole numbers is exact; it is
    chosen beside the Chebyshev node that it replaces. Where f is tiny the value is 0, the centre
    lies outside, and f is a multiple of t - centre; the last row is for all larger t.
    """
    rows, worst, reach = [], mpf(0), mpf(0)
    for low, high in intervals(mpf(1), scale):
        if abs(f(low)) < mpf(2) ** -27:
            rows.append([f32(high)] + [mpf(0)] * (degree + 1))
            continue
        if abs(f(high)) < mpf(2) ** -10:
            centre, start = f32(high + 2 * (high - low)), mpf(0)
            ratio = solve(lambda t, c=centre: f(t) / (t - c), chebyshev(low, high, degree), centre)
            c = [mpf(0), *ratio]
        else:
            nodes = chebyshev(low, high, degree + 1)
            node = nodes.pop(degree // 2 + 1)
            best = (mpf(1), node, mpf(0))
            for step in range(-100, 101):
                start = (nint(f(node) * 2**14) + step) / mpf(2) ** 14
                centre = f32(findroot(lambda t, s=start: f(t) - s, node, verify=False))
                if abs(centre - node) < (high - low) / 40:
                    best = min(best, (abs(f(centre) - start), centre, start))
            _, centre, start = best
            c = solve(lambda t, s=start: f(t) - s, nodes, centre, 1)
        for t in points(low, high):
            worst = max(worst, abs(start + value(c, t - centre) - f(t)) * ln(2))
        reach = max(reach, abs(f(low) - start), abs(f(high) - start))
        rows.append([centre, start, *c[1:]])
    return by_index(rows, mpf(1)), worst, reach


def log_table(f: Function, offset: mpf, last: list[mpf] | None) -> tuple[list[list[mpf]], mpf]:
    """Cubics in t of log2 of a tail; the worst error. last: the row beyond the table's end."""
    rows, worst = [], mpf(0)
    for low, high in intervals(offset, mpf(1)):
        c = solve(f, chebyshev(low, high, 4), mpf(0))
        worst = max(worst, *(abs(value(c, t) - f(t)) * ln(2) for t in points(low, high)))
        rows.append(c)
    if last:
        rows[-1] = last
    return by_index(rows, offset), worst


def ratio_table() -> tuple[list[list[mpf]], mpf]:
    """Centres and coefficients 0 to 6 of tail_ratio; the worst relative error.

    A centre where the leading coefficient is nearly a float32 makes its rounding harmless.
    """
    rows, worst = [], mpf(0)
    for low, high in intervals(mpf(1), mpf(1)):
        middle = (low + high) / 2
        tries = [f32(middle + (high - low) * q / 2048) for q in range(-200, 201)]
        centre = min(tries, key=lambda t: abs(f32(tail_ratio(t)) / tail_ratio(t) - 1))
        c = solve(tail_ratio, chebyshev(low, high, 7), centre)
        worst = max(
            worst, *(abs(value(c, t - centre) / tail_ratio(t) - 1) for t in points(low, high))
        )
        rows.append([centre, *c])
    return by_index(rows, mpf(1)), worst


def exp2_fit(f: Function, degree: int, reach: mpf) -> tuple[list[mpf], mpf]:
    """Coefficients on [-reach, reach]; the worst relative error."""
    c = solve(f, chebyshev(-reach, reach, degree + 1), mpf(0))
    return c, max(abs(value(c, x) / f(x) - 1) for x in points(-reach, reach))


# --- the header -----------------------------------------------------------------------------------


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


def emit_table(name: str, columns: list[list[mpf]]) -> list[str]:
    """A table of 16 lanes a row."""
    return [
        f"alignas(64) constexpr float {name}[{len(columns)}][16] = {{",
        ",\n".join("    " + emit_row(column, True) for column in columns) + "};",
    ]


def power(error: mpf) -> str:
    """As a power of two."""
    return f"2^{float(log(error, 2)):.1f}"


def tables() -> list[str]:
    """The tables of 16."""
    out, reach = [], mpf(0)
    for name, f, scale, degree in (
        ("kGeluBend", gelu_bend, mpf(1), 5),
        ("kTanhBend", logistic_bend(tanh_exponent), mpf("2.4375"), 6),
        ("kQuickBend", logistic_bend(lambda t: QUICK * t), mpf("1.125"), 6),
        ("kSiluBend", logistic_bend(lambda t: SILU * t), mpf("0.65625"), 6),
    ):
        columns, worst, most = bend_table(f, scale, degree)
        reach = max(reach, most)
        out += [f"// Error {power(worst)}; u = {float(scale)} t + 1.", *emit_table(name, columns)]
    if reach > mpf("0.25"):
        raise ValueError(f"kExp2F32 is fitted for a reach of 1/4 but got {float(reach)}")
    out += [
        "",
        "// log2 Phi(-t), log2 sigmoid(-v(t)): cubics in t, coefficients 0 to 3. Half: t < 7.5.",
    ]
    beyond = [mpf(0), QUICK, mpf(0), mpf(0)], [mpf(0), SILU, mpf(0), mpf(0)]
    for name, f, offset, last in (
        ("kGeluLog", lambda t: log(tail(t), 2), mpf(1), None),
        ("kGeluLogHalf", lambda t: log(tail(t), 2), HALF, None),
        ("kTanhLog", logistic(tanh_exponent), mpf(1), None),
        ("kTanhLogHalf", logistic(tanh_exponent), HALF, None),
        ("kQuickLog", logistic(lambda t: QUICK * t), mpf(1), beyond[0]),
        ("kSiluLog", logistic(lambda t: SILU * t), mpf(2), beyond[1]),
    ):
        columns, worst = log_table(f, offset, last)
        out += [f"// Error {power(worst)}; u = t + {float(offset)}.", *emit_table(name, columns)]
    columns, worst = ratio_table()
    return [
        *out,
        "",
        "// Phi(-t) / 2^(c t^2), c the float32 -log2(e)/2: centres, then coefficients 0 to 6 in",
        f"// t - centre. Error {power(worst)}; u = t + 1.",
        *emit_table("kTailRatio", columns),
    ]


def main() -> str:
    """The header's text."""
    single, single_error = exp2_fit(exp2_slope, 6, mpf("0.75"))
    double, double_error = exp2_fit(exp2_slope, 11, HALF)
    narrow, narrow_error = exp2_fit(lambda f: mpf(2) ** f, 4, HALF)
    out = [
        "// Written by gelu_tables.py; change that.",
        "// clang-format off",
        "#pragma once",
        "",
        "namespace fusedops {",
        "",
        "// Each table has an entry for each quarter octave of u, t in 16 intervals; errors are",
        "// relative ones of the tail. Bends: what log2 of a tail is beside its leading exponent:",
        "// centres, values there, coefficients from the first on in t - centre.",
        *tables(),
        "",
        f"// (2^f - 1) / f: on [-0.75, 0.75] with error {power(single_error)}, in double on",
        f"// [-0.5, 0.5] with {power(double_error)}; 2^f on the same with {power(narrow_error)}.",
        f"constexpr float kExp2F32[7] =\n    {emit_row(single, True)};",
        f"constexpr double kExp2F64[12] =\n    {emit_row(double, False)};",
        f"constexpr float kExp2Narrow[5] =\n    {emit_row(narrow, True)};",
        "",
        "// Exponents of 2 and sqrt(1/2), as high + low parts. tanh_linear[0] ends in zeros enough",
        "// for (tanh_cubic t^2 + tanh_linear) - tanh_linear to be exact.",
        "template <class T>",
        "struct Exponents {",
        "  T half_square[2], tanh_linear[2], tanh_cubic[2], quick[2], silu[2], sqrt_half[2];",
        "};",
    ]
    for name, type_name, rounded, grid in (("F32", "float", f32, 16), ("F64", "double", f64, 45)):
        parts = [
            split(HALF_SQUARE, rounded),
            split(TANH_LINEAR, rounded, grid),
            split(TANH_CUBIC, rounded),
            split(QUICK, rounded),
            split(SILU, rounded),
            split(sqrt(HALF), rounded),
        ]
        lines = [f"    {emit_row(list(pair), name == 'F32')}" for pair in parts]
        out += [f"constexpr Exponents<{type_name}> kExponents{name} = {{", ",\n".join(lines) + "};"]
    return "\n".join([*out, "", "}  // namespace fusedops", ""])


if __name__ == "__main__":
    Path(__file__).with_name("gelu_tables.h").write_text(main())
