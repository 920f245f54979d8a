// linear, linear_activation, gelu_linear, their variants that keep the pre-activation, and out=, on
// MPS.
#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <tuple>

#include "../../metal/params.h"
#include "../approximate.h"
#include "launch.h"

namespace fusedops::mps {
namespace {

namespace metal = fusedops_metal;
using MaybeTensor = std::optional<Tensor>;

// Up to so many rows reading w is nearly all of the work, and layer_rows reads it once.
constexpr int64_t kFewRows = 8;

// Whether our own matmul is wanted where torch's is the default: Apple's is ahead of any simple
// one.
bool own_matmul() {
  const char* choice = std::getenv("FUSEDOPS_MPS_MATMUL");
  if (!choice || !*choice || std::string_view(choice) == "torch") return false;
  if (std::string_view(choice) != "own")
    fail("fusedops", "FUSEDOPS_MPS_MATMUL must be 'torch' or 'own' but got '", choice, "'");
  return true;
}

uint64_t pieces(int64_t n, int64_t size) { return static_cast<uint64_t>((n + size - 1) / size); }

// What the kernels of a layer share.
struct Layer {
  Layer(const LinearCall& call_, Activation act_, const Tensor& y_, const Tensor* preact_)
      : call(call_), act(act_), y(y_), preact(preact_) {}

  const LinearCall& call;
  Activation act;
  const Tensor& y;
  const Tensor* preact;

  bool biased() const { return call.args.bias != nullptr; }
  metal::Matrix size() const { return {narrow(call.args.m), narrow(call.args.n)}; }
  metal::Depth depth() const { return {narrow(call.args.k)}; }
  metal::Leading leading() const { return {narrow(call.args.ldx), narrow(call.args.ldw)}; }
  metal::LayerFlags flags() const {
    return {(biased() ? metal::kHasBias : 0u) | (preact ? metal::kKeepPreact : 0u),
            static_cast<uint32_t>(act)};
  }
  // What is bound where there is none: it is not touched.
  const Tensor& bias() const { return biased() ? call.bias() : y; }
  const Tensor& kept() const { return preact ? *preact : y; }
  std::string name(const char* kernel) const {
    return std::string(kernel) + "_" + short_name(call.type);
  }
  bool aligned(const Tensor& t) const { return vector_aligned(View(t, Device::mps), call.type); }

  // Of the sums without bias that y holds.
  void epilogue() const {
    const int64_t n = call.args.n;
    const bool wide = n % 4 == 0 && aligned(y) && aligned(bias()) && aligned(kept());
    const auto columns = static_cast<uint64_t>(wide ? n / 4 : n);
    const uint64_t across = std::min<uint64_t>(columns, 256);
    const Grid grid = {{columns, static_cast<uint64_t>(call.args.m), 1}, {across, 256 / across, 1}};
    launch(call.op, name("layer_epilogue") + (wide ? "_x4" : "_x1"), grid, y, bias(), y, kept(),
           size(), flags());
  }

  void rows() const {
    const LinearArgs& a = call.args;
    const int64_t at_once = a.m <= 1 ? 1 : a.m <= 2 ? 2 : a.m <= 4 ? 4 : 8;
    const bool wide = a.k % 4 == 0 && a.ldx % 4 == 0 && a.ldw % 4 == 0 && aligned(call.input()) &&
                      aligned(call.weight());
    const auto of_group =
        int64_t{metal::outputs_of(static_cast<unsigned>(at_once))} * metal::kSimdgroups;
    constexpr uint64_t threads = uint64_t{metal::kSimdgroups} * metal::kLanes;
    const Grid grid = {{pieces(a.n, of_group) * threads, pieces(a.m, at_once), 1}, {threads, 1, 1}};
    product(name("layer_rows") + (wide ? "_x4_" : "_x1_") + std::to_string(at_once), grid);
  }

  void matmul() const {
    const Grid grid = {
        {pieces(call.args.n, metal::kTile) * 128, pieces(call.args.m, metal::kTile), 1},
        {128, 1, 1}};
    product(name("layer_matmul"), grid);
  }

 private:
  void product(const std::string& kernel, const Grid& grid) const {
    // A matrix without elements has no memory to bind; with k = 0 nobody looks at it.
    const bool sums = call.args.k > 0;
    launch(call.op, kernel, grid, sums ? call.input() : y, sums ? call.weight() : y, bias(), y,
           kept(), size(), depth(), leading(), flags());
  }
};

// y = x @ w^T by torch, of matrices without gaps: past the faults of MPS with a bias, with three
// dimensions and with strides. Not aten::linear, which autocast casts: backward too runs here, in
// the region of whoever calls it.
void torch_product(const LinearCall& call, const Tensor& y) {
  const LinearArgs& a = call.args;
  const Tensor x = torch::stable::reshape(torch::stable::contiguous(call.input()), {a.m, a.k});
  const Tensor w = torch::stable::contiguous(call.weight());
  mm_out(x, torch::stable::transpose(w, 0, 1), torch::stable::reshape(y, {a.m, a.n}));
}

void check_sizes(const LinearCall& call, int64_t result) {
  check_extent(call.op, "input", View(call.input(), Device::mps));
  check_extent(call.op, "weight", View(call.weight(), Device::mps));
  if (result > kMost)
    fail(call.op, "the result must have at most 2^32 - 256 elements on MPS but got ", result);
}

}  // namespace

Tensor layer(const LinearCall& call, Activation act, Tensor* preact) {
  const LinearArgs& a = call.args;
  check_sizes(call, a.m * a.n);
  if (preact) *preact = call.fresh_output();
  const bool few = a.m <= kFewRows || a.k == 0;
  const Tensor y = call.fresh_output();
  const Layer layer(call, act, y, preact);
  if (a.m * a.n == 0) return y;
  if (few) {
    layer.rows();
  } else if (own_matmul()) {
    layer.matmul();
  } else {
    torch_product(call, y);
    if (layer.biased() || act != Activation::identity || preact) layer.epilogue();
  }
  return y;
}

namespace {

Tensor linear(const Tensor& input, const Tensor& weight, const MaybeTensor& bias) {
  return layer(LinearCall("linear", input, weight, bias, Device::mps), Activation::identity);
}

Tensor activated(const char* op, Activation act, const Tensor& input, const Tensor& weight,
                 const MaybeTensor& bias) {
  return layer(LinearCall(op, input, weight, bias, Device::mps), act);
}

std::tuple<Tensor, Tensor> with_preact(const char* op, Activation act, const Tensor& input,
                                       const Tensor& weight, const MaybeTensor& bias) {
  Tensor z;
  Tensor y = layer(LinearCall(op, input, weight, bias, Device::mps), act, &z);
  return {y, z};
}

Tensor linear_activation(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                         const Text& activation) {
  return activated("linear", activation_named("linear", activation), input, weight, bias);
}

std::tuple<Tensor, Tensor> linear_activation_preact(const Tensor& input, const Tensor& weight,
                                                    const MaybeTensor& bias,
                                                    const Text& activation) {
  return with_preact("linear", activation_named("linear", activation), input, weight, bias);
}

Tensor gelu_linear(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                   const Text& approximate) {
  return activated("gelu_linear", activation_of("gelu_linear", approximate), input, weight, bias);
}

std::tuple<Tensor, Tensor> gelu_linear_preact(const Tensor& input, const Tensor& weight,
                                              const MaybeTensor& bias, const Text& approximate) {
  return with_preact("gelu_linear", activation_of("gelu_linear", approximate), input, weight, bias);
}

void gelu_linear_out(const Tensor& input, const Tensor& weight, const MaybeTensor& bias,
                     const Text& approximate, Tensor out) {
  const Activation act = activation_of("gelu_linear", approximate);
  const LinearCall call("gelu_linear", input, weight, bias, Device::mps);
  call.check_out(out, View(out, Device::mps), {&input, &weight, bias ? &*bias : nullptr});
  torch::stable::copy_(out, layer(call, act));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedops, MPS, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_nograd", TORCH_BOX(&linear));
  m.impl("linear_activation", TORCH_BOX(&linear_activation));
  m.impl("linear_activation_nograd", TORCH_BOX(&linear_activation));
  m.impl("linear_activation_preact", TORCH_BOX(&linear_activation_preact));
  m.impl("linear_activation_preact_nograd", TORCH_BOX(&linear_activation_preact));
  m.impl("gelu_linear", TORCH_BOX(&gelu_linear));
  m.impl("gelu_linear_nograd", TORCH_BOX(&gelu_linear));
  m.impl("gelu_linear_preact", TORCH_BOX(&gelu_linear_preact));
  m.impl("gelu_linear_preact_nograd", TORCH_BOX(&gelu_linear_preact));
  m.impl("gelu_linear_out", TORCH_BOX(&gelu_linear_out));
  m.impl("gelu_linear_out_nograd", TORCH_BOX(&gelu_linear_out));
}

}  // namespace fusedops::mps
