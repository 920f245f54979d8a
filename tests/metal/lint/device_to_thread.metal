#include <metal_stdlib>
kernel void f(device float* y [[buffer(0)]]) {
  thread float* p = y;
  y[0] = p[1];
}
