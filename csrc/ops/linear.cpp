// linear: schema, checks, CPU implementation; and run_linear, the threading of every dense layer.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "../parallel.h"

namespace fusedops {
namespace {

// Elements from one row of the last dimension to the next, if one stride leads through all rows.
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

// What a weight [n, k] of this type asks of the others.
void check(const char* op, const Tensor& input, torch::headeronly::ScalarType type, int64_t n,
           int64_t k, const std::optional<Tensor>& bias) {
  require_cpu(op, "input", input);
  const View x(input);
  floating(op, "input", x);
  if (type != x.type)
    fail(op, "weight must have input's dtype ", name_of(x.type), " but got ", name_of(type));
  if (x.rank() < 1) fail(op, "input must have at least 1 dimension but got shape ", shape_of(x));
  if (x.size(-1) != k)
    fail(op, "input's last dimension must be weight's K = ", k, " but got shape ", shape_of(x));
  if (!bias) return;
  require_cpu(op, "bias", *bias);
  const View b(*bias);
  if (b.type != x.type)
    fail(op, "bias must have input's dtype ", name_of(x.type), " but got ", name_of(b.type));
  if (b.rank() != 1 || b.size(0) != n)
    fail(op, "bias must be [N] = [", n, "] but got shape ", shape_of(b));
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
  require_cpu(op, "weight", weight);
  const View given(weight);
  if (given.rank() != 2)
    fail(op, "weight must have 2 dimensions [N, K] but got shape ", shape_of(given));
  args.n = given.size(0), args.k = given.size(1);
  check(op, input, given.type, args.n, args.k, bias);
  weight_ = in_rows(weight);
  const View w(weight_);
  args.w = w.data;
  if (args.k > 0) rows_of(w, args.ldw);
  take(input, bias);
}

LinearCall::LinearCall(const char* op_, const Tensor& input, const PackedWeight& weight,
                       const std::optional<Tensor>& bias)
    : op(op_), args{} {
  check(op, input, weight.type, weight.n, weight.k, bias);
  args.n = weight.n, args.k = weight.k;
  args.packed = weight.panels;
  take(input, bias);
}

void LinearCall::take(const Tensor& input, const std::optional<Tensor>& bias) {
  input_ = in_rows(input);
  if (bias) bias_ = in_rows(*bias);
  const View x(input_);
  type = floating(op, "input", x);
  shape.assign(x.sizes.begin(), x.sizes.end());
  shape.back() = args.n;
  args.m = 1;
  for (int64_t d = 0; d + 1 < x.rank(); d++) args.m *= x.size(d);
  args.x = x.data;
  if (bias) args.bias = View(bias_).data;
  if (args.k > 0) rows_of(x, args.ldx);
}

Tensor LinearCall::fresh_output() const {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; d--)
    strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  int32_t dtype = 0;
  aoti_torch_get_dtype(input_.get(), &dtype);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               dtype, aoti_torch_device_type_cpu(), 0, &handle) != 0)
    fail(op, "memory for the result must be available but got ", args.m * args.n,
         " elements refused");
  Tensor y(handle);
  advise_huge_pages(y.data_ptr(), args.m * args.n * size_of(type));
  return y;
}

void LinearCall::run(Activation act, const View& y, const View* z) const {
  LinearArgs a = args;
  a.act = act;
  a.y = y.data;
  rows_of(y, a.ldy);
  if (z) a.z = z->data, rows_of(*z, a.ldz);
  run_linear(a, type);
}

void LinearCall::check_out(const Tensor& out, const View& y,
                           std::initializer_list<const Tensor*> read) const {
  require_cpu(op, "out", out);
  const View x(input_);
  if (y.type != x.type)
    fail(op, "out must have input's dtype ", name_of(x.type), " but got ", name_of(y.type));
  if (!std::equal(y.sizes.begin(), y.sizes.end(), shape.begin(), shape.end()))
    fail(op, "out must have the result's shape ", shape_of(shape), " but got ", shape_of(y));
  if (overlaps_itself(y))
    fail(op, "out must not overlap itself but got strides that repeat elements, shape ",
         shape_of(y));
  for (const Tensor* t : read)
    if (t && overlap(y, View(*t)))
      fail(op, "out must not share memory with the inputs but got a view of the same memory");
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
  void (*pack)(const LinearArgs&, void*, int64_t, int64_t);
  void (*widen)(const LinearArgs&, float*, int64_t, int64_t);
};

LinearKernels kernels_for(DType t) {
  const KernelTable& k = kernels();
#define OF(T) k.linear_shape_##T, k.linear_dots_##T, k.linear_panels_##T, k.linear_pack_##T
  switch (t) {
    case DType::f16:
      return {OF(f16), k.linear_widen_f16};
    case DType::bf16:
      return {OF(bf16), k.linear_widen_bf16};
    case DType::f64:
      return {OF(f64), nullptr};
    default:
      return {OF(f32), nullptr};
  }
#undef OF
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
int64_t worker_count(const LinearArgs& a, int threads) {
  constexpr int64_t per_thread = int64_t{1} << 19;  // 5 to 10 us
  const int64_t work = a.n * a.k * (a.m + 8);
  return std::clamp<int64_t>(work / per_thread, 1, threads);
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

Tasks cut(const LinearArgs& a, const LinearKernels& k, int threads) {
  LinearShape shape = {};
  k.shape(a, shape);
  Tasks t = {};
  t.workers = worker_count(a, threads);
  // Panels compute whole panels: with few columns most of that would be thrown away.
  const int64_t padded = pieces(a.n, shape.panel_columns) * shape.panel_columns;
  t.dots = !a.packed && (a.m <= shape.few_rows || 5 * a.n < 4 * padded);
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

}  // namespace

struct LinearSchedule {
  LinearKernels kernels;
  Tasks tasks;
  int64_t element;     // bytes
  int64_t wide_rows;   // of x at once through a wider copy; 0: x is read as it is
  int64_t wide_bytes;  // of that copy, which lies before the workers' memory
};

namespace {

LinearSchedule schedule(const LinearArgs& a, DType type, int threads) {
  LinearSchedule s = {};
  s.kernels = kernels_for(type);
  if (a.m == 0 || a.n == 0) return s;  // nothing to cut
  s.tasks = cut(a, s.kernels, threads);
  s.element = size_of(type);
  LinearShape shape = {};
  s.kernels.shape(a, shape);
  if (!shape.widen_x) return s;
  const int64_t row_bytes = std::max<int64_t>(1, a.k) * static_cast<int64_t>(sizeof(float));
  const int64_t rows = s.tasks.rows;
  s.wide_rows = std::min(a.m, std::max<int64_t>(1, kWideBytes / row_bytes / rows) * rows);
  s.wide_bytes = pieces(s.wide_rows * row_bytes, 64) * 64;
  return s;
}

void run_widened(const LinearSchedule& s, const LinearArgs& a, char* memory) {
  float* wide = reinterpret_cast<float*>(memory);
  for (int64_t row = 0; row < a.m; row += s.wide_rows) {
    LinearArgs part = slice(a, row, std::min(s.wide_rows, a.m - row), s.element, s.element);
    parallel_for(part.m, pieces(1 << 15, std::max<int64_t>(1, a.k)),
                 [&](int64_t begin, int64_t end) { s.kernels.widen(part, wide, begin, end); });
    part.x = wide;
    part.ldx = a.k;
    run_tasks(part, s.kernels, s.tasks, memory + s.wide_bytes, sizeof(float), s.element);
  }
}

void pack(const LinearKernels& k, const LinearArgs& a, void* to) {
  LinearShape shape = {};
  k.shape(a, shape);
  const int64_t columns = shape.panel_columns;
  const int64_t grain = pieces(1 << 15, std::max<int64_t>(1, a.k * columns));
  parallel_for(pieces(a.n, columns), grain,
               [&](int64_t begin, int64_t end) { k.pack(a, to, begin, end); });
}

int64_t packed_bytes(const LinearKernels& k, const LinearArgs& a) {
  LinearShape shape = {};
  k.shape(a, shape);
  return pieces(a.n, shape.panel_columns) * shape.packed_bytes;
}

}  // namespace

std::shared_ptr<const LinearSchedule> schedule_packed(LinearArgs a, DType type, int threads) {
  static constexpr char some = 0;
  a.packed = &some;  // that there is one is all that a schedule asks
  return std::make_shared<const LinearSchedule>(schedule(a, type, threads));
}

int64_t work_bytes(const LinearSchedule& s) {
  return s.wide_bytes + s.tasks.workers * s.tasks.scratch;
}

void run_linear(const LinearSchedule& s, const LinearArgs& a, char* memory) {
  if (a.m == 0 || a.n == 0) return;
  if (s.wide_rows > 0) return run_widened(s, a, memory);
  run_tasks(a, s.kernels, s.tasks, memory, s.element, s.element);
}

void run_linear(const LinearArgs& a, DType type) {
  if (a.m == 0 || a.n == 0) return;
  const LinearSchedule s = schedule(a, type, thread_count());
  run_linear(s, a, allocate(work_bytes(s)).get());
}

int64_t packed_columns(const LinearArgs& a, DType type) {
  LinearShape shape = {};
  kernels_for(type).shape(a, shape);
  return shape.panel_columns;
}

int64_t packed_bytes(const LinearArgs& a, DType type) { return packed_bytes(kernels_for(type), a); }
int64_t packed_bytes(const LinearSchedule& s, const LinearArgs& a) {
  return packed_bytes(s.kernels, a);
}

void run_pack(const LinearArgs& a, DType type, void* to) { pack(kernels_for(type), a, to); }
void run_pack(const LinearSchedule& s, const LinearArgs& a, void* to) { pack(s.kernels, a, to); }

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_nograd(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_nograd", TORCH_BOX(&linear));
}

}  // namespace fusedops
