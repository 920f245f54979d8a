// The epilogue of a dense layer on sums that lie in memory.
#include "gemm/epilogue.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

template <class V, class S>
FUSEDOPS_INLINE V take(const S* p, int n) {
  return n == V::N ? load<V>(p) : load_n<V>(p, n);
}
template <class T, class V>
FUSEDOPS_INLINE void put(T* p, V v, int n) {
  if (n == V::N)
    store(p, v);
  else
    store_n(p, v, n);
}

template <class T, class S>
void finish_sums(const LinearArgs& a, const LinearSums& s) {
  using V = Vec<compute_t<T>>;
  const T* bias = static_cast<const T*>(a.bias);
  with_activation<T>(a.act, [&](auto act) {
    for (int64_t i = s.row_begin; i < s.row_end; i++) {
      const S* c = static_cast<const S*>(s.data) + (i - s.row_begin) * s.stride - s.col_begin;
      T* y = static_cast<T*>(a.y) + i * a.ldy;
      T* z = static_cast<T*>(a.z) + (a.z ? i * a.ldz : 0);
      for (int64_t j = s.col_begin; j < s.col_end; j += V::N) {
        const int n = static_cast<int>(at_most(s.col_end - j, V::N));
        V v = take<V>(c + j, n);
        if (bias) v = v + take<V>(bias + j, n);
        if (z) put(z + j, v, n);
        put(y + j, act.value(v), n);
      }
    }
  });
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
