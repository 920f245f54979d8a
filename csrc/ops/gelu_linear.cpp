// gelu_linear, gelu_linear_preact, gelu_linear_out: schemas, checks, CPU implementation.
#include <algorithm>
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

void check_out(const LinearCall& call, const Tensor& input, const Tensor& weight,
               const std::optional<Tensor>& bias, const Tensor& out, const View& y) {
  require_cpu(kOp, "out", out);
  const View x(input);
  if (y.type != x.type)
    fail(kOp, "out must have input's dtype ", name_of(x.type), " but got ", name_of(y.type));
  if (!std::equal(y.sizes.begin(), y.sizes.end(), call.shape.begin(), call.shape.end()))
    fail(kOp, "out must have the result's shape ", shape_of(call.shape), " but got ", shape_of(y));
  if (overlaps_itself(y))
    fail(kOp, "out must not overlap itself but got strides that repeat elements, shape ",
         shape_of(y));
  if (overlap(y, x) || overlap(y, View(weight)) || (bias && overlap(y, View(*bias))))
    fail(kOp, "out must not share memory with the inputs but got a view of the same memory");
}

void gelu_linear_out(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Text& approximate, Tensor out) {
  const Activation act = activation_of(kOp, approximate);
  const LinearCall call(kOp, input, weight, bias);
  const View y(out);
  check_out(call, input, weight, bias, out, y);
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
#undef LAYER
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("gelu_linear", TORCH_BOX(&gelu_linear));
  m.impl("gelu_linear_nograd", TORCH_BOX(&gelu_linear));
  m.impl("gelu_linear_preact", TORCH_BOX(&gelu_linear_preact));
  m.impl("gelu_linear_preact_nograd", TORCH_BOX(&gelu_linear_preact));
  m.impl("gelu_linear_out", TORCH_BOX(&gelu_linear_out));
}

}  // namespace fusedops
