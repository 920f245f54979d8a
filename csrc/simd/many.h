// K vectors side by side as one: what is written once for a vector runs on K of them, instruction
// beside instruction. A long chain of dependent instructions then shares the processor's window
// with K - 1 others from its first link on.
#pragma once
#include "simd.h"

namespace fusedops::FUSEDOPS_ISA {

template <class V, int K>
struct Many {
  static constexpr int N = K * V::N;
  V v[K];
};
template <class M>
constexpr bool kIsMany = false;
template <class V, int K>
constexpr bool kIsMany<Many<V, K>> = true;

// Vectors of floats, one or many.
template <class V>
constexpr bool kOfFloats = false;
template <>
constexpr bool kOfFloats<Vf> = true;
template <int K>
constexpr bool kOfFloats<Many<Vf, K>> = true;
template <class V>
concept OfFloats = kOfFloats<V>;

// fn(i) for each of the K vectors.
template <class V, int K, class F>
FUSEDOPS_INLINE Many<V, K> each(const F& fn) {
  Many<V, K> r;
#pragma GCC unroll 8
  for (int i = 0; i < K; i++) r.v[i] = fn(i);
  return r;
}
#define EACH(expression) \
  return each<V, K>([&](int i) __attribute__((always_inline)) { return expression; })
#define ON_EACH             \
  template <class V, int K> \
  FUSEDOPS_INLINE Many<V, K>
ON_EACH operator+(Many<V, K> a, Many<V, K> b) { EACH(a.v[i] + b.v[i]); }
ON_EACH operator-(Many<V, K> a, Many<V, K> b) { EACH(a.v[i] - b.v[i]); }
ON_EACH operator*(Many<V, K> a, Many<V, K> b) { EACH(a.v[i] * b.v[i]); }
ON_EACH operator/(Many<V, K> a, Many<V, K> b) { EACH(a.v[i] / b.v[i]); }
ON_EACH operator-(Many<V, K> a) { EACH(-a.v[i]); }
ON_EACH fma(Many<V, K> a, Many<V, K> b, Many<V, K> c) { EACH(fma(a.v[i], b.v[i], c.v[i])); }
ON_EACH mul_add(Many<V, K> a, Many<V, K> b, Many<V, K> c) { EACH(mul_add(a.v[i], b.v[i], c.v[i])); }
ON_EACH min(Many<V, K> a, Many<V, K> b) { EACH(min(a.v[i], b.v[i])); }
ON_EACH max(Many<V, K> a, Many<V, K> b) { EACH(max(a.v[i], b.v[i])); }
ON_EACH abs(Many<V, K> a) { EACH(abs(a.v[i])); }
ON_EACH if_negative(Many<V, K> x, Many<V, K> a, Many<V, K> b) {
  EACH(if_negative(x.v[i], a.v[i], b.v[i]));
}
ON_EACH min_abs(Many<V, K> a, double limit) { EACH(min_abs(a.v[i], limit)); }
ON_EACH round(Many<V, K> a) { EACH(round(a.v[i])); }
ON_EACH scale2(Many<V, K> a, Many<V, K> n) { EACH(scale2(a.v[i], n.v[i])); }
#undef ON_EACH

template <int K>
struct Entries {
  Entry v[K];
};
template <class V, int K>
FUSEDOPS_INLINE Entries<K> entry16(Many<V, K> u) {
  Entries<K> r;
#pragma GCC unroll 8
  for (int i = 0; i < K; i++) r.v[i] = entry16(u.v[i]);
  return r;
}
template <int K>
FUSEDOPS_INLINE Many<Vf, K> lookup16(const float* table, Entries<K> e) {
  return each<Vf, K>([&](int i) __attribute__((always_inline)) { return lookup16(table, e.v[i]); });
}

template <class M>
  requires kIsMany<M>
FUSEDOPS_INLINE M set1(double x) {
  M r;
  for (auto& v : r.v) v = set1<decltype(v + v)>(x);
  return r;
}
template <class M, class T>
  requires kIsMany<M>
FUSEDOPS_INLINE M load(const T* p) {
  M r;
  int64_t at = 0;
#pragma GCC unroll 8
  for (auto& v : r.v) {
    v = load<decltype(v + v)>(p + at);
    at += decltype(v + v)::N;
  }
  return r;
}
template <class T, class V, int K>
FUSEDOPS_INLINE void store(T* p, Many<V, K> a) {
#pragma GCC unroll 8
  for (int i = 0; i < K; i++) store(p + i * V::N, a.v[i]);
}
#undef EACH

}  // namespace fusedops::FUSEDOPS_ISA
