// linear_backward, linear_activation_backward, gelu_linear_backward, gelu_linear_dz: schemas,
// checks, CPU implementation.
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../approximate.h"
#include "../parallel.h"
#include "linear.h"
#include "memory.h"

namespace fusedops {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// A tensor as rows one stride apart. Of the gradient of a sum, which is one element expanded, one
// row is made and used for all.
class Rows {
 public:
  explicit Rows(const Tensor& t) : tensor_(t) {
    const View v(t);
    if (v.numel == 0 || rows_of(v, stride)) {
      data = v.data;
    } else if (std::all_of(v.strides.begin(), v.strides.end(), [](int64_t s) { return s == 0; })) {
      const auto bytes = static_cast<size_t>(size_of(floating("", "", v)));
      row_.resize(static_cast<size_t>(v.size(-1)) * bytes);
      for (size_t at = 0; at < row_.size(); at += bytes)
        std::memcpy(row_.data() + at, v.data, bytes);
      data = row_.data();
    } else {
      tensor_ = torch::stable::contiguous(t);
      data = tensor_.data_ptr();
      stride = v.size(-1);
    }
  }
  Rows(const Rows&) = delete;

  const void* data = nullptr;
  int64_t stride = 0;

 private:
  Tensor tensor_;
  std::vector<char> row_;
};

struct PreactKernels {
  void (*grad)(const PreactArgs&, int64_t, int64_t, int64_t, int64_t);
  void (*total)(const PreactArgs&, int64_t, int64_t);
};

PreactKernels preact_kernels(DType t) {
  const KernelTable& k = kernels();
  const PreactKernels by_type[] = {{k.preact_grad_f32, k.preact_total_f32},
                                   {k.preact_grad_f16, k.preact_total_f16},
                                   {k.preact_grad_bf16, k.preact_total_bf16},
                                   {k.preact_grad_f64, k.preact_total_f64}};
  return by_type[static_cast<int>(t)];
}

// Fills what is not null of dz, transposed and total.
void run_preact(const char* op, PreactArgs a, DType type) {
  constexpr int64_t columns = 256;  // of a task: whole cache lines in every dtype
  const PreactKernels k = preact_kernels(type);
  const int64_t blocks = pieces(a.rows, kPreactRows), across = pieces(a.n, columns);
  const int64_t compute = type == DType::f64 ? 8 : 4;
  const Memory sums = allocate(op, a.total ? blocks * a.n * compute : 0);
  if (a.total) a.sums = sums.get();
  const int64_t rows = std::min(a.rows, kPreactRows);
  const int64_t grain =
      pieces(type == DType::f64 ? 256 : 8192, std::max<int64_t>(1, rows) * columns);
  parallel_for(blocks * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task / across * kPreactRows, col = task % across * columns;
      k.grad(a, row, std::min(a.rows, row + kPreactRows), col, std::min(a.n, col + columns));
    }
  });
  if (a.total)
    parallel_for(a.n, pieces(1 << 15, std::max<int64_t>(1, blocks)),
                 [&](int64_t begin, int64_t end) { k.total(a, begin, end); });
}

// y [m][n] = x [m][k] @ w [k][n] by the engine.
void engine_matmul(const void* x, int64_t ldx, const Rows& w, const Tensor& y, int64_t m, int64_t n,
                   int64_t k, DType type) {
  LinearArgs a = {};
  a.x = x, a.ldx = ldx;
  a.w = w.data, a.ldw = w.stride, a.w_by_k = true;
  a.y = y.data_ptr(), a.ldy = n;
  a.m = m, a.n = n, a.k = k;
  a.act = Activation::identity;
  run_linear(a, type);
}

// The gradients of input where weight is given, of weight where input is, of bias if asked for;
// others come back empty. Without z, grad is that of the pre-activation.
Gradients backward(const char* op, Activation act, const Tensor& grad, const MaybeTensor& z,
                   const MaybeTensor& input, const MaybeTensor& weight, bool bias) {
  const View g(grad);
  check_grad(op, grad, g);
  if (z) check_z(op, *z, g);
  check_layer(op, input, weight, g);
  const DType type = floating(op, "grad", g);
  const int64_t n = g.size(-1), k = input    ? View(*input).size(-1)
                                    : weight ? View(*weight).size(1)
                                             : 0;
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < g.rank(); d++) m *= g.size(d);
  const Backend by_dx = backend_for(Product::input_gradient, type, m, n, k);
  const Backend by_dw = backend_for(Product::weight_gradient, type, m, n, k);
  const bool own_dw = by_dw == Backend::engine;

  const Rows dy(grad);
  PreactArgs a = {};
  a.rows = m, a.n = n, a.act = act;
  a.dy = dy.data, a.lddy = dy.stride;
  std::optional<Rows> saved;
  a.z = a.dy, a.ldz = a.lddy;  // the identity does not look at it
  if (z) {
    saved.emplace(*z);
    a.z = saved->data, a.ldz = saved->stride;
  }
  MaybeTensor dz;
  if (z && (weight || (input && !own_dw))) {
    dz = fresh(op, grad, {m, n});
    a.dz = dz->data_ptr(), a.lddz = n;
  }
  const int64_t element = size_of(type), line = 64 / element;
  a.ldt = pieces(m, line) * line + line;  // no power of two: rows would share a cache's set
  const Memory transposed = allocate(op, input && own_dw ? n * a.ldt * element : 0);
  if (input && own_dw) a.transposed = transposed.get();
  Tensor db = fresh(op, grad, {bias ? n : 0});
  if (bias) a.total = db.data_ptr();
  if (a.dz || a.transposed || a.total) run_preact(op, a, type);
  // dz, or dy where that is the same
  const Matrix d = {z ? a.dz : a.dy, m, n, z ? n : a.lddy, 1};

  std::vector<int64_t> shape(g.sizes.begin(), g.sizes.end());
  shape.back() = k;
  Tensor dx = fresh(op, grad, weight ? shape : std::vector<int64_t>{0});
  if (weight) {
    const Rows w(*weight);
    if (by_dx == Backend::engine)
      engine_matmul(d.data, d.row_stride, w, dx, m, k, n, type);
    else
      torch_product(d, {w.data, n, k, w.stride, 1}, {dx.data_ptr(), m, k, k, 1}, type, by_dx);
  }
  Tensor dw = fresh(op, grad, input ? std::vector<int64_t>{n, k} : std::vector<int64_t>{0});
  if (input) {
    const Rows x(*input);
    if (own_dw)
      engine_matmul(a.transposed, a.ldt, x, dw, n, k, m, type);
    else
      torch_product(d.transposed(), {x.data, m, k, x.stride, 1}, {dw.data_ptr(), n, k, k, 1}, type,
                    by_dw);
  }
  return {dx, dw, db};
}

Gradients linear_backward(const Tensor& grad, const MaybeTensor& input, const MaybeTensor& weight,
                          bool bias) {
  return backward("linear_backward", Activation::identity, grad, std::nullopt, input, weight, bias);
}

Gradients linear_activation_backward(const Tensor& grad, const MaybeTensor& input,
                                     const MaybeTensor& weight, const Tensor& z,
                                     const Text& activation, bool bias) {
  constexpr const char* op = "linear_activation_backward";
  return backward(op, activation_named(op, activation), grad, z, input, weight, bias);
}

Gradients gelu_linear_backward(const Tensor& grad, const MaybeTensor& input,
                               const MaybeTensor& weight, const Tensor& z, const Text& approximate,
                               bool bias) {
  constexpr const char* op = "gelu_linear_backward";
  return backward(op, activation_of(op, approximate), grad, z, input, weight, bias);
}

std::tuple<Tensor, Tensor> gelu_linear_dz(const Tensor& grad, const Tensor& z,
                                          const Text& approximate) {
  constexpr const char* op = "gelu_linear_dz";
  const Activation act = activation_of(op, approximate);
  const View g(grad);
  check_grad(op, grad, g);
  check_z(op, z, g);
  const Rows dy(grad), saved(z);
  Tensor dz = fresh(op, grad, {g.sizes.begin(), g.sizes.end()});
  Tensor db = fresh(op, grad, {g.size(-1)});
  PreactArgs a = {};
  a.act = act;
  a.n = g.size(-1), a.rows = 1;
  for (int64_t d = 0; d + 1 < g.rank(); d++) a.rows *= g.size(d);
  a.dy = dy.data, a.lddy = dy.stride;
  a.z = saved.data, a.ldz = saved.stride;
  a.dz = dz.data_ptr(), a.lddz = a.n;
  a.total = db.data_ptr();
  run_preact(op, a, floating(op, "grad", g));
  return {dz, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
#define LAYER "Tensor grad, Tensor? input, Tensor? weight"
  m.def("linear_backward(" LAYER ", bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_backward_nograd(" LAYER ", bool bias) -> (Tensor, Tensor, Tensor)");
#define ACTIVATION_LAYER LAYER ", Tensor z, str activation"
  m.def("linear_activation_backward(" ACTIVATION_LAYER ", bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_activation_backward_nograd(" ACTIVATION_LAYER
        ", bool bias) -> (Tensor, Tensor, Tensor)");
#define GELU_LAYER LAYER ", Tensor z, str approximate"
  m.def("gelu_linear_backward(" GELU_LAYER ", bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("gelu_linear_backward_nograd(" GELU_LAYER ", bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("gelu_linear_dz(Tensor grad, Tensor z, str approximate) -> (Tensor, Tensor)");
  m.def("gelu_linear_dz_nograd(Tensor grad, Tensor z, str approximate) -> (Tensor, Tensor)");
#undef GELU_LAYER
#undef ACTIVATION_LAYER
#undef LAYER
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_backward_nograd", TORCH_BOX(&linear_backward));
  m.impl("linear_activation_backward", TORCH_BOX(&linear_activation_backward));
  m.impl("linear_activation_backward_nograd", TORCH_BOX(&linear_activation_backward));
  m.impl("gelu_linear_backward", TORCH_BOX(&gelu_linear_backward));
  m.impl("gelu_linear_backward_nograd", TORCH_BOX(&gelu_linear_backward));
  m.impl("gelu_linear_dz", TORCH_BOX(&gelu_linear_dz));
  m.impl("gelu_linear_dz_nograd", TORCH_BOX(&gelu_linear_dz));
}

}  // namespace fusedops
