// Dense layers: what follows a matmul of torch (layer_epilogue), few rows (layer_rows), a matmul of
// our own (layer_matmul), and the gradient of the pre-activation (preact_grad, preact_total).
#include <metal_simdgroup_matrix>

#include "common.h"

// y = act(z + bias), and where it is kept z + bias itself; y may be z. Grid: (n / W, m).
// Where y is z one buffer is bound twice: each element is loaded and stored by one thread, and
// stored after it was loaded.
template <typename T, uint W>
[[kernel, max_total_threads_per_threadgroup(256)]] void layer_epilogue(
    device const T* z [[buffer(0)]], device const T* bias [[buffer(1)]], device T* y [[buffer(2)]],
    device T* preact [[buffer(3)]], constant Matrix& size [[buffer(4)]],
    constant LayerFlags& flags [[buffer(5)]], uint2 at [[thread_position_in_grid]]) {
  typedef typename Lanes<W>::value value;
  const uint column = at.x * W, i = at.y * size.n + column;
  value v = Lanes<W>::load(z + i);
  if (flags.bits & kHasBias) v += Lanes<W>::load(bias + column);
  if (flags.bits & kKeepPreact) Lanes<W>::store(preact + i, v);
  Lanes<W>::store(y + i, activate(flags.activation, v));
}

inline float product(float a, float b, float sum) { return fma(a, b, sum); }
inline float product(float4 a, float4 b, float sum) {
  return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, fma(a.w, b.w, sum))));
}

// R rows of x times outputs_of(R) rows of w per simdgroup, lane by lane along k: each element of w
// is read once, for all rows. Grid: (groups * kSimdgroups * kLanes, ceil(m / R)). A row past the
// last one reads the last one again; nothing of it is written.
template <typename T, uint W, uint R>
[[kernel, max_total_threads_per_threadgroup(128)]] void layer_rows(
    device const T* x [[buffer(0)]], device const T* w [[buffer(1)]],
    device const T* bias [[buffer(2)]], device T* y [[buffer(3)]], device T* preact [[buffer(4)]],
    constant Matrix& size [[buffer(5)]], constant Depth& depth [[buffer(6)]],
    constant Leading& leading [[buffer(7)]], constant LayerFlags& flags [[buffer(8)]],
    uint2 group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint simd_index [[simdgroup_index_in_threadgroup]]) {
  typedef typename Lanes<W>::value value;
  const uint outputs = outputs_of(R);
  const uint first_row = group.y * R, last_row = size.m - 1;
  const uint first = (group.x * kSimdgroups + simd_index) * outputs, last = size.n - 1;
  float sums[R][outputs_of(R)];
  for (uint r = 0; r < R; ++r)
    for (uint o = 0; o < outputs; ++o) sums[r][o] = 0.0f;

  for (uint i = lane * W; i < depth.k; i += kLanes * W) {
    value weights[outputs_of(R)];
    for (uint o = 0; o < outputs; ++o)
      weights[o] = Lanes<W>::load(w + (min(first + o, last) * leading.w + i));
    for (uint r = 0; r < R; ++r) {
      const value xs = Lanes<W>::load(x + (min(first_row + r, last_row) * leading.x + i));
      for (uint o = 0; o < outputs; ++o) sums[r][o] = product(xs, weights[o], sums[r][o]);
    }
  }
  for (uint r = 0; r < R; ++r)
    for (uint o = 0; o < outputs; ++o) sums[r][o] = simd_sum(sums[r][o]);

  if (lane != 0) return;
  for (uint r = 0; r < R; ++r) {
    for (uint o = 0; o < outputs; ++o) {
      const uint row = first_row + r, column = first + o;
      if (row > last_row || column > last) continue;
      float v = sums[r][o];
      if (flags.bits & kHasBias) v += float(bias[column]);
      const uint i = row * size.n + column;
      if (flags.bits & kKeepPreact) preact[i] = T(v);
      y[i] = T(activate(flags.activation, v));
    }
  }
}

// A tile of kTile rows and columns of y by four simdgroups, 16 steps of k at a time. Grid:
// (ceil(n / kTile) * 128, ceil(m / kTile)).
template <typename T>
[[kernel, max_total_threads_per_threadgroup(128)]] void layer_matmul(
    device const T* x [[buffer(0)]], device const T* w [[buffer(1)]],
    device const T* bias [[buffer(2)]], device T* y [[buffer(3)]], device T* preact [[buffer(4)]],
    constant Matrix& size [[buffer(5)]], constant Depth& depth [[buffer(6)]],
    constant Leading& leading [[buffer(7)]], constant LayerFlags& flags [[buffer(8)]],
    uint2 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simd_index [[simdgroup_index_in_threadgroup]]) {
  const uint steps = 16, threads = 128, fragments = 2;
  const uint stride = 16 + 8;  // of a row of the operands' tiles, against bank conflicts
  const uint y_stride = kTile + 4;
  threadgroup T x_tile[32 * 24];
  threadgroup T w_tile[32 * 24];
  threadgroup float y_tile[32 * 36];
  const uint first_row = group.y * kTile, first_column = group.x * kTile;
  const uint row_at = simd_index / 2 * 16, column_at = simd_index % 2 * 16;
  simdgroup_float8x8 sums[2][2];
  for (uint i = 0; i < fragments; ++i)
    for (uint j = 0; j < fragments; ++j)
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

  for (uint from = 0; from < depth.k; from += steps) {
    for (uint e = thread_index; e < kTile * steps; e += threads) {
      const uint line = e / steps, step = e % steps, k = from + step;
      const uint row = first_row + line, column = first_column + line;
      const bool inside = k < depth.k;
      x_tile[line * stride + step] = inside && row < size.m ? x[row * leading.x + k] : T(0.0f);
      w_tile[line * stride + step] =
          inside && column < size.n ? w[column * leading.w + k] : T(0.0f);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < steps; k += 8) {
      simdgroup_matrix<T, 8, 8> a[2], b[2];
      for (uint i = 0; i < fragments; ++i) {
        simdgroup_load(a[i], x_tile + (row_at + i * 8) * stride + k, stride);
        simdgroup_load(b[i], w_tile + (column_at + i * 8) * stride + k, stride, ulong2(0, 0), true);
      }
      for (uint i = 0; i < fragments; ++i)
        for (uint j = 0; j < fragments; ++j)
          simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (uint i = 0; i < fragments; ++i)
    for (uint j = 0; j < fragments; ++j)
      simdgroup_store(sums[i][j], y_tile + (row_at + i * 8) * y_stride + column_at + j * 8,
                      y_stride);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint e = thread_index; e < kTile * kTile; e += threads) {
    const uint line = e / kTile, across = e % kTile;
    const uint row = first_row + line, column = first_column + across;
    if (row >= size.m || column >= size.n) continue;
    float v = y_tile[line * y_stride + across];
    if (flags.bits & kHasBias) v += float(bias[column]);
    const uint i = row * size.n + column;
    if (flags.bits & kKeepPreact) preact[i] = T(v);
    y[i] = T(activate(flags.activation, v));
  }
}

// dz = dy * act'(z), and its unrounded sums over blocks of kSumRows rows, sums [blocks][n]; either
// where it is wanted. Grid: (n / W, blocks).
template <typename T, uint W>
[[kernel, max_total_threads_per_threadgroup(256)]] void preact_grad(
    device const T* dy [[buffer(0)]], device const T* z [[buffer(1)]], device T* dz [[buffer(2)]],
    device float* sums [[buffer(3)]], constant Matrix& size [[buffer(4)]],
    constant LayerFlags& flags [[buffer(5)]], uint2 at [[thread_position_in_grid]]) {
  typedef typename Lanes<W>::value value;
  const uint column = at.x * W, first = at.y * kSumRows, last = min(first + kSumRows, size.m);
  value sum = value(0.0f);
  for (uint row = first; row < last; ++row) {
    const uint i = row * size.n + column;
    value d = Lanes<W>::load(dy + i);
    if (flags.activation != kIdentity) d *= slope_of(flags.activation, Lanes<W>::load(z + i));
    if (flags.bits & kWriteDz) Lanes<W>::store(dz + i, d);
    sum += d;
  }
  if (flags.bits & kSumBias) Lanes<W>::store(sums + (at.y * size.n + column), sum);
}

// The bias gradient: sums [m][n] added over m, in order, with the error of each addition kept and
// added at the end (Neumaier). Grid: n.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(64)]] void preact_total(
    device const float* sums [[buffer(0)]], device T* total [[buffer(1)]],
    constant Matrix& size [[buffer(2)]], uint column [[thread_position_in_grid]]) {
  float sum = 0.0f, error = 0.0f;
  for (uint row = 0; row < size.m; ++row) {
    const float v = sums[row * size.n + column], next = sum + v;
    error += fabs(sum) >= fabs(v) ? (sum - next) + v : (v - next) + sum;
    sum = next;
  }
  // The error of an infinite sum is NaN.
  total[column] = T(isfinite(sum) ? sum + error : sum);
}

#define INSTANCE_ROWS(T, t, W, R)              \
  template [[host_name("layer_rows_" t "_x" #W \
                       "_" #R)]] [[kernel]] decltype(layer_rows<T, W, R>) layer_rows<T, W, R>;
#define INSTANCE_WIDTH(T, t, W)                                                                   \
  template [[host_name("layer_epilogue_" t                                                        \
                       "_x" #W)]] [[kernel]] decltype(layer_epilogue<T, W>) layer_epilogue<T, W>; \
  template [[host_name("preact_grad_" t                                                           \
                       "_x" #W)]] [[kernel]] decltype(preact_grad<T, W>) preact_grad<T, W>;       \
  INSTANCE_ROWS(T, t, W, 1)                                                                       \
  INSTANCE_ROWS(T, t, W, 2) INSTANCE_ROWS(T, t, W, 4) INSTANCE_ROWS(T, t, W, 8)
#define INSTANCES(T, t)                                                                           \
  INSTANCE_WIDTH(T, t, 1)                                                                         \
  INSTANCE_WIDTH(T, t, 4)                                                                         \
  template [[host_name("layer_matmul_" t)]] [[kernel]] decltype(layer_matmul<T>) layer_matmul<T>; \
  template [[host_name("preact_total_" t)]] [[kernel]] decltype(preact_total<T>) preact_total<T>;
INSTANCES(float, "f32")
INSTANCES(half, "f16")
INSTANCES(bfloat, "bf16")
#undef INSTANCES
#undef INSTANCE_WIDTH
#undef INSTANCE_ROWS
