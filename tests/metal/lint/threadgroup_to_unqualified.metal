#include <metal_stdlib>
inline float first(float* p) { return p[0]; }
kernel void f(device float* y [[buffer(0)]]) {
  threadgroup float s[4];
  s[0] = 1;
  y[0] = first(s);
}
