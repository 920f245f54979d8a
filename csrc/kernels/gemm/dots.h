// Few rows: dot products of rows of x with rows of w as they lie in memory; w is read once.
#pragma once
#include "epilogue.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kDotColumns = 48;  // of one piece of work: a multiple of every width below
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
// Rows of w at once: accumulators and x must fit the registers.
constexpr int dot_width(int rows) {
  return kVectorRegisters == 32 ? (rows < kDotRows ? 8 : 6) : (rows < kDotRows ? 6 : 4);
}

constexpr int64_t kAhead = 1024;  // bytes of w fetched before their use

// c[i][j] (+)= sum over k of x[i][k] * w[j][k]; j past `cols` repeats the last row of w.
template <class T, int Rows, int Width>
__attribute__((noinline)) void dot_tile(const typename operands_t<T>::X* x, int64_t ldx, const T* w,
                                        int64_t ldw, int64_t cols, int64_t k, compute_t<T>* c,
                                        bool add) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int64_t per_load = V::N * O::kStep;
  const T* row[Width];
  V acc[Rows][Width];
#pragma GCC unroll 8
  for (int j = 0; j < Width; j++) {
    row[j] = w + at_most(j, cols - 1) * ldw;
#pragma GCC unroll 4
    for (int i = 0; i < Rows; i++) acc[i][j] = set1<V>(0);
  }
  const auto step = [&](int64_t e, const auto& load_at) __attribute__((always_inline)) {
    V a[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; i++) a[i] = load_at(x + i * ldx + e);
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) {
      const V b = load_at(row[j] + e);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i++) acc[i][j] = O::multiply_add(a[i], b, acc[i][j]);
    }
  };
  int64_t e = 0;
  for (; e + per_load <= k; e += per_load) {
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) prefetch(reinterpret_cast<const char*>(row[j] + e) + kAhead);
    step(e, [](const auto* p) { return O::load(p); });
  }
  if (e < k) step(e, [&](const auto* p) { return O::load_n(p, static_cast<int>(k - e)); });
#pragma GCC unroll 4
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) {
      compute_t<T>* to = c + i * kDotColumns + j;
      *to = add ? *to + sum(acc[i][j]) : sum(acc[i][j]);
    }
}

template <class T, int Width>
FUSEDOPS_INLINE void any_dot_tile(int64_t rows, const typename operands_t<T>::X* x, int64_t ldx,
                                  const T* w, int64_t ldw, int64_t cols, int64_t k, compute_t<T>* c,
                                  bool add) {
  switch (rows) {
    case 1:
      return dot_tile<T, 1, Width>(x, ldx, w, ldw, cols, k, c, add);
    case 2:
      return dot_tile<T, 2, Width>(x, ldx, w, ldw, cols, k, c, add);
    case 3:
      return dot_tile<T, 3, Width>(x, ldx, w, ldw, cols, k, c, add);
    default:
      return dot_tile<T, kDotRows, Width>(x, ldx, w, ldw, cols, k, c, add);
  }
}

// All rows against `Width` columns: w's rows stay in the first cache while groups of x's pass.
template <class T, int Width>
FUSEDOPS_INLINE void dot_columns(const LinearArgs& a, int64_t col, int64_t cols, compute_t<T>* c) {
  using O = operands_t<T>;
  constexpr int64_t chain = kChainSteps<T> * O::V::N * O::kStep;
  const T* w = static_cast<const T*>(a.w) + col * a.ldw;
  const int64_t groups = (a.m + kDotRows - 1) / kDotRows;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t row = g * a.m / groups, rows = (g + 1) * a.m / groups - row;
    const typename O::X* x = static_cast<const typename O::X*>(a.x) + row * a.ldx;
    for (int64_t e = 0; e == 0 || e < a.k; e += chain)
      any_dot_tile<T, Width>(rows, x + e, a.ldx, w + e, a.ldw, cols, at_most(chain, a.k - e),
                             c + row * kDotColumns, e > 0);
  }
}

template <class T>
int64_t dot_scratch(const LinearArgs& a) {
  return a.m * kDotColumns * static_cast<int64_t>(sizeof(compute_t<T>));
}

// Columns [begin, end) of y, begin a multiple of kDotColumns.
template <class T>
FUSEDOPS_INLINE void dots(const LinearArgs& a, void* scratch, int64_t begin, int64_t end) {
  constexpr int many = dot_width(kDotRows), few = dot_width(1);
  compute_t<T>* c = static_cast<compute_t<T>*>(scratch);
  for (int64_t col = begin; col < end; col += kDotColumns) {
    const int64_t cols = at_most(kDotColumns, end - col);
    if (a.m < kDotRows)
      for (int64_t j = 0; j < cols; j += few) dot_columns<T, few>(a, col + j, cols - j, c + j);
    else
      for (int64_t j = 0; j < cols; j += many) dot_columns<T, many>(a, col + j, cols - j, c + j);
    finish<T>(a, c, kDotColumns, 0, a.m, col, cols);
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
