// act(x @ w^T + bias): the kernels over tasks of y, and how to cut the work.
#include "gemm/dots.h"
#include "gemm/panels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// Measured at k = 1024 and below. linear_dots converts w again for every group of rows: cheap where
// one instruction does it, a dozen on vectors of 4. Its sums across lanes cost the same for a short
// k as for a long one.
template <class T>
int64_t few_rows(int64_t k) {
  if (kWidenX<T> && Vf::N == 4) return kDotRows;
  constexpr int64_t most = kVectorRegisters == 32 ? 32 : 48;
  return at_most(most, k / (sizeof(T) == 2 ? 8 : 4));
}

template <class T>
int64_t few_columns(int64_t k) {
  if (kWidenX<T> && Vf::N == 4) return 0;
  constexpr int64_t most = kVectorRegisters == 32 ? 24 : 16;
  return at_most(most, k / 16);
}

template <class T>
void shape(const LinearArgs& a, LinearShape& s) {
  using C = compute_t<T>;
  constexpr int64_t columns = kPanelColumns<T>, lane = sizeof(C);
  s.dot_rows = kDotRows;
  s.dot_columns = kDotColumns;
  s.dot_row_bytes = dot_row_bytes<T>(a.k);
  s.dot_bytes = kDotRows * kFinishColumns * lane;
  s.panel_columns = columns;
  s.panel_bytes = (a.packed ? kStreamedSums : kBlockSteps + kTileRows) * columns * lane;
  s.panel_row_bytes = k_blocks<T>(a.k) == 1 ? 0 : columns * lane;
  s.packed_bytes = steps_of<T>(a.k) * columns * static_cast<int64_t>(sizeof(packed_t<T>));
  s.tile_rows = kTileRows;
  s.row_bytes = steps_of<T>(a.k) * lane;
  s.few_rows = few_rows<T>(a.k);
  s.few_columns = few_columns<T>(a.k);
  s.in_place = in_place<T>(a);
}

}  // namespace

#define LINEAR(T)                                                                             \
  void linear_shape_##T(const LinearArgs& a, LinearShape& s) { shape<T>(a, s); }              \
  void linear_dots_##T(const LinearArgs& a, const LinearPart& part) { dots<T>(a, part); }     \
  void linear_panels_##T(const LinearArgs& a, const LinearPart& part) { panels<T>(a, part); } \
  void linear_pack_##T(const LinearArgs& a, void* to, int64_t begin, int64_t end) {           \
    pack_panels<T>(a, to, begin, end);                                                        \
  }                                                                                           \
  void linear_rows_##T(const LinearArgs& a, void* to, int64_t begin, int64_t end) {           \
    pack_rows<T>(a, to, begin, end);                                                          \
  }
LINEAR(f32)
LINEAR(f16)
LINEAR(bf16)
LINEAR(f64)
#undef LINEAR

}  // namespace fusedops::FUSEDOPS_ISA
