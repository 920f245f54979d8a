// Rotary position embedding: read a row, rotate, write it once.
#include "../simd/simd.h"
#include "kernels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// The formula: (x1, x2) turned by the angle whose cosine and sine are c and s.
// Two products and one sum each, never contracted: bit-identical to eager x*cos +
// rotate_half(x)*sin.
template <class V>
FUSEDOPS_INLINE void rotate(V x1, V x2, V c, V s, V& y1, V& y2) {
  y1 = x1 * c - x2 * s;
  y2 = x2 * c + x1 * s;
}

FUSEDOPS_INLINE int clamp_lanes(int64_t n, int lanes) {
  return n < 0 ? 0 : n < lanes ? static_cast<int>(n) : lanes;
}

// Pairs (x[j], x[j + half]).
template <class T, class Table>
FUSEDOPS_INLINE void rotate_halves(const T* x, const Table* cos, const Table* sin, T* y,
                                   int64_t half, bool conjugate) {
  using V = Vec<compute_t<T>>;
  V y1, y2;
  int64_t j = 0;
  for (; j + V::N <= half; j += V::N) {
    const V s = load<V>(sin + j);
    rotate(load<V>(x + j), load<V>(x + half + j), load<V>(cos + j), conjugate ? -s : s, y1, y2);
    store(y + j, y1);
    store(y + half + j, y2);
  }
  if (j < half) {
    const int n = static_cast<int>(half - j);
    const V s = load_n<V>(sin + j, n);
    rotate(load_n<V>(x + j, n), load_n<V>(x + half + j, n), load_n<V>(cos + j, n),
           conjugate ? -s : s, y1, y2);
    store_n(y + j, y1, n);
    store_n(y + half + j, y2, n);
  }
}

// Pairs (x[2j], x[2j + 1]).
template <class T, class Table>
FUSEDOPS_INLINE void rotate_neighbours(const T* x, const Table* cos, const Table* sin, T* y,
                                       int64_t half, bool conjugate) {
  using V = Vec<compute_t<T>>;
  V x1, x2, y1, y2, a, b;
  int64_t j = 0;
  for (; j + V::N <= half; j += V::N) {
    deinterleave(load<V>(x + 2 * j), load<V>(x + 2 * j + V::N), x1, x2);
    const V s = load<V>(sin + j);
    rotate(x1, x2, load<V>(cos + j), conjugate ? -s : s, y1, y2);
    interleave(y1, y2, a, b);
    store(y + 2 * j, a);
    store(y + 2 * j + V::N, b);
  }
  if (j < half) {
    const int n = static_cast<int>(half - j);
    const int low = clamp_lanes(2 * n, V::N), high = clamp_lanes(2 * n - V::N, V::N);
    const int64_t next = 2 * j + low;  // where the second part starts; never formed past the row
    deinterleave(load_n<V>(x + 2 * j, low), load_n<V>(x + next, high), x1, x2);
    const V s = load_n<V>(sin + j, n);
    rotate(x1, x2, load_n<V>(cos + j, n), conjugate ? -s : s, y1, y2);
    interleave(y1, y2, a, b);
    store_n(y + 2 * j, a, low);
    store_n(y + next, b, high);
  }
}

template <class T, class Table>
FUSEDOPS_INLINE void rotate_row(const RopeArgs& a, const T* x, const Table* cos, const Table* sin,
                                T* y) {
  if (a.interleaved)
    rotate_neighbours(x, cos, sin, y, a.half, a.conjugate);
  else
    rotate_halves(x, cos, sin, y, a.half, a.conjugate);
  if (x != y)
    for (int64_t d = 2 * a.half; d < a.head_dim; d++) y[d] = x[d];
}

// Elements of a row that are not adjacent: one pair at a time.
template <class T, class Table>
void rotate_scattered_row(const RopeArgs& a, const T* x, const Table* cos, const Table* sin, T* y) {
  using V = Vec<compute_t<T>>;
  const int64_t step = a.interleaved ? 2 : 1, apart = a.interleaved ? 1 : a.half;
  V y1, y2;
  for (int64_t j = 0; j < a.half; j++) {
    const int64_t i1 = step * j, i2 = i1 + apart;
    const V s = load_n<V>(sin + j, 1);
    rotate(load_n<V>(x + i1 * a.x_dim, 1), load_n<V>(x + i2 * a.x_dim, 1), load_n<V>(cos + j, 1),
           a.conjugate ? -s : s, y1, y2);
    store_n(y + i1 * a.y_dim, y1, 1);
    store_n(y + i2 * a.y_dim, y2, 1);
  }
  for (int64_t d = 2 * a.half; d < a.head_dim; d++) y[d * a.y_dim] = x[d * a.x_dim];
}

constexpr int64_t kStreamRow = 2048;  // bytes of a row that is turned in L1 and streamed out whole

// Rows are written whole and in order, which is what a write-combining buffer needs.
template <class T, class Table>
FUSEDOPS_INLINE void stream_row(const RopeArgs& a, const T* x, const Table* cos, const Table* sin,
                                T* y) {
  alignas(64) float row[kStreamRow / 4];
  rotate_row(a, x, cos, sin, reinterpret_cast<T*>(row));
  float* out = reinterpret_cast<float*>(y);
  const int64_t floats = a.head_dim * static_cast<int64_t>(sizeof(T)) / 4;
  for (int64_t i = 0; i < floats; i += Vf::N) stream(out + i, load<Vf>(row + i));
}

template <class T>
bool can_stream(const RopeArgs& a) {
  const auto aligned = [](int64_t elements) { return elements * sizeof(T) % 64 == 0; };
  return a.stream && a.x_dim == 1 && a.y_dim == 1 &&
         a.head_dim * static_cast<int64_t>(sizeof(T)) <= kStreamRow &&
         reinterpret_cast<uintptr_t>(a.y) % 64 == 0 && aligned(a.head_dim) && aligned(a.y_batch) &&
         aligned(a.y_head) && aligned(a.y_seq);
}

FUSEDOPS_INLINE int64_t position(const RopeArgs& a, int64_t b, int64_t s) {
  if (!a.position_ids) return a.offset + s;
  const int64_t i = b * a.id_batch + s * a.id_seq;
  return a.offset + (a.wide_ids ? static_cast<const int64_t*>(a.position_ids)[i]
                                : static_cast<const int32_t*>(a.position_ids)[i]);
}

// Positions [first, stop) of one head.
struct Unit {
  int64_t batch, head, first, stop;
};
FUSEDOPS_INLINE Unit unit_at(const RopeArgs& a, int64_t index) {
  const int64_t blocks = (a.seq + a.block - 1) / a.block,
                first = index / a.heads % blocks * a.block;
  return {index / a.heads / blocks, index % a.heads, first,
          first + a.block < a.seq ? first + a.block : a.seq};
}
template <class T>
FUSEDOPS_INLINE const T* row_of_x(const RopeArgs& a, const Unit& u, int64_t s) {
  return static_cast<const T*>(a.x) + u.batch * a.x_batch + u.head * a.x_head + s * a.x_seq;
}

template <class T, class Table>
FUSEDOPS_INLINE void rope(const RopeArgs& a, int64_t begin, int64_t end) {
  const bool streaming = can_stream<T>(a), adjacent = a.x_dim == 1 && a.y_dim == 1;
  const int64_t row_bytes = a.head_dim * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = a.prefetch / row_bytes;  // rows, across the end of the unit
  for (int64_t index = begin; index < end; index++) {
    const Unit u = unit_at(a, index), next = unit_at(a, index + 1 < end ? index + 1 : index);
    for (int64_t s = u.first; s < u.stop; s++) {
      if (ahead) {
        const int64_t later = s + ahead - u.stop;
        const T* p =
            later < 0 ? row_of_x<T>(a, u, s + ahead) : row_of_x<T>(a, next, next.first + later);
        for (int64_t i = 0; i < row_bytes; i += 64) prefetch(reinterpret_cast<const char*>(p) + i);
      }
      const int64_t at = position(a, u.batch, s);
      const T* x = row_of_x<T>(a, u, s);
      T* y = static_cast<T*>(a.y) + u.batch * a.y_batch + u.head * a.y_head + s * a.y_seq;
      const Table* cos = static_cast<const Table*>(a.cos) + u.batch * a.cos_batch + at * a.cos_row;
      const Table* sin = static_cast<const Table*>(a.sin) + u.batch * a.sin_batch + at * a.sin_row;
      if (streaming)
        stream_row(a, x, cos, sin, y);
      else if (adjacent)
        rotate_row(a, x, cos, sin, y);
      else
        rotate_scattered_row(a, x, cos, sin, y);
    }
  }
  if (streaming) stream_fence();
}

// The eager steps, each over rows [begin, end).
template <class T>
FUSEDOPS_INLINE void step_rotate(const RopeStepArgs& r, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const V zero = set1<V>(-0.0);  // x + -0 is x, for x = -0 as well
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(r.a) + row * r.head_dim;
    T* y = static_cast<T*>(r.out) + row * r.head_dim;
    if (r.interleaved) {
      for (int64_t j = 0; j < r.half; j++) {
        y[2 * j] = -x[2 * j + 1];
        y[2 * j + 1] = x[2 * j];
      }
    } else {
      for (int64_t j = 0; j < r.half; j += V::N) {
        const int n = clamp_lanes(r.half - j, V::N);
        store_n(y + j, -load_n<V>(x + r.half + j, n), n);
        store_n(y + r.half + j, load_n<V>(x + j, n), n);
      }
    }
    for (int64_t d = 2 * r.half; d < r.head_dim; d += V::N)
      store_n(y + d, zero, clamp_lanes(r.head_dim - d, V::N));
  }
}

template <class T>
FUSEDOPS_INLINE void step_scale(const RopeStepArgs& r, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const V sign = set1<V>(r.negate ? -1 : 1);
  for (int64_t row = begin; row < end; row++) {
    const int64_t s = row % r.seq, b = row / r.seq / r.heads;
    const T* x = static_cast<const T*>(r.a) + row * r.head_dim;
    const T* table = static_cast<const T*>(r.b) + b * r.table_batch + s * r.half;
    T* y = static_cast<T*>(r.out) + row * r.head_dim;
    if (r.interleaved) {
      for (int64_t j = 0; j < r.half; j++) {
        const T factor = r.negate ? -table[j] : table[j];
        y[2 * j] = x[2 * j] * factor;
        y[2 * j + 1] = x[2 * j + 1] * factor;
      }
    } else {
      for (int64_t j = 0; j < r.half; j += V::N) {
        const int n = clamp_lanes(r.half - j, V::N);
        const V factor = load_n<V>(table + j, n) * sign;
        store_n(y + j, load_n<V>(x + j, n) * factor, n);
        store_n(y + r.half + j, load_n<V>(x + r.half + j, n) * factor, n);
      }
    }
    for (int64_t d = 2 * r.half; d < r.head_dim; d++) y[d] = x[d];
  }
}

template <class T>
FUSEDOPS_INLINE void step_add(const RopeStepArgs& r, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const T *x = static_cast<const T*>(r.a), *z = static_cast<const T*>(r.b);
  T* y = static_cast<T*>(r.out);
  for (int64_t i = begin * r.head_dim; i < end * r.head_dim; i += V::N) {
    const int n = clamp_lanes(end * r.head_dim - i, V::N);
    store_n(y + i, load_n<V>(x + i, n) + load_n<V>(z + i, n), n);
  }
}

}  // namespace

#define ROPE(name, T, Table) \
  void name(const RopeArgs& a, int64_t begin, int64_t end) { rope<T, Table>(a, begin, end); }
ROPE(rope_f32_f32, f32, f32)
ROPE(rope_f16_f32, f16, f32)
ROPE(rope_f16_f16, f16, f16)
ROPE(rope_bf16_f32, bf16, f32)
ROPE(rope_bf16_bf16, bf16, bf16)
ROPE(rope_f64_f32, f64, f32)
ROPE(rope_f64_f64, f64, f64)
#undef ROPE

#define STEP(step, suffix, T)                                                           \
  void rope_step_##step##_##suffix(const RopeStepArgs& r, int64_t begin, int64_t end) { \
    step_##step<T>(r, begin, end);                                                      \
  }
STEP(rotate, f32, f32)
STEP(rotate, f64, f64)
STEP(scale, f32, f32)
STEP(scale, f64, f64)
STEP(add, f32, f32)
STEP(add, f64, f64)
#undef STEP

}  // namespace fusedops::FUSEDOPS_ISA
