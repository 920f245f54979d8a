// gelu, gelu_backward, activation_backward on MPS.
#include "../ops/gelu.h"

#include "../../metal/params.h"
#include "../approximate.h"
#include "launch.h"

namespace fusedops::mps {
namespace {

namespace metal = fusedops_metal;

constexpr uint64_t kGroup = 256;

// One thread for four elements, or for one where they are not aligned.
struct Flat {
  explicit Flat(int64_t elements, bool wide)
      : suffix(wide ? "_x4" : "_x1"),
        grid{{static_cast<uint64_t>(wide ? (elements + 3) / 4 : elements), 1, 1}, {kGroup, 1, 1}} {}
  const char* suffix;
  Grid grid;
};

metal::Count count(const View& v, Activation act) {
  return {narrow(v.numel), static_cast<uint32_t>(act)};
}

Tensor gelu(const Tensor& x, const Text& approximate) {
  constexpr const char* op = "gelu";
  const View v(x, Device::mps);
  require_device(op, "x", x, v);
  const DType type = floating(op, "x", v);
  const Activation act = activation_of(op, approximate);
  Tensor y = empty_like_output(x, v);
  const View out(y, Device::mps);
  check_extent(op, "x", out);
  const bool flat = same_strides(v, out);
  if (!flat) torch::stable::copy_(y, x);
  const View& from = flat ? v : out;
  const Flat by(v.numel, vector_aligned(from, type) && vector_aligned(out, type));
  launch(op, std::string("gelu_") + short_name(type) + by.suffix, by.grid, flat ? x : y, y,
         count(v, act));
  return y;
}

Tensor backward(const char* op, const Tensor& grad, const Tensor& x, Activation act) {
  const View g(grad, Device::mps), v(x, Device::mps);
  check_gelu_backward(op, grad, g, x, v);
  const DType type = floating(op, "x", v);
  Tensor dx = empty_like_output(x, v);
  const View out(dx, Device::mps);
  check_extent(op, "x", out);
  const bool flat = same_strides(v, out);
  if (!flat) torch::stable::copy_(dx, x);
  Tensor dy = grad;
  if (!same_strides(g, out)) {
    dy = torch::stable::empty_like(dx);
    torch::stable::copy_(dy, grad);
  }
  const View &from = flat ? v : out, dy_view(dy, Device::mps);
  const Flat by(v.numel, vector_aligned(from, type) && vector_aligned(out, type) &&
                             vector_aligned(dy_view, type));
  launch(op, std::string("gelu_backward_") + short_name(type) + by.suffix, by.grid, dy,
         flat ? x : dx, dx, count(v, act));
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

static_assert(static_cast<uint32_t>(Activation::gelu) == metal::kGelu &&
              static_cast<uint32_t>(Activation::gelu_tanh) == metal::kGeluTanh &&
              static_cast<uint32_t>(Activation::gelu_quick) == metal::kGeluQuick &&
              static_cast<uint32_t>(Activation::silu) == metal::kSilu &&
              static_cast<uint32_t>(Activation::relu) == metal::kRelu &&
              static_cast<uint32_t>(Activation::relu2) == metal::kRelu2 &&
              static_cast<uint32_t>(Activation::identity) == metal::kIdentity);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedops, MPS, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_nograd", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("gelu_backward_nograd", TORCH_BOX(&gelu_backward));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("activation_backward_nograd", TORCH_BOX(&activation_backward));
}

}  // namespace fusedops::mps
