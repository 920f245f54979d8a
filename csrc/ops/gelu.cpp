// gelu, gelu_backward, activation_backward: schemas, checks, threading, CPU implementation.
#include <string>

#include "../approximate.h"
#include "../parallel.h"
#include "../run.h"
#include "gelu.h"

namespace fusedops {
namespace {

// About 5 us of work; float64 calls libm's erfc for every element.
int64_t elements_per_task(DType t) { return t == DType::f64 ? 256 : 8192; }

Tensor gelu(const Tensor& x, const Text& approximate) {
  const View v(x);
  require_device("gelu", "x", x, v);
  const DType type = floating("gelu", "x", v);
  GeluArgs a = {};
  a.act = activation_of("gelu", approximate);
  Tensor y = empty_like_output(x, v);
  const View out(y);
  const bool flat = same_strides(v, out);
  if (!flat) torch::stable::copy_(y, x);
  a.x = flat ? v.data : out.data;
  a.y = out.data;
  run_gelu(a, v.numel, type);
  return y;
}

Tensor backward(const char* op, const Tensor& grad, const Tensor& x, Activation act) {
  const View g(grad), v(x);
  check_gelu_backward(op, grad, g, x, v);
  GeluArgs a = {};
  a.act = act;
  Tensor dx = empty_like_output(x, v);
  const View out(dx);
  const bool flat = same_strides(v, out);
  if (!flat) torch::stable::copy_(dx, x);
  Tensor moved = grad;
  if (!same_strides(g, out)) {
    moved = torch::stable::empty_like(dx);
    torch::stable::copy_(moved, grad);
  }
  a.x = flat ? v.data : out.data;
  a.dy = View(moved).data;
  a.y = out.data;
  run_gelu_backward(a, v.numel, floating(op, "x", v));
  return dx;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x, const Text& approximate) {
  constexpr const char* op = "gelu_backward";
  return backward(op, grad, x, activation_of(op, approximate));
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, const Text& activation) {
  constexpr const char* op = "activation_backward";
  return backward(op, grad, x, activation_named(op, activation));
}

using GeluKernel = void (*)(const GeluArgs&, int64_t, int64_t);

void run(GeluKernel kernel, const GeluArgs& a, int64_t n, DType t) {
  parallel_for(n, elements_per_task(t), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace

void run_gelu(const GeluArgs& a, int64_t n, DType t) {
  const KernelTable& k = kernels();
  const GeluKernel by_type[] = {k.gelu_f32, k.gelu_f16, k.gelu_bf16, k.gelu_f64};
  run(by_type[static_cast<int>(t)], a, n, t);
}

void run_gelu_backward(const GeluArgs& a, int64_t n, DType t) {
  const KernelTable& k = kernels();
  const GeluKernel by_type[] = {k.gelu_backward_f32, k.gelu_backward_f16, k.gelu_backward_bf16,
                                k.gelu_backward_f64};
  run(by_type[static_cast<int>(t)], a, n, t);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
  m.def("gelu(Tensor x, str approximate) -> Tensor");
  m.def("gelu_nograd(Tensor x, str approximate) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x, str approximate) -> Tensor");
  m.def("gelu_backward_nograd(Tensor grad, Tensor x, str approximate) -> Tensor");
  m.def("activation_backward(Tensor grad, Tensor x, str activation) -> Tensor");
  m.def("activation_backward_nograd(Tensor grad, Tensor x, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_nograd", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("gelu_backward_nograd", TORCH_BOX(&gelu_backward));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("activation_backward_nograd", TORCH_BOX(&activation_backward));
}

}  // namespace fusedops
