#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;
// Nothing is wrong here in any language mode.
struct Sizes {
  uint rows, columns;
};
inline float first(threadgroup float* p) { return p[0]; }
inline float first(device const float* p) { return p[0]; }
kernel void f(device const float* x [[buffer(0)]], device atomic_uint* count [[buffer(1)]],
              constant Sizes& sizes [[buffer(2)]], device float* y [[buffer(3)]],
              uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  const Sizes own = sizes;
  s[t] = x[t % own.columns];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
  simdgroup_float8x8 a;
  simdgroup_load(a, s, 8);
  simdgroup_store(a, y, 8);
  y[t] += first(s) + first(x);
}
