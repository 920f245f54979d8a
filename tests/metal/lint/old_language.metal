#include <metal_stdlib>
using namespace metal;
template <typename T>
kernel void f(device T* y [[buffer(0)]]) {
  if constexpr (sizeof(T) == 4) y[0] = 1;
}
template [[host_name("f")]] [[kernel]] decltype(f<float>) f<float>;
