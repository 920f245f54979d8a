// Bytes times bytes in integers: exact, so any order gives the same result. x is stored as 128 + q,
// for the dot product takes one factor without a sign: w's sums times 128 are taken off again.
#pragma once
#include "finish.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kQuad = 4, kVectorBytes = kQuad * Vf::N;

// --- few rows: dot products with rows of w as they lie in memory

constexpr int kDotRows = kVectorRegisters == 32 ? 6 : 3;
constexpr int dot_width(int rows) { return kVectorRegisters == 32 ? (rows < 4 ? 8 : 4) : 2; }

// lanes[i][j][l]: as sums_tile.
template <int Rows, int Width>
__attribute__((noinline)) void dot_tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t ldw,
                                        int64_t cols, int64_t k, int32_t* lanes) {
  const int8_t* row[Width];
  Vi acc[Rows][Width];
#pragma GCC unroll 8
  for (int j = 0; j < Width; j++) {
    row[j] = w + at_most(j, cols - 1) * ldw;
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++) acc[i][j] = Vi{};
  }
  const auto step = [&](int64_t e, const auto& load_at) __attribute__((always_inline)) {
    Vi a[Rows];
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++) a[i] = load_bytes(x + i * ldx + e);
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) {
      const Vi b = load_at(row[j] + e);
#pragma GCC unroll 6
      for (int i = 0; i < Rows; i++) acc[i][j] = dot_quads(acc[i][j], a[i], b);
    }
  };
  const int64_t ahead = ldw <= 2048 ? Width * ldw : 1024;
  int64_t e = 0;
  for (; e + kVectorBytes <= k; e += kVectorBytes) {
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) prefetch(row[j] + e + ahead);
    step(e, [](const int8_t* p) { return load_bytes(p); });
  }
  if (e < k) step(e, [&](const int8_t* p) { return load_bytes_n(p, static_cast<int>(k - e)); });
#pragma GCC unroll 6
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < Width; j++) store_ints(lanes + (i * kGroup + j) * Vf::N, acc[i][j]);
}

template <int Rows>
FUSEDOPS_INLINE void dot_group(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t ldw,
                               int64_t cols, int64_t k, int32_t* lanes) {
  constexpr int width = dot_width(Rows);
  for (int64_t j = 0; j < cols; j += width)
    dot_tile<Rows, width>(x, ldx, w + j * ldw, ldw, cols - j, k, lanes + j * Vf::N);
}
FUSEDOPS_INLINE void any_dot_group(int64_t rows, const uint8_t* x, int64_t ldx, const int8_t* w,
                                   int64_t ldw, int64_t cols, int64_t k, int32_t* lanes) {
  constexpr int most = kDotRows;
  switch (rows) {
    case 1:
      return dot_group<1>(x, ldx, w, ldw, cols, k, lanes);
    case 2:
      return dot_group<2>(x, ldx, w, ldw, cols, k, lanes);
    case 3:
      return dot_group<3>(x, ldx, w, ldw, cols, k, lanes);
    case 4:
      return dot_group<at_most(4, most)>(x, ldx, w, ldw, cols, k, lanes);
    case 5:
      return dot_group<at_most(5, most)>(x, ldx, w, ldw, cols, k, lanes);
    default:
      return dot_group<most>(x, ldx, w, ldw, cols, k, lanes);
  }
}

constexpr int64_t kFewRows = 24;  // about where transposing w costs less than it brings
constexpr int64_t kLanesBytes = kDotRows * kGroup * Vf::N * 4;

// c[i][j]: sums of a group of columns, kGroup to a row.
__attribute__((noinline)) void add_dots(const int32_t* lanes, int64_t rows, int32_t* c) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < kGroup; j += Vf::N) {
      Vf r[Vf::N];
#pragma GCC unroll 16
      for (int l = 0; l < Vf::N; l++)
        r[l] = as_float(load_ints(lanes + (i * kGroup + j + l) * Vf::N));
      const Vf sum = add_lanes(r, [](Vf p, Vf q) { return as_float(as_ints(p) + as_ints(q)); });
      store_ints(c + i * kGroup + j, as_ints(sum));
    }
}

// y from the sums c, rows of which are `ldc` apart, less the offsets.
template <class T>
__attribute__((noinline)) void finish_bytes(const QuantizedArgs& a, const int32_t* c, int64_t ldc,
                                            const int32_t* offsets, int64_t row, int64_t rows,
                                            int64_t col, int64_t cols) {
  with_activation(a.act, [&](auto act) {
    for (int64_t i = 0; i < rows; i++)
      finish_row<T>(a, act, row + i, col, cols, a.row_scale + row + i, [&](int64_t j) {
        return to_float(load_ints(c + i * ldc + j) - load_ints(offsets + j));
      });
  });
}

// All rows of x and the row of 128s behind them, whose sums are the offsets.
template <class T>
FUSEDOPS_INLINE void few_dots(const QuantizedArgs& a, void* scratch, int64_t begin, int64_t end) {
  int32_t* lanes = static_cast<int32_t*>(scratch);
  int32_t* c = lanes + kLanesBytes / 4;
  const int64_t rows = a.m + 1, groups = (rows + kDotRows - 1) / kDotRows;
  for (int64_t col = begin; col < end; col += kGroup) {
    const int64_t cols = at_most(kGroup, end - col);
    const int8_t* w = static_cast<const int8_t*>(a.w) + col * a.k;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * rows / groups, count = (g + 1) * rows / groups - first;
      any_dot_group(count, byte_row(a, first), a.row_bytes, w, a.k, cols, a.k, lanes);
      add_dots(lanes, count, c + first * kGroup);
    }
    finish_bytes<T>(a, c, kGroup, c + a.m * kGroup, 0, a.m, col, cols);
  }
}

// --- many rows: panels of w, transposed, past which tiles of x stream

constexpr int kTileRows = kVectorRegisters == 32 ? 6 : 4, kTileVectors = kVectorRegisters / 8;
constexpr int64_t kPanelColumns = kTileVectors * Vf::N;
constexpr int64_t kBlock = 4096;  // of k: a block of a panel then lies in the second cache

// N rows of w, N quads of k, as one square of the panel; adds 128 times w to the offsets.
template <bool Full>
FUSEDOPS_INLINE Vi byte_square(const int8_t* w, int64_t ldw, int64_t rows, int64_t k,
                               int32_t* panel, Vi offsets) {
  Vf r[Vf::N];
#pragma GCC unroll 16
  for (int i = 0; i < Vf::N; i++) {
    const int8_t* p = w + i * ldw;
    if constexpr (Full) prefetch(p + 512);
    if constexpr (Full)
      r[i] = as_float(load_bytes(p));
    else
      r[i] = as_float(i < rows ? load_bytes_n(p, static_cast<int>(k)) : Vi{});
  }
  transpose(r);
  const uint8_t offset[4] = {128, 128, 128, 128};
  const Vi zero = broadcast_bytes(offset);
#pragma GCC unroll 16
  for (int i = 0; i < Vf::N; i++) {
    offsets = dot_quads(offsets, zero, as_ints(r[i]));
    store_ints(panel + i * kPanelColumns, as_ints(r[i]));
  }
  return offsets;
}

__attribute__((noinline)) void byte_panel(const int8_t* w, int64_t ldw, int64_t cols, int64_t k,
                                          int32_t* panel, int32_t* offsets, bool add) {
  for (int64_t j = 0; j < kPanelColumns; j += Vf::N) {
    Vi sum = add ? load_ints(offsets + j) : Vi{};
    for (int64_t e = 0; e < k; e += kVectorBytes) {
      const int8_t* from = w + j * ldw + e;
      int32_t* to = panel + e / kQuad * kPanelColumns + j;
      if (j + Vf::N <= cols && e + kVectorBytes <= k)
        sum = byte_square<true>(from, ldw, Vf::N, kVectorBytes, to, sum);
      else
        sum = byte_square<false>(from, ldw, cols - j, at_most(kVectorBytes, k - e), to, sum);
    }
    store_ints(offsets + j, sum);
  }
}

// c[i][j] (+)= sum over quads of x[i] * panel, for Rows rows of x.
template <int Rows>
__attribute__((noinline)) void byte_tile(const uint8_t* x, int64_t ldx, int64_t quads,
                                         const int32_t* panel, int32_t* c, bool add) {
  Vi acc[Rows][kTileVectors];
#pragma GCC unroll 6
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; j++) acc[i][j] = Vi{};
#pragma GCC unroll 4
  for (int64_t s = 0; s < quads; s++) {
    if (s % 16 == 0)  // a line of each row of the next tile
#pragma GCC unroll 6
      for (int i = 0; i < Rows; i++) prefetch(x + (Rows + i) * ldx + kQuad * s);
    Vi b[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; j++) b[j] = load_ints(panel + s * kPanelColumns + j * Vf::N);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++) {
      const Vi a = broadcast_bytes(x + i * ldx + kQuad * s);
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; j++) acc[i][j] = dot_quads(acc[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; j++) {
      int32_t* to = c + i * kPanelColumns + j * Vf::N;
      store_ints(to, add ? load_ints(to) + acc[i][j] : acc[i][j]);
    }
}
FUSEDOPS_INLINE void any_byte_tile(int64_t rows, const uint8_t* x, int64_t ldx, int64_t quads,
                                   const int32_t* panel, int32_t* c, bool add) {
  switch (rows) {
    case 1:
      return byte_tile<1>(x, ldx, quads, panel, c, add);
    case 2:
      return byte_tile<2>(x, ldx, quads, panel, c, add);
    case 3:
      return byte_tile<3>(x, ldx, quads, panel, c, add);
    case 4:
      return byte_tile<4>(x, ldx, quads, panel, c, add);
    case 5:
      return byte_tile<at_most(5, kTileRows)>(x, ldx, quads, panel, c, add);
    default:
      return byte_tile<kTileRows>(x, ldx, quads, panel, c, add);
  }
}

FUSEDOPS_INLINE int64_t byte_blocks(int64_t k) {
  return k <= kBlock ? 1 : (k + kBlock - 1) / kBlock;
}

FUSEDOPS_INLINE void bytes_shape(const QuantizedArgs& a, int64_t rows, QuantizedShape& s) {
  const int64_t sums = byte_blocks(a.k) == 1 ? kTileRows : rows;
  const int64_t few = kLanesBytes + (kFewRows + 1) * kGroup * 4;
  const int64_t many = (kBlock / kQuad + 1 + sums) * kPanelColumns * 4;
  s.row_bytes = padded_row(a.k);
  s.columns = 64;  // a multiple of both
  s.few_rows = kFewRows;
  s.scratch = few > many ? few : many;
}

template <class T>
FUSEDOPS_INLINE void many_dots(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,
                               int64_t begin, int64_t end) {
  int32_t* panel = static_cast<int32_t*>(scratch);
  int32_t* offsets = panel + kBlock / kQuad * kPanelColumns;
  int32_t* c = offsets + kPanelColumns;
  const int64_t blocks = byte_blocks(a.k), tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t col = begin; col < end; col += kPanelColumns) {
    const int64_t cols = at_most(kPanelColumns, end - col);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t k0 = b * kBlock, k = at_most(kBlock, a.k - k0);
      byte_panel(static_cast<const int8_t*>(a.w) + col * a.k + k0, a.k, cols, k, panel, offsets,
                 b > 0);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t first = t * rows / tiles, count = (t + 1) * rows / tiles - first;
        int32_t* to = blocks == 1 ? c : c + first * kPanelColumns;
        any_byte_tile(count, byte_row(a, row + first) + k0, a.row_bytes, (k + kQuad - 1) / kQuad,
                      panel, to, b > 0);
        if (b == blocks - 1)
          finish_bytes<T>(a, to, kPanelColumns, offsets, row + first, count, col, cols);
      }
    }
  }
}

template <class T>
FUSEDOPS_INLINE void byte_dots(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,
                               int64_t begin, int64_t end) {
  if (a.m <= kFewRows)
    few_dots<T>(a, scratch, begin, end);
  else
    many_dots<T>(a, scratch, row, rows, begin, end);
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
