// Few rows or columns: dot products of rows of x with rows of w as they lie in memory.
#pragma once
#include "epilogue.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kDotColumns = 48;  // of one task: a multiple of every width below
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
// Rows of w at once: accumulators and x must fit the registers.
constexpr int dot_width(int rows) {
  return kVectorRegisters == 32 ? (rows < kDotRows ? 8 : 6) : (rows < kDotRows ? 6 : 4);
}

constexpr int64_t kAhead = 1024;  // bytes of w fetched before their use

// x as the dot products read it: widened first where it is narrow.
template <class T, bool Widen>
struct DotRows {
  using X = T;
};
template <class T>
struct DotRows<T, true> {
  using X = compute_t<T>;
};
template <class T>
using dot_x = typename DotRows<T, kWidenX<T>>::X;

// c[i][j] (+)= sum over k of x[i][k] * w[j][k]; j past `cols` repeats the last row of w. `jump`:
// elements from the end of these of a row to those that are read next.
template <class T, int Rows, int Width>
__attribute__((noinline)) void dot_tile(const dot_x<T>* x, int64_t ldx, const T* w, int64_t ldw,
                                        int64_t cols, int64_t k, int64_t jump, compute_t<T>* c,
                                        bool add) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int64_t per_load = V::N * O::kStep;
  const T* row[Width];
  V acc[Rows * Width];
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Width; i++) acc[i] = set1<V>(0);
#pragma GCC unroll 8
  for (int j = 0; j < Width; j++) row[j] = w + at_most(j, cols - 1) * ldw;
  const auto step = [&](int64_t e, const auto& load_at) __attribute__((always_inline)) {
    V a[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; i++) a[i] = load_at(x + i * ldx + e);
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) {
      V b = load_at(row[j] + e);
      // Loaded once: the compiler would repeat the load in every multiplication.
      if constexpr (Rows > 1) FUSEDOPS_KEEP(b.v);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i++)
        acc[i * Width + j] = O::multiply_add(a[i], b, acc[i * Width + j]);
    }
  };
  constexpr int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T));
  int64_t e = 0;
  for (; e + per_load <= k; e += per_load) {
    const int64_t later = e + ahead + (e + ahead < k ? 0 : jump);
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) prefetch(row[j] + later);
    step(e, [](const auto* p) { return O::load(p); });
  }
  if (e < k) step(e, [&](const auto* p) { return O::load_n(p, static_cast<int>(k - e)); });
  constexpr int groups = (Rows * Width + V::N - 1) / V::N;
  compute_t<T> total[groups * V::N];
#pragma GCC unroll 32
  for (int g = 0; g < groups; g++) {
    V part[V::N];
#pragma GCC unroll 16
    for (int i = 0; i < V::N; i++)
      part[i] = g * V::N + i < Rows * Width ? acc[g * V::N + i] : set1<V>(0);
    store(total + g * V::N, sums(part));
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) {
      compute_t<T>* to = c + i * kDotColumns + j;
      *to = add ? *to + total[i * Width + j] : total[i * Width + j];
    }
}

template <class T, int Width>
FUSEDOPS_INLINE void any_dot_tile(int64_t rows, const dot_x<T>* x, int64_t ldx, const T* w,
                                  int64_t ldw, int64_t cols, int64_t k, int64_t jump,
                                  compute_t<T>* c, bool add) {
  switch (rows) {
    case 1:
      return dot_tile<T, 1, Width>(x, ldx, w, ldw, cols, k, jump, c, add);
    case 2:
      return dot_tile<T, 2, Width>(x, ldx, w, ldw, cols, k, jump, c, add);
    case 3:
      return dot_tile<T, 3, Width>(x, ldx, w, ldw, cols, k, jump, c, add);
    default:
      return dot_tile<T, kDotRows, Width>(x, ldx, w, ldw, cols, k, jump, c, add);
  }
}

// All rows against `Width` columns: w's rows stay in the first cache while groups of x's pass.
template <class T, int Width>
FUSEDOPS_INLINE void dot_columns(const LinearArgs& a, const dot_x<T>* x, int64_t ldx, int64_t rows,
                                 int64_t col, int64_t cols, compute_t<T>* c) {
  using O = operands_t<T>;
  constexpr int64_t chain = kChainSteps<T> * O::V::N * O::kStep;
  const T* w = static_cast<const T*>(a.w) + col * a.ldw;
  const int64_t groups = (rows + kDotRows - 1) / kDotRows;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t row = g * rows / groups, height = (g + 1) * rows / groups - row;
    for (int64_t e = 0; e == 0 || e < a.k; e += chain)
      any_dot_tile<T, Width>(height, x + row * ldx + e, ldx, w + e, a.ldw, cols,
                             at_most(chain, a.k - e), e + chain < a.k ? 0 : Width * a.ldw - a.k,
                             c + row * kDotColumns, e > 0);
  }
}

// Bytes of scratch for a row: its sums, and its widened copy.
template <class T>
int64_t widened_elements(int64_t k) {
  return kWidenX<T> ? (k + 15) / 16 * 16 : 0;
}
template <class T>
int64_t dot_row_bytes(int64_t k) {
  return (kDotColumns + widened_elements<T>(k)) * static_cast<int64_t>(sizeof(compute_t<T>));
}

template <class T>
FUSEDOPS_INLINE void widen_row(const T* x, int64_t k, compute_t<T>* to) {
  using V = Vec<compute_t<T>>;
  int64_t e = 0;
  for (; e + V::N <= k; e += V::N) store(to + e, load<V>(x + e));
  const int n = static_cast<int>(k - e);
  if (n > 0) store_n(to + e, load_n<V>(x + e, n), n);
}

// Columns [begin, end) of y, begin a multiple of kDotColumns.
template <class T>
FUSEDOPS_INLINE void dots(const LinearArgs& a, const LinearPart& part) {
  constexpr int many = dot_width(kDotRows), few = dot_width(1);
  const int64_t rows = part.row_end - part.row_begin;
  compute_t<T>* c = static_cast<compute_t<T>*>(part.scratch);
  const T* given = static_cast<const T*>(a.x) + part.row_begin * a.ldx;
  const dot_x<T>* x;
  int64_t ldx = a.ldx;
  if constexpr (kWidenX<T>) {
    compute_t<T>* wide = c + rows * kDotColumns;
    ldx = widened_elements<T>(a.k);
    if (part.new_rows)
      for (int64_t i = 0; i < rows; i++) widen_row(given + i * a.ldx, a.k, wide + i * ldx);
    x = wide;
  } else {
    x = given;
  }
  for (int64_t col = part.col_begin; col < part.col_end; col += kDotColumns) {
    const int64_t cols = at_most(kDotColumns, part.col_end - col);
    if (rows < kDotRows)
      for (int64_t j = 0; j < cols; j += few)
        dot_columns<T, few>(a, x, ldx, rows, col + j, cols - j, c + j);
    else
      for (int64_t j = 0; j < cols; j += many)
        dot_columns<T, many>(a, x, ldx, rows, col + j, cols - j, c + j);
    finish<T>(a, c, kDotColumns, part.row_begin, rows, col, cols);
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
