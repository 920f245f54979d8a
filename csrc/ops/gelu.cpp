// gelu, gelu_backward, activation_backward: schemas, checks, threading, CPU implementation.
#include <string>

#include "../approximate.h"
#include "../parallel.h"
#include "../run.h"
#include "tensor.h"

namespace fusedops {
namespace {

// About 5 us of work; float64 calls libm's erfc for every element.
int64_t elements_per_task(DType t) { return t == DType::f64 ? 256 : 8192; }

bool same_strides(const View& a, const View& b) {
  for (int64_t d = 0; d < a.rank(); d++)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// empty_like keeps the strides of a tensor whose elements fill its memory, and only of such a one.
Tensor gelu(const Tensor& x, const Text& approximate) {
  const View v(x);
  require_cpu("gelu", "x", x, v);
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
  require_cpu(op, "x", x, v);
  require_cpu(op, "grad", grad, g);
  const DType type = floating(op, "x", v);
  if (g.type != v.type)
    fail(op, "grad must have x's dtype ", name_of(v.type), " but got ", name_of(g.type));
  if (!same_shape(g, v))
    fail(op, "grad must have x's shape ", shape_of(v), " but got ", shape_of(g));
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
  run_gelu_backward(a, v.numel, type);
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
