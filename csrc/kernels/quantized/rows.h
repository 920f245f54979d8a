// x as the kernels of quantized layers read it: floats, or bytes and one scale per row.
#pragma once
#include "../../simd/simd.h"
#include "../kernels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

FUSEDOPS_INLINE constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Whole cache lines, an odd number of them: rows that lie a multiple of 4 KiB apart would share
// the few places that the first cache has for each address.
FUSEDOPS_INLINE int64_t padded_row(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

FUSEDOPS_INLINE float* float_row(const QuantizedArgs& a, int64_t row) {
  return reinterpret_cast<float*>(static_cast<char*>(a.rows) + row * a.row_bytes);
}
FUSEDOPS_INLINE uint8_t* byte_row(const QuantizedArgs& a, int64_t row) {
  return static_cast<uint8_t*>(a.rows) + row * a.row_bytes;
}

// fn(vector, element, lanes) over a row.
template <class T, class F>
FUSEDOPS_INLINE void each_vector(const T* x, int64_t k, const F& fn) {
  int64_t e = 0;
  for (; e + Vf::N <= k; e += Vf::N) fn(load<Vf>(x + e), e, Vf::N);
  const int n = static_cast<int>(k - e);
  if (n > 0) fn(load_n<Vf>(x + e, n), e, n);
}

template <class T>
FUSEDOPS_INLINE void widen_rows(const QuantizedArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    float* to = float_row(a, row);
    each_vector(static_cast<const T*>(a.x) + row * a.k, a.k,
                [&](Vf v, int64_t e, int) __attribute__((always_inline)) { store(to + e, v); });
    for (int64_t e = (a.k + Vf::N - 1) / Vf::N * Vf::N; e < a.row_bytes / 4; e++) to[e] = 0;
  }
}

// The largest magnitude of a row; NaN where an element is not finite.
template <class T>
FUSEDOPS_INLINE float magnitude_of(const T* x, int64_t k) {
  Vf largest = set1<Vf>(0), poison = set1<Vf>(0);
  each_vector(x, k, [&](Vf v, int64_t, int) __attribute__((always_inline)) {
    largest = max(largest, abs(v));
    poison = mul_add(v, set1<Vf>(0), poison);
  });
  float lane[2 * Vf::N], most = 0, sick = 0;
  store(lane, largest), store(lane + Vf::N, poison);
  for (int i = 0; i < Vf::N; i++) {
    most = most < lane[i] ? lane[i] : most;
    sick += lane[Vf::N + i];
  }
  return most + sick;
}

constexpr float kLeastScale = 0x1p-126f;  // the reciprocal of a smaller one may be infinite

// q = x / scale to nearest even, scale = the largest magnitude / 127: never beyond 127, so nothing
// saturates. A row that is not finite gets the scale NaN.
template <class T>
FUSEDOPS_INLINE void round_row(const QuantizedArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.k;
  uint8_t* to = byte_row(a, row);
  const float most = magnitude_of(x, a.k), even = most / 127;
  const float scale = even < kLeastScale ? kLeastScale : even;
  a.row_scale[row] = scale;
  if (most != most) {
    for (int64_t e = 0; e < a.k; e++) to[e] = 128;
  } else {
    const Vf inverse = set1<Vf>(1 / scale), zero = set1<Vf>(128);
    each_vector(x, a.k, [&](Vf v, int64_t e, int) __attribute__((always_inline)) {
      store_bytes(to + e, round(v * inverse) + zero);
    });
  }
  for (int64_t e = a.k; e < a.row_bytes; e++) to[e] = 0;
}

template <class T>
FUSEDOPS_INLINE void round_rows(const QuantizedArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) round_row<T>(a, row);
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
