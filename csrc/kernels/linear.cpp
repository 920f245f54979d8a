// act(x @ w^T + bias): the kernels over columns of y, and how to cut the work.
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
  s.dot_columns = kDotColumns;
  s.dot_scratch = dot_scratch<T>(a);
  s.panel_columns = kPanelColumns<T>;
  s.panel_scratch = panel_scratch<T>(a);
  s.packed_bytes = packed_elements<T>(a) * static_cast<int64_t>(sizeof(packed_t<T>));
  s.few_rows = few_rows<T>();
  s.widen_x = kWidenX<T>;
}

// Rows [begin, end) of x in the compute type, k elements apart.
template <class T>
FUSEDOPS_INLINE void widen(const LinearArgs& a, float* wide, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(a.x) + row * a.ldx;
    float* to = wide + row * a.k;
    int64_t e = 0;
    for (; e + Vf::N <= a.k; e += Vf::N) store(to + e, load<Vf>(x + e));
    const int n = static_cast<int>(a.k - e);
    if (n > 0) store_n(to + e, load_n<Vf>(x + e, n), n);
  }
}

}  // namespace

#define LINEAR(T)                                                                          \
  void linear_shape_##T(const LinearArgs& a, LinearShape& s) { shape<T>(a, s); }           \
  void linear_dots_##T(const LinearArgs& a, void* scratch, int64_t begin, int64_t end) {   \
    dots<T>(a, scratch, begin, end);                                                       \
  }                                                                                        \
  void linear_panels_##T(const LinearArgs& a, void* scratch, int64_t begin, int64_t end) { \
    panels<T>(a, scratch, begin, end);                                                     \
  }                                                                                        \
  void linear_pack_##T(const LinearArgs& a, void* panels, int64_t begin, int64_t end) {    \
    pack<T>(a, panels, begin, end);                                                        \
  }
LINEAR(f32)
LINEAR(f16)
LINEAR(bf16)
LINEAR(f64)
#undef LINEAR

void linear_widen_f16(const LinearArgs& a, float* wide, int64_t begin, int64_t end) {
  widen<f16>(a, wide, begin, end);
}
void linear_widen_bf16(const LinearArgs& a, float* wide, int64_t begin, int64_t end) {
  widen<bf16>(a, wide, begin, end);
}

}  // namespace fusedops::FUSEDOPS_ISA
