// The kernels of every instruction set of one architecture without torch: generated cases against
// float64, each buffer between two pages that nobody may touch. Built and run, natively and under
// emulators of many CPUs, by test_kernels.py.
//
//   kernels_test [ROW...]   these rows or all that are supported; one line for each
//   kernels_test unguarded [ROW...]  for an emulator whose masked loads touch what they mask
//   kernels_test force ROW  vectors of a row, supported or not: an unknown instruction kills it
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "run.h"

using namespace fusedops;

#define ISA(name, arch, header, features) \
  namespace fusedops::name {              \
  int check_vectors();                    \
  }
#include "isa.inc"
#undef ISA

// What of libtorch the library calls while it is loaded, and its threads: one here.
extern "C" {
int aoti_torch_library_init_fragment(const char*, const char*, unsigned, void** out) {
  return *out = nullptr, 0;
}
int aoti_torch_library_init_impl(const char*, const char*, const char*, unsigned, void** out) {
  return *out = nullptr, 0;
}
int aoti_torch_library_def(void*, const char*) { return 0; }
int torch_library_impl(void*, const char*, void*, uint64_t) { return 0; }
int aoti_torch_delete_library_object(void*) { return 0; }
int torch_get_num_threads(uint32_t* n) { return *n = 1, 0; }
int torch_get_thread_idx(uint32_t* i) { return *i = 0, 0; }
int torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*call)(int64_t, int64_t, void*),
                       void* context) {
  return call(begin, end, context), 0;
}
}

// Of ops/linear.h, which knows torch's tensors.
namespace fusedops {
int64_t packed_bytes(const LinearArgs& a, DType t);
void run_pack(const LinearArgs& a, DType t, void* to);
}  // namespace fusedops

namespace {

int checks = 0, failures = 0;
std::string at;  // the case that is running

void expect(bool good, const char* what, int64_t element, double actual, double exact) {
  checks++;
  if (!good && ++failures <= 20)
    std::printf("  %s: %s, element %lld: %.9g, exact %.9g\n", at.c_str(), what,
                static_cast<long long>(element), actual, exact);
}

// --- numbers -----------------------------------------------------------------------------------

uint64_t seed;
uint64_t next() {  // splitmix64
  uint64_t z = seed += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}
double uniform() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1; }
double normal() {
  double sum = 0;
  for (int i = 0; i < 6; i++) sum += uniform();
  return sum * 0.7071;
}

struct Type {
  DType name;
  int bytes, mantissa,
      lowest;  // of the unit in the last place: 2^(exponent - mantissa) >= 2^lowest
};
constexpr Type kF32 = {DType::f32, 4, 23, -149}, kF16 = {DType::f16, 2, 10, -24},
               kBf16 = {DType::bf16, 2, 7, -133}, kF64 = {DType::f64, 8, 52, -1074};
constexpr const Type* kTypes[] = {&kF32, &kF16, &kBf16, &kF64};
const char* name_of(const Type& t) {
  return &t == &kF32 ? "f32" : &t == &kF16 ? "f16" : &t == &kBf16 ? "bf16" : "f64";
}
const Type& computed_in(const Type& t) { return t.name == DType::f64 ? kF64 : kF32; }

double ulp(double value, const Type& t) {
  if (value == 0) return std::ldexp(1, t.lowest);
  return std::ldexp(1, std::max(std::ilogb(value) - t.mantissa, t.lowest));
}
// To the nearest, ties to even: value / ulp has few enough bits for rint.
double rounded(double value, const Type& t) {
  if (t.name == DType::f64) return value;
  if (t.name == DType::f32) return static_cast<double>(static_cast<float>(value));
  const double unit = ulp(value, t);
  return std::rint(value / unit) * unit;
}

double get(const void* p, int64_t i, const Type& t) {
  if (t.name == DType::f64) return static_cast<const double*>(p)[i];
  if (t.name == DType::f32) return static_cast<double>(static_cast<const float*>(p)[i]);
  const uint32_t u = static_cast<const uint16_t*>(p)[i];
  if (t.name == DType::bf16) {
    const uint32_t wide = u << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return static_cast<double>(value);
  }
  const int exponent = static_cast<int>(u >> 10 & 31), fraction = static_cast<int>(u & 1023);
  const double size =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return u >> 15 ? -size : size;
}
// A value that the type has.
void set(void* p, int64_t i, double value, const Type& t) {
  value = rounded(value, t);
  if (t.name == DType::f64) {
    static_cast<double*>(p)[i] = value;
  } else if (t.name == DType::f32) {
    static_cast<float*>(p)[i] = static_cast<float>(value);
  } else if (t.name == DType::bf16) {
    const float single = static_cast<float>(value);
    uint32_t u;
    std::memcpy(&u, &single, 4);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(u >> 16);
  } else {
    const double size = std::fabs(value);
    const int exponent = size < 0x1p-14 ? -15 : std::ilogb(size);
    const double units = exponent < -14 ? size * 0x1p24 : std::ldexp(size, 10 - exponent) - 1024;
    const int bits = (exponent + 15) << 10 | static_cast<int>(units);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
  }
}

// --- buffers -----------------------------------------------------------------------------------

// Memory that ends at a page nobody may touch, or starts behind one.
class Room {
 public:
  explicit Room(bool guarded) {
    page_ = sysconf(_SC_PAGESIZE);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    whole_ =
        static_cast<char*>(mmap(nullptr, kBytes + 2 * page_, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (!guarded) return;
    mprotect(whole_, page_, PROT_NONE);
    mprotect(whole_ + page_ + kBytes, page_, PROT_NONE);
  }
  void* place(int64_t bytes, bool at_end) const {
    if (bytes > kBytes) std::abort();
    return whole_ + page_ + (at_end ? kBytes - bytes : 0);
  }

 private:
  static constexpr int64_t kBytes = 4 << 20;
  int64_t page_;
  char* whole_;
};
std::vector<Room> rooms;

struct Array {
  void* data;
  const Type* type;
  int64_t size;

  double operator[](int64_t i) const { return get(data, i, *type); }
};
template <class Values>
Array filled(int room, int64_t size, const Type& t, bool at_end, const Values& value) {
  const Array a = {rooms[room].place(size * t.bytes, at_end), &t, size};
  for (int64_t i = 0; i < size; i++) set(a.data, i, value(), t);
  return a;
}

std::vector<double> values_of(const Array& a) {
  std::vector<double> values(a.size);
  for (int64_t i = 0; i < a.size; i++) values[i] = a[i];
  return values;
}

// Of the bytes of every result, so that rows and machines can be compared.
struct Hash {
  uint64_t value = 0xcbf29ce484222325;
  void add(const Array& a) {
    const unsigned char* p = static_cast<const unsigned char*>(a.data);
    for (int64_t i = 0; i < a.size * a.type->bytes; i++) value = (value ^ p[i]) * 0x100000001b3;
  }
};
Hash rope_bits, gelu_bits, quantized_bits;

// --- rope --------------------------------------------------------------------------------------

struct Layout {
  int64_t tail, gap, step;  // elements behind those that turn, between rows, between elements
  bool in_place;
  int ids;              // 0: none, else the bytes of one
  int64_t stream_from;  // bytes of a half from which whole lines are written around the caches
};

// What run_rope does with a result larger than the last cache.
void stream_rope(RopeArgs a, DType x, DType table) {
  const KernelTable& k = kernels();
  const auto kernel = x == DType::f32   ? k.rope_f32_f32
                      : x == DType::f64 ? (table == DType::f32 ? k.rope_f64_f32 : k.rope_f64_f64)
                      : x == DType::bf16
                          ? (table == DType::f32 ? k.rope_bf16_f32 : k.rope_bf16_bf16)
                          : (table == DType::f32 ? k.rope_f16_f32 : k.rope_f16_f16);
  a.block = a.seq, a.prefetch = 8192, a.stream = true;
  kernel(a, 0, a.batch * ((a.heads + kSide - 1) / kSide));
}

void rope_case(const Type& t, const Type& table, int64_t half, bool interleaved, bool conjugate,
               const Layout& l, bool at_end) {
  constexpr int64_t batch = 2, heads = 2, seq = 3, rows = 5;
  const int64_t dim = 2 * half + l.tail, row = dim * l.step + l.gap;
  const int64_t span = batch * heads * seq * row - l.gap - (l.step - 1);
  const Array x = filled(0, span, t, at_end, normal);
  const Array y = l.in_place ? x : filled(1, span, t, at_end, [] { return 77.0; });
  const Array cos = filled(2, rows * half, table, at_end, uniform);
  const Array sin = filled(3, rows * half, table, at_end, uniform);
  const int64_t places[batch * seq] = {4, 0, 2, 1, 1, 3};
  void* ids = rooms[4].place(batch * seq * l.ids, at_end);
  for (int i = 0; i < batch * seq; i++) {
    const int32_t narrow = static_cast<int32_t>(places[i]);
    if (l.ids)
      std::memcpy(static_cast<char*>(ids) + i * l.ids,
                  l.ids == 8 ? &places[i] : static_cast<const void*>(&narrow), l.ids);
  }

  RopeArgs a = {};
  a.x = x.data, a.y = y.data, a.cos = cos.data, a.sin = sin.data;
  a.batch = batch, a.heads = heads, a.seq = seq, a.head_dim = dim, a.half = half;
  a.x_dim = a.y_dim = l.step;
  a.x_seq = a.y_seq = row, a.x_head = a.y_head = seq * row,
  a.x_batch = a.y_batch = heads * seq * row;
  a.cos_row = a.sin_row = half;
  a.interleaved = interleaved, a.conjugate = conjugate;
  if (l.ids) a.position_ids = ids, a.wide_ids = l.ids == 8, a.id_batch = seq, a.id_seq = 1;

  static double before[1 << 16];
  for (int64_t i = 0; i < span; i++) before[i] = x[i];
  if (l.stream_from && half * t.bytes % l.stream_from == 0)
    stream_rope(a, t.name, table.name);
  else
    run_rope(&a, 1, t.name, table.name);

  const Type& c = computed_in(t);
  for (int64_t r = 0; r < batch * heads * seq; r++) {
    const int64_t s = r % seq, position = l.ids ? places[r / (heads * seq) * seq + s] : s;
    for (int64_t j = 0; j < half; j++) {
      const int64_t first = r * row + (interleaved ? 2 * j : j) * l.step;
      const int64_t second = first + (interleaved ? 1 : half) * l.step;
      const double x1 = before[first], x2 = before[second];
      const double k = cos[position * half + j],
                   q = sin[position * half + j] * (conjugate ? -1 : 1);
      const auto product = [&c](double u, double v) { return rounded(u * v, c); };
      const double y1 = rounded(rounded(product(x1, k) - product(x2, q), c), t);
      const double y2 = rounded(rounded(product(x2, k) + product(x1, q), c), t);
      expect(y[first] == y1, "first of a pair", first, y[first], y1);
      expect(y[second] == y2, "second of a pair", second, y[second], y2);
    }
    for (int64_t d = 2 * half; d < dim; d++) {
      const int64_t i = r * row + d * l.step;
      expect(y[i] == before[i], "behind the pairs", i, y[i], before[i]);
    }
  }
  for (int64_t i = 0; i < span; i++) {
    if (i % row < dim * l.step && i % row % l.step == 0) continue;
    const double untouched = l.in_place ? before[i] : 77;
    expect(y[i] == untouched, "between rows", i, y[i], untouched);
  }
  if (t.name == DType::f32) rope_bits.add(y);
}

void rope_cases() {
  constexpr const Type* pairs[][2] = {{&kF32, &kF32},  {&kF16, &kF32},   {&kF16, &kF16},
                                      {&kBf16, &kF32}, {&kBf16, &kBf16}, {&kF64, &kF32},
                                      {&kF64, &kF64}};
  constexpr int64_t halves[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 32, 33, 63, 64};
  constexpr Layout layouts[] = {{0, 0, 1, false, 0, 64},
                                {3, 5, 1, false, 8, 0},
                                {2, 0, 2, true, 4, 0},
                                {0, 1, 1, true, 0, 0}};
  for (const auto& pair : pairs)
    for (const int64_t half : halves)
      for (const Layout& layout : layouts)
        for (int variant = 0; variant < 8; variant++) {
          at = std::string("rope ") + name_of(*pair[0]) + " " + name_of(*pair[1]) + " half " +
               std::to_string(half) + " layout " + std::to_string(&layout - layouts) + " variant " +
               std::to_string(variant);
          rope_case(*pair[0], *pair[1], half, variant & 1, variant & 2, layout, variant & 4);
        }
}

// The eager steps: x turned by a quarter, times a table, and two of these added up.
void step_case(const Type& t, int64_t half, bool interleaved, bool negate, bool at_end) {
  constexpr int64_t batch = 2, heads = 2, seq = 3, rows = batch * heads * seq;
  const int64_t dim = 2 * half + 3;
  const Array x = filled(0, rows * dim, t, at_end, normal);
  const Array table = filled(1, batch * seq * half, t, at_end, uniform);
  const Array y = filled(2, rows * dim, t, at_end, [] { return 77.0; });
  const KernelTable& k = kernels();
  const bool wide = t.name == DType::f64;
  RopeStepArgs a = {};
  a.a = x.data, a.b = table.data, a.out = y.data;
  a.heads = heads, a.seq = seq, a.head_dim = dim, a.half = half, a.table_batch = seq * half;
  a.interleaved = interleaved, a.negate = negate;
  const auto second_of = [&](int64_t d) { return interleaved ? d % 2 != 0 : d >= half; };
  const auto pair_of = [&](int64_t d) { return interleaved ? d / 2 : d % half; };
  const auto check = [&](const char* what, const auto& exact) {
    for (int64_t i = 0; i < y.size; i++) expect(y[i] == exact(i), what, i, y[i], exact(i));
  };

  (wide ? k.rope_step_rotate_f64 : k.rope_step_rotate_f32)(a, 0, rows);
  check("turned by a quarter", [&](int64_t i) {
    const int64_t d = i % dim, apart = interleaved ? 1 : half;
    return d >= 2 * half ? 0.0 : second_of(d) ? x[i - apart] : -x[i + apart];
  });
  (wide ? k.rope_step_scale_f64 : k.rope_step_scale_f32)(a, 0, rows);
  check("times a table", [&](int64_t i) {
    const int64_t row = i / dim, d = i % dim, b = row / seq / heads;
    if (d >= 2 * half) return x[i];
    const double factor = table[(b * seq + row % seq) * half + pair_of(d)];
    return rounded(x[i] * (negate ? -factor : factor), t);
  });
  const Array z = filled(1, rows * dim, t, at_end, normal);
  a.b = z.data;
  (wide ? k.rope_step_add_f64 : k.rope_step_add_f32)(a, 0, rows);
  check("added up", [&](int64_t i) { return rounded(x[i] + z[i], t); });
}
void step_cases() {
  for (const Type* t : {&kF32, &kF64})
    for (const int64_t half : {1, 2, 3, 5, 8, 16, 17, 33})
      for (int variant = 0; variant < 8; variant++) {
        at = std::string("rope steps ") + name_of(*t) + " half " + std::to_string(half);
        step_case(*t, half, variant & 1, variant & 2, variant & 4);
      }
}

// --- activations -------------------------------------------------------------------------------

// R is double, or long double for what is compared with doubles.
constexpr long double kSqrtHalf = 0.707106781186547524400844362104849L;
constexpr long double kPi = 3.14159265358979323846264338327950288L;

template <class R>
R argument(R x, Activation act) {
  if (act == Activation::silu) return x;
  if (act == Activation::gelu_quick) return R(1.702L) * x;
  return R(2) * std::sqrt(R(2 / kPi)) * (x + R(0.044715L) * x * x * x);
}
template <class R>
R activated(R x, Activation act) {
  switch (act) {
    case Activation::identity:
      return x;
    case Activation::relu:
      return std::fmax(x, R(0));
    case Activation::relu2:
      return std::fmax(x, R(0)) * std::fmax(x, R(0));
    case Activation::gelu:
      return x / 2 * std::erfc(-x * R(kSqrtHalf));
    default:
      return x / (1 + std::exp(-argument(x, act)));
  }
}
// The two terms of the derivative, and what a relative error of the inner formula does.
template <class R>
struct Slope {
  R value, steep, conditioning;
};
template <class R>
Slope<R> slope(R x, Activation act) {
  if (act == Activation::identity) return {1, 0, 0};
  if (act == Activation::relu) return {R(x > 0), 0, 0};
  if (act == Activation::relu2) return {2 * std::fmax(x, R(0)), 0, 0};
  if (act == Activation::gelu)
    return {std::erfc(-x * R(kSqrtHalf)) / 2, x * std::exp(-x * x / 2) / std::sqrt(R(2 * kPi)),
            x * x};
  const R v = argument(x, act), s = 1 / (1 + std::exp(-v));
  const R inner = act == Activation::silu ? R(1)
                  : act == Activation::gelu_quick
                      ? R(1.702L)
                      : R(2) * std::sqrt(R(2 / kPi)) * (1 + R(3 * 0.044715L) * x * x);
  return {s, x * s * (1 - s) * inner, R(2.5L) * std::fabs(v) * (1 - s)};
}

// fusedops/testing/bounds.py derives it: 4 ulp, what the formula's inner roundings do, and that a
// 16-bit result may be computed to 2^-15.
double activation_error(double x, double y, Activation act, const Type& t) {
  const Type& c = computed_in(t);
  const bool plain = act == Activation::identity || act == Activation::relu ||
                     act == Activation::relu2 || (act == Activation::gelu && c.name == DType::f32);
  const double conditioning = plain || y == 0 ? 0 : slope(x, act).conditioning;
  double error = 4 * ulp(y, c) + conditioning * std::ldexp(1, -c.mantissa) * std::fabs(y);
  if (t.bytes == 2) error += 0x1p-15 * std::fabs(y);
  if (c.name == DType::f64) error = 2 * (error + 0x1p-1074 * std::fmin(std::fabs(x), 800));
  return error + (t.bytes == 2 ? 0.5 * ulp(std::fabs(y) + error, t) : 0);
}
// Of dy * act'(x).
template <class R>
double slope_error(double dy, const Slope<R>& slope, double exact, const Type& t) {
  const Slope<double> s = {static_cast<double>(slope.value), static_cast<double>(slope.steep),
                           static_cast<double>(slope.conditioning)};
  const Type& c = computed_in(t);
  const double scale = s.value + std::fabs(s.steep), inner = 8 + 4 * s.conditioning;
  const double error = std::fabs(dy) * scale * std::ldexp(1, -c.mantissa) * inner + 2 * ulp(0, c);
  return error + (t.bytes == 2 ? 0.5 * ulp(std::fabs(exact) + error, t) : 0);
}

constexpr Activation kGelus[] = {Activation::gelu, Activation::gelu_tanh, Activation::gelu_quick};
constexpr Activation kActs[] = {Activation::identity,   Activation::gelu, Activation::gelu_tanh,
                                Activation::gelu_quick, Activation::silu, Activation::relu,
                                Activation::relu2};

template <class R>
void gelu_case(const Type& t, Activation act, int64_t n, bool at_end) {
  const double size = n % 3 == 0 ? 1 : n % 3 == 1 ? 4 : 12;
  const Array x = filled(0, n, t, at_end, [size] { return size * normal(); });
  const Array dy = filled(1, n, t, at_end, normal);
  const Array y = filled(2, n, t, at_end, [] { return 77.0; });
  GeluArgs a = {};
  a.x = x.data, a.y = y.data, a.act = act;
  run_gelu(a, n, t.name);
  for (int64_t i = 0; i < n; i++) {
    const double exact = static_cast<double>(activated<R>(x[i], act));
    expect(std::fabs(y[i] - exact) <= activation_error(x[i], exact, act, t), "value", i, y[i],
           exact);
  }
  if (t.name == DType::f32) gelu_bits.add(y);

  a.dy = dy.data;
  run_gelu_backward(a, n, t.name);
  for (int64_t i = 0; i < n; i++) {
    const Slope<R> s = slope<R>(x[i], act);
    const double exact = static_cast<double>(R(dy[i]) * (s.value + s.steep));
    expect(std::fabs(y[i] - exact) <= slope_error(dy[i], s, exact, t), "derivative", i, y[i],
           exact);
  }
}

template <class R>
void gelu_cases_of(const Type& t, int64_t many) {
  for (const Activation act : kGelus) {
    at = std::string("gelu ") + name_of(t) + " " + std::to_string(static_cast<int>(act));
    for (int64_t n = 1; n <= 67; n++) gelu_case<R>(t, act, n, n & 1);
    gelu_case<R>(t, act, many, true);
  }
}
void gelu_cases() {
  for (const Type* t : {&kF32, &kF16, &kBf16}) gelu_cases_of<double>(*t, 20011);
  gelu_cases_of<long double>(kF64, 1009);
}

// dz, its transpose and its sums over the rows, with gaps between rows.
template <class R>
void preact_case(const Type& t, Activation act, int64_t rows, int64_t n, int64_t gap, bool at_end) {
  const int64_t ld = n + gap, ldt = rows + 16, span = rows * ld - gap;
  const auto marked = [] { return 77.0; };
  const Array z = filled(0, span, t, at_end, [] { return 2 * normal(); });
  const Array dy = filled(1, span, t, at_end, normal);
  const Array dz = filled(2, span, t, at_end, marked);
  const Array transposed = filled(3, n * ldt, t, at_end, marked);
  const Type& c = computed_in(t);
  const int64_t blocks = (rows + kPreactRows - 1) / kPreactRows;
  const Array sums = filled(4, blocks * n, c, at_end, marked);
  const Array total = filled(5, n, t, at_end, marked);
  const KernelTable& k = kernels();
  using Grad = void (*)(const PreactArgs&, int64_t, int64_t, int64_t, int64_t);
  using Total = void (*)(const PreactArgs&, int64_t, int64_t);
  const Grad grads[] = {k.preact_grad_f32, k.preact_grad_f16, k.preact_grad_bf16,
                        k.preact_grad_f64};
  const Total totals[] = {k.preact_total_f32, k.preact_total_f16, k.preact_total_bf16,
                          k.preact_total_f64};
  PreactArgs a = {};
  a.dy = dy.data, a.z = z.data, a.dz = dz.data, a.transposed = transposed.data;
  a.sums = sums.data, a.total = total.data;
  a.rows = rows, a.n = n, a.lddy = a.ldz = a.lddz = ld, a.ldt = ldt, a.act = act;
  for (int64_t row = 0; row < rows; row += kPreactRows)
    for (int64_t col = 0; col < n; col += 32)
      grads[static_cast<int>(t.name)](a, row, std::min(rows, row + kPreactRows), col,
                                      std::min(n, col + 32));
  totals[static_cast<int>(t.name)](a, 0, n);

  for (int64_t j = 0; j < n; j++) {
    double sum = 0, size = 0, error = 0;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t place = i * ld + j;
      const Slope<R> s = slope<R>(z[place], act);
      const double exact = static_cast<double>(R(dy[place]) * (s.value + s.steep)),
                   bound = slope_error(dy[place], s, exact, t);
      expect(std::fabs(dz[place] - exact) <= bound, "dz", place, dz[place], exact);
      expect(transposed[j * ldt + i] == dz[place], "transposed", j * ldt + i,
             transposed[j * ldt + i], dz[place]);
      sum += exact, size += std::fabs(exact), error += slope_error(dy[place], s, exact, c);
    }
    error += static_cast<double>(kPreactRows) * std::ldexp(1, -c.mantissa) * size;
    if (t.bytes == 2) error += 0.5 * ulp(std::fabs(sum) + error, t);
    expect(std::fabs(total[j] - sum) <= error + ulp(sum, c), "sum of rows", j, total[j], sum);
  }
  for (int64_t i = 0; i < span; i++)
    if (i % ld >= n) expect(dz[i] == 77, "between rows", i, dz[i], 77);
}
void preact_cases() {
  constexpr int64_t rows[] = {1, 3, 16, 33, 64, 65, 130}, columns[] = {1, 4, 7, 16, 33, 40};
  int turn = 0;
  for (const Type* t : kTypes)
    for (const int64_t m : rows)
      for (const int64_t n : columns) {
        at = std::string("through an activation ") + name_of(*t) + " " + std::to_string(m) + "x" +
             std::to_string(n);
        const auto run = t == &kF64 ? preact_case<long double> : preact_case<double>;
        run(*t, kActs[turn % 7], m, n, turn % 3, turn % 2);
        turn++;
      }
}

// --- linear ------------------------------------------------------------------------------------

double linear_value(bool integers) {
  return integers ? static_cast<double>(next() % 7) - 3 : normal();
}

enum class Weight { plain, by_k, packed };

void linear_case(const Type& t, int64_t m, int64_t n, int64_t k, Activation act, bool integers,
                 int64_t gap, bool with_bias, bool with_z, bool at_end, Weight kind,
                 bool deterministic) {
  const auto value = [integers] { return linear_value(integers); };
  const auto span = [gap](int64_t rows, int64_t columns) { return rows * (columns + gap) - gap; };
  const bool by_k = kind == Weight::by_k;
  const Array x = filled(0, span(m, k), t, at_end, value),
              w = filled(1, by_k ? span(k, n) : span(n, k), t, at_end, value);
  const Array bias = filled(2, n, t, at_end, value);
  const Array y = filled(3, span(m, n), t, at_end, [] { return 77.0; });
  const Array z = filled(4, span(m, n), t, at_end, [] { return 77.0; });
  LinearArgs a = {};
  a.x = x.data, a.w = w.data, a.y = y.data, a.bias = with_bias ? bias.data : nullptr;
  a.z = with_z ? z.data : nullptr;
  a.m = m, a.n = n, a.k = k;
  a.ldx = k + gap, a.ldw = (by_k ? n : k) + gap, a.ldy = a.ldz = n + gap;
  a.act = act, a.deterministic = deterministic, a.w_by_k = by_k;
  if (kind == Weight::packed) {
    void* to = rooms[5].place(packed_bytes(a, t.name), at_end);
    run_pack(a, t.name, to);
    a.packed = to, a.w = nullptr;
  }
  run_linear(a, t.name);

  const Type& c = computed_in(t);
  const double depth = static_cast<double>(k) + 2, u = std::ldexp(1, -c.mantissa - 1);
  // bf16: the dot product of arm64 rounds twice for a pair, to odd, which errs by up to 2u.
  const double roundings = std::fmin(depth, 4 * std::sqrt(depth)) * (t.name == DType::bf16 ? 2 : 1);
  const std::vector<double> xs = values_of(x), ws = values_of(w);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double exact = 0, scale = 0, flushed = depth;
      for (int64_t e = 0; e < k; e++) {
        const double p = xs[i * a.ldx + e], q = ws[by_k ? e * a.ldw + j : j * a.ldw + e];
        exact += p * q, scale += std::fabs(p * q), flushed += std::fabs(p) + std::fabs(q);
      }
      if (with_bias) exact += bias[j], scale += std::fabs(bias[j]);
      double error = integers ? 0 : 2 * roundings * u * scale;
      if (t.name == DType::bf16 && !integers) error += flushed * 0x1p-126;
      const auto good = [&](double actual, double truth, double err) {
        return std::fabs(actual - truth) <=
               err + (t.bytes == 2 ? 0.5 * ulp(std::fabs(truth) + err, t) : 0);
      };
      const int64_t place = i * a.ldy + j;
      if (with_z) expect(good(z[place], exact, error), "sum", place, z[place], exact);
      const double wanted = activated(exact, act);
      // The steepest of the others has a slope of 1.13.
      const double moved = act == Activation::identity || act == Activation::relu ? error
                           : act == Activation::relu2 ? (2 * std::fmax(exact, 0) + error) * error
                                                      : 1.13 * error;
      const double bound = act == Activation::identity || act == Activation::relu
                               ? moved
                               : moved + activation_error(exact, std::fabs(wanted) + moved, act, t);
      expect(good(y[place], wanted, bound), "result", place, y[place], wanted);
    }
  for (int64_t i = 0; i < y.size; i++)
    if (i % a.ldy >= n) expect(y[i] == 77 && z[i] == 77, "between rows", i, y[i], 77);
}

void linear_cases() {
  constexpr int64_t rows[] = {1, 2, 3, 4, 5, 7, 33, 50};
  constexpr int64_t columns[] = {1, 7, 16, 49}, depths[] = {1, 2, 3, 8, 17, 33, 64};
  constexpr int64_t large[][3] = {{50, 33, 1025}, {3, 33, 1025}, {7, 20, 2051}, {13, 97, 130}};
  constexpr int64_t streamed[][3] = {{6, 70, 1030}, {7, 1026, 300}, {12, 1031, 70}, {16, 1027, 9}};
  int turn = 0;
  const auto both = [&turn](const Type& t, int64_t m, int64_t n, int64_t k) {
    at = std::string("linear ") + name_of(t) + " " + std::to_string(m) + "x" + std::to_string(n) +
         "x" + std::to_string(k);
    linear_case(t, m, n, k, kActs[turn % 7], false, turn % 3, turn % 2, turn % 5 == 0,
                turn % 11 < 6, Weight(turn % 3), turn % 4 == 0);
    linear_case(t, m, n, k, Activation::identity, true, turn % 2, turn % 3, true, turn % 11 >= 6,
                Weight((turn + 1) % 3), turn % 4 == 1);
    turn++;
  };
  for (const Type* t : kTypes) {
    for (const int64_t m : rows)
      for (const int64_t n : columns)
        for (const int64_t k : depths) both(*t, m, n, k);
    for (const auto& s : large) both(*t, s[0], s[1], s[2]);
    // Few rows and packed panels, so many that x is packed as well.
    for (const auto& s : streamed) {
      at = std::string("linear, packed, ") + name_of(*t) + " " + std::to_string(s[0]) + " rows";
      linear_case(*t, s[0], s[1], s[2], Activation::gelu, false, 1, true, true, true,
                  Weight::packed, false);
    }
  }
}

// --- quantized layers --------------------------------------------------------------------------

struct Quantized {
  void (*shape)(const QuantizedArgs&, int64_t, QuantizedShape&);
  void (*prepare)(const QuantizedArgs&, int64_t, int64_t);
  void (*run)(const QuantizedArgs&, void*, int64_t, int64_t, int64_t, int64_t);
};
Quantized quantized_of(const Type& t, bool int8_weight, bool int8_input) {
  const KernelTable& k = kernels();
#define OF(T)                                                                                    \
  if (int8_input) return {k.quantized_shape_u8, k.quantized_round_##T, k.quantized_dots_s8_##T}; \
  return {k.quantized_shape_f32, k.quantized_widen_##T,                                          \
          int8_weight ? k.quantized_sums_s8_##T : k.quantized_sums_bf16_##T};
  if (t.name == DType::f16) {
    OF(f16)
  }
  if (t.name == DType::bf16) {
    OF(bf16)
  }
  OF(f32)
#undef OF
}

void quantized_case(const Type& t, int64_t m, int64_t n, int64_t k, Activation act,
                    bool int8_weight, bool int8_input, bool with_bias, bool at_end) {
  const Array x = filled(0, m * k, t, at_end, normal);
  int8_t* bytes = static_cast<int8_t*>(rooms[1].place(n * k, at_end));
  Array w = {bytes, &kBf16, n * k};
  std::vector<double> ws(n * k);
  if (int8_weight)
    for (int64_t i = 0; i < n * k; i++) ws[i] = bytes[i] = static_cast<int8_t>(next() >> 56);
  else
    ws = values_of(w = filled(1, n * k, kBf16, at_end, normal));
  const Array scale = filled(2, n, kF32, at_end, [] { return 0.01 * (2 + uniform()); });
  const Array bias = filled(3, n, kF32, at_end, normal);
  const Array y = filled(4, m * n, t, at_end, [] { return 77.0; });
  QuantizedArgs a = {};
  a.x = x.data, a.w = w.data, a.y = y.data;
  a.scale = int8_weight ? static_cast<const float*>(scale.data) : nullptr;
  a.bias = with_bias ? static_cast<const float*>(bias.data) : nullptr;
  a.m = m, a.n = n, a.k = k, a.act = act;

  const Quantized q = quantized_of(t, int8_weight, int8_input);
  QuantizedShape shape = {};
  q.shape(a, m, shape);
  const int64_t rows = m > 2 * (shape.few_rows + 1) ? (m + 1) / 2 : m;  // of a task
  q.shape(a, rows, shape);
  a.row_bytes = shape.row_bytes;
  std::vector<float> row_scale(m);
  a.rows = rooms[5].place((m + 1) * a.row_bytes, true);  // a multiple of 64 bytes
  a.row_scale = row_scale.data();
  q.prepare(a, 0, m);
  if (int8_input) std::memset(static_cast<char*>(a.rows) + m * a.row_bytes, 128, a.row_bytes);
  void* scratch = rooms[6].place((shape.scratch + 63) / 64 * 64, true);
  for (int64_t row = 0; row < m; row += rows)
    for (int64_t col = 0; col < n; col += shape.columns)
      q.run(a, scratch, row, std::min(rows, m - row), col, std::min(n, col + shape.columns));

  const double u = 0x1p-24, depth = static_cast<double>(k);
  for (int64_t i = 0; i < m; i++) {
    double most = 0;
    for (int64_t e = 0; e < k; e++) most = std::fmax(most, std::fabs(x[i * k + e]));
    const float unit = std::fmax(static_cast<float>(most) / 127, 0x1p-126f);
    for (int64_t j = 0; j < n; j++) {
      double sum = 0, size = 0;
      for (int64_t e = 0; e < k; e++) {
        double factor = x[i * k + e];
        if (int8_input)
          factor = static_cast<double>(std::nearbyint(static_cast<float>(factor) * (1 / unit))) *
                   static_cast<double>(unit);
        sum += factor * ws[j * k + e], size += std::fabs(factor * ws[j * k + e]);
      }
      const double f = int8_weight ? scale[j] : 1, b = with_bias ? bias[j] : 0, exact = sum * f + b;
      double error = int8_input ? 4 * u * (std::fabs(sum * f) + 2 * std::fabs(b))
                                : (depth / 16 + 7) * u * (size * f + std::fabs(b));
      error = 1.13 * (error + (depth + 2) * 0x1p-149 * (1 + f));
      const double wanted = activated(exact, act);
      error += activation_error(exact, std::fabs(wanted) + error, act, kF32);
      if (t.bytes == 2) error += 0.5 * ulp(std::fabs(wanted) + error, t);
      const int64_t place = i * n + j;
      expect(std::fabs(y[place] - wanted) <= error, "quantized", place, y[place], wanted);
    }
  }
  quantized_bits.add(y);
}

void quantized_cases() {
  constexpr int64_t rows[] = {1, 2, 5, 24, 25, 60}, columns[] = {1, 15, 70};
  constexpr int64_t depths[] = {1, 3, 16, 37, 130};
  int turn = 0;
  for (const Type* t : {&kF32, &kF16, &kBf16})
    for (int kind = 0; kind < 3; kind++)
      for (const int64_t m : rows)
        for (const int64_t n : columns)
          for (const int64_t k : depths) {
            at = std::string("quantized ") + name_of(*t) + " kind " + std::to_string(kind) + " " +
                 std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
            const Activation act = turn % 4 == 0 ? Activation::identity : kGelus[turn % 4 - 1];
            quantized_case(*t, m, n, k, act, kind > 0, kind > 1, turn % 3, turn % 2);
            turn++;
          }
  at = "quantized, several blocks of k";
  quantized_case(kF32, 26, 33, 8200, Activation::gelu, true, true, true, true);
  quantized_case(kF32, 26, 33, 8200, Activation::gelu, true, false, true, true);
}

struct Row {
  const char* name;
  int (*check_vectors)();
};
constexpr Row kRows[] = {
#define ISA(name, arch, header, features) {#name, &name::check_vectors},
#include "isa.inc"
#undef ISA
};

int run(const Row& row) {
  checks = failures = 0, seed = 2026, rope_bits = gelu_bits = quantized_bits = {};
  failures += row.check_vectors();
  rope_cases();
  step_cases();
  gelu_cases();
  preact_cases();
  linear_cases();
  quantized_cases();
  const auto hex = [](const Hash& h) { return static_cast<unsigned long long>(h.value); };
  std::printf("row %s: %d checks, %d failures, rope %016llx, gelu %016llx, quantized %016llx\n",
              row.name, checks, failures, hex(rope_bits), hex(gelu_bits), hex(quantized_bits));
  std::fflush(stdout);
  return failures != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const bool unguarded = argc > 1 && argv[1] == std::string("unguarded");
  if (unguarded) argc--, argv++;
  for (int i = 0; i < 7; i++) rooms.emplace_back(!unguarded);
  if (argc == 3 && std::string(argv[1]) == "force") {
    for (const Row& row : kRows)
      if (argv[2] == std::string(row.name)) return row.check_vectors();
    return 2;
  }
  std::vector<std::string> wanted(argv + 1, argv + argc);
  if (wanted.empty()) wanted = isa::supported();
  std::printf("supported:");
  for (const std::string& name : isa::supported()) std::printf(" %s", name.c_str());
  std::printf("\nchosen: %s\n", isa::current().c_str());
  std::fflush(stdout);
  int failed = 0;
  for (const Row& row : kRows) {
    if (std::find(wanted.begin(), wanted.end(), row.name) == wanted.end()) continue;
    isa::use(row.name);
    failed |= run(row);
  }
  return failed;
}
