// Through the activation of a dense layer backward: dz, its transpose and its sums in one pass.
#include "activation.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

FUSEDOPS_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V, class T>
FUSEDOPS_INLINE V get(const T* p, int n) {
  return n == V::N ? load<V>(p) : load_n<V>(p, n);
}
template <class T, class V>
FUSEDOPS_INLINE void put(T* p, V v, int n) {
  if (n == V::N)
    store(p, v);
  else
    store_n(p, v, n);
}

// A square of at most N rows and N columns; returns its sums over the rows.
template <class T, class Act>
FUSEDOPS_INLINE Vec<compute_t<T>> square(const PreactArgs& a, Act act, int64_t row, int rows,
                                         int64_t col, int cols) {
  using C = compute_t<T>;
  using V = Vec<C>;
  constexpr int64_t ahead = 256;  // bytes
  const T* dy = static_cast<const T*>(a.dy) + row * a.lddy + col;
  const T* z = static_cast<const T*>(a.z) + row * a.ldz + col;
  T* dz = static_cast<T*>(a.dz) + (a.dz ? row * a.lddz + col : 0);
  C lanes[V::N * V::N];  // as it lies in memory: the activation needs the registers
  V sums = set1<V>(0);
  for (int i = 0; i < rows; i++, dy += a.lddy, z += a.ldz) {
    prefetch(reinterpret_cast<const char*>(dy) + ahead);
    prefetch(reinterpret_cast<const char*>(z) + ahead);
    const V v = get<V>(dy, cols) * act.grad(get<V>(z, cols));
    sums = sums + v;
    if (a.dz) put(dz + i * a.lddz, v, cols);
    if (a.transposed) store(lanes + i * V::N, v);
  }
  if (a.transposed) {
    V r[V::N];
#pragma GCC unroll 16
    for (int i = 0; i < V::N; i++) r[i] = i < rows ? load<V>(lanes + i * V::N) : set1<V>(0);
    transpose(r);
    T* to = static_cast<T*>(a.transposed) + col * a.ldt + row;
#pragma GCC unroll 16
    for (int i = 0; i < V::N; i++)
      if (i < cols) store(to + i * a.ldt, r[i]);
  }
  return sums;
}

template <class T>
FUSEDOPS_INLINE void grad(const PreactArgs& a, int64_t row, int64_t row_end, int64_t col,
                          int64_t end) {
  using C = compute_t<T>;
  using V = Vec<C>;
  C* sums = static_cast<C*>(a.sums) + (a.sums ? row / kPreactRows * a.n : 0);
  with_activation(a.act, [&](auto act) {
    for (int64_t j = col; j < end; j += V::N) {
      const int cols = static_cast<int>(at_most(end - j, V::N));
      V sum = set1<V>(0);
      for (int64_t i = row; i < row_end; i += V::N)
        sum = sum + square<T>(a, act, i, static_cast<int>(at_most(row_end - i, V::N)), j, cols);
      if (a.sums) put(sums + j, sum, cols);
    }
  });
}

// In float64: there are few blocks, and their number must not show in the error.
template <class T>
FUSEDOPS_INLINE void total(const PreactArgs& a, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t some = 32;
  for (int64_t j = begin; j < end; j += some) {
    const int64_t cols = at_most(end - j, some);
    double sum[some] = {};
    for (int64_t row = 0; row < a.rows; row += kPreactRows) {
      const C* p = static_cast<const C*>(a.sums) + row / kPreactRows * a.n + j;
      for (int64_t c = 0; c < cols; c++) sum[c] += static_cast<double>(p[c]);
    }
    C rounded[some];
    for (int64_t c = 0; c < some; c++) rounded[c] = static_cast<C>(sum[c]);
    for (int64_t c = 0; c < cols; c += Vec<C>::N)
      put(static_cast<T*>(a.total) + j + c, load<Vec<C>>(rounded + c),
          static_cast<int>(at_most(cols - c, Vec<C>::N)));
  }
}

}  // namespace

#define PREACT(T)                                                                      \
  void preact_grad_##T(const PreactArgs& a, int64_t row, int64_t row_end, int64_t col, \
                       int64_t end) {                                                  \
    grad<T>(a, row, row_end, col, end);                                                \
  }                                                                                    \
  void preact_total_##T(const PreactArgs& a, int64_t begin, int64_t end) {             \
    total<T>(a, begin, end);                                                           \
  }
PREACT(f32)
PREACT(f16)
PREACT(bf16)
PREACT(f64)
#undef PREACT

}  // namespace fusedops::FUSEDOPS_ISA
