// Few rows or columns: dot products of rows of x with rows of w as they lie in memory.
#pragma once
#include "epilogue.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kDotColumns = 48;      // of one task: a multiple of kDotWidth
constexpr int64_t kFinishColumns = 192;  // of a few rows, finished together: a multiple of that
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
// Rows of w at once for many rows: accumulators and x must fit the registers.
constexpr int kDotWidth = kVectorRegisters == 32 ? 6 : 4;

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
template <class T, int Rows>
__attribute__((noinline)) void dot_tile(const dot_x<T>* x, int64_t ldx, const T* w, int64_t ldw,
                                        int64_t cols, int64_t k, int64_t jump, compute_t<T>* c,
                                        bool add) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int Width = kDotWidth;
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

template <class T>
FUSEDOPS_INLINE void any_dot_tile(int64_t rows, const dot_x<T>* x, int64_t ldx, const T* w,
                                  int64_t ldw, int64_t cols, int64_t k, int64_t jump,
                                  compute_t<T>* c, bool add) {
  switch (rows) {
    case 1:
      return dot_tile<T, 1>(x, ldx, w, ldw, cols, k, jump, c, add);
    case 2:
      return dot_tile<T, 2>(x, ldx, w, ldw, cols, k, jump, c, add);
    case 3:
      return dot_tile<T, 3>(x, ldx, w, ldw, cols, k, jump, c, add);
    default:
      return dot_tile<T, kDotRows>(x, ldx, w, ldw, cols, k, jump, c, add);
  }
}

// Many rows against kDotWidth columns: w's rows stay in the first cache while groups of x's pass.
template <class T>
FUSEDOPS_INLINE void dot_columns(const LinearArgs& a, const dot_x<T>* x, int64_t ldx, int64_t rows,
                                 int64_t col, int64_t cols, compute_t<T>* c) {
  using O = operands_t<T>;
  constexpr int64_t chain = kChainSteps<T> * O::V::N * O::kStep;
  const T* w = static_cast<const T*>(a.w) + col * a.ldw;
  const int64_t groups = (rows + kDotRows - 1) / kDotRows;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t row = g * rows / groups, height = (g + 1) * rows / groups - row;
    for (int64_t e = 0; e == 0 || e < a.k; e += chain)
      any_dot_tile<T>(height, x + row * ldx + e, ldx, w + e, a.ldw, cols, at_most(chain, a.k - e),
                      e + chain < a.k ? 0 : kDotWidth * a.ldw - a.k, c + row * kDotColumns, e > 0);
  }
}

// What is fetched while element e of some rows of w is multiplied, from the first row on: for each
// row `apart` more than `distance` + e * `scale`, and `jump` more past the end of the present ones.
struct DotAhead {
  int64_t distance, scale, apart, jump;
};
// The next rows in the order in which they lie, where they fit the first cache; else the same rows
// a little ahead. k: elements of a row.
template <class T>
FUSEDOPS_INLINE DotAhead dot_ahead(int64_t rows, int64_t ldw, int64_t k, bool last) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t next = rows * ldw;
  if (rows > 1 && ldw == k && next * static_cast<int64_t>(sizeof(T)) <= 16384)
    return {next, rows, line, 0};
  const int64_t ahead = (rows == 1 ? 8192 : 2048) / static_cast<int64_t>(sizeof(T));
  return {ahead, 1, ldw, last ? next - k : 0};
}

// Few rows, all that there are, against a vector of columns: c[i][j] (+)= the sum over k. Rows of w
// pass `Width` at a time, in the order in which they lie: memory delivers from few places at once
// faster than from many. A single row has no other work meanwhile: one at a time, in several
// chains.
template <class T, int Rows, int Width, int Chains>
__attribute__((noinline)) void dot_vector(const dot_x<T>* x, int64_t ldx, const T* w, int64_t ldw,
                                          int64_t cols, int64_t k, DotAhead ahead, compute_t<T>* c,
                                          bool add) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int64_t per_load = V::N * O::kStep;
  constexpr int per_line = 64 / static_cast<int>(per_load * sizeof(T));  // loads
  constexpr int unrolled = Chains > per_line ? Chains : per_line;
  constexpr int64_t step = unrolled * per_load;
  V total[Rows][V::N];
  for (int j = 0; j < V::N; j += Width) {
    const T* row[Width];
    V acc[Chains][Rows][Width];
#pragma GCC unroll 4
    for (int v = 0; v < Width; v++) row[v] = w + at_most(j + v, cols - 1) * ldw;
#pragma GCC unroll 8
    for (int u = 0; u < Chains; u++)
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < Width; v++) acc[u][i][v] = set1<V>(0);
    const auto multiply = [&](int u, int64_t e, const auto& read) __attribute__((always_inline)) {
      V a[Rows];
#pragma GCC unroll 4
      for (int i = 0; i < Rows; i++) a[i] = read(x + i * ldx + e);
#pragma GCC unroll 4
      for (int v = 0; v < Width; v++) {
        V b = read(row[v] + e);
        if constexpr (Rows > 1) FUSEDOPS_KEEP(b.v);
#pragma GCC unroll 4
        for (int i = 0; i < Rows; i++) acc[u][i][v] = O::multiply_add(a[i], b, acc[u][i][v]);
      }
    };
    const auto whole = [](const auto* p) __attribute__((always_inline)) { return O::load(p); };
    int64_t e = 0;
    const T* later = row[0] + ahead.distance;
    for (int64_t end = k - ahead.distance;; later += ahead.jump, end = k) {
      for (; e + step <= end; e += step, later += step * ahead.scale)
#pragma GCC unroll 8
        for (int u = 0; u < unrolled; u++) {
#pragma GCC unroll 4
          for (int v = 0; v < Width; v++)
            if (u % per_line == 0) prefetch(later + v * ahead.apart + u * per_load);
          multiply(u % Chains, e + u * per_load, whole);
        }
      if (end == k) break;
    }
    for (; e + per_load <= k; e += per_load) multiply(0, e, whole);
    if (e < k)
      multiply(Chains - 1, e, [&](const auto* p) __attribute__((always_inline)) {
        return O::load_n(p, static_cast<int>(k - e));
      });
#pragma GCC unroll 4
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
      for (int v = 0; v < Width; v++) {
#pragma GCC unroll 3
        for (int apart = Chains / 2; apart > 0; apart /= 2)
#pragma GCC unroll 4
          for (int u = 0; u < apart; u++) acc[u][i][v] = acc[u][i][v] + acc[u + apart][i][v];
        total[i][j + v] = acc[0][i][v];
      }
  }
  const int n = static_cast<int>(at_most(cols, V::N));
#pragma GCC unroll 4
  for (int i = 0; i < Rows; i++) {
    V sum = sums(total[i]);
    if (add) sum = sum + load_n<V>(c + i * kFinishColumns, n);
    store_n(c + i * kFinishColumns, sum, n);
  }
}

template <class T, int Rows>
FUSEDOPS_INLINE void few_dots(const LinearArgs& a, const dot_x<T>* x, int64_t ldx, int64_t col,
                              int64_t cols, compute_t<T>* c) {
  using O = operands_t<T>;
  using V = typename O::V;
  // Where each value of w is widened, x has the time to wait for several.
  constexpr bool one = Rows == 1 && !kWidenX<T>;
  constexpr int width = one ? 1 : V::N < 4 ? V::N : 4, chains = !one ? 1 : Vf::N == 4 ? 8 : 4;
  constexpr int64_t chain = kChainSteps<T> * chains * V::N * O::kStep;
  const T* w = static_cast<const T*>(a.w) + col * a.ldw;
  for (int64_t j = 0; j < cols; j += V::N)
    for (int64_t e = 0; e == 0 || e < a.k; e += chain)
      dot_vector<T, Rows, width, chains>(
          x + e, ldx, w + j * a.ldw + e, a.ldw, cols - j, at_most(chain, a.k - e),
          dot_ahead<T>(width, a.ldw, a.k, e + chain >= a.k), c + j, e > 0);
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
  const int64_t rows = part.row_end - part.row_begin;
  const int64_t together = a.m <= kDotRows ? kFinishColumns : kDotColumns;
  compute_t<T>* c = static_cast<compute_t<T>*>(part.scratch);
  const T* given = static_cast<const T*>(a.x) + part.row_begin * a.ldx;
  const dot_x<T>* x;
  int64_t ldx = a.ldx;
  if constexpr (kWidenX<T>) {
    compute_t<T>* wide = c + rows * together;
    ldx = widened_elements<T>(a.k);
    if (part.new_rows)
      for (int64_t i = 0; i < rows; i++) widen_row(given + i * a.ldx, a.k, wide + i * ldx);
    x = wide;
  } else {
    x = given;
  }
  const bool few = a.m <= kDotRows;  // of all rows: a row's bits do not depend on how work is cut
  for (int64_t col = part.col_begin; col < part.col_end; col += together) {
    const int64_t cols = at_most(together, part.col_end - col);
    if (few && a.m == 1)
      few_dots<T, 1>(a, x, ldx, col, cols, c);
    else if (few && a.m == 2)
      few_dots<T, 2>(a, x, ldx, col, cols, c);
    else if (few && a.m == 3)
      few_dots<T, 3>(a, x, ldx, col, cols, c);
    else if (few)
      few_dots<T, kDotRows>(a, x, ldx, col, cols, c);
    else
      for (int64_t j = 0; j < cols; j += kDotWidth)
        dot_columns<T>(a, x, ldx, rows, col + j, cols - j, c + j);
    finish<T>(a, c, together, part.row_begin, rows, col, cols);
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
