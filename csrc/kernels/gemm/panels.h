// Many rows: a panel of w's rows is transposed once into scratch, then tiles of x stream past it.
#pragma once
#include "epilogue.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// Accumulators fill 3/4 of the registers.
constexpr int kTileRows = 6, kTileVectors = kVectorRegisters / 8;
constexpr int64_t kBlockSteps = 1024;  // of k: a block of a panel then lies in the second cache

template <class T>
constexpr int64_t kPanelColumns = kTileVectors * Vec<compute_t<T>>::N;

// N rows of w, N steps of k, as one square of the panel.
template <class T, bool Full>
FUSEDOPS_INLINE void transpose_square(const T* w, int64_t ldw, int64_t rows, int64_t k,
                                      compute_t<T>* panel) {
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
  for (int i = 0; i < V::N; i++) store(panel + i * kPanelColumns<T>, O::packed(r[i]));
}

// panel[step][column] = w[column][step]; columns past `cols` and elements past k are zero.
template <class T>
__attribute__((noinline)) void transpose_panel(const T* w, int64_t ldw, int64_t cols, int64_t k,
                                               compute_t<T>* panel) {
  using O = operands_t<T>;
  constexpr int64_t N = O::V::N, square = N * O::kStep;
  for (int64_t j = 0; j < kPanelColumns<T>; j += N)
    for (int64_t e = 0; e < k; e += square) {
      const T* from = w + j * ldw + e;
      compute_t<T>* to = panel + e / O::kStep * kPanelColumns<T> + j;
      if (j + N <= cols && e + square <= k)
        transpose_square<T, true>(from, ldw, N, square, to);
      else
        transpose_square<T, false>(from, ldw, cols - j, at_most(square, k - e), to);
    }
}

// c[i][j] (+)= sum over k of x[i][k] * panel[k][j], for Rows rows of x.
template <class T, int Rows>
__attribute__((noinline)) void tile(const typename operands_t<T>::X* x, int64_t ldx, int64_t k,
                                    const compute_t<T>* panel, compute_t<T>* c, bool add) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int64_t columns = kPanelColumns<T>;
  V acc[Rows][kTileVectors];
#pragma GCC unroll 6
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; j++) acc[i][j] = set1<V>(0);
  const auto step = [&](const auto& x_at) __attribute__((always_inline)) {
    V b[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; j++) b[j] = load<V>(panel + j * V::N);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++) {
      const V a = x_at(x + i * ldx);
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; j++) acc[i][j] = O::multiply_broadcast(a, b[j], acc[i][j]);
    }
    panel += columns;
    x += O::kStep;
  };
  const int64_t steps = k / O::kStep;
#pragma GCC unroll 4
  for (int64_t s = 0; s < steps; s++) step([](const auto* p) { return O::broadcast(p); });
  if constexpr (O::kStep > 1)
    if (k % O::kStep) step([](const auto* p) { return O::broadcast_last(p); });
#pragma GCC unroll 6
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; j++) {
      compute_t<T>* to = c + i * columns + j * V::N;
      store(to, add ? load<V>(to) + acc[i][j] : acc[i][j]);
    }
}

template <class T>
FUSEDOPS_INLINE void any_tile(int64_t rows, const typename operands_t<T>::X* x, int64_t ldx,
                              int64_t k, const compute_t<T>* panel, compute_t<T>* c, bool add) {
  switch (rows) {
    case 1:
      return tile<T, 1>(x, ldx, k, panel, c, add);
    case 2:
      return tile<T, 2>(x, ldx, k, panel, c, add);
    case 3:
      return tile<T, 3>(x, ldx, k, panel, c, add);
    case 4:
      return tile<T, 4>(x, ldx, k, panel, c, add);
    case 5:
      return tile<T, 5>(x, ldx, k, panel, c, add);
    default:
      return tile<T, kTileRows>(x, ldx, k, panel, c, add);
  }
}

// Blocks of k: at least one, for an empty sum is a result too.
FUSEDOPS_INLINE int64_t k_blocks(int64_t k, int64_t block) {
  return k <= block ? 1 : (k + block - 1) / block;
}

// Bytes: one block of a panel, then the sums: of one tile, or of all rows while blocks of k follow.
template <class T>
int64_t panel_scratch(const LinearArgs& a) {
  const int64_t rows = k_blocks(a.k, kBlockSteps * operands_t<T>::kStep) == 1 ? kTileRows : a.m;
  return (kBlockSteps + rows) * kPanelColumns<T> * static_cast<int64_t>(sizeof(compute_t<T>));
}

// Columns [begin, end) of y, begin a multiple of the panel.
template <class T>
FUSEDOPS_INLINE void panels(const LinearArgs& a, void* scratch, int64_t begin, int64_t end) {
  using O = operands_t<T>;
  constexpr int64_t columns = kPanelColumns<T>, block = kBlockSteps * O::kStep,
                    chain = kChainSteps<T> * O::kStep;
  const typename O::X* x = static_cast<const typename O::X*>(a.x);
  compute_t<T>* panel = static_cast<compute_t<T>*>(scratch);
  compute_t<T>* sums = panel + kBlockSteps * columns;
  const int64_t blocks = k_blocks(a.k, block), tiles = (a.m + kTileRows - 1) / kTileRows;
  for (int64_t col = begin; col < end; col += columns) {
    const int64_t cols = at_most(columns, end - col);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t k0 = b * block, k = at_most(block, a.k - k0);
      transpose_panel<T>(static_cast<const T*>(a.w) + col * a.ldw + k0, a.ldw, cols, k, panel);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = t * a.m / tiles, rows = (t + 1) * a.m / tiles - row;
        compute_t<T>* c = blocks == 1 ? sums : sums + row * columns;
        for (int64_t e = 0; e == 0 || e < k; e += chain)
          any_tile<T>(rows, x + row * a.ldx + k0 + e, a.ldx, at_most(chain, k - e),
                      panel + e / O::kStep * columns, c, b > 0 || e > 0);
        if (b == blocks - 1) finish<T>(a, c, columns, row, rows, col, cols);
      }
    }
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
