// Many rows: the 16 sums of sums.h, one after the other for a tile of y, so that vectors lie along
// the columns. x and w are stored in that order of k; what two sums make waits for its pair in
// memory, level by level, as the halves of sums.h are added.
#pragma once
#include "sums.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int kChainRows = kVectorRegisters == 32 ? 6 : 4, kChainVectors = kVectorRegisters / 8;
constexpr int64_t kChainColumns = kChainVectors * Vf::N;
constexpr int kLevels = 5;
constexpr int64_t kChainPanel = int64_t{512} << 10;  // bytes: of the second cache

// The place of sum k modulo 16 in the order of the additions: its bits reversed.
constexpr int place_of(int sum) {
  return (sum & 1) << 3 | (sum & 2) << 1 | (sum & 4) >> 1 | (sum & 8) >> 3;
}
FUSEDOPS_INLINE int64_t steps_of(int64_t k) { return (k + kSums - 1) / kSums; }

template <class T>
FUSEDOPS_INLINE void order_rows(const QuantizedArgs& a, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(a.k);
  for (int64_t row = begin; row < end; row++) {
    float* to = float_row(a, row);
    for (int64_t e = a.k; e < steps * kSums; e++)
      to[place_of(static_cast<int>(e % kSums)) * steps + e / kSums] = 0;
    each_vector(static_cast<const T*>(a.x) + row * a.k, a.k,
                [&](Vf v, int64_t e, int n) __attribute__((always_inline)) {
                  float lane[Vf::N];
                  store(lane, v);
                  for (int i = 0; i < n; i++)
                    to[place_of(static_cast<int>((e + i) % kSums)) * steps + (e + i) / kSums] =
                        lane[i];
                });
  }
}

// Of the places [first, first + count): panel[place][step][column]; zero past `cols` and k.
template <class W>
__attribute__((noinline)) void chain_panel(const W* w, int64_t ldw, int64_t cols, int64_t k,
                                           int first, int count, float* panel) {
  const int64_t steps = steps_of(k);
  for (int64_t j = 0; j < kChainColumns; j += Vf::N)
    for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++) {
        const int64_t e = s * kSums + part * Vf::N;
        Vf r[Vf::N];
#pragma GCC unroll 16
        for (int i = 0; i < Vf::N; i++) {
          const W* p = w + (j + i) * ldw + e;
          r[i] = set1<Vf>(0);
          if (j + i < cols && e < k) {
            r[i] = e + Vf::N <= k ? load<Vf>(p) : load_n<Vf>(p, static_cast<int>(k - e));
            prefetch(reinterpret_cast<const char*>(p) + 256);
          }
        }
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < Vf::N; i++) {
          const int place = place_of(part * Vf::N + i) - first;
          if (place >= 0 && place < count)
            store(panel + (place * steps + s) * kChainColumns + j, r[i]);
        }
      }
}

template <int Rows>
__attribute__((noinline)) void chain_tile(const float* x, int64_t ldx, int64_t steps,
                                          const float* panel, int first, int count, float* stack,
                                          int64_t level) {
  for (int place = first; place < first + count; place++) {
    Vf acc[Rows][kChainVectors];
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < kChainVectors; j++) acc[i][j] = set1<Vf>(0);
    const float* from = x + place * steps;
    for (int64_t s = 0; s < steps; s++) {
      if (s % 16 == 0)  // a line of each row of the next tile
#pragma GCC unroll 6
        for (int i = 0; i < Rows; i++) prefetch(from + (Rows + i) * ldx + s);
      Vf b[kChainVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kChainVectors; j++) b[j] = load<Vf>(panel + j * Vf::N);
#pragma GCC unroll 6
      for (int i = 0; i < Rows; i++) {
        const Vf v = broadcast<Vf>(from + i * ldx + s);
#pragma GCC unroll 4
        for (int j = 0; j < kChainVectors; j++) acc[i][j] = fma(v, b[j], acc[i][j]);
      }
      panel += kChainColumns;
    }
    float* to = stack;
    for (int p = place; p & 1; p >>= 1, to += level)
#pragma GCC unroll 6
      for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < kChainVectors; j++)
          acc[i][j] = load<Vf>(to + i * kChainColumns + j * Vf::N) + acc[i][j];
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < kChainVectors; j++) store(to + i * kChainColumns + j * Vf::N, acc[i][j]);
  }
}
FUSEDOPS_INLINE void any_chain_tile(int64_t rows, const float* x, int64_t ldx, int64_t steps,
                                    const float* panel, int first, int count, float* stack,
                                    int64_t level) {
  constexpr int most = kChainRows;
  switch (rows) {
    case 1:
      return chain_tile<1>(x, ldx, steps, panel, first, count, stack, level);
    case 2:
      return chain_tile<2>(x, ldx, steps, panel, first, count, stack, level);
    case 3:
      return chain_tile<3>(x, ldx, steps, panel, first, count, stack, level);
    case 4:
      return chain_tile<4>(x, ldx, steps, panel, first, count, stack, level);
    case 5:
      return chain_tile<at_most(5, most)>(x, ldx, steps, panel, first, count, stack, level);
    default:
      return chain_tile<most>(x, ldx, steps, panel, first, count, stack, level);
  }
}

// Places in one panel: all, or a power of two that fits.
FUSEDOPS_INLINE int places_at_once(int64_t k) {
  int count = kSums;
  while (count > 1 && count * steps_of(k) * kChainColumns * 4 > kChainPanel) count /= 2;
  return count;
}
FUSEDOPS_INLINE int64_t level_size(int count, int64_t rows) {
  return (count == kSums ? kChainRows : rows) * kChainColumns;
}
FUSEDOPS_INLINE int64_t chains_scratch(int64_t k, int64_t rows) {
  const int count = places_at_once(k);
  return (count * steps_of(k) * kChainColumns + kLevels * level_size(count, rows)) * 4;
}

template <class T>
__attribute__((noinline)) void finish_chains(const QuantizedArgs& a, const float* c, int64_t row,
                                             int64_t rows, int64_t col, int64_t cols) {
  with_activation(a.act, [&](auto act) {
    for (int64_t i = 0; i < rows; i++)
      finish_row<T>(a, act, row + i, col, cols, nullptr,
                    [&](int64_t j) { return load<Vf>(c + i * kChainColumns + j); });
  });
}

template <class W, class T>
FUSEDOPS_INLINE void chains(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,
                            int64_t begin, int64_t end) {
  const int count = places_at_once(a.k);
  const int64_t steps = steps_of(a.k), level = level_size(count, rows);
  const int64_t tiles = (rows + kChainRows - 1) / kChainRows;
  float* panel = static_cast<float*>(scratch);
  float* stack = panel + count * steps * kChainColumns;
  for (int64_t col = begin; col < end; col += kChainColumns) {
    const int64_t cols = at_most(kChainColumns, end - col);
    for (int first = 0; first < kSums; first += count) {
      chain_panel(static_cast<const W*>(a.w) + col * a.k, a.k, cols, a.k, first, count, panel);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t top = t * rows / tiles, height = (t + 1) * rows / tiles - top;
        float* to = stack + (count == kSums ? 0 : top * kChainColumns);
        any_chain_tile(height, float_row(a, row + top), a.row_bytes / 4, steps, panel, first, count,
                       to, level);
        if (first + count == kSums)
          finish_chains<T>(a, to + (kLevels - 1) * level, row + top, height, col, cols);
      }
    }
  }
}

// --- the choice: few rows read w where it lies

constexpr int64_t kFewSums = 24;  // about where transposing w costs less than it brings

FUSEDOPS_INLINE void floats_shape(const QuantizedArgs& a, int64_t rows, QuantizedShape& s) {
  const int64_t few = sums_scratch(a.k), many = chains_scratch(a.k, rows);
  s.row_bytes = padded_row(a.k * 4);
  s.columns = 64;  // a multiple of both
  s.few_rows = kFewSums;
  s.scratch = a.m <= kFewSums ? few : many;
}
template <class T>
FUSEDOPS_INLINE void float_rows(const QuantizedArgs& a, int64_t begin, int64_t end) {
  if (a.m <= kFewSums)
    widen_rows<T>(a, begin, end);
  else
    order_rows<T>(a, begin, end);
}
template <class W, class T>
FUSEDOPS_INLINE void floats(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,
                            int64_t begin, int64_t end) {
  if (a.m <= kFewSums)
    sums<W, T>(a, scratch, row, rows, begin, end);
  else
    chains<W, T>(a, scratch, row, rows, begin, end);
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
