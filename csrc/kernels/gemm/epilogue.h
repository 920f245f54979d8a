// What happens to finished sums: bias, pre-activation, activation, one rounding.
#pragma once
#include "../activation.h"
#include "operands.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// The lines of y that finish() writes, owned before: stores that miss would hold up those behind.
template <class T>
FUSEDOPS_INLINE void expect(const LinearArgs& a, int64_t row0, int64_t rows, int64_t col0,
                            int64_t cols) {
  for (int64_t i = 0; i < rows; i++) {
    const char* y = reinterpret_cast<const char*>(static_cast<T*>(a.y) + (row0 + i) * a.ldy + col0);
    for (int64_t b = 0; b < cols * static_cast<int64_t>(sizeof(T)); b += 64)
      prefetch_to_write(y + b);
  }
}

// y[row0 + i][col0 + j] = act(c[i][j] + bias[col0 + j]); rows of c are `ldc` apart and a multiple
// of the vector long.
template <class T>
__attribute__((noinline)) void finish(const LinearArgs& a, const compute_t<T>* c, int64_t ldc,
                                      int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  using V = Vec<compute_t<T>>;
  constexpr int together = kTogether<T> > 1 ? kVectorRegisters / 8 : 1;  // a row of a panel
  const T* bias = static_cast<const T*>(a.bias);
  with_activation<T>(a.act, [&](auto act) {
    for (int64_t i = 0; i < rows; i++) {
      T* y = static_cast<T*>(a.y) + (row0 + i) * a.ldy + col0;
      T* z = static_cast<T*>(a.z) + (a.z ? (row0 + i) * a.ldz + col0 : 0);
      int64_t j = 0;
      const auto whole = [&](auto several) __attribute__((always_inline)) {
        using S = decltype(several);
        for (; j + S::N <= cols; j += S::N) {
          S v = load<S>(c + i * ldc + j);
          if (bias) v = v + load<S>(bias + col0 + j);
          if (z) store(z + j, v);
          store(y + j, act.value(v));
        }
      };
      if constexpr (together > 1) whole(Many<V, together>{});
      whole(V{});
      const int n = static_cast<int>(cols - j);
      if (n == 0) continue;
      V v = load<V>(c + i * ldc + j);
      if (bias) v = v + load_n<V>(bias + col0 + j, n);
      if (z) store_n(z + j, v, n);
      store_n(y + j, act.value(v), n);
    }
  });
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
