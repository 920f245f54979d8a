// The epilogue of a dense layer on sums that lie in memory.
#include "gemm/epilogue.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

template <class T, class S>
void finish_sums(const LinearArgs& a, const LinearSums& s) {
  finish<T>(a, static_cast<const S*>(s.data), s.stride, s.row_begin, s.row_end - s.row_begin,
            s.col_begin, s.col_end - s.col_begin);
}

template <class T>
void finish_either(const LinearArgs& a, const LinearSums& s) {
  s.rounded ? finish_sums<T, T>(a, s) : finish_sums<T, compute_t<T>>(a, s);
}

}  // namespace

#define FINISH(T) \
  void linear_finish_##T(const LinearArgs& a, const LinearSums& s) { finish_either<T>(a, s); }
FINISH(f32)
FINISH(f16)
FINISH(bf16)
FINISH(f64)
#undef FINISH

}  // namespace fusedops::FUSEDOPS_ISA
