// AVX2 + FMA + F16C: 8 floats or 4 doubles.
#pragma once
#include <immintrin.h>

namespace fusedops::FUSEDOPS_ISA {

template <>
struct Vec<float> {
  static constexpr int N = 8;
  __m256 v;
};
template <>
struct Vec<double> {
  static constexpr int N = 4;
  __m256d v;
};
using Vf = Vec<float>;
using Vd = Vec<double>;
constexpr int kVectorRegisters = 16;
constexpr bool kBf16Dot = false;

FUSEDOPS_INLINE __m256i first_n_32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FUSEDOPS_INLINE __m256i first_n_64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

template <class V>
FUSEDOPS_INLINE V set1(double x) {
  if constexpr (V::N == 8)
    return {_mm256_set1_ps(static_cast<float>(x))};
  else
    return {_mm256_set1_pd(x)};
}

template <class V, class T>
FUSEDOPS_INLINE V broadcast(const T* p) {
  if constexpr (V::N == 8)
    return {_mm256_broadcast_ss(p)};
  else
    return {_mm256_broadcast_sd(p)};
}

FUSEDOPS_INLINE __m256 widen(__m128i h, const f16*) { return _mm256_cvtph_ps(h); }
FUSEDOPS_INLINE __m256 widen(__m128i h, const bf16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
FUSEDOPS_INLINE __m128i narrow(__m256 v, const f16*) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FUSEDOPS_INLINE __m128i narrow(__m256 v, const bf16*) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i w = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}

template <class V, class T>
FUSEDOPS_INLINE V load(const T* p) {
  if constexpr (sizeof(T) == 1)
    return {_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  else if constexpr (sizeof(T) == 2)
    return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p)};
  else if constexpr (sizeof(T) == 8)
    return {_mm256_loadu_pd(p)};
  else if constexpr (V::N == 4)
    return {_mm256_cvtps_pd(_mm_loadu_ps(p))};
  else
    return {_mm256_loadu_ps(p)};
}
template <class V, class T>
FUSEDOPS_INLINE V load_n(const T* p, int n) {
  if constexpr (sizeof(T) <= 2) {
    T part[8] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return load<V>(part);
  } else if constexpr (sizeof(T) == 8) {
    return {_mm256_maskload_pd(p, first_n_64(n))};
  } else if constexpr (V::N == 4) {
    return {_mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(first_n_32(n))))};
  } else {
    return {_mm256_maskload_ps(p, first_n_32(n))};
  }
}
template <class T>
FUSEDOPS_INLINE void store(T* p, Vf a) {
  if constexpr (sizeof(T) == 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a.v, p));
  else
    _mm256_storeu_ps(p, a.v);
}
FUSEDOPS_INLINE void store(double* p, Vd a) { _mm256_storeu_pd(p, a.v); }
template <class T>
FUSEDOPS_INLINE void store_n(T* p, Vf a, int n) {
  if constexpr (sizeof(T) == 2) {
    T part[8];
    store(part, a);
    for (int i = 0; i < n; i++) p[i] = part[i];
  } else {
    _mm256_maskstore_ps(p, first_n_32(n), a.v);
  }
}
FUSEDOPS_INLINE void store_n(double* p, Vd a, int n) { _mm256_maskstore_pd(p, first_n_64(n), a.v); }
FUSEDOPS_INLINE void stream(float* p, Vf a) { _mm256_stream_ps(p, a.v); }
FUSEDOPS_INLINE void stream(double* p, Vd a) { _mm256_stream_pd(p, a.v); }
template <class T>
  requires(sizeof(T) == 2)
FUSEDOPS_INLINE void stream2(T* p, Vf a, Vf b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_set_m128i(narrow(b.v, p), narrow(a.v, p)));
}
FUSEDOPS_INLINE void stream_fence() { _mm_sfence(); }

FUSEDOPS_INLINE Vf operator+(Vf a, Vf b) { return {_mm256_add_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator-(Vf a, Vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator*(Vf a, Vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator/(Vf a, Vf b) { return {_mm256_div_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf operator-(Vf a) { return {-a.v}; }
FUSEDOPS_INLINE Vf fma(Vf a, Vf b, Vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FUSEDOPS_INLINE Vf mul_add(Vf a, Vf b, Vf c) { return fma(a, b, c); }
FUSEDOPS_INLINE Vf min(Vf a, Vf b) { return {_mm256_min_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf max(Vf a, Vf b) { return {_mm256_max_ps(a.v, b.v)}; }
FUSEDOPS_INLINE Vf abs(Vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
FUSEDOPS_INLINE Vf min_abs(Vf a, double limit) { return min(set1<Vf>(limit), abs(a)); }
FUSEDOPS_INLINE Vf if_negative(Vf x, Vf a, Vf b) { return {_mm256_blendv_ps(b.v, a.v, x.v)}; }
FUSEDOPS_INLINE Vf round(Vf a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// Three factors, each a normal power of two, so that only the last product can round.
FUSEDOPS_INLINE Vf scale2(Vf a, Vf n) {
  const __m256i e = _mm256_cvtps_epi32(n.v);
  const __m256i third = _mm256_srai_epi32(_mm256_mullo_epi32(e, _mm256_set1_epi32(21846)), 16);
  const __m256i rest = _mm256_sub_epi32(e, _mm256_add_epi32(third, third));
  const auto pow2 = [](__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(_mm256_mul_ps(a.v, pow2(rest)), pow2(third)), pow2(third))};
}
struct Entry {
  __m256i v;
};
FUSEDOPS_INLINE Entry entry16(Vf u) { return {_mm256_srli_epi32(_mm256_castps_si256(u.v), 21)}; }
FUSEDOPS_INLINE Vf lookup16(const float* table, Entry i) {
  const __m256 lo = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i.v);
  const __m256 hi = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i.v);
  return {_mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(i.v, 28)))};
}
FUSEDOPS_INLINE float sum(Vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

FUSEDOPS_INLINE Vd operator+(Vd a, Vd b) { return {_mm256_add_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator-(Vd a, Vd b) { return {_mm256_sub_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator*(Vd a, Vd b) { return {_mm256_mul_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator/(Vd a, Vd b) { return {_mm256_div_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd operator-(Vd a) { return {-a.v}; }
FUSEDOPS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FUSEDOPS_INLINE Vd mul_add(Vd a, Vd b, Vd c) { return fma(a, b, c); }
FUSEDOPS_INLINE Vd min(Vd a, Vd b) { return {_mm256_min_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd max(Vd a, Vd b) { return {_mm256_max_pd(a.v, b.v)}; }
FUSEDOPS_INLINE Vd abs(Vd a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.), a.v)}; }
FUSEDOPS_INLINE Vd if_negative(Vd x, Vd a, Vd b) { return {_mm256_blendv_pd(b.v, a.v, x.v)}; }
FUSEDOPS_INLINE Vd round(Vd a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FUSEDOPS_INLINE Vd scale2(Vd a, Vd n) {
  const __m128i e = _mm256_cvtpd_epi32(n.v);
  const __m128i third = _mm_srai_epi32(_mm_mullo_epi32(e, _mm_set1_epi32(21846)), 16);
  const __m128i rest = _mm_sub_epi32(e, _mm_add_epi32(third, third));
  const auto pow2 = [](__m128i k) {
    const __m256i biased = _mm256_cvtepi32_epi64(_mm_add_epi32(k, _mm_set1_epi32(1023)));
    return _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52));
  };
  return {_mm256_mul_pd(_mm256_mul_pd(_mm256_mul_pd(a.v, pow2(rest)), pow2(third)), pow2(third))};
}
FUSEDOPS_INLINE double sum(Vd a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

FUSEDOPS_INLINE void deinterleave(Vf a, Vf b, Vf& even, Vf& odd) {
  const auto order = [](__m256 x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  };
  even.v = order(_mm256_shuffle_ps(a.v, b.v, 0x88));
  odd.v = order(_mm256_shuffle_ps(a.v, b.v, 0xdd));
}
FUSEDOPS_INLINE void interleave(Vf even, Vf odd, Vf& a, Vf& b) {
  const __m256 lo = _mm256_unpacklo_ps(even.v, odd.v), hi = _mm256_unpackhi_ps(even.v, odd.v);
  a.v = _mm256_permute2f128_ps(lo, hi, 0x20);
  b.v = _mm256_permute2f128_ps(lo, hi, 0x31);
}
FUSEDOPS_INLINE void deinterleave(Vd a, Vd b, Vd& even, Vd& odd) {
  even.v = _mm256_permute4x64_pd(_mm256_unpacklo_pd(a.v, b.v), 0xd8);
  odd.v = _mm256_permute4x64_pd(_mm256_unpackhi_pd(a.v, b.v), 0xd8);
}
FUSEDOPS_INLINE void interleave(Vd even, Vd odd, Vd& a, Vd& b) {
  const __m256d lo = _mm256_unpacklo_pd(even.v, odd.v), hi = _mm256_unpackhi_pd(even.v, odd.v);
  a.v = _mm256_permute2f128_pd(lo, hi, 0x20);
  b.v = _mm256_permute2f128_pd(lo, hi, 0x31);
}

FUSEDOPS_INLINE Vf sums(const Vf (&r)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(r[0].v, r[1].v), _mm256_hadd_ps(r[2].v, r[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(r[4].v, r[5].v), _mm256_hadd_ps(r[6].v, r[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}
FUSEDOPS_INLINE Vd sums(const Vd (&r)[4]) {
  const __m256d a = _mm256_hadd_pd(r[0].v, r[1].v), b = _mm256_hadd_pd(r[2].v, r[3].v);
  return {_mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31))};
}

// acc[i] += the dot product of four u8 of x and four s8 of y.
struct Vi {
  __m256i v;
};
constexpr int kByteProducts = 32;
constexpr const char* kByteDot = "u8 x s8 in three steps (vpmaddubsw, vpmaddwd, vpaddd)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) {
  const __m256i pairs = _mm256_maddubs_epi16(x.v, y.v);
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

FUSEDOPS_INLINE Vi load_bytes(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
FUSEDOPS_INLINE Vi load_bytes_n(const void* p, int n) {
  uint8_t part[32] = {};
  for (int i = 0; i < n; i++) part[i] = static_cast<const uint8_t*>(p)[i];
  return load_bytes(part);
}
FUSEDOPS_INLINE Vi broadcast_bytes(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return {_mm256_set1_epi32(four)};
}
FUSEDOPS_INLINE Vi operator+(Vi a, Vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
FUSEDOPS_INLINE Vi operator-(Vi a, Vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
// Sums of two products of bytes do not fit 16 bits: even and odd bytes apart, widened first.
FUSEDOPS_INLINE Vi dot_quads(Vi acc, Vi x, Vi y) {
  const __m256i x_even = _mm256_and_si256(x.v, _mm256_set1_epi16(0xff));
  const __m256i y_even = _mm256_srai_epi16(_mm256_slli_epi16(y.v, 8), 8);
  const __m256i x_odd = _mm256_srli_epi16(x.v, 8), y_odd = _mm256_srai_epi16(y.v, 8);
  return {_mm256_add_epi32(_mm256_add_epi32(acc.v, _mm256_madd_epi16(x_even, y_even)),
                           _mm256_madd_epi16(x_odd, y_odd))};
}
FUSEDOPS_INLINE Vi load_ints(const int32_t* p) { return load_bytes(p); }
FUSEDOPS_INLINE void store_ints(int32_t* p, Vi a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
FUSEDOPS_INLINE Vf to_float(Vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
FUSEDOPS_INLINE Vf as_float(Vi a) { return {_mm256_castsi256_ps(a.v)}; }
FUSEDOPS_INLINE Vi as_ints(Vf a) { return {_mm256_castps_si256(a.v)}; }
FUSEDOPS_INLINE void store_bytes(uint8_t* p, Vf a) {
  const __m256i words = _mm256_cvtps_epi32(a.v);
  const __m128i pairs =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}

FUSEDOPS_INLINE void transpose(Vf (&r)[8]) {
  __m256 t[8], q[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    q[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    q[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    q[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    q[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i].v = _mm256_permute2f128_ps(q[i], q[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(q[i], q[4 + i], 0x31);
  }
}
FUSEDOPS_INLINE void transpose(Vd (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0].v, r[1].v), b = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d c = _mm256_unpacklo_pd(r[2].v, r[3].v), d = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  r[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  r[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  r[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}

}  // namespace fusedops::FUSEDOPS_ISA
