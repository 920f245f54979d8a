// What the shaders share: one element or four at a time, and the activations.
// C++14 without lambdas, `if constexpr` and dynamic threadgroup memory: Metal 3.1 has none of them,
// and torch's shim cannot pass the last.
#pragma once
#include <metal_stdlib>

#include "params.h"

using namespace metal;
using namespace fusedops_metal;

// Loads and stores of W neighbouring elements, as floats. Four need an address that is a multiple
// of their size; the host looks.
template <uint W>
struct Lanes;

template <>
struct Lanes<1> {
  typedef float value;
  template <typename T>
  static float load(device const T* p) {
    return float(*p);
  }
  template <typename T>
  static void store(device T* p, float v) {
    *p = T(v);
  }
  template <typename T>
  static void copy(device const T* from, device T* to) {
    *to = *from;
  }
  template <typename T>
  static void load_pairs(device const T* p, uint step, thread float& first, thread float& second) {
    first = float(p[0]);
    second = float(p[step]);
  }
  template <typename T>
  static void store_pairs(device T* p, uint step, float first, float second) {
    p[0] = T(first);
    p[step] = T(second);
  }
};

template <>
struct Lanes<4> {
  typedef float4 value;
  template <typename T>
  static float4 load(device const T* p) {
    const vec<T, 4> v = *(device const vec<T, 4>*)p;
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
  // Members of a vector that is known to be aligned: one store of 8 or 16 bytes.
  template <typename T>
  static void store(device T* p, float4 v) {
    device vec<T, 4>* to = (device vec<T, 4>*)p;
    to->x = T(v.x);
    to->y = T(v.y);
    to->z = T(v.z);
    to->w = T(v.w);
  }
  template <typename T>
  static void copy(device const T* from, device T* p) {
    const vec<T, 4> v = *(device const vec<T, 4>*)from;
    device vec<T, 4>* to = (device vec<T, 4>*)p;
    to->x = v.x;
    to->y = v.y;
    to->z = v.z;
    to->w = v.w;
  }
  // (first, second) four times over; step is 1.
  template <typename T>
  static void load_pairs(device const T* p, uint step, thread float4& first,
                         thread float4& second) {
    const float4 a = load(p), b = load(p + 4 * step);
    first = float4(a.x, a.z, b.x, b.z);
    second = float4(a.y, a.w, b.y, b.w);
  }
  template <typename T>
  static void store_pairs(device T* p, uint step, float4 first, float4 second) {
    store(p, float4(first.x, second.x, first.y, second.y));
    store(p + 4 * step, float4(first.z, second.z, first.w, second.w));
  }
};

// GELU is x Phi(x) with Phi(-a) = exp(-a^2 / 2) R(a) for a >= 0, never 1 + erf, which cancels. R is
// half of erfc(a / sqrt 2) exp(a^2 / 2), smooth: (1 + a) R(a) as a polynomial of (a - 4) / (a + 4),
// fitted in weighted least squares (Lawson) to 1.7e-9 of its value on [0, 14.6], where exp(-a^2 /
// 2) is 0.
inline float gelu_ratio(float a) {
  const float q = (a - 4.0f) / (a + 4.0f);
  float p = -7.169124e-05f;
  p = fma(p, q, -6.07701477e-05f);
  p = fma(p, q, 0.00069271744f);
  p = fma(p, q, -0.000303694163f);
  p = fma(p, q, -0.00500428863f);
  p = fma(p, q, 0.0179402083f);
  p = fma(p, q, -0.0321972854f);
  p = fma(p, q, 0.0285999775f);
  p = fma(p, q, 0.0139995972f);
  p = fma(p, q, -0.0967034698f);
  p = fma(p, q, 0.4720532f);
  return p / (1.0f + a);
}
// exp(-a^2 / 2): the square's own rounding error would be that of the result times a^2.
inline float gelu_density(float a) {
  const float square = a * a, rest = fma(a, a, -square);
  return precise::exp(-0.5f * square) * fma(-0.5f, rest, 1.0f);
}
// |x| where it matters: beyond, exp is 0, and an infinity times it would be NaN. NaN stays.
inline float gelu_magnitude(float x) {
  const float a = fabs(x);
  return a > 20.0f ? 20.0f : a;
}
inline float gelu_value(float x) {
  const float a = gelu_magnitude(x), tail = a * (gelu_density(a) * gelu_ratio(a));
  return x < 0.0f ? -tail : x - tail;
}
inline float gelu_grad(float x) {
  const float a = gelu_magnitude(x);
  const float tail = gelu_density(a) * (gelu_ratio(a) - 0.3989422804f * a);
  return x < 0.0f ? tail : 1.0f - tail;
}

// The others are x sigmoid(v(x)): tanh(u) is 2 sigmoid(2u) - 1. exp of a negative number never
// overflows. Below -120 all results are -0, above all slopes 1.
inline float sigmoid_product(float x, float v) {
  const float e = precise::exp(-fabs(v));
  return (v < 0.0f ? x * e : x) / (1.0f + e);
}
// `slope` is v'(x).
inline float sigmoid_product_grad(float x, float v, float slope) {
  const float e = precise::exp(-fabs(v)), all = 1.0f + e;
  return ((v < 0.0f ? e : 1.0f) + x * slope * (e / all)) / all;
}
inline float not_below(float x) { return x < -120.0f ? -120.0f : x; }
inline float within(float x) { return x > 120.0f ? 120.0f : not_below(x); }

constant constexpr float kTanhScale = 1.5957691216f;  // 2 sqrt(2 / pi)
constant constexpr float kTanhCube = 0.044715f;
constant constexpr float kQuick = 1.702f;

inline float tanh_exponent(float x) { return kTanhScale * fma(kTanhCube * x, x * x, x); }

inline float activate(uint activation, float x) {
  switch (activation) {
    case kGelu:
      return gelu_value(x);
    case kGeluTanh:
      x = not_below(x);
      return sigmoid_product(x, tanh_exponent(x));
    case kGeluQuick:
      x = not_below(x);
      return sigmoid_product(x, kQuick * x);
    case kSilu:
      x = not_below(x);
      return sigmoid_product(x, x);
    case kRelu:
      return x < 0.0f ? 0.0f : x;  // NaN stays
    case kRelu2:
      x = x < 0.0f ? 0.0f : x;
      return x * x;
    default:
      return x;
  }
}

inline float slope_of(uint activation, float x) {
  switch (activation) {
    case kGelu:
      return gelu_grad(x);
    case kGeluTanh:
      x = within(x);
      return sigmoid_product_grad(x, tanh_exponent(x),
                                  kTanhScale * fma(3.0f * kTanhCube * x, x, 1.0f));
    case kGeluQuick:
      x = within(x);
      return sigmoid_product_grad(x, kQuick * x, kQuick);
    case kSilu:
      x = within(x);
      return sigmoid_product_grad(x, x, 1.0f);
    case kRelu:
      return x > 0.0f ? 1.0f : 0.0f;
    case kRelu2:
      return x < 0.0f ? 0.0f : x + x;
    default:
      return 1.0f;
  }
}

inline float4 activate(uint activation, float4 x) {
  return float4(activate(activation, x.x), activate(activation, x.y), activate(activation, x.z),
                activate(activation, x.w));
}
inline float4 slope_of(uint activation, float4 x) {
  return float4(slope_of(activation, x.x), slope_of(activation, x.y), slope_of(activation, x.z),
                slope_of(activation, x.w));
}
