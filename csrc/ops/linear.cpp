// linear: schema, checks, CPU implementation; and run_linear, the threading of every dense layer.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "../parallel.h"

namespace fusedops {

bool rows_of(const View& v, int64_t& stride) {
  if (v.size(-1) > 1 && v.stride(-1) != 1) return false;
  stride = v.size(-1);
  int64_t rows = 1;  // of the dimensions behind d, all of them `stride` apart
  for (int64_t d = v.rank() - 2; d >= 0; d--) {
    if (v.size(d) == 1) continue;
    if (rows == 1)
      stride = v.stride(d);
    else if (v.stride(d) != rows * stride)
      return false;
    rows *= v.size(d);
  }
  return true;
}

Tensor in_rows(const Tensor& t) {
  int64_t stride;
  const View v(t);
  return v.numel == 0 || rows_of(v, stride) ? t : torch::stable::contiguous(t);
}

Tensor fresh(const char* op, const Tensor& like, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; d--)
    strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  const int64_t numel = shape[0] * strides[0];
  int32_t dtype = 0;
  aoti_torch_get_dtype(like.get(), &dtype);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               dtype, aoti_torch_device_type_cpu(), 0, &handle) != 0)
    fail(op, "memory for the result must be available but got ", numel, " elements refused");
  Tensor y(handle);
  advise_huge_pages(y.data_ptr(), numel * size_of(floating(op, "like", View(like))));
  return y;
}

namespace {

void check(const char* op, const Tensor& input, const Tensor& weight,
           const std::optional<Tensor>& bias) {
  require_cpu(op, "input", input);
  require_cpu(op, "weight", weight);
  const View x(input), w(weight);
  floating(op, "input", x);
  if (w.type != x.type)
    fail(op, "weight must have input's dtype ", name_of(x.type), " but got ", name_of(w.type));
  if (x.rank() < 1) fail(op, "input must have at least 1 dimension but got shape ", shape_of(x));
  if (w.rank() != 2) fail(op, "weight must have 2 dimensions [N, K] but got shape ", shape_of(w));
  if (x.size(-1) != w.size(1))
    fail(op, "input's last dimension must be weight's K = ", w.size(1), " but got shape ",
         shape_of(x));
  if (!bias) return;
  require_cpu(op, "bias", *bias);
  const View b(*bias);
  if (b.type != x.type)
    fail(op, "bias must have input's dtype ", name_of(x.type), " but got ", name_of(b.type));
  if (b.rank() != 1 || b.size(0) != w.size(0))
    fail(op, "bias must be [N] = [", w.size(0), "] but got shape ", shape_of(b));
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const LinearCall call("linear", input, weight, bias);
  Tensor y = call.fresh_output();
  call.run(Activation::identity, View(y));
  return y;
}

}  // namespace

LinearCall::LinearCall(const char* op_, const Tensor& input, const Tensor& weight,
                       const std::optional<Tensor>& bias)
    : op(op_), args{} {
  check(op, input, weight, bias);
  input_ = in_rows(input);
  weight_ = in_rows(weight);
  if (bias) bias_ = in_rows(*bias);
  const View x(input_), w(weight_);
  type = floating(op, "input", x);
  shape.assign(x.sizes.begin(), x.sizes.end());
  shape.back() = w.size(0);
  args.n = w.size(0), args.k = w.size(1);
  args.m = 1;
  for (int64_t d = 0; d + 1 < x.rank(); d++) args.m *= x.size(d);
  args.x = x.data, args.w = w.data;
  if (bias) args.bias = View(bias_).data;
  if (args.k > 0) rows_of(x, args.ldx), rows_of(w, args.ldw);
}

Tensor LinearCall::fresh_output() const { return fresh(op, input_, shape); }

void LinearCall::run(Activation act, const View& y, const View* z) const {
  LinearArgs a = args;
  a.act = act;
  a.y = y.data;
  rows_of(y, a.ldy);
  if (z) a.z = z->data, rows_of(*z, a.ldz);
  run_linear(a, type);
}

void LinearCall::run_into(Activation act, Tensor& out, const View& y) const {
  int64_t stride;
  if (rows_of(y, stride)) return run(act, y);
  const Tensor fresh = fresh_output();
  run(act, View(fresh));
  torch::stable::copy_(out, fresh);
}

namespace {

struct LinearKernels {
  void (*shape)(const LinearArgs&, LinearShape&);
  void (*dots)(const LinearArgs&, void*, int64_t, int64_t);
  void (*panels)(const LinearArgs&, void*, int64_t, int64_t);
  void (*widen)(const LinearArgs&, float*, int64_t, int64_t);
};

LinearKernels kernels_for(DType t) {
  const KernelTable& k = kernels();
  switch (t) {
    case DType::f16:
      return {k.linear_shape_f16, k.linear_dots_f16, k.linear_panels_f16, k.linear_widen_f16};
    case DType::bf16:
      return {k.linear_shape_bf16, k.linear_dots_bf16, k.linear_panels_bf16, k.linear_widen_bf16};
    case DType::f64:
      return {k.linear_shape_f64, k.linear_dots_f64, k.linear_panels_f64, nullptr};
    default:
      return {k.linear_shape_f32, k.linear_dots_f32, k.linear_panels_f32, nullptr};
  }
}

using Memory = std::unique_ptr<char, decltype(&std::free)>;

Memory allocate(int64_t bytes) {  // a multiple of 64, and at least that
  char* p = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
  if (!p)
    fail("linear", "memory for the workspace must be available but got ", bytes, " bytes refused");
  return {p, &std::free};
}

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The same layer on rows [begin, begin + rows).
LinearArgs slice(const LinearArgs& a, int64_t begin, int64_t rows, int64_t x_element,
                 int64_t element) {
  LinearArgs s = a;
  s.m = rows;
  s.x = static_cast<const char*>(a.x) + begin * a.ldx * x_element;
  s.y = static_cast<char*>(a.y) + begin * a.ldy * element;
  if (a.z) s.z = static_cast<char*>(a.z) + begin * a.ldz * element;
  return s;
}

// Work is multiply-adds, and reading w once, which costs as much as some more of them.
int64_t worker_count(const LinearArgs& a) {
  constexpr int64_t per_thread = int64_t{1} << 19;  // 5 to 10 us
  const int64_t work = a.n * a.k * (a.m + 8);
  return std::clamp<int64_t>(work / per_thread, 1, thread_count());
}

constexpr int64_t kDotChunk = 64;         // rows whose sums stay in the first cache
constexpr int64_t kPanelChunk = 2048;     // rows whose sums stay in the second, beside a panel
constexpr int64_t kWideBytes = 16 << 20;  // of x at once in a wider type

// y in tasks of `rows` x `columns`, columns fastest.
struct Tasks {
  bool dots;
  int64_t rows, columns;
  int64_t scratch;  // bytes for each worker
  int64_t workers;
};

Tasks plan(const LinearArgs& a, const LinearKernels& k) {
  LinearShape shape = {};
  k.shape(a, shape);
  Tasks t = {};
  t.workers = worker_count(a);
  // Panels compute whole panels: with few columns most of that would be thrown away.
  const int64_t padded = pieces(a.n, shape.panel_columns) * shape.panel_columns;
  t.dots = !a.w_by_k && (a.m <= shape.few_rows || 5 * a.n < 4 * padded);
  t.columns = t.dots ? shape.dot_columns : shape.panel_columns;
  // Enough tasks for all threads to end together, but of rows enough to be worth a panel.
  const int64_t for_threads = pieces(t.workers > 1 ? 4 * t.workers : 1, pieces(a.n, t.columns));
  const int64_t chunks = std::max(pieces(a.m, t.dots ? kDotChunk : kPanelChunk),
                                  std::min(for_threads, pieces(a.m, 2 * kDotChunk)));
  t.rows = pieces(a.m, chunks);
  LinearArgs task = a;
  task.m = t.rows;
  k.shape(task, shape);
  t.scratch = pieces(t.dots ? shape.dot_scratch : shape.panel_scratch, 64) * 64;
  return t;
}

void run_tasks(const LinearArgs& a, const LinearKernels& k, const Tasks& t, char* scratch,
               int64_t x_element, int64_t element) {
  const int64_t across = pieces(a.n, t.columns), total = pieces(a.m, t.rows) * across;
  std::atomic<int64_t> next{0};
  // A range may hold several workers (torch's pool was busy): its first one then does all the work.
  parallel_for(t.workers, 1, [&](int64_t worker, int64_t) {
    void* mine = scratch + worker * t.scratch;
    for (int64_t task = next++; task < total; task = next++) {
      const int64_t row = task / across * t.rows, col = task % across * t.columns;
      const LinearArgs part = slice(a, row, std::min(t.rows, a.m - row), x_element, element);
      (t.dots ? k.dots : k.panels)(part, mine, col, std::min(a.n, col + t.columns));
    }
  });
}

// x goes through a wider copy of as many rows as fit kWideBytes.
void run_widened(const LinearArgs& a, const LinearKernels& k, const Tasks& t, int64_t element) {
  const int64_t row_bytes = std::max<int64_t>(1, a.k) * static_cast<int64_t>(sizeof(float));
  const int64_t rows =
      std::min(a.m, std::max<int64_t>(1, kWideBytes / row_bytes / t.rows) * t.rows);
  const int64_t wide_bytes = pieces(rows * row_bytes, 64) * 64;
  const Memory memory = allocate(wide_bytes + t.workers * t.scratch);
  float* wide = reinterpret_cast<float*>(memory.get());
  for (int64_t row = 0; row < a.m; row += rows) {
    LinearArgs part = slice(a, row, std::min(rows, a.m - row), element, element);
    parallel_for(part.m, pieces(1 << 15, std::max<int64_t>(1, a.k)),
                 [&](int64_t begin, int64_t end) { k.widen(part, wide, begin, end); });
    part.x = wide;
    part.ldx = a.k;
    run_tasks(part, k, t, memory.get() + wide_bytes, sizeof(float), element);
  }
}

}  // namespace

void run_linear(const LinearArgs& a, DType type) {
  if (a.m == 0 || a.n == 0) return;
  const LinearKernels k = kernels_for(type);
  const Tasks t = plan(a, k);
  const int64_t element = size_of(type);
  LinearShape shape = {};
  k.shape(a, shape);
  if (shape.widen_x) return run_widened(a, k, t, element);
  const Memory scratch = allocate(t.workers * t.scratch);
  run_tasks(a, k, t, scratch.get(), element, element);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_nograd(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_nograd", TORCH_BOX(&linear));
}

}  // namespace fusedops
