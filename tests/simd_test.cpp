// The vector contract of csrc/simd/simd.h, for the ISA this is compiled for. Part of kernels_test;
// prints what is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>

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

// Quarter octaves from 1/8 to 32: twice the table's four octaves.
static void check_lookup() {
  float table[16], u[32], out[32];
  for (int i = 0; i < 16; i++) table[i] = 100.f + static_cast<float>(i);
  for (int i = 0; i < 32; i++)
    u[i] = std::ldexp(1.2f + 0.25f * static_cast<float>(i % 4), i / 4 - 3);
  for (int b = 0; b < 32; b += Vf::N) store(out + b, lookup16(table, entry16(load<Vf>(u + b))));
  for (int i = 0; i < 32; i++) EXPECT(out[i] == 100 + static_cast<float>(i % 16));
  float e[Vf::N];
  store(e, min_abs(set1<Vf>(-3), 4));
  EXPECT(e[0] == 3);
  store(e, min_abs(set1<Vf>(-INFINITY), 4));
  EXPECT(e[0] == 4);
  store(e, min_abs(set1<Vf>(NAN), 4));
  EXPECT(std::isnan(e[0]) || e[0] == 4);
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

// One rounding, also where a sum in double precision would round to the middle between two floats.
static void check_fma() {
  const auto expect = [](float x, float y, float z) {
    float a[Vf::N], b[Vf::N], c[Vf::N], out[Vf::N];
    for (int i = 0; i < Vf::N; i++) a[i] = x, b[i] = i % 2 ? -y : y, c[i] = i % 2 ? -z : z;
    store(out, fma(load<Vf>(a), load<Vf>(b), load<Vf>(c)));
    for (int i = 0; i < Vf::N; i++) {
      const float exact = std::fma(a[i], b[i], c[i]);
      EXPECT(bits_of<uint32_t>(out[i]) == bits_of<uint32_t>(exact) ||
             (std::isnan(out[i]) && std::isnan(exact)));
    }
  };
  const float near = 1 + 0x1p-12f;
  for (const float tiny : {0.f, 0x1p-80f, -0x1p-80f, 0x1p-140f, -0x1p-140f}) {
    expect(near, near, tiny);
    expect(near * 0x1p-70f, near * 0x1p-70f, tiny * 0x1p-9f);
    expect(0x1.000002p-75f, 0x1.8p-75f, tiny);
  }
  const float special[] = {0, -0.f, 1, INFINITY, NAN, 3e38f, 1e-45f, -1e-38f};
  for (const float x : special)
    for (const float y : special)
      for (const float z : special) expect(x, y, z);
  uint32_t seed = 1;
  const auto random = [&] { return bits_of<float>(seed = seed * 1664525u + 1013904223u); };
  for (int i = 0; i < 200000; i++) {
    const float x = random(), y = random();
    expect(x, y, random());
    expect(x, y, -x * y * (1 + static_cast<float>(seed % 7) * 0x1p-23f));
  }
}

// Exact sums of four products of bytes, where saturating ones would not be.
static void check_bytes() {
  constexpr int bytes = 4 * Vf::N;
  uint8_t x[bytes], stored[Vf::N];
  int8_t y[bytes];
  int32_t start[Vf::N], out[Vf::N];
  float wide[Vf::N];
  uint32_t seed = 7;
  const auto random = [&] { return (seed = seed * 1664525u + 1013904223u) >> 24; };
  for (int round = 0; round < 2000; round++) {
    for (int i = 0; i < bytes; i++) {
      x[i] = round < 2 ? 255 : static_cast<uint8_t>(random());
      y[i] = static_cast<int8_t>(round < 2 ? 127 - 255 * round : random());
    }
    for (int i = 0; i < Vf::N; i++)
      start[i] = static_cast<int32_t>(random()) * (round % 3 - 1) * 65536;
    const Vi acc = load_ints(start), all = dot_quads(acc, load_bytes(x), load_bytes(y));
    const int n = round % (bytes + 1);
    const Vi some = dot_quads(acc, load_bytes_n(x, n), load_bytes(y));
    const Vi four = dot_quads(acc, broadcast_bytes(x), load_bytes(y));
    for (const auto& [v, kind] : {std::pair{all, 0}, std::pair{some, 1}, std::pair{four, 2}}) {
      store_ints(out, v);
      for (int i = 0; i < Vf::N; i++) {
        int32_t sum = start[i];
        for (int j = 4 * i; j < 4 * i + 4; j++)
          sum += (kind == 2 ? x[j % 4] : kind == 1 && j >= n ? 0 : x[j]) * y[j];
        EXPECT(out[i] == sum);
      }
    }
    store_ints(out, all - acc + acc);
    store(wide, to_float(all));
    for (int i = 0; i < Vf::N; i++) EXPECT(wide[i] == static_cast<float>(out[i]));
    store_ints(out, as_ints(as_float(acc)));
    for (int i = 0; i < Vf::N; i++) EXPECT(out[i] == start[i]);
    store(wide, load<Vf>(y));
    for (int i = 0; i < Vf::N; i++) EXPECT(wide[i] == y[i]);
    store(wide, load_n<Vf>(y, n % (Vf::N + 1)));
    for (int i = 0; i < Vf::N; i++) EXPECT(wide[i] == (i < n % (Vf::N + 1) ? y[i] : 0));
    for (int i = 0; i < Vf::N; i++) wide[i] = x[i];
    store_bytes(stored, load<Vf>(wide));
    for (int i = 0; i < Vf::N; i++) EXPECT(stored[i] == x[i]);
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
      x = seed % 16 == 0 ? 0
                         : static_cast<lane>(bits_of<float>(round % 2 ? seed : seed & 0x80ffffffu));
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
  for (int i = 0; i < 3; i++) {
    const auto pairs = factors<Vf, 3>(reinterpret_cast<const float*>(a));
    store(out, dot_pairs(load<Vf>(acc), factor<Vf>(pairs, i), load_pairs(b)));
    const int first = (2 * i) % 7 - 3, second = (2 * i + 1) % 7 - 3;
    for (int j = 0; j < Vf::N; j++) {
      const int exact = j + first * (2 * j % 5 + 1) + second * ((2 * j + 1) % 5 + 1);
      EXPECT(out[j] == static_cast<float>(exact));
    }
  }
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
    EXPECT(sum(dot_f16_pairs(load<Vf>(acc), load_pairs_n(a, n), load_pairs(b))) ==
           static_cast<float>(exact));
  }
  for (int i = 0; i < Vf::N; i++) acc[i] = static_cast<float>(i);
  const auto pairs = factors<Vf, 3>(reinterpret_cast<const float*>(a));
  for (int i = 0; i < 3; i++) {
    store(out, dot_f16_pairs(load<Vf>(acc), factor<Vf>(pairs, i), pack_pairs(load_pairs(b))));
    const int first = 2 * i % 6, second = (2 * i + 1) % 6;
    for (int j = 0; j < Vf::N; j++)
      EXPECT(out[j] == static_cast<float>(j + first * (2 * j % 5) + second * ((2 * j + 1) % 5)));
  }
  float low[Vf::N], high[Vf::N];
  for (int i = 0; i < Vf::N; i++)
    low[i] = static_cast<float>(2 * i % 5), high[i] = static_cast<float>((2 * i + 1) % 5);
  store(out, pair_up_f16(load<Vf>(low), load<Vf>(high)));
  EXPECT(std::memcmp(out, b, sizeof(out)) == 0);
}
#endif

namespace fusedops::FUSEDOPS_ISA {
int check_vectors();  // the number of what is wrong
int check_vectors() {
  failures = 0;
  check_fma();
  check_bytes();
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
