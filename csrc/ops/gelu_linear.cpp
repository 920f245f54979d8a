// gelu_linear, gelu_linear_preact, gelu_linear_out: schemas, checks, CPU implementation.
#include <string>
#include <tuple>

#include "../approximate.h"
#include "linear.h"

namespace fusedops {
namespace {

constexpr const char* kOp = "gelu_linear";

Tensor gelu_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Text& approximate) {
  const Activation act = activation_of(kOp, approximate);
  const LinearCall call(kOp, input, weight, bias);
  Tensor y = call.fresh_output();
  call.run(act, View(y));
  return y;
}

std::tuple<Tensor, Tensor> gelu_linear_preact(const Tensor& input, const Tensor& weight,
                                              const std::optional<Tensor>& bias,
                                              const Text& approximate) {
  const Activation act = activation_of(kOp, approximate);
  const LinearCall call(kOp, input, weight, bias);
  Tensor y = call.fresh_output(), z = call.fresh_output();
  const View z_view(z);
  call.run(act, View(y), &z_view);
  return {y, z};
}

void gelu_linear_out(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Text& approximate, Tensor out) {
  const Activation act = activation_of(kOp, approximate);
  const LinearCall call(kOp, input, weight, bias);
  const View y(out);
  call.check_out(out, y, {&input, &weight, bias ? &*bias : nullptr});
  call.run_into(act, out, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
#define LAYER "Tensor input, Tensor weight, Tensor? bias, str approximate"
  m.def("gelu_linear(" LAYER ") -> Tensor");
  m.def("gelu_linear_nograd(" LAYER ") -> Tensor");
  m.def("gelu_linear_preact(" LAYER ") -> (Tensor, Tensor)");
  m.def("gelu_linear_preact_nograd(" LAYER ") -> (Tensor, Tensor)");
  m.def("gelu_linear_out(" LAYER ", Tensor(a!) out) -> ()");
  m.def("gelu_linear_out_nograd(" LAYER ", Tensor(a!) out) -> ()");
#undef LAYER
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("gelu_linear", TORCH_BOX(&gelu_linear));
  m.impl("gelu_linear_nograd", TORCH_BOX(&gelu_linear));
  m.impl("gelu_linear_preact", TORCH_BOX(&gelu_linear_preact));
  m.impl("gelu_linear_preact_nograd", TORCH_BOX(&gelu_linear_preact));
  m.impl("gelu_linear_out", TORCH_BOX(&gelu_linear_out));
  m.impl("gelu_linear_out_nograd", TORCH_BOX(&gelu_linear_out));
}

}  // namespace fusedops
