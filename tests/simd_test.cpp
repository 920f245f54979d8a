// The vector contract of csrc/simd/simd.h, for the ISA this is compiled for. Part of kernels_test;
// prints what is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "simd/simd.h"

using namespace fusedops;
using namespace fusedops::FUSEDOPS_ISA;

static int failures = 0;

#define EXPECT(condition)                                                                     \
  do {                                                                                        \
    if (!(condition) && ++failures <= 20) std::printf("line %d: %s\n", __LINE__, #condition); \
  } while (0)

template <class To, class From>
static To bits_of(From x) {
  To u;
  static_assert(sizeof(u) == sizeof(x));
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

template <class V, class T>
static void check_moves() {
  constexpr int N = V::N;
  T a[2 * N], e[2 * N], o[N];
  for (int i = 0; i < 2 * N; i++) a[i] = static_cast<T>(i);
  const V x = load<V>(a), y = load<V>(a + N);

  V even, odd, first, second;
  deinterleave(x, y, even, odd);
  store(e, even), store(o, odd);
  for (int i = 0; i < N; i++) EXPECT(e[i] == 2 * i && o[i] == 2 * i + 1);
  interleave(even, odd, first, second);
  store(e, first), store(e + N, second);
  for (int i = 0; i < 2 * N; i++) EXPECT(e[i] == i);

  T m[N * N];
  V r[N];
  for (int i = 0; i < N * N; i++) m[i] = static_cast<T>(i);
  for (int i = 0; i < N; i++) r[i] = load<V>(m + i * N);
  transpose(r);
  for (int i = 0; i < N; i++) {
    store(o, r[i]);
    for (int j = 0; j < N; j++) EXPECT(o[j] == m[j * N + i]);
  }

  for (int n = 0; n <= N; n++) {
    store(o, load_n<V>(a, n));
    for (int i = 0; i < N; i++) EXPECT(o[i] == (i < n ? a[i] : 0));
    for (int i = 0; i < N; i++) o[i] = -1;
    store_n(o, x, n);
    for (int i = 0; i < N; i++) EXPECT(o[i] == (i < n ? a[i] : -1));
  }
}

template <class V, class T>
static void check_arithmetic() {
  constexpr int N = V::N;
  T e[N];
  EXPECT(sum(load<V>([] {
           static T a[N];
           for (int i = 0; i < N; i++) a[i] = static_cast<T>(i);
           return a;
         }())) == static_cast<T>(N * (N - 1) / 2));
  // The product of these two differs from the third by less than a rounding: only a fused sum sees
  // it.
  const T u = 1 + (sizeof(T) == 4 ? T(0x1p-12) : T(0x1p-27));
  store(e, fma(set1<V>(u), set1<V>(u), set1<V>(-(u * u))));
  EXPECT(e[N - 1] == std::fma(u, u, -(u * u)));
  EXPECT(e[N - 1] != 0);
  store(e, abs(-set1<V>(3)));
  EXPECT(e[0] == 3);
  store(e, max(set1<V>(NAN), set1<V>(2)));
  EXPECT(e[0] == 2);
  store(e, min(set1<V>(2), set1<V>(NAN)));
  EXPECT(std::isnan(e[0]));
  for (T v = -10.5; v <= 10; v += T(0.5)) {
    store(e, round(set1<V>(v)));
    EXPECT(e[0] == std::nearbyint(v));
  }
  const int low = sizeof(T) == 4 ? -300 : -2200, high = sizeof(T) == 4 ? 127 : 1023;
  const T mantissa = static_cast<T>(1.2345678901234);
  for (int n = low; n <= high; n++) {
    store(e, scale2(set1<V>(mantissa), set1<V>(n)));
    EXPECT(e[0] == std::ldexp(mantissa, n));
  }
}

static void check_lookup() {
  float table[16], index[16], out[16];
  for (int i = 0; i < 16; i++) table[i] = 100.f + static_cast<float>(i);
  for (int i = 0; i < 16; i++) index[i] = static_cast<float>(i * 7 % 16);
  for (int b = 0; b < 16; b += Vf::N) store(out + b, lookup16(table, load<Vf>(index + b)));
  for (int i = 0; i < 16; i++) EXPECT(out[i] == 100 + index[i]);
}

// Every f16 and bf16 value widens exactly and comes back; NaN stays NaN.
static void check_widening() {
  for (uint32_t u = 0; u < 65536; u++) {
    const f16 h = {static_cast<uint16_t>(u)};
    const bf16 b = {static_cast<uint16_t>(u)};
    f16 hs[Vf::N];
    bf16 bs[Vf::N];
    for (int i = 0; i < Vf::N; i++) hs[i] = h, bs[i] = b;
    float wide[Vf::N];

    store(wide, load<Vf>(hs));
    const int exponent = static_cast<int>(u >> 10 & 31), fraction = static_cast<int>(u & 1023);
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                            : std::ldexp(fraction, -24);
    if (std::isnan(magnitude)) {
      EXPECT(std::isnan(wide[0]));
    } else {
      EXPECT(std::fabs(wide[0]) == magnitude && std::signbit(wide[0]) == (u >> 15 != 0));
    }
    store(hs, load<Vf>(hs));
    EXPECT(std::isnan(magnitude) ? (hs[0].bits & 0x7fff) > 0x7c00 : hs[0].bits == u);

    store(wide, load<Vf>(bs));
    EXPECT(bits_of<uint32_t>(wide[0]) == u << 16);
    store(bs, load<Vf>(bs));
    EXPECT(std::isnan(wide[0]) ? (bs[0].bits & 0x7fff) > 0x7f80 : bs[0].bits == u);
  }
}

// The nearest 16-bit value, ties to even, found from its definition.
static uint16_t nearest(float x, float value(uint16_t)) {
  uint16_t low = 0, high = 0x7fff;  // magnitudes are ordered like their bits
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (value(middle) <= std::fabs(x) ? low : high) = middle;
  }
  const double below = std::fabs(x) - static_cast<double>(value(low));
  const double next = std::isinf(value(high)) ? 2.0 * value(low) - value(low - 1) : value(high);
  const double above = next - std::fabs(x);
  const uint16_t chosen = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(chosen | (std::signbit(x) ? 0x8000 : 0));
}
static float value_of_bf16(uint16_t u) { return bits_of<float>(static_cast<uint32_t>(u) << 16); }
static float value_of_f16(uint16_t u) {
  if (u >= 0x7c00) return u == 0x7c00 ? INFINITY : NAN;
  const int exponent = u >> 10, fraction = u & 1023;
  return static_cast<float>(exponent ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24));
}

static void check_rounding() {
  uint32_t seed = 12345;
  for (int i = 0; i < 200000; i++) {
    seed = seed * 1664525u + 1013904223u;
    float x = bits_of<float>(seed);
    if (i % 2)
      x = std::ldexp(1.f + static_cast<float>(seed >> 9) * 0x1p-23f,
                     static_cast<int>(seed % 44) - 27);
    if (std::isnan(x)) continue;
    float in[Vf::N];
    for (float& lane : in) lane = x;
    f16 h[Vf::N];
    bf16 b[Vf::N];
    store(h, load<Vf>(in)), store(b, load<Vf>(in));
    if (std::fabs(x) <= 65504) EXPECT(h[Vf::N - 1].bits == nearest(x, value_of_f16));
    if (std::fabs(x) >= 65520) EXPECT((h[0].bits & 0x7fff) == 0x7c00);
    if (std::fabs(x) <= 3e38f) EXPECT(b[Vf::N - 1].bits == nearest(x, value_of_bf16));
  }
}

// load2, store2 and stream2 are two of the single ones, bit for bit.
template <class V, class T>
static void check_two() {
  constexpr int N = V::N;
  using lane = decltype(sum(V{}));
  alignas(64) T two[2 * N], twice[2 * N];
  alignas(64) lane in[2 * N], a[N], b[N];
  uint32_t seed = 1;
  for (int round = 0; round < 20000; round++) {
    for (lane& x : in) {
      seed = seed * 1664525u + 1013904223u;
      // Every bit pattern, among them subnormals; and a zero now and then.
      x = seed % 16 == 0 ? 0 : static_cast<lane>(bits_of<float>(round % 2 ? seed : seed & 0x80ffffffu));
      if (std::isnan(x)) x = 1;
    }
    store(twice, load<V>(in)), store(twice + N, load<V>(in + N));
    V x, y;
    load2(in, x, y);
    store2(two, x, y);
    EXPECT(std::memcmp(two, twice, sizeof(two)) == 0);
    std::memset(two, 0xab, sizeof(two));
    stream2(two, x, y);
    stream_fence();
    EXPECT(std::memcmp(two, twice, sizeof(two)) == 0);
    load2(two, x, y);
    store(a, x), store(b, y);
    lane one[N], other[N];
    store(one, load<V>(twice)), store(other, load<V>(twice + N));
    EXPECT(std::memcmp(a, one, sizeof(a)) == 0 && std::memcmp(b, other, sizeof(b)) == 0);
  }
}

#ifdef FUSEDOPS_BF16_DOT
// Small integers: no sum of them is rounded, in whatever order.
static void check_bf16_pairs() {
  bf16 a[2 * Vf::N], b[2 * Vf::N];
  float acc[Vf::N], out[Vf::N];
  const auto bits = [](int i) {
    return bf16{static_cast<uint16_t>(bits_of<uint32_t>(static_cast<float>(i)) >> 16)};
  };
  for (int n = 0; n <= 2 * Vf::N; n++) {
    for (int i = 0; i < 2 * Vf::N; i++) a[i] = bits(i % 7 - 3), b[i] = bits(i % 5 + 1);
    for (int i = 0; i < Vf::N; i++) acc[i] = static_cast<float>(i);
    const auto product = [n](int i) { return i < n ? (i % 7 - 3) * (i % 5 + 1) : 0; };
    store(out, dot_pairs(load<Vf>(acc), load_pairs_n(a, n), load_pairs(b)));
    for (int i = 0; i < Vf::N; i++) {
      const int exact = i + product(2 * i) + product(2 * i + 1);
      EXPECT(out[i] == static_cast<float>(exact));
    }
  }
  store(out, dot_pairs(load<Vf>(acc), broadcast_pair(a), load_pairs(b)));
  EXPECT(out[1] == 1.f - 3 * 3 - 2 * 4);
  store(out, dot_pairs(load<Vf>(acc), broadcast_half(a), load_pairs(b)));
  EXPECT(out[1] == 1.f - 3 * 3);
}
#endif

#ifdef FUSEDOPS_F16_DOT
static void check_f16_pairs() {
  f16 a[2 * Vf::N], b[2 * Vf::N];
  float acc[Vf::N], out[Vf::N];
  constexpr uint16_t integers[] = {0, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500};
  for (int i = 0; i < 2 * Vf::N; i++) a[i].bits = integers[i % 6], b[i].bits = integers[i % 5];
  for (float& lane : acc) lane = 0;
  for (int n = 0; n <= 2 * Vf::N; n++) {
    int exact = 0;
    for (int i = 0; i < n; i++) exact += i % 6 * (i % 5);
    EXPECT(sum(dot_pairs(load<Vf>(acc), load_pairs_n(a, n), load_pairs(b), a)) ==
           static_cast<float>(exact));
  }
  const Vf packed = pack_pairs(load_pairs(b), b);
  for (int i = 0; i < Vf::N; i++) acc[i] = static_cast<float>(i);
  store(out, dot_broadcast(load<Vf>(acc), broadcast_pair(a + 2), packed, a));
  for (int i = 0; i < Vf::N; i++)
    EXPECT(out[i] == static_cast<float>(i + 2 * (2 * i % 5) + 3 * ((2 * i + 1) % 5)));
  store(out, dot_broadcast(load<Vf>(acc), broadcast_half(a + 2), packed, a));
  for (int i = 0; i < Vf::N; i++) EXPECT(out[i] == static_cast<float>(i + 2 * (2 * i % 5)));
}
#endif

namespace fusedops::FUSEDOPS_ISA {
int check_vectors();  // the number of what is wrong
int check_vectors() {
  failures = 0;
  check_moves<Vf, float>();
  check_moves<Vd, double>();
  check_arithmetic<Vf, float>();
  check_arithmetic<Vd, double>();
  check_lookup();
  check_widening();
  check_rounding();
  check_two<Vf, float>();
  check_two<Vf, f16>();
  check_two<Vf, bf16>();
  check_two<Vd, double>();
#ifdef FUSEDOPS_BF16_DOT
  check_bf16_pairs();
#endif
#ifdef FUSEDOPS_F16_DOT
  check_f16_pairs();
#endif
  return failures;
}
}  // namespace fusedops::FUSEDOPS_ISA
