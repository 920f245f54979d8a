#include <metal_stdlib>
using namespace metal;
kernel void f(device float* y [[buffer(0)]]) { y[0] = erf(y[0]); }
