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
    const char* end = y + cols * static_cast<int64_t>(sizeof(T));
    for (y -= reinterpret_cast<uintptr_t>(y) % 64; y < end; y += 64) prefetch_to_write(y);
  }
}

// y[j] = act(c[j] + bias[j]), and z[j] what act is applied to; bias and z may be null.
template <class T, class S, class Act>
FUSEDOPS_INLINE void finish_row(const Act& act, const S* c, const T* bias, T* y, T* z,
                                int64_t cols) {
  using V = Vec<compute_t<T>>;
  constexpr int together = kTogether<T> > 1 ? kVectorRegisters / 8 : 1;  // a row of a panel
  int64_t j = 0;
  const auto whole = [&](auto several) __attribute__((always_inline)) {
    using W = decltype(several);
    for (; j + W::N <= cols; j += W::N) {
      W v = load<W>(c + j);
      if (bias) v = v + load<W>(bias + j);
      if (z) store(z + j, v);
      store(y + j, act.value(v));
    }
  };
  if constexpr (together > 1) whole(Many<V, together>{});
  whole(V{});
  const int n = static_cast<int>(cols - j);
  if (n == 0) return;
  V v = load_n<V>(c + j, n);
  if (bias) v = v + load_n<V>(bias + j, n);
  if (z) store_n(z + j, v, n);
  store_n(y + j, act.value(v), n);
}

// The same for rows that are ldc, ldy and ldz apart.
template <class T, class S, class Act>
__attribute__((noinline)) void finish_rows(Act act, const S* c, int64_t ldc, const T* bias, T* y,
                                           int64_t ldy, T* z, int64_t ldz, int64_t rows,
                                           int64_t cols) {
  if constexpr (kTogether<T> > 1) {
    using W = Many<Vec<compute_t<T>>, kVectorRegisters / 8>;
    if (cols == W::N && !z) {  // a loop so short keeps its constants
      for (int64_t i = 0; i < rows; i++) {
        W v = load<W>(c + i * ldc);
        if (bias) v = v + load<W>(bias);
        store(y + i * ldy, act.value(v));
      }
      return;
    }
  }
  for (int64_t i = 0; i < rows; i++)
    finish_row<T>(act, c + i * ldc, bias, y + i * ldy, z ? z + i * ldz : nullptr, cols);
}

// y[row0 + i][col0 + j] = act(c[i][j] + bias[col0 + j]); rows of c are `ldc` apart.
template <class T, class S>
FUSEDOPS_INLINE void finish(const LinearArgs& a, const S* c, int64_t ldc, int64_t row0,
                            int64_t rows, int64_t col0, int64_t cols) {
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + col0 : nullptr;
  T* y = static_cast<T*>(a.y) + row0 * a.ldy + col0;
  T* z = a.z ? static_cast<T*>(a.z) + row0 * a.ldz + col0 : nullptr;
  with_activation<T>(a.act, [&](auto act) __attribute__((always_inline)) {
    finish_rows<T>(act, c, ldc, bias, y, a.ldy, z, a.ldz, rows, cols);
  });
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
