#include <metal_stdlib>
kernel void f(device float* y [[buffer(0)]]) {
  double wide = y[0];
  y[0] = wide;
}
