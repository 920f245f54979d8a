// One kernel for each mistake that the emulator finds, and ok_* beside it, in which nothing is
// wrong.
#include <metal_stdlib>
using namespace metal;

kernel void ok_swap(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                    uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  s[t] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = s[63 - t];
}

kernel void bug_early_return(device float* y [[buffer(0)]], constant uint& n [[buffer(1)]],
                             uint i [[thread_position_in_grid]],
                             uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  if (i >= n) return;
  s[t] = y[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = s[t];
}

kernel void bug_divergent_barrier(device float* y [[buffer(0)]],
                                  uint t [[thread_index_in_threadgroup]]) {
  if (t < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[t] = 2;
  } else {
    y[t] = simd_sum(1.0f);
    threadgroup_barrier(mem_flags::mem_none);
  }
}

kernel void bug_uninitialised(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                              uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  if (t < 32) s[t] = 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = s[t];
}

kernel void bug_missing_barrier(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                                uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  s[t] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s[t] = y[i];
  y[i] = s[63 - t];
}

// The next round writes what the last one still reads.
kernel void bug_missing_second_barrier(device float* y [[buffer(0)]],
                                       uint i [[thread_position_in_grid]],
                                       uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    s[t] = y[i] + round;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += s[63 - t];
  }
  y[i] = sum;
}

// Orders the simdgroup, but the other one reads.
kernel void bug_simdgroup_barrier(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                                  uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  s[t] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s[t] = y[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = s[63 - t];
}

kernel void ok_simdgroup_barrier(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                                 uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  s[t] = y[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = s[t ^ 31];
}

// A barrier that orders device memory alone.
kernel void bug_barrier_of_other_memory(device float* y [[buffer(0)]],
                                        uint i [[thread_position_in_grid]],
                                        uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[64];
  s[t] = y[i];
  threadgroup_barrier(mem_flags::mem_device);
  y[i] = s[63 - t];
}

kernel void bug_race_of_threadgroups(device float* y [[buffer(0)]],
                                     uint g [[threadgroup_position_in_grid]],
                                     uint t [[thread_index_in_threadgroup]]) {
  if (t == 0) y[0] = y[0] * 0.5f + g;
}

kernel void ok_atomic(device atomic_uint* y [[buffer(0)]]) {
  atomic_fetch_add_explicit(y, 1u, memory_order_relaxed);
}

kernel void bug_too_much_memory(device float* y [[buffer(0)]],
                                uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[9000];
  s[t] = 1;
  y[t] = s[t];
}

struct Four {
  uint a[4];
};
kernel void bug_small_constant(device float* y [[buffer(0)]], constant Four& four [[buffer(1)]],
                               uint t [[thread_index_in_threadgroup]]) {
  y[t] = four.a[3];
}

kernel void bug_unbound(device float* y [[buffer(0)]], device float* z [[buffer(2)]],
                        uint t [[thread_index_in_threadgroup]]) {
  y[t] = z[t];
}

kernel void bug_store_past_the_end(device float* y [[buffer(0)]],
                                   uint i [[thread_position_in_grid]]) {
  y[i + 1] = 2;
}

kernel void bug_load_before_the_start(device float* y [[buffer(0)]],
                                      uint i [[thread_position_in_grid]]) {
  if (i == 0) y[i] = y[int(i) - 1];
}

kernel void bug_misaligned(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  device float4* wide = (device float4*)(y + 1);
  if (i == 0) wide[0] = float4(1.0f);
}

kernel void bug_index(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  float local[4] = {1, 2, 3, 4};
  y[i] = local[i];
}

kernel void bug_threadgroup_index(device float* y [[buffer(0)]],
                                  uint t [[thread_index_in_threadgroup]]) {
  threadgroup float s[32];
  s[t] = 1;
  y[t] = s[t];
}

kernel void bug_division(device float* y [[buffer(0)]], constant uint& zero [[buffer(1)]],
                         uint i [[thread_position_in_grid]]) {
  y[i] = i / zero;
}

kernel void bug_partial_matrix(device float* y [[buffer(0)]],
                               uint t [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), b = a;
  if (t % 32 < 16) simdgroup_multiply(b, a, a);
  y[t] = b.thread_elements()[0];
}

// Every element once; with n threads of 4 elements each.
kernel void ok_traffic(device const float4* x [[buffer(0)]], device float4* y [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  y[i] = x[i] * 2.0f;
}

kernel void ok_exp(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  y[i] = exp(y[i]);
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(32)]] void ok_matrix(device const T* a [[buffer(0)]],
                                                                 device const T* b [[buffer(1)]],
                                                                 device float* y [[buffer(2)]]) {
  simdgroup_matrix<T, 8, 8> left, right;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_load(left, a, 8);
  simdgroup_load(right, b, 8, ulong2(0, 0), true);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, y, 8);
}
template [[host_name("ok_matrix_f32")]] [[kernel]] decltype(ok_matrix<float>) ok_matrix<float>;
template [[host_name("ok_matrix_f16")]] [[kernel]] decltype(ok_matrix<half>) ok_matrix<half>;
template [[host_name("ok_matrix_bf16")]] [[kernel]] decltype(ok_matrix<bfloat>) ok_matrix<bfloat>;
