// gelu and its variants, elementwise, and their gradients. Memory is read and written once.
#include "common.h"

// Four elements a thread; the last one takes what is left of them.
template <typename T, uint W>
[[kernel, max_total_threads_per_threadgroup(256)]] void gelu(device const T* x [[buffer(0)]],
                                                             device T* y [[buffer(1)]],
                                                             constant Count& count [[buffer(2)]],
                                                             uint at [[thread_position_in_grid]]) {
  const uint first = at * W;
  if (first + W <= count.elements) {
    Lanes<W>::store(y + first, activate(count.activation, Lanes<W>::load(x + first)));
    return;
  }
  for (uint i = first; i < count.elements; ++i)
    Lanes<1>::store(y + i, activate(count.activation, Lanes<1>::load(x + i)));
}

// dx = dy * act'(x)
template <typename T, uint W>
[[kernel, max_total_threads_per_threadgroup(256)]] void gelu_backward(
    device const T* dy [[buffer(0)]], device const T* x [[buffer(1)]], device T* dx [[buffer(2)]],
    constant Count& count [[buffer(3)]], uint at [[thread_position_in_grid]]) {
  const uint first = at * W;
  if (first + W <= count.elements) {
    Lanes<W>::store(dx + first, Lanes<W>::load(dy + first) *
                                    slope_of(count.activation, Lanes<W>::load(x + first)));
    return;
  }
  for (uint i = first; i < count.elements; ++i)
    Lanes<1>::store(dx + i,
                    Lanes<1>::load(dy + i) * slope_of(count.activation, Lanes<1>::load(x + i)));
}

#define INSTANCE(T, t, W)                                                               \
  template [[host_name("gelu_" t "_x" #W)]] [[kernel]] decltype(gelu<T, W>) gelu<T, W>; \
  template [[host_name("gelu_backward_" t                                               \
                       "_x" #W)]] [[kernel]] decltype(gelu_backward<T, W>) gelu_backward<T, W>;
#define INSTANCES(T, t) INSTANCE(T, t, 1) INSTANCE(T, t, 4)
INSTANCES(float, "f32")
INSTANCES(half, "f16")
INSTANCES(bfloat, "bf16")
#undef INSTANCES
#undef INSTANCE
