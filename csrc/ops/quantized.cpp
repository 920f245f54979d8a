// gelu_linear_quantized: schema, checks, threading, CPU implementation.
#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "../approximate.h"
#include "../parallel.h"
#include "../run.h"
#include "memory.h"

namespace fusedops {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "gelu_linear_quantized";
// The largest K whose sums of products of 127 and 128 fit 32 bits, rounded down.
constexpr int64_t kMostBytes = int64_t{1} << 17;

void check_vector(const char* what, const Tensor& t, int64_t n) {
  const View v(t);
  require_device(kOp, what, t, v);
  if (v.type != ScalarType::Float) fail(kOp, what, " must be float32 but got ", name_of(v.type));
  if (v.rank() != 1 || v.size(0) != n)
    fail(kOp, what, " must be [N] = [", n, "] but got shape ", shape_of(v));
}

DType check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& bias, bool quantize_input) {
  const View x(input), w(weight);
  require_device(kOp, "input", input, x);
  require_device(kOp, "weight", weight, w);
  if (x.type != ScalarType::Float && x.type != ScalarType::Half && x.type != ScalarType::BFloat16)
    fail(kOp, "input must be float32, float16 or bfloat16 but got ", name_of(x.type));
  if (w.type != ScalarType::BFloat16 && w.type != ScalarType::Char)
    fail(kOp, "weight must be bfloat16 or int8 but got ", name_of(w.type));
  if (x.rank() < 1) fail(kOp, "input must have at least 1 dimension but got shape ", shape_of(x));
  if (w.rank() != 2) fail(kOp, "weight must have 2 dimensions [N, K] but got shape ", shape_of(w));
  if (x.size(-1) != w.size(1))
    fail(kOp, "input's last dimension must be weight's K = ", w.size(1), " but got shape ",
         shape_of(x));
  const bool bytes = w.type == ScalarType::Char;
  if (bytes && !scale) fail(kOp, "scale must be given for an int8 weight but got None");
  if (!bytes && scale) fail(kOp, "scale must be None for a bfloat16 weight but got a tensor");
  if (scale) check_vector("scale", *scale, w.size(0));
  if (bias) check_vector("bias", *bias, w.size(0));
  if (quantize_input && !bytes)
    fail(kOp, "activation_dtype must be None for a bfloat16 weight but got torch.int8");
  if (quantize_input && w.size(1) > kMostBytes)
    fail(kOp, "K must be at most ", kMostBytes, " for activation_dtype=torch.int8 but got ",
         w.size(1));
  return floating(kOp, "input", x);
}

Tensor in_order(const Tensor& t) {
  const View v(t);
  int64_t expected = 1;
  for (int64_t d = v.rank() - 1; d >= 0; d--) {
    if (v.size(d) != 1 && v.stride(d) != expected) return torch::stable::contiguous(t);
    expected *= v.size(d);
  }
  return t;
}

struct Kernels {
  void (*shape)(const QuantizedArgs&, int64_t rows, QuantizedShape&);
  void (*prepare)(const QuantizedArgs&, int64_t begin, int64_t end);
  void (*run)(const QuantizedArgs&, void* scratch, int64_t row, int64_t rows, int64_t begin,
              int64_t end);
};

Kernels kernels_for(DType x, bool int8_weight, bool int8_input) {
  const KernelTable& k = kernels();
#define PICK(T)                                                                                  \
  if (int8_input) return {k.quantized_shape_u8, k.quantized_round_##T, k.quantized_dots_s8_##T}; \
  return {k.quantized_shape_f32, k.quantized_widen_##T,                                          \
          int8_weight ? k.quantized_sums_s8_##T : k.quantized_sums_bf16_##T};
  if (x == DType::f16) {
    PICK(f16)
  }
  if (x == DType::bf16) {
    PICK(bf16)
  }
  PICK(f32)
#undef PICK
}

// Work is products, and reading w once, which costs as much as some more of them.
int64_t worker_count(const QuantizedArgs& a) {
  constexpr int64_t per_thread = int64_t{1} << 19;
  return std::clamp<int64_t>(a.n * a.k * (a.m + 8) / per_thread, 1, thread_count());
}

// Rows of y in one task: enough tasks for all threads to end together, but not of so few rows that
// preparing w again for each outweighs them.
int64_t rows_of_task(const QuantizedArgs& a, const QuantizedShape& s, int64_t workers) {
  constexpr int64_t least = 64, most = 512;
  if (a.m <= s.few_rows) return a.m;
  const int64_t for_threads = pieces(workers > 1 ? 4 * workers : 1, pieces(a.n, s.columns));
  const int64_t chunks = std::max(pieces(a.m, most), std::min(for_threads, pieces(a.m, least)));
  return std::max(pieces(a.m, chunks), std::min(a.m, s.few_rows + 1));
}

void run(QuantizedArgs a, const Kernels& k, bool int8_input) {
  if (a.m == 0 || a.n == 0) return;
  const int64_t workers = worker_count(a);
  QuantizedShape s = {};
  k.shape(a, a.m, s);
  const int64_t rows = rows_of_task(a, s, workers);
  k.shape(a, rows, s);
  a.row_bytes = s.row_bytes;
  const int64_t scratch = aligned(s.scratch), all_rows = (a.m + 1) * a.row_bytes;
  const Memory memory = allocate(kOp, all_rows + workers * scratch + a.m * 4);
  a.rows = memory.get();
  a.row_scale = reinterpret_cast<float*>(memory.get() + all_rows + workers * scratch);
  parallel_for(a.m, pieces(1 << 15, std::max<int64_t>(1, a.k)),
               [&](int64_t begin, int64_t end) { k.prepare(a, begin, end); });
  if (int8_input) std::fill_n(memory.get() + a.m * a.row_bytes, a.row_bytes, char(128));
  const int64_t across = pieces(a.n, s.columns), total = pieces(a.m, rows) * across;
  std::atomic<int64_t> next{0};
  // A range may hold several workers (torch's pool was busy): its first one then does all the work.
  parallel_for(workers, 1, [&](int64_t worker, int64_t) {
    void* mine = memory.get() + all_rows + worker * scratch;
    for (int64_t task = next++; task < total; task = next++) {
      const int64_t row = task / across * rows, col = task % across * s.columns;
      k.run(a, mine, row, std::min(rows, a.m - row), col, std::min(a.n, col + s.columns));
    }
  });
}

Tensor gelu_linear_quantized(const Tensor& input, const Tensor& weight,
                             const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                             const Text& approximate, bool quantize_input) {
  QuantizedArgs a = {};
  a.act = activation_of(kOp, approximate);
  const DType type = check(input, weight, scale, bias, quantize_input);
  const Tensor x = in_order(input), w = in_order(weight);
  const Tensor factors = scale ? in_order(*scale) : Tensor(),
               added = bias ? in_order(*bias) : Tensor();
  const View rows(x), columns(w);
  a.n = columns.size(0), a.k = columns.size(1), a.m = 1;
  for (int64_t d = 0; d + 1 < rows.rank(); d++) a.m *= rows.size(d);
  a.x = rows.data, a.w = columns.data;
  if (scale) a.scale = static_cast<const float*>(View(factors).data);
  if (bias) a.bias = static_cast<const float*>(View(added).data);
  std::vector<int64_t> shape(rows.sizes.begin(), rows.sizes.end());
  shape.back() = a.n;
  Tensor y = torch::stable::new_empty(x, {shape.data(), shape.size()});
  advise_huge_pages(y.data_ptr(), a.m * a.n * size_of(type));
  a.y = y.data_ptr();
  run(a, kernels_for(type, columns.type == ScalarType::Char, quantize_input), quantize_input);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
#define LAYER \
  "Tensor input, Tensor weight, Tensor? scale, Tensor? bias, str approximate, bool quantize_input"
  m.def("gelu_linear_quantized(" LAYER ") -> Tensor");
  m.def("gelu_linear_quantized_nograd(" LAYER ") -> Tensor");
#undef LAYER
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("gelu_linear_quantized", TORCH_BOX(&gelu_linear_quantized));
  m.impl("gelu_linear_quantized_nograd", TORCH_BOX(&gelu_linear_quantized));
}

}  // namespace fusedops
