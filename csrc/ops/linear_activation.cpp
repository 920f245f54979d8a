// linear_activation, linear_activation_preact: linear with an activation on its sums, and with the
// pre-activation as well. Schemas, CPU implementation.
#include <tuple>

#include "../approximate.h"
#include "linear.h"

namespace fusedops {
namespace {

constexpr const char* kOp = "linear";

Tensor linear_activation(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, const Text& activation) {
  const Activation act = activation_named(kOp, activation);
  const LinearCall call(kOp, input, weight, bias);
  Tensor y = call.fresh_output();
  call.run(act, View(y));
  return y;
}

std::tuple<Tensor, Tensor> linear_activation_preact(const Tensor& input, const Tensor& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const Text& activation) {
  const Activation act = activation_named(kOp, activation);
  const LinearCall call(kOp, input, weight, bias);
  Tensor y = call.fresh_output(), z = call.fresh_output();
  const View z_view(z);
  call.run(act, View(y), &z_view);
  return {y, z};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
#define LAYER "Tensor input, Tensor weight, Tensor? bias, str activation"
  m.def("linear_activation(" LAYER ") -> Tensor");
  m.def("linear_activation_nograd(" LAYER ") -> Tensor");
  m.def("linear_activation_preact(" LAYER ") -> (Tensor, Tensor)");
  m.def("linear_activation_preact_nograd(" LAYER ") -> (Tensor, Tensor)");
#undef LAYER
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("linear_activation", TORCH_BOX(&linear_activation));
  m.impl("linear_activation_nograd", TORCH_BOX(&linear_activation));
  m.impl("linear_activation_preact", TORCH_BOX(&linear_activation_preact));
  m.impl("linear_activation_preact_nograd", TORCH_BOX(&linear_activation_preact));
}

}  // namespace fusedops
