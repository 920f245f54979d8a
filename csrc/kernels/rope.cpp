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

// One row: where it is, where it goes, its angles; `ahead` will be read soon.
template <class T, class Table>
struct Row {
  const T *x, *ahead;
  const Table *cos, *sin;
  T* y;
};

template <bool Streaming, class T, class V>
FUSEDOPS_INLINE void put2(T* y, V a, V b) {
  if constexpr (Streaming)
    stream2(y, a, b);
  else
    store2(y, a, b);
}

// The lines that two vectors come from.
template <class V, class T>
FUSEDOPS_INLINE void prefetch2(const T* p) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < 2 * V::N; i += line) prefetch(p + i);
}

// Pairs (x[j], x[j + half]). The opposite angle is the same rotation of (x[j + half], x[j]).
template <bool Streaming, class T, class Table>
FUSEDOPS_INLINE void rotate_halves(const RopeArgs& a, const Row<T, Table>& r) {
  using V = Vec<compute_t<T>>;
  const int64_t half = a.half, first = a.conjugate ? half : 0, second = half - first;
  V x1[2], x2[2], c[2], s[2], y1[2], y2[2];
  int64_t j = 0;
  for (; j + 2 * V::N <= half; j += 2 * V::N) {
    prefetch2<V>(r.ahead + j);
    prefetch2<V>(r.ahead + half + j);
    load2(r.x + first + j, x1[0], x1[1]);
    load2(r.x + second + j, x2[0], x2[1]);
    load2(r.cos + j, c[0], c[1]);
    load2(r.sin + j, s[0], s[1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) rotate(x1[i], x2[i], c[i], s[i], y1[i], y2[i]);
    put2<Streaming>(r.y + first + j, y1[0], y1[1]);
    put2<Streaming>(r.y + second + j, y2[0], y2[1]);
  }
  for (; j < half; j += V::N) {
    const int n = clamp_lanes(half - j, V::N);
    rotate(load_n<V>(r.x + first + j, n), load_n<V>(r.x + second + j, n), load_n<V>(r.cos + j, n),
           load_n<V>(r.sin + j, n), y1[0], y2[0]);
    store_n(r.y + first + j, y1[0], n);
    store_n(r.y + second + j, y2[0], n);
  }
}

// Pairs (x[2j], x[2j + 1]).
template <bool Streaming, class T, class Table>
FUSEDOPS_INLINE void rotate_neighbours(const RopeArgs& a, const Row<T, Table>& r) {
  using V = Vec<compute_t<T>>;
  const V sign = set1<V>(a.conjugate ? -1 : 1);
  V x1, x2, y1, y2, low, high;
  int64_t j = 0;
  for (; j + V::N <= a.half; j += V::N) {
    prefetch2<V>(r.ahead + 2 * j);
    load2(r.x + 2 * j, low, high);
    deinterleave(low, high, x1, x2);
    rotate(x1, x2, load<V>(r.cos + j), load<V>(r.sin + j) * sign, y1, y2);
    interleave(y1, y2, low, high);
    put2<Streaming>(r.y + 2 * j, low, high);
  }
  if (j < a.half) {
    const int n = static_cast<int>(a.half - j);
    const int n_low = clamp_lanes(2 * n, V::N), n_high = clamp_lanes(2 * n - V::N, V::N);
    const int64_t next = 2 * j + n_low;  // where the second part starts; never past the row
    deinterleave(load_n<V>(r.x + 2 * j, n_low), load_n<V>(r.x + next, n_high), x1, x2);
    rotate(x1, x2, load_n<V>(r.cos + j, n), load_n<V>(r.sin + j, n) * sign, y1, y2);
    interleave(y1, y2, low, high);
    store_n(r.y + 2 * j, low, n_low);
    store_n(r.y + next, high, n_high);
  }
}

template <bool Interleaved, bool Streaming>
struct Adjacent {
  template <class T, class Table>
  FUSEDOPS_INLINE void rotate_row(const RopeArgs& a, const Row<T, Table>& r) {
    if constexpr (Interleaved)
      rotate_neighbours<Streaming>(a, r);
    else
      rotate_halves<Streaming>(a, r);
    const int64_t turned = 2 * a.half;
    if (r.x != r.y && turned < a.head_dim)
      __builtin_memcpy(r.y + turned, r.x + turned, (a.head_dim - turned) * sizeof(T));
  }
};

// Elements of a row that are not adjacent: one pair at a time.
struct Scattered {
  template <class T, class Table>
  FUSEDOPS_INLINE void rotate_row(const RopeArgs& a, const Row<T, Table>& r) {
    using V = Vec<compute_t<T>>;
    const int64_t step = a.interleaved ? 2 : 1, apart = a.interleaved ? 1 : a.half;
    const int64_t first = a.conjugate ? apart : 0, second = apart - first;
    V y1, y2;
    for (int64_t j = 0; j < a.half; j++) {
      const int64_t i1 = step * j + first, i2 = step * j + second;
      rotate(load_n<V>(r.x + i1 * a.x_dim, 1), load_n<V>(r.x + i2 * a.x_dim, 1),
             load_n<V>(r.cos + j, 1), load_n<V>(r.sin + j, 1), y1, y2);
      store_n(r.y + i1 * a.y_dim, y1, 1);
      store_n(r.y + i2 * a.y_dim, y2, 1);
    }
    for (int64_t d = 2 * a.half; d < a.head_dim; d++) r.y[d * a.y_dim] = r.x[d * a.x_dim];
  }
};

// Both parts of every row begin on a line and are written line by line.
template <class T>
bool can_stream(const RopeArgs& a) {
  const auto aligned = [](int64_t elements) { return elements * sizeof(T) % 64 == 0; };
  return a.stream && reinterpret_cast<uintptr_t>(a.y) % 64 == 0 && aligned(a.half) &&
         aligned(a.y_batch) && aligned(a.y_head) && aligned(a.y_seq);
}

FUSEDOPS_INLINE int64_t position(const RopeArgs& a, int64_t b, int64_t s) {
  if (!a.position_ids) return a.offset + s;
  const int64_t i = b * a.id_batch + s * a.id_seq;
  return a.offset + (a.wide_ids ? static_cast<const int64_t*>(a.position_ids)[i]
                                : static_cast<const int32_t*>(a.position_ids)[i]);
}

// A unit of work: `block` positions of kSide heads from (head, seq) on, or all heads of one
// position.
struct Unit {
  int64_t batch, head, seq;
};
FUSEDOPS_INLINE Unit unit_at(const RopeArgs& a, int64_t index) {
  if (a.block == 0) return {index / a.seq, 0, index % a.seq};
  const int64_t blocks = (a.seq + a.block - 1) / a.block, groups = (a.heads + kSide - 1) / kSide;
  return {index / groups / blocks, index % groups * kSide, index / groups % blocks * a.block};
}
FUSEDOPS_INLINE Unit after(const RopeArgs& a, Unit u) {
  u.head += kSide;
  if (a.block != 0 && u.head < a.heads) return u;
  u.head = 0;
  u.seq += a.block == 0 ? 1 : a.block;
  if (u.seq >= a.seq) u.seq = 0, u.batch++;
  return u;
}

template <class T>
FUSEDOPS_INLINE const T* x_at(const RopeArgs& a, int64_t b, int64_t h, int64_t s) {
  return static_cast<const T*>(a.x) + b * a.x_batch + h * a.x_head + s * a.x_seq;
}
template <class T, class Table>
FUSEDOPS_INLINE Row<T, Table> row_at(const RopeArgs& a, int64_t b, int64_t h, int64_t s,
                                     const T* ahead) {
  const int64_t at = position(a, b, s);
  return {x_at<T>(a, b, h, s), ahead,
          static_cast<const Table*>(a.cos) + b * a.cos_batch + at * a.cos_row,
          static_cast<const Table*>(a.sin) + b * a.sin_batch + at * a.sin_row,
          static_cast<T*>(a.y) + b * a.y_batch + h * a.y_head + s * a.y_seq};
}

struct Steps {
  int64_t x, y, cos, sin;
};

// n positions in equal steps, each of `heads` heads, which share its angles. The arguments are
// copied: no store through y can change them.
template <class T, class Table, class Kind>
__attribute__((noinline)) void rotate_run(RopeArgs a, Row<T, Table> r, int64_t n, Steps step,
                                          int64_t heads, Kind kind) {
  for (int64_t i = 0; i < n; i++) {
    Row<T, Table> one = r;
    for (int64_t h = 0; h < heads; h++) {
      kind.rotate_row(a, one);
      one.x += a.x_head, one.ahead += a.x_head, one.y += a.y_head;
    }
    r.x += step.x, r.ahead += step.x, r.y += step.y, r.cos += step.cos, r.sin += step.sin;
  }
}

// Memory is read ahead in whole positions.
template <class T, class Table, class Kind>
FUSEDOPS_INLINE void rotate_heads(const RopeArgs& a, const Unit& u, Kind kind) {
  const int64_t row_bytes = a.head_dim * static_cast<int64_t>(sizeof(T));
  const int64_t later = a.prefetch / (a.heads * row_bytes) + (a.prefetch ? 1 : 0);
  const int64_t s = u.seq + later < a.seq ? u.seq + later : u.seq;
  const Row<T, Table> r = row_at<T, Table>(a, u.batch, 0, u.seq, x_at<T>(a, u.batch, 0, s));
  rotate_run(a, r, 1, {}, a.heads, kind);
}

// Positions [begin, end) of a unit's heads.
template <class T, class Table, class Kind>
FUSEDOPS_INLINE void rotate_positions(const RopeArgs& a, const Unit& u, int64_t begin, int64_t end,
                                      const T* ahead, Kind kind) {
  const Steps step = {a.x_seq, a.y_seq, a.cos_row, a.sin_row};
  const int64_t heads = a.heads - u.head < kSide ? a.heads - u.head : kSide;
  const int64_t in_order = a.position_ids ? 1 : end - begin;
  for (int64_t s = begin; s < end; s += in_order, ahead += a.x_seq)
    rotate_run(a, row_at<T, Table>(a, u.batch, u.head, s, ahead), in_order, step, heads, kind);
}

template <class T, class Table, class Kind>
FUSEDOPS_INLINE void rotate_units(const RopeArgs& a, int64_t begin, int64_t end, Kind kind) {
  // Positions that are read ahead, at the end of a unit from the next one.
  const int64_t row_bytes = a.head_dim * static_cast<int64_t>(sizeof(T)),
                ahead = a.prefetch / row_bytes / kSide;
  Unit u = unit_at(a, begin);
  for (int64_t index = begin; index < end; index++) {
    const Unit next = index + 1 < end ? after(a, u) : u;
    if (a.block == 0) {
      rotate_heads<T, Table>(a, u, kind);
    } else {
      const int64_t stop = u.seq + a.block < a.seq ? u.seq + a.block : a.seq,
                    split = stop - ahead > u.seq ? stop - ahead : u.seq;
      rotate_positions<T, Table>(a, u, u.seq, split, x_at<T>(a, u.batch, u.head, u.seq + ahead),
                                 kind);
      const T* following = x_at<T>(a, next.batch, next.head, next.seq + split + ahead - stop);
      rotate_positions<T, Table>(a, u, split, stop, following, kind);
    }
    u = next;
  }
}

template <class T, class Table>
FUSEDOPS_INLINE void rope(const RopeArgs& a, int64_t begin, int64_t end) {
  if (a.x_dim != 1 || a.y_dim != 1) return rotate_units<T, Table>(a, begin, end, Scattered{});
  if (!can_stream<T>(a)) {
    if (a.interleaved) return rotate_units<T, Table>(a, begin, end, Adjacent<true, false>{});
    return rotate_units<T, Table>(a, begin, end, Adjacent<false, false>{});
  }
  if (a.interleaved)
    rotate_units<T, Table>(a, begin, end, Adjacent<true, true>{});
  else
    rotate_units<T, Table>(a, begin, end, Adjacent<false, true>{});
  stream_fence();
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
