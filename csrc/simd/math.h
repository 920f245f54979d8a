// Activations on vectors: gelu (erf), gelu_tanh, gelu_quick, silu, each with _grad, and of each
// value a _narrow one for results that are rounded to 16 bits.
//
// With t = |x|, a value is max(x, 0) - t * tail(t), tail falling from 1/2 to 0, and a derivative is
// slope(t) for x < 0, 1 - slope(t) otherwise. Exponents are kept to more bits than a lane has:
// results hold their relative accuracy down to the subnormals. -0 appears only for x = -0 and where
// the value underflows. NaN gives NaN, +-inf the limits (inf, -0; derivatives 1, 0).
//
// f32 and narrow values: log2 of the tail is its leading exponent plus a bend, which a table of 16
// polynomials gives; one power of two of their sum, and t, are all that rounds beside the last
// difference. docs/accuracy.md has the largest error of each, and over which floats. The others, by
// samples, without FMA / with it; derivatives cross zero near x = -0.75, so theirs are relative to
// the size of the two terms, sigma(x) + |x| sigma'(x) for x * sigma(x), in units of 2^-24 or 2^-53:
//                        f32         f64
//   gelu                            4.0 / 4.0 ulp
//   gelu_tanh                       3.0 / 2.8 ulp
//   gelu_quick, silu                2.8 / 2.8 ulp
//   gelu_grad         3.7 / 3.4   4.2 / 4.2
//   gelu_tanh_grad    7.8 / 7.6   6.8 / 6.8
//   gelu_quick_grad   5.4 / 5.4   5.6 / 5.6
#pragma once
#include <math.h>

#include "gelu_tables.h"
#include "many.h"

namespace fusedops::FUSEDOPS_ISA {

template <OfFloats F>
FUSEDOPS_INLINE const Exponents<float>& exponents(F) {
  return kExponentsF32;
}
FUSEDOPS_INLINE const Exponents<double>& exponents(Vd) { return kExponentsF64; }

template <class V, class T, int N>
FUSEDOPS_INLINE V polynomial(const T (&c)[N], V x) {
  V r = set1<V>(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; i--) r = mul_add(r, x, set1<V>(c[i]));
  return r;
}
template <OfFloats F>
FUSEDOPS_INLINE F exp2_slope(F f) {
  return polynomial(kExp2F32, f);
}
FUSEDOPS_INLINE Vd exp2_slope(Vd f) { return polynomial(kExp2F64, f); }

// |x|, at most `limit`: beyond it results are what they are at the limit. NaN stays.
FUSEDOPS_INLINE Vf magnitude(Vf x, double limit, double) { return min(set1<Vf>(limit), abs(x)); }
FUSEDOPS_INLINE Vd magnitude(Vd x, double, double limit) { return min(set1<Vd>(limit), abs(x)); }

// 2^(n + f), n integral, |f| <= 1/2, 2^f = 1 + f * slope. Scaling by 2^n is left to the last step
// of a formula: nothing else then rounds into the subnormals.
template <class V>
struct Power {
  V n, f, slope;
};
template <class V>
FUSEDOPS_INLINE Power<V> power(V a, V b, V low) {  // 2^(a * b + low)
  const V n = round(a * b), f = fma(a, b, -n) + low;
  return {n, f, exp2_slope(f)};
}
template <class V>
FUSEDOPS_INLINE V times_fraction(V a, const Power<V>& p) {  // a * 2^f
  return mul_add(a * p.f, p.slope, a);
}

// exp(-t^2 / 2) but for the rounding of its constant: 2^(c t^2) with c = half_square[0].
template <class V>
FUSEDOPS_INLINE Power<V> gauss(V t) {
  const V c = set1<V>(exponents(t).half_square[0]), s = t * t;
  return power(s, c, fma(t, t, -s) * c);
}
// phi(t) / gauss(t)
template <class V>
FUSEDOPS_INLINE V gauss_density(V t) {
  constexpr double density = 0.39894228040143268, ln2 = 0.69314718055994531;
  const V rounding = set1<V>(density * ln2 * exponents(t).half_square[1]);
  return mul_add(t * t, rounding, set1<V>(density));
}
// high + low = log2 of exp(-2u) / t, u = sqrt(2/pi) (t + 0.044715 t^3)
template <class V>
struct Sum {
  V high, low;
};
template <class V>
FUSEDOPS_INLINE Sum<V> tanh_exponent(V t) {
  const auto& c = exponents(t);
  const V linear = set1<V>(c.tanh_linear[0]), cubic = set1<V>(c.tanh_cubic[0]);
  const V s = t * t, s_low = fma(t, t, -s), high = fma(cubic, s, linear);
  const V low = fma(cubic, s, linear - high) + set1<V>(c.tanh_linear[1]);
  return {high, mul_add(cubic, s_low, mul_add(set1<V>(c.tanh_cubic[1]), s, low))};
}
template <class V>
FUSEDOPS_INLINE Power<V> tanh_power(V t) {  // exp(-2u)
  const Sum<V> e = tanh_exponent(t);
  return power(t, e.high, t * e.low);
}
// exp(-1.702 t), exp(-t)
template <class V>
FUSEDOPS_INLINE Power<V> quick_power(V t) {
  const auto& c = exponents(t).quick;
  return power(t, set1<V>(c[0]), t * set1<V>(c[1]));
}
template <class V>
FUSEDOPS_INLINE Power<V> silu_power(V t) {
  const auto& c = exponents(t).silu;
  return power(t, set1<V>(c[0]), t * set1<V>(c[1]));
}

// Phi(-t) / gauss(t)
FUSEDOPS_INLINE Vf tail_ratio(Vf t) {
  const Entry e = entry16(t + set1<Vf>(1));
  const Vf d = t - lookup16(kTailRatio[0], e);
  Vf r = lookup16(kTailRatio[7], e);
#pragma GCC unroll 8
  for (int i = 6; i >= 1; i--) r = mul_add(r, d, lookup16(kTailRatio[i], e));
  return r;
}
// Phi(-t) through libm: erfc(z + e) = erfc(z) - e * 2/sqrt(pi) exp(-z^2), e what rounding z lost.
FUSEDOPS_INLINE Vd libm_tail(Vd t, const Power<Vd>& p) {
  const auto& c = exponents(t).sqrt_half;
  const Vd h = set1<Vd>(c[0]), z = t * h, e = fma(t, h, -z) + t * set1<Vd>(c[1]);
  const Vd bell = scale2(times_fraction(set1<Vd>(1.1283791670955126), p), p.n);
  double lane[Vd::N];
  store(lane, z);
  for (double& value : lane) value = erfc(value);
  return set1<Vd>(0.5) * (load<Vd>(lane) - e * bell);
}
// t Phi(-t) / phi(t) for t > kFar: erfc would soon be subnormal. The next term is below 2^-58.
constexpr double kFar = 25;
constexpr double kMills[9] = {1, -1, 3, -15, 105, -945, 10395, -135135, 2027025};
FUSEDOPS_INLINE Vd mills(Vd t) { return polynomial(kMills, set1<Vd>(1) / (t * t)); }

template <OfFloats F>
FUSEDOPS_INLINE F positive(F x) {
  return max(set1<F>(-0.), x);  // NaN stays
}

// max(x, 0) - t * 2^(a b + a_low b_low + bend): the bend of t is looked up by u. The table's second
// row is what is added to the exponent without rounding, being short.
template <OfFloats F, int N>
FUSEDOPS_INLINE F bent_value(F x, F t, F u, F a, F b, F a_low, F b_low,
                             const float (&table)[N][16]) {
  const auto e = entry16(u);
  const F d = t - lookup16(table[0], e), start = lookup16(table[1], e);
  F bend = lookup16(table[N - 1], e);
#pragma GCC unroll 5
  for (int i = N - 2; i >= 2; i--) bend = mul_add(bend, d, lookup16(table[i], e));
  const F n = round(mul_add(a, b, start));
  const F f = mul_add(bend, d, mul_add(a_low, b_low, fma(a, b, start - n)));
  return positive(x) - scale2(mul_add(t * f, exp2_slope(f), t), n);
}
// The place in a table of t; past its end the last entry holds.
template <OfFloats F>
FUSEDOPS_INLINE F place(F t, double scale) {
  return min(set1<F>(15.5), mul_add(t, set1<F>(scale), set1<F>(1)));
}

template <OfFloats F>
FUSEDOPS_INLINE F gelu(F x) {
  const F t = min_abs(x, 14.9), c = set1<F>(kExponentsF32.half_square[0]);
  const F s = t * t, s_low = fma(t, t, -s);
  return bent_value(x, t, t + set1<F>(1), s, c, s_low, c, kGeluBend);
}
template <OfFloats F>
FUSEDOPS_INLINE F gelu_tanh(F x) {
  const F t = min_abs(x, 11);
  const Sum<F> e = tanh_exponent(t);
  return bent_value(x, t, place(t, 2.4375), t, e.high, t, e.low, kTanhBend);
}
template <OfFloats F>
FUSEDOPS_INLINE F gelu_quick(F x) {
  const auto& c = kExponentsF32.quick;
  const F t = min_abs(x, 65), high = set1<F>(c[0]), low = set1<F>(c[1]);
  return bent_value(x, t, place(t, 1.125), t, high, t, low, kQuickBend);
}
template <OfFloats F>
FUSEDOPS_INLINE F silu(F x) {
  const auto& c = kExponentsF32.silu;
  const F t = min_abs(x, 110), high = set1<F>(c[0]), low = set1<F>(c[1]);
  return bent_value(x, t, place(t, 0.65625), t, high, t, low, kSiluBend);
}

// For results that are rounded to f16 or bf16: within a small part of half an ulp of those. log2 of
// the tail is one cubic; up to t = 7, where f16 results are 0, there are tables of half the width.
template <OfFloats F>
FUSEDOPS_INLINE F narrow_value(F x, F t, F u, const float (&table)[4][16]) {
  const auto e = entry16(u);
  F log = lookup16(table[3], e);
#pragma GCC unroll 3
  for (int i = 2; i >= 0; i--) log = mul_add(log, t, lookup16(table[i], e));
  const F n = round(log);
  return mul_add(-t, scale2(polynomial(kExp2Narrow, log - n), n), positive(x));
}
template <class T>
constexpr bool kHalf = false;
template <>
constexpr bool kHalf<f16> = true;
template <class T, OfFloats F>
FUSEDOPS_INLINE F gelu_narrow(F x) {
  const F t = min_abs(x, kHalf<T> ? 7 : 14.9);
  return narrow_value(x, t, t + set1<F>(kHalf<T> ? 0.5 : 1), kHalf<T> ? kGeluLogHalf : kGeluLog);
}
template <class T, OfFloats F>
FUSEDOPS_INLINE F gelu_tanh_narrow(F x) {
  const F t = min_abs(x, kHalf<T> ? 7 : 11);
  return narrow_value(x, t, t + set1<F>(kHalf<T> ? 0.5 : 1), kHalf<T> ? kTanhLogHalf : kTanhLog);
}
template <OfFloats F>
FUSEDOPS_INLINE F gelu_quick_narrow(F x) {
  const F t = min_abs(x, 65);
  return narrow_value(x, t, min(set1<F>(15.5), t + set1<F>(1)), kQuickLog);
}
template <OfFloats F>
FUSEDOPS_INLINE F silu_narrow(F x) {
  const F t = min_abs(x, 110);
  return narrow_value(x, t, min(set1<F>(31), t + set1<F>(2)), kSiluLog);
}

FUSEDOPS_INLINE Vd gelu(Vd x) {
  const Vd t = magnitude(x, 0, 40);
  const Power<Vd> p = gauss(t);
  const Vd far = scale2(times_fraction(gauss_density(t) * mills(t), p), p.n);
  return max(set1<Vd>(-0.), x) - if_negative(set1<Vd>(kFar) - t, far, t * libm_tail(t, p));
}
FUSEDOPS_INLINE Vf gelu_grad(Vf x) {
  const Vf t = magnitude(x, 14.9, 0);
  const Power<Vf> p = gauss(t);
  const Vf ratio = fma(-t, gauss_density(t), tail_ratio(t));
  const Vf slope = scale2(times_fraction(ratio, p), p.n);
  return if_negative(x, slope, set1<Vf>(1) - slope);
}
FUSEDOPS_INLINE Vd gelu_grad(Vd x) {
  const Vd t = magnitude(x, 0, 40);
  const Power<Vd> p = gauss(t);
  const Vd density = gauss_density(t);
  const Vd near = libm_tail(t, p) - scale2(times_fraction(t * density, p), p.n);
  const Vd far = scale2(times_fraction(density * (mills(t) / t - t), p), p.n);
  const Vd slope = if_negative(set1<Vd>(kFar) - t, far, near);
  return if_negative(x, slope, set1<Vd>(1) - slope);
}

// x * sigmoid(v(x)) with p = exp(-v(t)), v odd.
FUSEDOPS_INLINE Vd logistic(Vd x, Vd t, const Power<Vd>& p) {
  const Vd one = set1<Vd>(1), w = scale2(times_fraction(one, p), p.n);
  return max(set1<Vd>(-0.), x) - scale2(times_fraction(t, p), p.n) / (one + w);
}
FUSEDOPS_INLINE Vd gelu_tanh(Vd x) {
  const Vd t = magnitude(x, 0, 22);
  return logistic(x, t, tanh_power(t));
}
FUSEDOPS_INLINE Vd gelu_quick(Vd x) {
  const Vd t = magnitude(x, 0, 450);
  return logistic(x, t, quick_power(t));
}
FUSEDOPS_INLINE Vd silu(Vd x) {
  const Vd t = magnitude(x, 0, 760);
  return logistic(x, t, silu_power(t));
}

// The derivative of x * sigmoid(v(x)); tv = t * v'(t).
template <class V>
FUSEDOPS_INLINE V logistic_grad(V x, V tv, const Power<V>& p) {
  const V one = set1<V>(1), fraction = times_fraction(one, p);
  const V r = one / (one + scale2(fraction, p.n));  // sigmoid(v(t))
  const V slope = scale2(fraction * r * fma(-tv, r, one), p.n);
  return if_negative(x, slope, one - slope);
}
template <class V>
FUSEDOPS_INLINE V gelu_tanh_grad(V x) {
  const V t = magnitude(x, 11, 22);
  const V inner = mul_add(t * t, set1<V>(3 * 0.044715), set1<V>(1));
  return logistic_grad(x, t * set1<V>(1.5957691216057308) * inner, tanh_power(t));
}
template <class V>
FUSEDOPS_INLINE V gelu_quick_grad(V x) {
  const V t = magnitude(x, 65, 450);
  return logistic_grad(x, t * set1<V>(1.702), quick_power(t));
}
template <class V>
FUSEDOPS_INLINE V silu_grad(V x) {
  const V t = magnitude(x, 110, 760);
  return logistic_grad(x, t, silu_power(t));
}

}  // namespace fusedops::FUSEDOPS_ISA
