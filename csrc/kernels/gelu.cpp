// GELU and its backward over contiguous elements.
#include "activation.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// Bytes between a load and its prefetch: the arithmetic of a few vectors fills the processor's
// window, so that loads would start late.
constexpr int64_t kAhead = 1024;
template <int Elements, class T>
FUSEDOPS_INLINE void ask(const T* p) {
  const char* line = reinterpret_cast<const char*>(p) + kAhead;
  for (int64_t b = 0; b < Elements * static_cast<int64_t>(sizeof(T)); b += 64) prefetch(line + b);
}

template <class T>
FUSEDOPS_INLINE void forward(const GeluArgs& a, int64_t begin, int64_t end) {
  using V = Vec<compute_t<T>>;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  with_activation<T>(a.act, [&](auto act) {
    int64_t i = begin;
    const auto whole = [&](auto several) __attribute__((always_inline)) {
      using W = decltype(several);
      for (; i + W::N <= end; i += W::N) {
        ask<W::N>(x + i);
        store(y + i, act.value(load<W>(x + i)));
      }
    };
    if constexpr (kTogether<T> > 1) whole(Many<V, kTogether<T>>{});
    whole(V{});
    const int n = static_cast<int>(end - i);
    if (n > 0) store_n(y + i, act.value(load_n<V>(x + i, n)), n);
  });
}

template <class T>
FUSEDOPS_INLINE void backward(const GeluArgs& a, int64_t begin, int64_t end) {
  using V = Vec<compute_t<T>>;
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.y);
  with_activation<T>(a.act, [&](auto act) {
    int64_t i = begin;
    for (; i + V::N <= end; i += V::N) {
      prefetch(x + i + kAhead / static_cast<int64_t>(sizeof(T)));
      prefetch(dy + i + kAhead / static_cast<int64_t>(sizeof(T)));
      store(dx + i, load<V>(dy + i) * act.grad(load<V>(x + i)));
    }
    const int n = static_cast<int>(end - i);
    if (n > 0) store_n(dx + i, load_n<V>(dy + i, n) * act.grad(load_n<V>(x + i, n)), n);
  });
}

}  // namespace

#define GELU(T)                                                                               \
  void gelu_##T(const GeluArgs& a, int64_t begin, int64_t end) { forward<T>(a, begin, end); } \
  void gelu_backward_##T(const GeluArgs& a, int64_t begin, int64_t end) {                     \
    backward<T>(a, begin, end);                                                               \
  }
GELU(f32)
GELU(f16)
GELU(bf16)
GELU(f64)
#undef GELU

}  // namespace fusedops::FUSEDOPS_ISA
