// AVX-512 F, BW, VL, DQ: 16 floats or 8 doubles.
#pragma once
#include <immintrin.h>

namespace fusedops::FUSEDOPS_ISA {

template <>
struct Vec<float> {
  static constexpr int N = 16;
  __m512 v;
};
template <>
struct Vec<double> {
  static constexpr int N = 8;
  __m512d v;
};
using Vf = Vec<float>;
using Vd = Vec<double>;
constexpr int kVectorRegisters = 32;

FUSEDOPS_INLINE __mmask16 first_n(int n) { return static_cast<__mmask16>((1u << n) - 1); }

template <class V>
FUSEDOPS_INLINE V set1(double x) {
  if constexpr (V::N == 16)
    return {_mm512_set1_ps(static_cast<float>(x))};
  else
    return {_mm512_set1_pd(x)};
}

// In assembly: the compiler would repeat the load in every multiplication that uses the value.
template <class V, class T>
FUSEDOPS_INLINE V broadcast(const T* p) {
  V r;
  if constexpr (V::N == 16)
    __asm__("vbroadcastss %1, %0" : "=v"(r.v) : "m"(*p));
  else
    __asm__("vbroadcastsd %1, %0" : "=v"(r.v) : "m"(*p));
  return r;
}

FUSEDOPS_INLINE __m512 widen(__m256i h, const f16*) { return _mm512_cvtph_ps(h); }
FUSEDOPS_INLINE __m512 widen(__m256i h, const bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
FUSEDOPS_INLINE __m256i narrow(__m512 v, const f16*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FUSEDOPS_INLINE __m256i narrow_in_integers(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
FUSEDOPS_INLINE __m256i narrow(__m512 v, const bf16*) {
#ifdef __AVX512BF16__
  // The instruction is right but for subnormals, which it takes as zero.
  constexpr int subnormal = 0x20;
  if (_mm512_fpclass_ps_mask(v, subnormal) == 0) [[likely]]
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
  return narrow_in_integers(v);
}

template <class V, class T>
FUSEDOPS_INLINE V load(const T* p) {
  if constexpr (sizeof(T) == 1)
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  else if constexpr (sizeof(T) == 2)
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p)};
  else if constexpr (sizeof(T) == 8)
    return {_mm512_loadu_pd(p)};
  else if constexpr (V::N == 8)
    return {_mm512_cvtps_pd(_mm256_loadu_ps(p))};
  else
    return {_mm512_loadu_ps(p)};
}
template <class V, class T>
FUSEDOPS_INLINE V load_n(const T* p, int n) {
  const __mmask16 m = first_n(n);
  if constexpr (sizeof(T) == 1)
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p)))};
  else if constexpr (sizeof(T) == 2)
    return {widen(_mm256_maskz_loadu_epi16(m, p), p)};
  else if constexpr (sizeof(T) == 8)
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(m), p)};
  else if constexpr (V::N == 8)
    return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>(m), p))};
  else
    return {_mm512_maskz_loadu_ps(m, p)};
}
template <class T>
FUSEDOPS_INLINE void store(T* p, Vf a) {
  if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a.v, p));
  else
    _mm512_storeu_ps(p, a.v);
}
FUSEDOPS_INLINE void store(double* p, Vd a) { _mm512_storeu_pd(p, a.v); }
template <class T>
FUSEDOPS_INLINE void store_n(T* p, Vf a, int n) {
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, first_n(n), narrow(a.v, p));
  else
    _mm512_mask_storeu_ps(p, first_n(n), a.v);
}
FUSEDOPS_INLINE void store_n(double* p, Vd a, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_n(n)), a.v);
}
FUSEDOPS_INLINE void stream(float* p, Vf a) { _mm512_stream_ps(p, a.v); }
FUSEDOPS_INLINE void stream(double* p, Vd a) { _mm512_stream_pd(p, a.v); }

// One shuffle widens half of 32 elements: each moves to the upper word of its lane.
FUSEDOPS_INLINE void load2(const bf16* p, Vf& a, Vf& b) {
  const __m512i both = _mm512_loadu_si512(p);
  const __m512i low =
      _mm512_set_epi32(15 << 16, 14 << 16, 13 << 16, 12 << 16, 11 << 16, 10 << 16, 9 << 16, 8 << 16,
                       7 << 16, 6 << 16, 5 << 16, 4 << 16, 3 << 16, 2 << 16, 1 << 16, 0);
  const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(16 << 16));
  constexpr __mmask32 upper = 0xaaaaaaaa;
  a.v = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, low, both));
  b.v = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, high, both));
}
template <class T>
FUSEDOPS_INLINE __m512i narrow2(Vf a, Vf b, const T* p) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a.v, p)), narrow(b.v, p), 1);
}
#ifdef __AVX512BF16__
FUSEDOPS_INLINE __m512i narrow2(Vf a, Vf b, const bf16* p) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v));
  // A zero may be a subnormal that the instruction dropped.
  if (_mm512_testn_epi16_mask(both, _mm512_set1_epi16(0x7fff)) == 0) [[likely]]
    return both;
  return narrow2<bf16>(a, b, p);
}
#endif
template <class T>
  requires(sizeof(T) == 2)
FUSEDOPS_INLINE void store2(T* p, Vf a, Vf b) {
  _mm512_storeu_si512(p, narrow2(a, b, p));
}
template <class T>
  requires(sizeof(T) == 2)
FUSEDOPS_INLINE void stream2(T* p, Vf a, Vf b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow2(a, b, p));
}
FUSEDOPS_INLINE void stream_fence() { _mm_sfence(); }

FUSEDOPS_INLINE Vf operator+(Vf a, Vf b) { return {_mm512_add_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator-(Vf a, Vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator*(Vf a, Vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator/(Vf a, Vf b) { return {_mm512_div_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator-(Vf a) { return {-a.v}; }
FUSEDOPS_INLINE Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FUSEDOPS_INLINE Vf mul_add(Vf a, Vf b, Vf c) { return fma(a, b, c); }
FUSEDOPS_INLINE Vf min(Vf a, Vf b) { return {_mm512_min_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf max(Vf a, Vf b) { return {_mm512_max_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf abs(Vf a) { return {_mm512_abs_ps(a.v)}; }
FUSEDOPS_INLINE Vf min_abs(Vf a, double limit) {
  constexpr int smaller_size = 2, sign_clear = 2 << 2;
  return {_mm512_range_ps(a.v, set1<Vf>(limit).v, smaller_size | sign_clear)};
}
FUSEDOPS_INLINE Vf if_negative(Vf x, Vf a, Vf b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v)};
}
FUSEDOPS_INLINE Vf round(Vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FUSEDOPS_INLINE Vf scale2(Vf a, Vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
struct Entry {
  __m512i v;
};
FUSEDOPS_INLINE Entry entry16(Vf u) { return {_mm512_srli_epi32(_mm512_castps_si512(u.v), 21)}; }
FUSEDOPS_INLINE Vf lookup16(const float* table, Entry i) {
  return {_mm512_permutexvar_ps(i.v, _mm512_loadu_ps(table))};
}
FUSEDOPS_INLINE float sum(Vf a) { return _mm512_reduce_add_ps(a.v); }

FUSEDOPS_INLINE Vd operator+(Vd a, Vd b) { return {_mm512_add_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator-(Vd a, Vd b) { return {_mm512_sub_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator*(Vd a, Vd b) { return {_mm512_mul_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator/(Vd a, Vd b) { return {_mm512_div_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator-(Vd a) { return {-a.v}; }
FUSEDOPS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FUSEDOPS_INLINE Vd mul_add(Vd a, Vd b, Vd c) { return fma(a, b, c); }
FUSEDOPS_INLINE Vd min(Vd a, Vd b) { return {_mm512_min_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd max(Vd a, Vd b) { return {_mm512_max_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd abs(Vd a) { return {_mm512_abs_pd(a.v)}; }
FUSEDOPS_INLINE Vd if_negative(Vd x, Vd a, Vd b) {
  return {_mm512_mask_blend_pd(_mm512_movepi64_mask(_mm512_castpd_si512(x.v)), b.v, a.v)};
}
FUSEDOPS_INLINE Vd round(Vd a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FUSEDOPS_INLINE Vd scale2(Vd a, Vd n) { return {_mm512_scalef_pd(a.v, n.v)}; }
FUSEDOPS_INLINE double sum(Vd a) { return _mm512_reduce_add_pd(a.v); }

FUSEDOPS_INLINE void deinterleave(Vf a, Vf b, Vf& even, Vf& odd) {
  const __m512i e = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even.v = _mm512_permutex2var_ps(a.v, e, b.v);
  odd.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(e, _mm512_set1_epi32(1)), b.v);
}
FUSEDOPS_INLINE void interleave(Vf even, Vf odd, Vf& a, Vf& b) {
  const __m512i lo = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  a.v = _mm512_permutex2var_ps(even.v, lo, odd.v);
  b.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(lo, _mm512_set1_epi32(8)), odd.v);
}
FUSEDOPS_INLINE void deinterleave(Vd a, Vd b, Vd& even, Vd& odd) {
  const __m512i e = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
  even.v = _mm512_permutex2var_pd(a.v, e, b.v);
  odd.v = _mm512_permutex2var_pd(a.v, _mm512_add_epi64(e, _mm512_set1_epi64(1)), b.v);
}
FUSEDOPS_INLINE void interleave(Vd even, Vd odd, Vd& a, Vd& b) {
  const __m512i lo = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  a.v = _mm512_permutex2var_pd(even.v, lo, odd.v);
  b.v = _mm512_permutex2var_pd(even.v, _mm512_add_epi64(lo, _mm512_set1_epi64(4)), odd.v);
}

FUSEDOPS_INLINE void transpose(Vf (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  const auto lo = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto hi = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  __m512 q[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    q[4 * i] = lo(t[4 * i], t[4 * i + 2]);
    q[4 * i + 1] = hi(t[4 * i], t[4 * i + 2]);
    q[4 * i + 2] = lo(t[4 * i + 1], t[4 * i + 3]);
    q[4 * i + 3] = hi(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(q[i], q[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(q[i], q[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(q[8 + i], q[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(q[8 + i], q[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
FUSEDOPS_INLINE void transpose(Vd (&r)[8]) {
  __m512d t[8], q[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    q[i] = _mm512_shuffle_f64x2(t[i], t[2 + i], 0x88);
    q[2 + i] = _mm512_shuffle_f64x2(t[i], t[2 + i], 0xdd);
    q[4 + i] = _mm512_shuffle_f64x2(t[4 + i], t[6 + i], 0x88);
    q[6 + i] = _mm512_shuffle_f64x2(t[4 + i], t[6 + i], 0xdd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[i].v = _mm512_shuffle_f64x2(q[i], q[4 + i], 0x88);
    r[4 + i].v = _mm512_shuffle_f64x2(q[i], q[4 + i], 0xdd);
    r[2 + i].v = _mm512_shuffle_f64x2(q[2 + i], q[6 + i], 0x88);
    r[6 + i].v = _mm512_shuffle_f64x2(q[2 + i], q[6 + i], 0xdd);
  }
}

FUSEDOPS_INLINE Vf sums(const Vf (&r)[16]) {
  const auto lo = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto hi = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512 a = r[4 * i].v, b = r[4 * i + 1].v, c = r[4 * i + 2].v, d = r[4 * i + 3].v;
    const __m512 s = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 t = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    q[i] = _mm512_add_ps(lo(s, t), hi(s, t));
  }
  return {fold(fold(q[0], q[1]), fold(q[2], q[3]))};
}
FUSEDOPS_INLINE Vd sums(const Vd (&r)[8]) {
  const auto fold = [](__m512d a, __m512d b) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  };
  __m512d q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    q[i] = _mm512_add_pd(_mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v),
                         _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v));
  return {fold(fold(q[0], q[1]), fold(q[2], q[3]))};
}

// acc[i] += the dot product of four u8 of x and four s8 of y.
struct Vi {
  __m512i v;
};
constexpr int kByteProducts = 64;
#ifdef __AVX512VNNI__
constexpr const char* kByteDot = "u8 x s8 dot product (vpdpbusd)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) { return {_mm512_dpbusd_epi32(acc.v, x.v, y.v)}; }
#else
constexpr const char* kByteDot = "u8 x s8 in three steps (vpmaddubsw, vpmaddwd, vpaddd)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) {
  const __m512i pairs = _mm512_maddubs_epi16(x.v, y.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
#endif

FUSEDOPS_INLINE Vi load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
FUSEDOPS_INLINE Vi load_bytes_n(const void* p, int n) {
  const __mmask64 m = n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
  return {_mm512_maskz_loadu_epi8(m, p)};
}
FUSEDOPS_INLINE Vi broadcast_bytes(const uint8_t* p) {
  struct Four {
    uint8_t bytes[4];
  };
  Vi r;
  __asm__("vpbroadcastd %1, %0" : "=v"(r.v) : "m"(*reinterpret_cast<const Four*>(p)));
  return r;
}
FUSEDOPS_INLINE Vi operator+(Vi a, Vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
FUSEDOPS_INLINE Vi operator-(Vi a, Vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
#ifdef __AVX512VNNI__
FUSEDOPS_INLINE Vi dot_quads(Vi acc, Vi x, Vi y) { return dot_bytes(acc, x, y); }
#else
// Sums of two products of bytes do not fit 16 bits: even and odd bytes apart, widened first.
FUSEDOPS_INLINE Vi dot_quads(Vi acc, Vi x, Vi y) {
  const __m512i x_even = _mm512_and_si512(x.v, _mm512_set1_epi16(0xff));
  const __m512i y_even = _mm512_srai_epi16(_mm512_slli_epi16(y.v, 8), 8);
  const __m512i x_odd = _mm512_srli_epi16(x.v, 8), y_odd = _mm512_srai_epi16(y.v, 8);
  return {_mm512_add_epi32(_mm512_add_epi32(acc.v, _mm512_madd_epi16(x_even, y_even)),
                           _mm512_madd_epi16(x_odd, y_odd))};
}
#endif
FUSEDOPS_INLINE Vi load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FUSEDOPS_INLINE void store_ints(int32_t* p, Vi a) { _mm512_storeu_si512(p, a.v); }
FUSEDOPS_INLINE Vf to_float(Vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
FUSEDOPS_INLINE Vf as_float(Vi a) { return {_mm512_castsi512_ps(a.v)}; }
FUSEDOPS_INLINE Vi as_ints(Vf a) { return {_mm512_castps_si512(a.v)}; }
FUSEDOPS_INLINE void store_bytes(uint8_t* p, Vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

#ifdef __AVX512BF16__
#define FUSEDOPS_BF16_DOT 1
constexpr bool kBf16Dot = true;
FUSEDOPS_INLINE Vf load_pairs(const bf16* p) { return {_mm512_loadu_ps(p)}; }
FUSEDOPS_INLINE Vf load_pairs_n(const bf16* p, int n) {
  const __mmask32 m = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, p))};
}
// The pairs (a[i], b[i]) of widened bf16.
FUSEDOPS_INLINE Vf pair_up(Vf a, Vf b) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(b.v)))};
}
// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1]
FUSEDOPS_INLINE Vf dot_pairs(Vf acc, Vf a, Vf b) {
  return {
      _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#else
constexpr bool kBf16Dot = false;
#endif

}  // namespace fusedops::FUSEDOPS_ISA
