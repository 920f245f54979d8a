// Panels of w: packed ahead, or transposed into scratch as they are needed; then tiles of x stream
// past one block of a panel, which lies in the second cache.
#pragma once
#include "epilogue.h"
#include "tiles.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kBlockSteps = 1024;  // of k

// N rows of w, N steps of k, as one square of the panel.
template <class T, bool Full, class P>
FUSEDOPS_INLINE void transpose_square(const T* w, int64_t ldw, int64_t rows, int64_t k, P* panel) {
  using O = operands_t<T>;
  using V = typename O::V;
  V r[V::N];
#pragma GCC unroll 16
  for (int i = 0; i < V::N; i++) {
    const T* p = w + i * ldw;
    if constexpr (Full)
      r[i] = O::load(p);
    else
      r[i] = i < rows ? O::load_n(p, static_cast<int>(k)) : set1<V>(0);
    if constexpr (Full) prefetch(reinterpret_cast<const char*>(p) + 256);  // bytes
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < V::N; i++)
    if (Full || i < steps_of<T>(k)) store(panel + i * kPanelColumns<T>, O::packed(r[i]));
}

// panel[step][column] = w[column][step]; columns past `cols` and elements past k are zero. P is
// compute_t<T> for scratch, where columns past the last vector that any_tile reads stay as they
// are, and packed_t<T> for what is kept.
template <class T, class P>
__attribute__((noinline)) void transpose_panel(const T* w, int64_t ldw, int64_t cols, int64_t k,
                                               P* panel, bool kept) {
  using O = operands_t<T>;
  constexpr int64_t N = O::V::N, square = N * O::kStep;
  const int64_t width = kept ? kPanelColumns<T> : cols;
  for (int64_t j = 0; j < width; j += N)
    for (int64_t e = 0; e < k; e += square) {
      const T* from = w + j * ldw + e;
      P* to = panel + e / O::kStep * kPanelColumns<T> + j;
      if (j + N <= cols && e + square <= k)
        transpose_square<T, true>(from, ldw, N, square, to);
      else
        transpose_square<T, false>(from, ldw, cols - j, at_most(square, k - e), to);
    }
}

// The same panel of a w by k.
template <class T>
__attribute__((noinline)) void copy_panel(const T* w, int64_t ldw, int64_t cols, int64_t k,
                                          compute_t<T>* panel) {
  using O = operands_t<T>;
  constexpr int64_t N = O::V::N, ahead = 8;  // rows: each is another page
  for (int64_t e = 0; e < k; e += O::kStep, panel += kPanelColumns<T>) {
    const T* row = w + e * ldw;
    for (int64_t j = 0; j < kPanelColumns<T>; j += N) {
      const int n = static_cast<int>(at_most(cols - j, N));
      for (int i = 0; i < O::kStep; i++) prefetch(row + j + (ahead * O::kStep + i) * ldw);
      store(panel + j,
            n > 0 ? O::packed(O::load_across(row + j, ldw, k - e, n)) : set1<typename O::V>(0));
    }
  }
}

// Blocks of k, of nearly one length: at least one, for an empty sum is a result too.
template <class T>
FUSEDOPS_INLINE int64_t k_blocks(int64_t k) {
  const int64_t steps = steps_of<T>(k);
  return steps <= kBlockSteps ? 1 : (steps + kBlockSteps - 1) / kBlockSteps;
}
template <class T>
FUSEDOPS_INLINE int64_t block_steps(int64_t k) {
  constexpr int64_t whole = 64;
  const int64_t blocks = k_blocks<T>(k), each = (steps_of<T>(k) + blocks - 1) / blocks;
  return at_most((each + whole - 1) / whole * whole, kBlockSteps);
}

// A block of w that is read after the present one: rows in memory.
struct NextBlock {
  const char* from;
  int64_t rows, row_bytes, stride;
};
// The share of one of the last tiles of a task in asking for it.
constexpr int64_t kAskingTiles = 8;
FUSEDOPS_INLINE Ahead ahead_of(const NextBlock& next, int64_t tile, int64_t tiles, int64_t steps) {
  const int64_t asking = at_most(tiles, kAskingTiles), turn = tile - (tiles - asking);
  Ahead ahead = {next.from, 0, 0, 0, 0};
  if (turn < 0 || next.row_bytes == 0 || steps < kUnrolled) return ahead;
  const int64_t first = turn * next.rows / asking, rows = (turn + 1) * next.rows / asking - first;
  const bool joined = next.stride == next.row_bytes;
  const int64_t bytes = joined ? rows * next.row_bytes : next.row_bytes;
  const int64_t lines = rows * next.row_bytes / 64, times = steps / kUnrolled;
  ahead.from += first * next.stride;
  ahead.lines = (lines + times - 1) / times;
  if (!joined) ahead.lines = at_most(ahead.lines, (next.row_bytes + 63) / 64);
  if (ahead.lines == 0) return ahead;
  ahead.run = (bytes + 64 * ahead.lines - 1) / (64 * ahead.lines);
  ahead.left = ahead.run;
  ahead.jump = next.stride - ahead.run * 64 * ahead.lines;
  return ahead;
}

// Whether tiles read x where it lies: it passes by so few panels that a packed copy does not pay. A
// row's bits are the same either way, so the number of rows may decide. Not for 16-bit values that
// are widened, nor for pairs of f16, which are moved when they are packed; nor where a register
// takes the factors of several rows at once.
constexpr int64_t kInPlacePanels = 16;
template <class T>
constexpr bool kReadsInPlace = !kLaneFactors && !kWidenX<T> && !kIsF16<T>;
template <class T>
FUSEDOPS_INLINE bool in_place(const LinearArgs& a) {
  return kReadsInPlace<T> && a.n <= kInPlacePanels * kPanelColumns<T> && a.m > kTileRows;
}

// One block of k of a panel against the tiles of a task; the last block finishes them.
template <class T, class P>
FUSEDOPS_INLINE void panel_block(const LinearArgs& a, const LinearPart& part, const P* panel,
                                 const NextBlock& next, int64_t k0, int64_t k, compute_t<T>* sums,
                                 int64_t col, int64_t cols) {
  constexpr int64_t columns = kPanelColumns<T>;
  const RowTiles rows(a.m);
  const bool first = k0 == 0, last = k0 + k == a.k;
  const int64_t before = rows.row(part.row_begin), steps = steps_of<T>(k);
  const int64_t all_steps = steps_of<T>(a.k), skipped = k0 / operands_t<T>::kStep;
  for (int64_t t = part.row_begin; t < part.row_end; t++) {
    const int64_t row = rows.row(t), height = rows.row(t + 1) - row;
    compute_t<T>* c = first && last ? sums : sums + (row - before) * columns;
    if (last) expect<T>(a, row, height, col, cols);
    const Ahead ahead = ahead_of(next, t - part.row_begin, part.row_end - part.row_begin, steps);
    const auto run = [&](const auto& x) __attribute__((always_inline)) {
      any_tile<T>(height, cols, x, steps, panel, c, !first, ahead);
    };
    const bool half = k % operands_t<T>::kStep != 0;
    if constexpr (kReadsInPlace<T>) {
      const T* x = static_cast<const T*>(a.x) + row * a.ldx + k0;
      if (in_place<T>(a)) run(RowsInPlace<T>{x, half, x + k, a.ldx, height * a.ldx - k});
    }
    if (!in_place<T>(a))
      run(PackedRows<T>{
          static_cast<const compute_t<T>*>(part.rows) + row * all_steps + skipped * height, half});
    if (last) finish<T>(a, c, columns, row, height, col, cols);
  }
}

// A panel past all tiles of a few rows. It comes at first use, through the first cache: one tile
// takes it as it comes, several take turns at a chain of it. Chains are added up in blocks, or the
// sum of all of them would err like one long chain. x, sums: tile after tile.
template <class T>
FUSEDOPS_INLINE void streamed_panel(const RowTiles& rows, const compute_t<T>* x, int64_t steps,
                                    const packed_t<T>* panel, compute_t<T>* sums,
                                    compute_t<T>* part) {
  using V = Vec<compute_t<T>>;
  constexpr int64_t columns = kPanelColumns<T>,
                    row_bytes = columns * static_cast<int64_t>(sizeof(packed_t<T>));
  const int64_t chain = at_most(short_chain_steps<T>(steps), kFewSteps);
  for (int64_t b = 0; b == 0 || b < steps; b += kBlockSteps) {
    const int64_t block = at_most(kBlockSteps, steps - b);
    compute_t<T>* to = b == 0 ? sums : part;
    if (rows.count == 1)
      tile_of<T, kTileVectors, Source::streamed>(rows.m, PackedRows<T>{x + b * rows.m, false},
                                                 block, panel + b * columns, to, false, {});
    else
      for (int64_t s = 0; s == 0 || s < block; s += chain) {
        const int64_t at = b + s, now = at_most(chain, block - s);
        const NextBlock next = {reinterpret_cast<const char*>(panel + (at + now) * columns), chain,
                                row_bytes, row_bytes};
        for (int64_t t = 0; t < rows.count; t++) {
          const int64_t row = rows.row(t), height = rows.row(t + 1) - row;
          tile_of<T, kTileVectors, Source::shared>(
              height, PackedRows<T>{x + row * steps + at * height, false}, now,
              panel + at * columns, to + row * columns, s > 0, ahead_of(next, t, rows.count, now));
        }
      }
    if (b == 0) continue;
    for (int64_t i = 0; i < rows.m * columns; i += V::N)
      store(sums + i, load<V>(sums + i) + load<V>(part + i));
  }
}

// Up to so many rows take packed panels this way, unless their bits must be those of many rows or x
// is not packed. Tiles of more rows are high: the second cache delivers as fast as they multiply.
constexpr int64_t kStreamedRows = 16;
template <class T>
FUSEDOPS_INLINE bool streamed(const LinearArgs& a) {
  return a.packed && a.m <= kStreamedRows && !a.deterministic && !in_place<T>(a);
}
// The sums of so many panels are finished together where there is one tile: a few vectors alone
// would wait for one another.
constexpr int64_t kStreamedPanels = 8;
// Rows of sums that they need: of all panels, and of one more for a block.
constexpr int64_t kStreamedSums = (kStreamedPanels + 1) * kTileRows > 2 * kStreamedRows
                                      ? (kStreamedPanels + 1) * kTileRows
                                      : 2 * kStreamedRows;
template <class T>
FUSEDOPS_INLINE void streamed_panels(const LinearArgs& a, const LinearPart& part) {
  constexpr int64_t columns = kPanelColumns<T>;
  const int64_t steps = steps_of<T>(a.k);
  const RowTiles rows(a.m);
  const packed_t<T>* packed = static_cast<const packed_t<T>*>(a.packed);
  const compute_t<T>* x = static_cast<const compute_t<T>*>(part.rows);
  compute_t<T>* sums = static_cast<compute_t<T>*>(part.scratch);
  const int64_t together = (rows.count == 1 ? kStreamedPanels : 1) * columns;
  compute_t<T>* other = sums + together * a.m;
  for (int64_t from = part.col_begin; from < part.col_end; from += together) {
    const int64_t to = at_most(part.col_end, from + together);
    for (int64_t col = from; col < to; col += columns)
      streamed_panel<T>(rows, x, steps, packed + col * steps, sums + (col - from) * a.m, other);
    for (int64_t col = from; col < to; col += columns)
      finish<T>(a, sums + (col - from) * a.m, columns, 0, a.m, col, at_most(columns, to - col));
  }
}

// Tiles [row_begin, row_end) of y's rows, columns [col_begin, col_end), col_begin a multiple of
// the panel.
template <class T>
FUSEDOPS_INLINE void panels(const LinearArgs& a, const LinearPart& part) {
  constexpr int64_t columns = kPanelColumns<T>;
  constexpr int64_t packed_row = columns * static_cast<int64_t>(sizeof(packed_t<T>));
  constexpr int64_t element = sizeof(T);
  if (streamed<T>(a)) return streamed_panels<T>(a, part);
  compute_t<T>* panel = static_cast<compute_t<T>*>(part.scratch);
  compute_t<T>* sums = panel + (a.packed ? 0 : kBlockSteps * columns);
  const int64_t blocks = k_blocks<T>(a.k), all_steps = steps_of<T>(a.k);
  const int64_t each = block_steps<T>(a.k), block = each * operands_t<T>::kStep;
  for (int64_t col = part.col_begin; col < part.col_end; col += columns) {
    const int64_t cols = at_most(columns, part.col_end - col);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t k0 = b * block, k = at_most(block, a.k - k0);
      if (a.packed) {
        const packed_t<T>* packed =
            static_cast<const packed_t<T>*>(a.packed) + col * all_steps + b * each * columns;
        const int64_t steps = steps_of<T>(k);
        const char* behind = reinterpret_cast<const char*>(packed + steps * columns);
        panel_block<T>(a, part, packed, {behind, steps, packed_row, packed_row}, k0, k, sums, col,
                       cols);
        continue;
      }
      const int64_t by_col = a.w_by_k ? 1 : a.ldw, by_k = a.w_by_k ? a.ldw : 1;
      const T* w = static_cast<const T*>(a.w) + col * by_col + k0 * by_k;
      const T* next = b + 1 < blocks ? w + block * by_k : w - k0 * by_k + columns * by_col;
      NextBlock asked = {reinterpret_cast<const char*>(next), columns, k * element,
                         a.ldw * element};
      if (a.w_by_k) {
        copy_panel<T>(w, a.ldw, cols, k, panel);
        asked.rows = k, asked.row_bytes = columns * element;
      } else {
        transpose_panel<T>(w, a.ldw, cols, k, panel, false);
      }
      panel_block<T>(a, part, panel, asked, k0, k, sums, col, cols);
    }
  }
}

// Panels [begin, end) of w, one behind the other.
template <class T>
FUSEDOPS_INLINE void pack_panels(const LinearArgs& a, void* to, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p++) {
    const int64_t col = p * kPanelColumns<T>, cols = at_most(kPanelColumns<T>, a.n - col);
    transpose_panel<T>(static_cast<const T*>(a.w) + col * a.ldw, a.ldw, cols, a.k,
                       static_cast<packed_t<T>*>(to) + col * steps_of<T>(a.k), true);
  }
}

// Tiles [begin, end) of the rows of x, one behind the other.
template <class T>
FUSEDOPS_INLINE void pack_rows(const LinearArgs& a, void* to, int64_t begin, int64_t end) {
  const RowTiles rows(a.m);
  for (int64_t t = begin; t < end; t++) {
    const int64_t row = rows.row(t);
    pack_tile<T>(static_cast<const T*>(a.x) + row * a.ldx, a.ldx, rows.row(t + 1) - row, a.k,
                 static_cast<compute_t<T>*>(to) + row * steps_of<T>(a.k));
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
