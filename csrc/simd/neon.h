// Advanced SIMD: 4 floats or 2 doubles. The baseline is armv8.0; fmlal (f16), bfdot (bf16) and the
// dot products of bytes come in with the features of the row.
#pragma once
#include <arm_neon.h>

namespace fusedops::FUSEDOPS_ISA {

template <>
struct Vec<float> {
  static constexpr int N = 4;
  float32x4_t v;
};
template <>
struct Vec<double> {
  static constexpr int N = 2;
  float64x2_t v;
};
using Vf = Vec<float>;
using Vd = Vec<double>;
constexpr int kVectorRegisters = 32;

template <class V>
FUSEDOPS_INLINE V set1(double x) {
  if constexpr (V::N == 4)
    return {vdupq_n_f32(static_cast<float>(x))};
  else
    return {vdupq_n_f64(x)};
}

template <class V, class T>
FUSEDOPS_INLINE V broadcast(const T* p) {
  if constexpr (V::N == 4)
    return {vld1q_dup_f32(p)};
  else
    return {vld1q_dup_f64(p)};
}

FUSEDOPS_INLINE float32x4_t widen(uint16x4_t h, const f16*) {
  return vcvt_f32_f16(vreinterpret_f16_u16(h));
}
FUSEDOPS_INLINE float32x4_t widen(uint16x4_t h, const bf16*) {
  return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}
FUSEDOPS_INLINE float32x4_t widen(const int8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}
FUSEDOPS_INLINE uint16x4_t narrow(float32x4_t v, const f16*) {
  return vreinterpret_u16_f16(vcvt_f16_f32(v));
}
FUSEDOPS_INLINE uint16x8_t narrow2(float32x4_t v, float32x4_t w, const f16*) {
  return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v), w));
}
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
FUSEDOPS_INLINE uint16x4_t narrow(float32x4_t v, const bf16*) {
  return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
}
FUSEDOPS_INLINE uint16x8_t narrow2(float32x4_t v, float32x4_t w, const bf16*) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(v), w));
}
#else
// The result is in the upper halves of the lanes.
FUSEDOPS_INLINE uint32x4_t rounded(float32x4_t v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  return vbslq_u32(vceqq_f32(v, v), r, quiet);
}
FUSEDOPS_INLINE uint16x4_t narrow(float32x4_t v, const bf16*) {
  return vshrn_n_u32(rounded(v), 16);
}
FUSEDOPS_INLINE uint16x8_t narrow2(float32x4_t v, float32x4_t w, const bf16*) {
  return vuzp2q_u16(vreinterpretq_u16_u32(rounded(v)), vreinterpretq_u16_u32(rounded(w)));
}
#endif

template <class V, class T>
FUSEDOPS_INLINE V load(const T* p) {
  if constexpr (sizeof(T) == 1)
    return {widen(p)};
  else if constexpr (sizeof(T) == 2)
    return {widen(vld1_u16(&p->bits), p)};
  else if constexpr (sizeof(T) == 8)
    return {vld1q_f64(p)};
  else if constexpr (V::N == 2)
    return {vcvt_f64_f32(vld1_f32(p))};
  else
    return {vld1q_f32(p)};
}
template <class T, class V>
FUSEDOPS_INLINE void store(T* p, V a) {
  if constexpr (sizeof(T) == 2)
    vst1_u16(&p->bits, narrow(a.v, p));
  else if constexpr (sizeof(T) == 8)
    vst1q_f64(p, a.v);
  else
    vst1q_f32(p, a.v);
}

// Part of a vector, by the bits of n: two elements if n has the second, then element n - 1 if n is
// odd.
template <class V, class T>
FUSEDOPS_INLINE V load_n(const T* p, int n) {
  if (n == V::N) return load<V>(p);
  if constexpr (V::N == 2) {
    return {vcombine_f64(vdup_n_f64(n ? static_cast<double>(*p) : 0), vdup_n_f64(0))};
  } else if constexpr (sizeof(T) == 1) {
    T part[4] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return load<V>(part);
  } else if constexpr (sizeof(T) == 2) {
    uint64_t four = 0;
    if (n & 2) __builtin_memcpy(&four, p, 4);
    if (n & 1) four |= static_cast<uint64_t>(p[n - 1].bits) << 16 * (n - 1);
    return {widen(vcreate_u16(four), p)};
  } else {
    float32x2_t low = vdup_n_f32(0), high = low;
    if (n & 2) low = vld1_f32(p);
    if (n == 1) low = vld1_lane_f32(p, low, 0);
    if (n == 3) high = vld1_lane_f32(p + 2, high, 0);
    return {vcombine_f32(low, high)};
  }
}
template <class T, class V>
FUSEDOPS_INLINE void store_n(T* p, V a, int n) {
  if (n == V::N) return store(p, a);
  if constexpr (V::N == 2) {
    if (n) vst1q_lane_f64(p, a.v, 0);
  } else if constexpr (sizeof(T) == 2) {
    const uint64_t four = vget_lane_u64(vreinterpret_u64_u16(narrow(a.v, p)), 0);
    if (n & 2) __builtin_memcpy(p, &four, 4);
    if (n & 1) p[n - 1].bits = static_cast<uint16_t>(four >> 16 * (n - 1));
  } else {
    if (n & 2) vst1_f32(p, vget_low_f32(a.v));
    if (n == 1) vst1q_lane_f32(p, a.v, 0);
    if (n == 3) vst1q_lane_f32(p + 2, a.v, 2);
  }
}
// The architecture's non-temporal store is a hint for a pair of registers, not one.
FUSEDOPS_INLINE void stream(float* p, Vf a) { store(p, a); }
FUSEDOPS_INLINE void stream(double* p, Vd a) { store(p, a); }
FUSEDOPS_INLINE void stream_fence() {}

// One load and one store of eight 16-bit elements.
FUSEDOPS_INLINE void load2(const f16* p, Vf& a, Vf& b) {
  const float16x8_t both = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
  a.v = vcvt_f32_f16(vget_low_f16(both));
  b.v = vcvt_high_f32_f16(both);
}
FUSEDOPS_INLINE void load2(const bf16* p, Vf& a, Vf& b) {
  const uint16x8_t both = vld1q_u16(&p->bits);
  a.v = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(both), 16));
  b.v = vreinterpretq_f32_u32(vshll_high_n_u16(both, 16));
}
template <class T>
  requires(sizeof(T) == 2)
FUSEDOPS_INLINE void store2(T* p, Vf a, Vf b) {
  vst1q_u16(&p->bits, narrow2(a.v, b.v, p));
}

FUSEDOPS_INLINE Vf operator+(Vf a, Vf b) { return {vaddq_f32(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator-(Vf a, Vf b) { return {vsubq_f32(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator*(Vf a, Vf b) { return {vmulq_f32(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator/(Vf a, Vf b) { return {vdivq_f32(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator-(Vf a) { return {vnegq_f32(a.v)}; }
FUSEDOPS_INLINE Vf fma(Vf a, Vf b, Vf c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FUSEDOPS_INLINE Vf mul_add(Vf a, Vf b, Vf c) { return fma(a, b, c); }
// FMIN and FMAX have another rule for NaN and for zeros.
FUSEDOPS_INLINE Vf min(Vf a, Vf b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
FUSEDOPS_INLINE Vf max(Vf a, Vf b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
FUSEDOPS_INLINE Vf abs(Vf a) { return {vabsq_f32(a.v)}; }
FUSEDOPS_INLINE Vf if_negative(Vf x, Vf a, Vf b) {
  return {vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(x.v)), a.v, b.v)};
}
FUSEDOPS_INLINE Vf round(Vf a) { return {vrndnq_f32(a.v)}; }
// Three factors, each a normal power of two, so that only the last product can round.
FUSEDOPS_INLINE Vf scale2(Vf a, Vf n) {
  const int32x4_t e = vcvtq_s32_f32(n.v), third = vshrq_n_s32(vmulq_n_s32(e, 21846), 16);
  const int32x4_t rest = vsubq_s32(e, vaddq_s32(third, third));
  const auto pow2 = [](int32x4_t k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
  };
  return a * Vf{pow2(rest)} * Vf{pow2(third)} * Vf{pow2(third)};
}
// The table is 64 bytes, what four registers hold: bytes 4i to 4i + 3 for lane i.
FUSEDOPS_INLINE Vf lookup16(const float* table, Vf i) {
  const uint32x4_t first = vmulq_n_u32(vcvtnq_u32_f32(i.v), 0x04040404);
  const uint8x16_t bytes = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100)));
  const uint8x16x4_t all = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
  return {vreinterpretq_f32_u8(vqtbl4q_u8(all, bytes))};
}
// The same by bits 21 to 24 of u.
struct Entry {
  uint8x16_t bytes;
};
FUSEDOPS_INLINE Entry entry16(Vf u) {
  const uint32x4_t first = vandq_u32(vshrq_n_u32(vreinterpretq_u32_f32(u.v), 19), vdupq_n_u32(60));
  const uint32x4_t all = vmlaq_n_u32(vdupq_n_u32(0x03020100), first, 0x01010101);
  return {vreinterpretq_u8_u32(all)};
}
FUSEDOPS_INLINE Vf lookup16(const float* table, Entry e) {
  const uint8x16x4_t all = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
  return {vreinterpretq_f32_u8(vqtbl4q_u8(all, e.bytes))};
}
FUSEDOPS_INLINE Vf min_abs(Vf a, double limit) {
  return {vminq_f32(vdupq_n_f32(static_cast<float>(limit)), vabsq_f32(a.v))};
}
FUSEDOPS_INLINE float sum(Vf a) { return vaddvq_f32(a.v); }
FUSEDOPS_INLINE Vf sums(const Vf (&r)[4]) {
  return {vpaddq_f32(vpaddq_f32(r[0].v, r[1].v), vpaddq_f32(r[2].v, r[3].v))};
}

FUSEDOPS_INLINE Vd operator+(Vd a, Vd b) { return {vaddq_f64(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator-(Vd a, Vd b) { return {vsubq_f64(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator*(Vd a, Vd b) { return {vmulq_f64(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator/(Vd a, Vd b) { return {vdivq_f64(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator-(Vd a) { return {vnegq_f64(a.v)}; }
FUSEDOPS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
FUSEDOPS_INLINE Vd mul_add(Vd a, Vd b, Vd c) { return fma(a, b, c); }
FUSEDOPS_INLINE Vd min(Vd a, Vd b) { return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)}; }
FUSEDOPS_INLINE Vd max(Vd a, Vd b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
FUSEDOPS_INLINE Vd abs(Vd a) { return {vabsq_f64(a.v)}; }
FUSEDOPS_INLINE Vd if_negative(Vd x, Vd a, Vd b) {
  return {vbslq_f64(vcltzq_s64(vreinterpretq_s64_f64(x.v)), a.v, b.v)};
}
FUSEDOPS_INLINE Vd round(Vd a) { return {vrndnq_f64(a.v)}; }
FUSEDOPS_INLINE Vd scale2(Vd a, Vd n) {
  // Both numbers below 2^12: a third of one is exact in the low half of a lane.
  const int32x4_t e = vreinterpretq_s32_s64(vcvtq_s64_f64(n.v));
  const int64x2_t third = vreinterpretq_s64_s32(vshrq_n_s32(vmulq_n_s32(e, 21846), 16));
  const int64x2_t rest = vsubq_s64(vreinterpretq_s64_s32(e), vaddq_s64(third, third));
  const auto pow2 = [](int64x2_t k) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(k, vdupq_n_s64(1023)), 52));
  };
  return a * Vd{pow2(rest)} * Vd{pow2(third)} * Vd{pow2(third)};
}
FUSEDOPS_INLINE double sum(Vd a) { return vaddvq_f64(a.v); }
FUSEDOPS_INLINE Vd sums(const Vd (&r)[2]) { return {vpaddq_f64(r[0].v, r[1].v)}; }

// A multiply-add takes one lane of a register for all: a register holds N factors.
#define FUSEDOPS_LANE_FACTORS 1
constexpr bool kLaneFactors = true;
template <class V, int n>
struct Factors {
  V v[(n + V::N - 1) / V::N];
};
template <class V>
struct Factor {
  V v;
  int lane;
};
template <class V, int n, class T>
FUSEDOPS_INLINE Factors<V, n> factors(const T* p) {
  Factors<V, n> f;
  for (int i = 0; i < n; i += V::N) f.v[i / V::N] = load_n<V>(p + i, n - i < V::N ? n - i : V::N);
  return f;
}
template <class V, int n>
FUSEDOPS_INLINE Factor<V> factor(const Factors<V, n>& f, int i) {
  return {f.v[i / V::N], i % V::N};
}
FUSEDOPS_INLINE Vf mul_add(Factor<Vf> a, Vf b, Vf c) {
  switch (a.lane) {
    case 0:
      return {vfmaq_laneq_f32(c.v, b.v, a.v.v, 0)};
    case 1:
      return {vfmaq_laneq_f32(c.v, b.v, a.v.v, 1)};
    case 2:
      return {vfmaq_laneq_f32(c.v, b.v, a.v.v, 2)};
    default:
      return {vfmaq_laneq_f32(c.v, b.v, a.v.v, 3)};
  }
}
FUSEDOPS_INLINE Vd mul_add(Factor<Vd> a, Vd b, Vd c) {
  if (a.lane == 0) return {vfmaq_laneq_f64(c.v, b.v, a.v.v, 0)};
  return {vfmaq_laneq_f64(c.v, b.v, a.v.v, 1)};
}

FUSEDOPS_INLINE void deinterleave(Vf a, Vf b, Vf& even, Vf& odd) {
  even.v = vuzp1q_f32(a.v, b.v);
  odd.v = vuzp2q_f32(a.v, b.v);
}
FUSEDOPS_INLINE void interleave(Vf even, Vf odd, Vf& a, Vf& b) {
  a.v = vzip1q_f32(even.v, odd.v);
  b.v = vzip2q_f32(even.v, odd.v);
}
FUSEDOPS_INLINE void deinterleave(Vd a, Vd b, Vd& even, Vd& odd) {
  even.v = vuzp1q_f64(a.v, b.v);
  odd.v = vuzp2q_f64(a.v, b.v);
}
FUSEDOPS_INLINE void interleave(Vd even, Vd odd, Vd& a, Vd& b) { deinterleave(even, odd, a, b); }

FUSEDOPS_INLINE void transpose(Vf (&r)[4]) {
  const auto wide = [](float32x4_t a) { return vreinterpretq_f64_f32(a); };
  const auto lanes = [](float64x2_t a) { return vreinterpretq_f32_f64(a); };
  const float64x2_t a = wide(vtrn1q_f32(r[0].v, r[1].v)), b = wide(vtrn2q_f32(r[0].v, r[1].v));
  const float64x2_t c = wide(vtrn1q_f32(r[2].v, r[3].v)), d = wide(vtrn2q_f32(r[2].v, r[3].v));
  r[0].v = lanes(vzip1q_f64(a, c));
  r[1].v = lanes(vzip1q_f64(b, d));
  r[2].v = lanes(vzip2q_f64(a, c));
  r[3].v = lanes(vzip2q_f64(b, d));
}
FUSEDOPS_INLINE void transpose(Vd (&r)[2]) {
  const Vd a = r[0], b = r[1];
  deinterleave(a, b, r[0], r[1]);
}

// acc[i] += the dot product of four bytes of x and four of y.
struct Vi {
  int32x4_t v;
};
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kByteProducts = 16;
constexpr const char* kByteDot = "u8 x s8 dot product (usdot)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) {
  return {vusdotq_s32(acc.v, vreinterpretq_u8_s32(x.v), vreinterpretq_s8_s32(y.v))};
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kByteProducts = 16;
constexpr const char* kByteDot = "s8 x s8 dot product (sdot)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) {
  return {vdotq_s32(acc.v, vreinterpretq_s8_s32(x.v), vreinterpretq_s8_s32(y.v))};
}
#else
// Widened to 16 bits, the narrowest whose products can be added up.
constexpr int kByteProducts = 8;
constexpr const char* kByteDot = "16-bit multiply-add (no dot product of bytes)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) {
  const auto shorts = [](Vi a) { return vreinterpretq_s16_s32(a.v); };
  return {vreinterpretq_s32_s16(vmlaq_s16(shorts(acc), shorts(x), shorts(y)))};
}
#endif

FUSEDOPS_INLINE Vi load_bytes(const void* p) {
  return {vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)))};
}
FUSEDOPS_INLINE Vi load_bytes_n(const void* p, int n) {
  uint8_t part[16] = {};
  for (int i = 0; i < n; i++) part[i] = static_cast<const uint8_t*>(p)[i];
  return load_bytes(part);
}
FUSEDOPS_INLINE Vi broadcast_bytes(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return {vdupq_n_s32(four)};
}
FUSEDOPS_INLINE Vi operator+(Vi a, Vi b) { return {vaddq_s32(a.v, b.v)}; }
FUSEDOPS_INLINE Vi operator-(Vi a, Vi b) { return {vsubq_s32(a.v, b.v)}; }
// acc[i] += the four products u8 x * s8 y of lane i
FUSEDOPS_INLINE Vi dot_quads(Vi acc, Vi x, Vi y) {
  const int8x16_t signed_y = vreinterpretq_s8_s32(y.v);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return {vusdotq_s32(acc.v, vreinterpretq_u8_s32(x.v), signed_y)};
#elif defined(__ARM_FEATURE_DOTPROD)
  // x - 128 is signed; 128 y comes as 64 y twice.
  const int8x16_t moved = veorq_s8(vreinterpretq_s8_s32(x.v), vdupq_n_s8(-128));
  const int8x16_t half = vdupq_n_s8(64);
  return {vdotq_s32(vdotq_s32(vdotq_s32(acc.v, moved, signed_y), half, signed_y), half, signed_y)};
#else
  const uint8x16_t bytes = vreinterpretq_u8_s32(x.v);
  const int16x8_t x_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
  const int16x8_t x_high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
  const int16x8_t y_low = vmovl_s8(vget_low_s8(signed_y)), y_high = vmovl_high_s8(signed_y);
  const int32x4_t low =
      vpaddq_s32(vmull_s16(vget_low_s16(x_low), vget_low_s16(y_low)), vmull_high_s16(x_low, y_low));
  const int32x4_t high = vpaddq_s32(vmull_s16(vget_low_s16(x_high), vget_low_s16(y_high)),
                                    vmull_high_s16(x_high, y_high));
  return {vaddq_s32(acc.v, vpaddq_s32(low, high))};
#endif
}
FUSEDOPS_INLINE Vi load_ints(const int32_t* p) { return {vld1q_s32(p)}; }
FUSEDOPS_INLINE void store_ints(int32_t* p, Vi a) { vst1q_s32(p, a.v); }
FUSEDOPS_INLINE Vf to_float(Vi a) { return {vcvtq_f32_s32(a.v)}; }
FUSEDOPS_INLINE Vf as_float(Vi a) { return {vreinterpretq_f32_s32(a.v)}; }
FUSEDOPS_INLINE Vi as_ints(Vf a) { return {vreinterpretq_s32_f32(a.v)}; }
FUSEDOPS_INLINE void store_bytes(uint8_t* p, Vf a) {
  const uint16x4_t words = vmovn_u32(vcvtq_u32_f32(a.v));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  __builtin_memcpy(p, &four, sizeof(four));
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define FUSEDOPS_BF16_DOT 1
constexpr bool kBf16Dot = true;
FUSEDOPS_INLINE Vf load_pairs(const bf16* p) {
  return {vreinterpretq_f32_u16(vld1q_u16(&p->bits))};
}
FUSEDOPS_INLINE Vf load_pairs_n(const bf16* p, int n) {
  if (n >= 8) return load_pairs(p);
  bf16 part[8] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load_pairs(part);
}
// The pairs (a[i], b[i]) of widened bf16.
FUSEDOPS_INLINE Vf pair_up(Vf a, Vf b) {
  const uint32x4_t low = vreinterpretq_u32_f32(a.v), high = vreinterpretq_u32_f32(b.v);
  return {vreinterpretq_f32_u32(vsriq_n_u32(high, low, 16))};
}
// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1], both sums rounded to odd
FUSEDOPS_INLINE Vf dot_pairs(Vf acc, Vf a, Vf b) {
  return {vbfdotq_f32(acc.v, vreinterpretq_bf16_f32(a.v), vreinterpretq_bf16_f32(b.v))};
}
FUSEDOPS_INLINE Vf dot_pairs(Vf acc, Factor<Vf> a, Vf b) {
  const bfloat16x8_t x = vreinterpretq_bf16_f32(a.v.v), w = vreinterpretq_bf16_f32(b.v);
  switch (a.lane) {
    case 0:
      return {vbfdotq_laneq_f32(acc.v, w, x, 0)};
    case 1:
      return {vbfdotq_laneq_f32(acc.v, w, x, 1)};
    case 2:
      return {vbfdotq_laneq_f32(acc.v, w, x, 2)};
    default:
      return {vbfdotq_laneq_f32(acc.v, w, x, 3)};
  }
}
#else
constexpr bool kBf16Dot = false;
#endif

#ifdef __ARM_FEATURE_FP16_FML
#define FUSEDOPS_F16_DOT 1
FUSEDOPS_INLINE float16x8_t halves(Vf a) { return vreinterpretq_f16_f32(a.v); }
FUSEDOPS_INLINE Vf load_pairs(const f16* p) { return {vreinterpretq_f32_u16(vld1q_u16(&p->bits))}; }
FUSEDOPS_INLINE Vf load_pairs_n(const f16* p, int n) {
  if (n >= 8) return load_pairs(p);
  f16 part[8] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load_pairs(part);
}
// The pairs (a[i], b[i]) of widened f16.
FUSEDOPS_INLINE Vf pair_up_f16(Vf a, Vf b) {
  const uint16x4_t low = narrow(a.v, static_cast<const f16*>(nullptr)),
                   high = narrow(b.v, static_cast<const f16*>(nullptr));
  return {vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high)))};
}
// First elements of the pairs, then second ones: what fmlal and fmlal2 take.
FUSEDOPS_INLINE Vf pack_pairs(Vf a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a.v);
  return {vreinterpretq_f32_u16(vcombine_u16(vmovn_u32(u), vshrn_n_u32(u, 16)))};
}
FUSEDOPS_INLINE Vf dot_f16_pairs(Vf acc, Vf a, Vf b) {
  return {vfmlalq_high_f16(vfmlalq_low_f16(acc.v, halves(a), halves(b)), halves(a), halves(b))};
}
FUSEDOPS_INLINE Vf dot_f16_pairs(Vf acc, Factor<Vf> a, Vf b) {
  const float16x8_t x = halves(a.v), w = halves(b);
  switch (a.lane) {
    case 0:
      return {vfmlalq_laneq_high_f16(vfmlalq_laneq_low_f16(acc.v, w, x, 0), w, x, 1)};
    case 1:
      return {vfmlalq_laneq_high_f16(vfmlalq_laneq_low_f16(acc.v, w, x, 2), w, x, 3)};
    case 2:
      return {vfmlalq_laneq_high_f16(vfmlalq_laneq_low_f16(acc.v, w, x, 4), w, x, 5)};
    default:
      return {vfmlalq_laneq_high_f16(vfmlalq_laneq_low_f16(acc.v, w, x, 6), w, x, 7)};
  }
}
#endif

}  // namespace fusedops::FUSEDOPS_ISA
