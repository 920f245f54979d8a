#include <metal_stdlib>
kernel void f(constant float* x [[buffer(0)]], device float* y [[buffer(1)]]) {
  device const float* q = x;
  y[0] = q[0];
}
