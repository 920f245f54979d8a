// GCC/Clang vector extensions, 4 floats or 2 doubles: what every baseline (SSE2, armv8.0) lowers
// well. neon.h includes this with FUSEDOPS_VECTOR_FMA set and brings its own multiply-add.
#pragma once

namespace fusedops::FUSEDOPS_ISA {

template <>
struct Vec<float> {
  static constexpr int N = 4;
  typedef float lane;
  typedef float reg __attribute__((vector_size(16)));
  typedef int32_t bits __attribute__((vector_size(16)));
  reg v;
};
template <>
struct Vec<double> {
  static constexpr int N = 2;
  typedef double lane;
  typedef double reg __attribute__((vector_size(16)));
  typedef int64_t bits __attribute__((vector_size(16)));
  reg v;
};
using Vf = Vec<float>;
using Vd = Vec<double>;
#ifdef __aarch64__
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif
constexpr bool kBf16Dot = false;

typedef uint16_t Half4 __attribute__((vector_size(8)));
typedef int8_t Byte4 __attribute__((vector_size(4)));
typedef float Narrow2 __attribute__((vector_size(8)));

FUSEDOPS_INLINE Vf::reg widen(Vf::bits h, const bf16*) { return (Vf::reg)(h << 16); }
FUSEDOPS_INLINE Vf::reg widen(Vf::bits h, const f16*) {
  const Vf::bits body = (h & 0x7fff) << 13;
  // 2^112 moves the exponent bias from 15 to 127, subnormals included.
  const Vf::bits finite = (Vf::bits)((Vf::reg)body * 0x1p112f);
  return (Vf::reg)((body >= 0x7c00 << 13 ? body | 0x7f800000 : finite) | (h & 0x8000) << 16);
}
FUSEDOPS_INLINE Vf::bits narrow(Vf::reg x, const bf16*) {
  const Vf::bits u = (Vf::bits)x;
  return (x != x ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1)) >> 16;
}
FUSEDOPS_INLINE Vf::bits narrow(Vf::reg x, const f16*) {
  const Vf::bits u = (Vf::bits)x, size = u & 0x7fffffff;
  const Vf::bits normal = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  const Vf::bits subnormal = (Vf::bits)((Vf::reg)size + 0.5f) - 0x3f000000;  // rounds at 2^-24
  Vf::bits r = size < 0x38800000 ? subnormal : normal;
  r = size >= 0x477ff000 ? Vf::bits{} + 0x7c00 : r;  // rounds to 65536 or more
  r = size > 0x7f800000 ? 0x7e00 | (size >> 13 & 0x3ff) : r;
  return r | (u >> 16 & 0x8000);
}

// x - 0 is x for every x; lane by lane, gcc inserts one element after the other.
template <class V>
FUSEDOPS_INLINE V set1(double x) {
  return {static_cast<typename V::lane>(x) - typename V::reg{}};
}
template <class V, class T>
FUSEDOPS_INLINE V broadcast(const T* p) {
  return {*p - typename V::reg{}};
}
template <class V, class T>
FUSEDOPS_INLINE V load(const T* p) {
  V r;
  if constexpr (sizeof(T) == 1) {
    Byte4 b;
    __builtin_memcpy(&b, p, sizeof(b));
    r.v = __builtin_convertvector(b, Vf::reg);
  } else if constexpr (sizeof(T) == 2) {
    Half4 h;
    __builtin_memcpy(&h, p, sizeof(h));
    r.v = widen(__builtin_convertvector(h, Vf::bits), p);
  } else if constexpr (sizeof(T) < sizeof(r.v[0])) {
    Narrow2 h;
    __builtin_memcpy(&h, p, sizeof(h));
    r.v = __builtin_convertvector(h, Vd::reg);
  } else {
    __builtin_memcpy(&r.v, p, sizeof(r.v));
  }
  return r;
}
template <class V, class T>
FUSEDOPS_INLINE V load_n(const T* p, int n) {
  T part[V::N] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load<V>(part);
}
template <class T, class V>
FUSEDOPS_INLINE void store(T* p, V a) {
  if constexpr (sizeof(T) == 2) {
    const Half4 h = __builtin_convertvector(narrow(a.v, p), Half4);
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    __builtin_memcpy(p, &a.v, sizeof(a.v));
  }
}
template <class T, class V>
FUSEDOPS_INLINE void store_n(T* p, V a, int n) {
  T part[V::N];
  store(part, a);
  for (int i = 0; i < n; i++) p[i] = part[i];
}
template <class V>
FUSEDOPS_INLINE void stream(typename V::lane* p, V a) {
  store(p, a);
}
FUSEDOPS_INLINE void stream_fence() {}

template <class T>
FUSEDOPS_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
FUSEDOPS_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <class T>
FUSEDOPS_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}
template <class T>
FUSEDOPS_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}
template <class T>
FUSEDOPS_INLINE Vec<T> operator-(Vec<T> a) {
  return {-a.v};
}
#ifndef FUSEDOPS_VECTOR_FMA
// a + b where the last bit is 1 if the sum is not exact: rounded once more, to 51 bits or less, it
// is the exact sum rounded once (Boldo and Melquiond 2008).
FUSEDOPS_INLINE Vd::reg add_to_odd(Vd::reg a, Vd::reg b) {
  typedef uint64_t Words __attribute__((vector_size(16)));
  const Vd::reg s = a + b, t = s - a, lost = (a - (s - t)) + (b - t);
  const Words u = (Words)s, inexact = (Words)(lost < 0) | (Words)(lost > 0);  // not of NaN
  const Words step = ~u & inexact & 1, down = ((Words)lost ^ u) >> 63 & step;
  return (Vd::reg)(u + step - down - down);
}
// The product of two floats is exact in double.
FUSEDOPS_INLINE Vf fma(Vf a, Vf b, Vf c) {
  Vf r;
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const auto wide = [i](Vf::reg x) __attribute__((always_inline)) {
      const Narrow2 two = {x[i], x[i + 1]};
      return __builtin_convertvector(two, Vd::reg);
    };
    const Vd::reg sum = add_to_odd(wide(a.v) * wide(b.v), wide(c.v));
    const Narrow2 two = __builtin_convertvector(sum, Narrow2);
    r.v[i] = two[0], r.v[i + 1] = two[1];
  }
  return r;
}
FUSEDOPS_INLINE Vd fma(Vd a, Vd b, Vd c) {
  return {Vd::reg{__builtin_fma(a.v[0], b.v[0], c.v[0]), __builtin_fma(a.v[1], b.v[1], c.v[1])}};
}
template <class T>
FUSEDOPS_INLINE Vec<T> mul_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#ifdef FUSEDOPS_SAME_BITS
  return fma(a, b, c);
#else
  return {a.v * b.v + c.v};
#endif
}
#endif
template <class T>
FUSEDOPS_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class T>
FUSEDOPS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
FUSEDOPS_INLINE Vf abs(Vf a) { return {(Vf::reg)((Vf::bits)a.v & 0x7fffffff)}; }
FUSEDOPS_INLINE Vd abs(Vd a) { return {(Vd::reg)((Vd::bits)a.v & 0x7fffffffffffffff)}; }
FUSEDOPS_INLINE Vf min_abs(Vf a, double limit) { return min(set1<Vf>(limit), abs(a)); }
template <class T>
FUSEDOPS_INLINE Vec<T> if_negative(Vec<T> x, Vec<T> a, Vec<T> b) {
  return {(typename Vec<T>::bits)x.v < 0 ? a.v : b.v};
}
// Adding 1.5 * 2^23 leaves no fraction bits.
FUSEDOPS_INLINE Vf round(Vf a) { return {a.v + 0x1.8p23f - 0x1.8p23f}; }
FUSEDOPS_INLINE Vd round(Vd a) { return {a.v + 0x1.8p52 - 0x1.8p52}; }
// Three factors, each a normal power of two, so that only the last product can round.
template <class T>
FUSEDOPS_INLINE Vec<T> scale2(Vec<T> a, Vec<T> n) {
  using V = Vec<T>;
  constexpr int bias = sizeof(T) == 4 ? 127 : 1023, mantissa = sizeof(T) == 4 ? 23 : 52;
  typename V::bits third, rest;
  for (int i = 0; i < V::N; i++) {
    const int e = static_cast<int>(n.v[i]);
    third[i] = e / 3;
    rest[i] = e - 2 * (e / 3);
  }
  const auto pow2 = [](typename V::bits k) { return (typename V::reg)((k + bias) << mantissa); };
  return {a.v * pow2(rest) * pow2(third) * pow2(third)};
}
struct Entry {
  Vf::bits v;
};
FUSEDOPS_INLINE Entry entry16(Vf u) { return {(Vf::bits)u.v >> 21 & 15}; }
FUSEDOPS_INLINE Vf lookup16(const float* table, Entry i) {
  Vf r;
  for (int j = 0; j < 4; j++) r.v[j] = table[i.v[j]];
  return r;
}
FUSEDOPS_INLINE float sum(Vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FUSEDOPS_INLINE double sum(Vd a) { return a.v[0] + a.v[1]; }
template <class T>
FUSEDOPS_INLINE Vec<T> sums(const Vec<T> (&r)[Vec<T>::N]) {
  Vec<T> s;
  for (int i = 0; i < Vec<T>::N; i++) s.v[i] = sum(r[i]);
  return s;
}

FUSEDOPS_INLINE void deinterleave(Vf a, Vf b, Vf& even, Vf& odd) {
  even.v = Vf::reg{a.v[0], a.v[2], b.v[0], b.v[2]};
  odd.v = Vf::reg{a.v[1], a.v[3], b.v[1], b.v[3]};
}
FUSEDOPS_INLINE void interleave(Vf even, Vf odd, Vf& a, Vf& b) {
  a.v = Vf::reg{even.v[0], odd.v[0], even.v[1], odd.v[1]};
  b.v = Vf::reg{even.v[2], odd.v[2], even.v[3], odd.v[3]};
}
FUSEDOPS_INLINE void deinterleave(Vd a, Vd b, Vd& even, Vd& odd) {
  even.v = Vd::reg{a.v[0], b.v[0]};
  odd.v = Vd::reg{a.v[1], b.v[1]};
}
FUSEDOPS_INLINE void interleave(Vd even, Vd odd, Vd& a, Vd& b) { deinterleave(even, odd, a, b); }

// No dot product of bytes here: widened to 16 bits, the narrowest that this
// multiplies.
struct Vi {
  typedef int16_t reg __attribute__((vector_size(16)));
  reg v;
};
constexpr int kByteProducts = 8;
constexpr const char* kByteDot = "16-bit multiply-add (no dot product of bytes)";
FUSEDOPS_INLINE Vi dot_bytes(Vi acc, Vi x, Vi y) { return {acc.v + x.v * y.v}; }

typedef uint32_t Words4 __attribute__((vector_size(16)));
typedef uint8_t Bytes4 __attribute__((vector_size(4)));
FUSEDOPS_INLINE Vi load_bytes(const void* p) {
  Vi r;
  __builtin_memcpy(&r.v, p, sizeof(r.v));
  return r;
}
FUSEDOPS_INLINE Vi load_bytes_n(const void* p, int n) {
  uint8_t part[16] = {};
  for (int i = 0; i < n; i++) part[i] = static_cast<const uint8_t*>(p)[i];
  return load_bytes(part);
}
FUSEDOPS_INLINE Vi broadcast_bytes(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return {(Vi::reg)(four + Words4{})};
}
FUSEDOPS_INLINE Vi operator+(Vi a, Vi b) { return {(Vi::reg)((Words4)a.v + (Words4)b.v)}; }
FUSEDOPS_INLINE Vi operator-(Vi a, Vi b) { return {(Vi::reg)((Words4)a.v - (Words4)b.v)}; }
// A product of two bytes fits 16 bits, the sum of two does not.
FUSEDOPS_INLINE Vi dot_quads(Vi acc, Vi x, Vi y) {
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  const Vi::reg x_odd = (Vi::reg)((Shorts)x.v >> 8), y_even = (Vi::reg)((Shorts)y.v << 8) >> 8;
  const Vf::bits even = (Vf::bits)((x.v & 0xff) * y_even), odd = (Vf::bits)(x_odd * (y.v >> 8));
  const auto low = [](Vf::bits p) { return (Vf::bits)((Words4)p << 16) >> 16; };
  const Vf::bits four = low(even) + (even >> 16) + low(odd) + (odd >> 16);
  return acc + Vi{(Vi::reg)four};
}
FUSEDOPS_INLINE Vi load_ints(const int32_t* p) { return load_bytes(p); }
FUSEDOPS_INLINE void store_ints(int32_t* p, Vi a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
FUSEDOPS_INLINE Vf to_float(Vi a) { return {__builtin_convertvector((Vf::bits)a.v, Vf::reg)}; }
FUSEDOPS_INLINE Vf as_float(Vi a) { return {(Vf::reg)a.v}; }
FUSEDOPS_INLINE Vi as_ints(Vf a) { return {(Vi::reg)a.v}; }
FUSEDOPS_INLINE void store_bytes(uint8_t* p, Vf a) {
  const Bytes4 bytes = __builtin_convertvector(__builtin_convertvector(a.v, Vf::bits), Bytes4);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
}

template <class T>
FUSEDOPS_INLINE void transpose(Vec<T> (&r)[Vec<T>::N]) {
  Vec<T> t[Vec<T>::N];
  for (int i = 0; i < Vec<T>::N; i++)
    for (int j = 0; j < Vec<T>::N; j++) t[i].v[j] = r[j].v[i];
  for (int i = 0; i < Vec<T>::N; i++) r[i] = t[i];
}

}  // namespace fusedops::FUSEDOPS_ISA
