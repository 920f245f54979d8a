// linear_backward, linear_activation_backward, gelu_linear_backward, gelu_linear_dz on MPS: one
// pass over (dy, z), then torch's matmuls.
#include <algorithm>
#include <tuple>

#include "../../metal/params.h"
#include "../approximate.h"
#include "launch.h"
#include "linear.h"

namespace fusedops::mps {
namespace {

namespace metal = fusedops_metal;
using MaybeTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using torch::headeronly::ScalarType;

// grad as [m][n] without gaps.
struct Rows {
  Rows(const char* op, const View& g) : n(g.size(-1)), type(floating(op, "grad", g)) {
    for (int64_t d = 0; d + 1 < g.rank(); d++) m *= g.size(d);
    // An expanded grad is a copy of all of its elements here.
    if (g.numel > kMost)
      fail(op, "grad must have at most 2^32 - 256 elements on MPS but got ", g.numel);
  }
  Tensor of(const Tensor& t, int64_t columns) const {
    return torch::stable::reshape(torch::stable::contiguous(t), {m, columns});
  }
  Tensor of(const Tensor& t) const { return of(t, n); }

  int64_t m = 1, n;
  DType type;
};

// Fills dz and total, where they are not null, from dy and z: [m][n] without gaps.
void pass(const char* op, const Rows& rows, Activation act, const Tensor& dy, const Tensor& z,
          const Tensor* dz, const Tensor* total) {
  if (rows.m * rows.n == 0) {
    if (total) {
      Tensor zeros = *total;
      torch::stable::zero_(zeros);
    }
    return;
  }
  const int64_t blocks = (rows.m + metal::kSumRows - 1) / int64_t{metal::kSumRows};
  const Tensor sums =
      torch::stable::new_empty(dy, {total ? blocks * rows.n : 1}, ScalarType::Float);
  const auto aligned = [&](const Tensor& t) {
    return vector_aligned(View(t, Device::mps), rows.type);
  };
  const bool wide = rows.n % 4 == 0 && aligned(dy) && aligned(z) && (!dz || aligned(*dz));
  const auto columns = static_cast<uint64_t>(wide ? rows.n / 4 : rows.n);
  const uint64_t across = std::min<uint64_t>(columns, 256);
  const Grid grid = {{columns, static_cast<uint64_t>(blocks), 1}, {across, 256 / across, 1}};
  const std::string type = short_name(rows.type);
  launch(op, "preact_grad_" + type + (wide ? "_x4" : "_x1"), grid, dy, z, dz ? *dz : dy, sums,
         metal::Matrix{narrow(rows.m), narrow(rows.n)},
         metal::LayerFlags{(dz ? metal::kWriteDz : 0u) | (total ? metal::kSumBias : 0u),
                           static_cast<uint32_t>(act)});
  if (!total) return;
  launch(op, "preact_total_" + type, Grid{{static_cast<uint64_t>(rows.n), 1, 1}, {64, 1, 1}}, sums,
         *total, metal::Matrix{narrow(blocks), narrow(rows.n)});
}

Tensor torch_matmul(const char* op, const Tensor& a, const Tensor& b) {
  const Tensor y = fresh(op, a, {View(a).size(0), View(b).size(1)}, Device::mps);
  mm_out(a, b, y);
  return y;
}

// As on the CPU: gradients of input where weight is given, of weight where input is, of bias if
// asked for; others come back empty. Without z, grad is that of the pre-activation.
Gradients backward(const char* op, Activation act, const Tensor& grad, const MaybeTensor& z,
                   const MaybeTensor& input, const MaybeTensor& weight, bool bias) {
  const View g(grad, Device::mps);
  check_grad(op, grad, g);
  if (z) check_z(op, *z, g);
  check_layer(op, input, weight, g);
  check_extent(op, "grad", g);
  const Rows rows(op, g);
  const Tensor dy = rows.of(grad), none = fresh(op, grad, {0}, Device::mps);
  const Tensor saved = z ? rows.of(*z) : dy;
  Tensor dz = dy, db = bias ? fresh(op, grad, {rows.n}, Device::mps) : none;
  const bool own_dz = z && (input || weight);
  if (own_dz) dz = fresh(op, grad, {rows.m, rows.n}, Device::mps);
  if (own_dz || bias) pass(op, rows, act, dy, saved, own_dz ? &dz : nullptr, bias ? &db : nullptr);

  Tensor dx = none, dw = none;
  if (weight) {
    std::vector<int64_t> shape(g.sizes.begin(), g.sizes.end());
    shape.back() = View(*weight).size(1);
    dx = torch::stable::reshape(torch_matmul(op, dz, torch::stable::contiguous(*weight)), shape);
  }
  if (input)
    dw = torch_matmul(op, torch::stable::transpose(dz, 0, 1),
                      rows.of(*input, View(*input).size(-1)));
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
  const View g(grad, Device::mps);
  check_grad(op, grad, g);
  check_z(op, z, g);
  check_extent(op, "grad", g);
  const Rows rows(op, g);
  const Tensor dz = fresh(op, grad, {g.sizes.begin(), g.sizes.end()}, Device::mps);
  const Tensor db = fresh(op, grad, {rows.n}, Device::mps);
  pass(op, rows, act, rows.of(grad), rows.of(z), &dz, &db);
  return {dz, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedops, MPS, m) {
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_backward_nograd", TORCH_BOX(&linear_backward));
  m.impl("linear_activation_backward", TORCH_BOX(&linear_activation_backward));
  m.impl("linear_activation_backward_nograd", TORCH_BOX(&linear_activation_backward));
  m.impl("gelu_linear_backward", TORCH_BOX(&gelu_linear_backward));
  m.impl("gelu_linear_backward_nograd", TORCH_BOX(&gelu_linear_backward));
  m.impl("gelu_linear_dz", TORCH_BOX(&gelu_linear_dz));
  m.impl("gelu_linear_dz_nograd", TORCH_BOX(&gelu_linear_dz));
}

}  // namespace fusedops::mps
