// Floats times narrow weights: each element of y is 16 sums, of the products with k = 0, 1, ... 15
// modulo 16, each in the order of k with one rounding per product, added up in halves: 0 with 8, 1
// with 9, ...; then 0 with 4, ... Vectors and registers of any size do that alike.
#pragma once
#include "finish.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int kSums = 16, kParts = kSums / Vf::N;

// Rows of x at once, and of w beside them: the sums fill 3/4 of the registers.
constexpr int kSumRows = Vf::N == 16 ? 6 : kVectorRegisters == 32 || Vf::N == 8 ? 3 : 1;
constexpr int sum_width(int rows) {
  if (Vf::N == 16) return rows < 3 ? 8 : 4;
  return rows == 1 && kVectorRegisters * Vf::N >= 128 ? 4 : 2;
}

// sums[i][j][s], rows of x kGroup * kSums apart; j past `cols` repeats the last row of w.
template <class W, int Rows, int Width>
__attribute__((noinline)) void sums_tile(const float* x, int64_t ldx, const W* w, int64_t ldw,
                                         int64_t cols, int64_t k, float* sums) {
  const W* row[Width];
  Vf acc[Rows][Width][kParts];
#pragma GCC unroll 8
  for (int j = 0; j < Width; j++) {
    row[j] = w + at_most(j, cols - 1) * ldw;
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; p++) acc[i][j][p] = set1<Vf>(0);
  }
  const auto step = [&](int64_t e, const auto& load_at) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; p++) {
      Vf a[Rows];
#pragma GCC unroll 6
      for (int i = 0; i < Rows; i++) a[i] = load<Vf>(x + i * ldx + e + p * Vf::N);
#pragma GCC unroll 8
      for (int j = 0; j < Width; j++) {
        const Vf b = load_at(row[j] + e + p * Vf::N, k - e - p * Vf::N);
#pragma GCC unroll 6
        for (int i = 0; i < Rows; i++) acc[i][j][p] = fma(a[i], b, acc[i][j][p]);
      }
    }
  };
  // The rows of the next call, or this row where it is long.
  const int64_t ahead = ldw * static_cast<int64_t>(sizeof(W)) <= 2048
                            ? Width * ldw * static_cast<int64_t>(sizeof(W))
                            : 1024;
  int64_t e = 0;
  for (; e + kSums <= k; e += kSums) {
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) prefetch(reinterpret_cast<const char*>(row[j] + e) + ahead);
    step(e, [](const W* p, int64_t) { return load<Vf>(p); });
  }
  if (e < k)
    step(e, [](const W* p, int64_t left) {
      return left >= Vf::N ? load<Vf>(p)
             : left > 0    ? load_n<Vf>(p, static_cast<int>(left))
                           : set1<Vf>(0);
    });
#pragma GCC unroll 6
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; p++)
        store(sums + (i * kGroup + j) * kSums + p * Vf::N, acc[i][j][p]);
}

// A group of columns for `rows` rows of x.
template <class W, int Rows>
FUSEDOPS_INLINE void sums_group(const float* x, int64_t ldx, const W* w, int64_t ldw, int64_t cols,
                                int64_t k, float* sums) {
  constexpr int width = sum_width(Rows);
  for (int64_t j = 0; j < cols; j += width)
    sums_tile<W, Rows, width>(x, ldx, w + j * ldw, ldw, cols - j, k, sums + j * kSums);
}
template <class W>
FUSEDOPS_INLINE void any_sums_group(int64_t rows, const float* x, int64_t ldx, const W* w,
                                    int64_t ldw, int64_t cols, int64_t k, float* sums) {
  constexpr int most = kSumRows;
  switch (rows) {
    case 1:
      return sums_group<W, 1>(x, ldx, w, ldw, cols, k, sums);
    case 2:
      return sums_group<W, at_most(2, most)>(x, ldx, w, ldw, cols, k, sums);
    case 3:
      return sums_group<W, at_most(3, most)>(x, ldx, w, ldw, cols, k, sums);
    case 4:
      return sums_group<W, at_most(4, most)>(x, ldx, w, ldw, cols, k, sums);
    case 5:
      return sums_group<W, at_most(5, most)>(x, ldx, w, ldw, cols, k, sums);
    default:
      return sums_group<W, most>(x, ldx, w, ldw, cols, k, sums);
  }
}

template <class T>
__attribute__((noinline)) void finish_sums(const QuantizedArgs& a, const float* sums, int64_t row,
                                           int64_t rows, int64_t col, int64_t cols) {
  with_activation(a.act, [&](auto act) {
    for (int64_t i = 0; i < rows; i++)
      finish_row<T>(a, act, row + i, col, cols, nullptr, [&](int64_t j) {
        Vf r[Vf::N];
#pragma GCC unroll 16
        for (int c = 0; c < Vf::N; c++) {
          const float* from = sums + (i * kGroup + j + c) * kSums;
          Vf part[kParts];
#pragma GCC unroll 4
          for (int p = 0; p < kParts; p++) part[p] = load<Vf>(from + p * Vf::N);
#pragma GCC unroll 2
          for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 2
            for (int p = 0; p < half; p++) part[p] = part[p] + part[p + half];
          r[c] = part[0];
        }
        return add_lanes(r, [](Vf p, Vf q) { return p + q; });
      });
  });
}

FUSEDOPS_INLINE int64_t wide_row(int64_t k) { return padded_row(k * 4) / 4; }
constexpr int64_t kSumsBytes = kSumRows * kGroup * kSums * 4;

FUSEDOPS_INLINE int64_t sums_scratch(int64_t k) { return kSumsBytes + kGroup * wide_row(k) * 4; }

// Rows [row, row + rows) and columns [begin, end) of y. Few rows read w as it is stored, more of
// them a copy in floats: the same sums.
template <class W, class T>
FUSEDOPS_INLINE void sums(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,
                          int64_t begin, int64_t end) {
  float* c = static_cast<float*>(scratch);
  float* wide = c + kSumsBytes / 4;
  const int64_t ldx = a.row_bytes / 4, ldwide = wide_row(a.k);
  const int64_t groups = (rows + kSumRows - 1) / kSumRows;
  for (int64_t col = begin; col < end; col += kGroup) {
    const int64_t cols = at_most(kGroup, end - col);
    const W* w = static_cast<const W*>(a.w) + col * a.k;
    if (groups > 1)
      for (int64_t j = 0; j < cols; j++)
        each_vector(w + j * a.k, a.k, [&](Vf v, int64_t e, int) __attribute__((always_inline)) {
          store(wide + j * ldwide + e, v);
        });
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * rows / groups, count = (g + 1) * rows / groups - first;
      const float* x = float_row(a, row + first);
      if (groups > 1)
        any_sums_group<float>(count, x, ldx, wide, ldwide, cols, a.k, c);
      else
        any_sums_group<W>(count, x, ldx, w, a.k, cols, a.k, c);
      finish_sums<T>(a, c, row + first, count, col, cols);
    }
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
