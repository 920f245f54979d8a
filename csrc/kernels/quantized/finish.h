// From sums to results: scale and bias in one rounding each, activation, one rounding to y.
#pragma once
#include "../activation.h"
#include "rows.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kGroup = 16;  // columns of y finished together; a multiple of every vector

FUSEDOPS_INLINE Vf columns_of(const float* p, int64_t col, int n) {
  return n == Vf::N ? load<Vf>(p + col) : load_n<Vf>(p + col, n);
}

// y[row][col + j] = act(scale * sum(j) + bias) for `cols` columns. sum(j): a vector of sums.
// row_scale: of a row of bytes, null for floats.
template <class T, class Act, class Sum>
FUSEDOPS_INLINE void finish_row(const QuantizedArgs& a, Act act, int64_t row, int64_t col,
                                int64_t cols, const float* row_scale, const Sum& sum) {
  T* y = static_cast<T*>(a.y) + row * a.n + col;
  for (int64_t j = 0; j < cols; j += Vf::N) {
    const int n = static_cast<int>(at_most(cols - j, Vf::N));
    Vf v = sum(j), factor = a.scale ? columns_of(a.scale, col + j, n) : set1<Vf>(1);
    if (row_scale) {  // the sum is an integer: times the weight's scale it is normal, or 0
      v = v * factor;
      factor = set1<Vf>(*row_scale);
    }
    v = a.bias ? fma(v, factor, columns_of(a.bias, col + j, n)) : v * factor;
    v = act.value(v);
    if (n == Vf::N)
      store(y + j, v);
    else
      store_n(y + j, v, n);
  }
}

// The sums over the lanes of N vectors, as one vector. add: of floats or of integers.
template <class Add>
FUSEDOPS_INLINE Vf add_lanes(Vf (&r)[Vf::N], const Add& add) {
  transpose(r);
#pragma GCC unroll 4
  for (int half = Vf::N / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) r[i] = add(r[i], r[i + half]);
  return r[0];
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
