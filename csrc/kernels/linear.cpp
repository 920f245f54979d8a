// act(x @ w^T + bias): the kernels over tasks of y, and how to cut the work.
#include "gemm/dots.h"
#include "gemm/panels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// Measured at k = 1024. linear_dots converts w again for every group of rows: cheap where one
// instruction does it, a dozen on vectors of 4.
template <class T>
constexpr int64_t few_rows() {
  if (kWidenX<T> && Vf::N == 4) return kDotRows;
  return kVectorRegisters == 32 ? 32 : 48;
}

template <class T>
void shape(const LinearArgs& a, LinearShape& s) {
  using C = compute_t<T>;
  constexpr int64_t columns = kPanelColumns<T>, lane = sizeof(C);
  s.dot_columns = kDotColumns;
  s.dot_row_bytes = dot_row_bytes<T>(a.k);
  s.panel_columns = columns;
  s.panel_bytes =
      (a.packed ? kStreamedPanels * kTileRows : kBlockSteps + kTileRows) * columns * lane;
  s.panel_row_bytes = k_blocks<T>(a.k) == 1 ? 0 : columns * lane;
  s.packed_bytes = steps_of<T>(a.k) * columns * static_cast<int64_t>(sizeof(packed_t<T>));
  s.tile_rows = kTileRows;
  s.row_bytes = steps_of<T>(a.k) * lane;
  s.few_rows = few_rows<T>();
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
