// The checks of dense layers and of their gradients, for the kernels of every device.
#include <algorithm>
#include <array>

#include "linear.h"

namespace fusedops {

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

Tensor fresh(const char* op, const Tensor& like, const std::vector<int64_t>& shape, Device device) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; d--)
    strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  int64_t numel = 1;
  for (const int64_t n : shape) numel *= n;
  int32_t dtype = 0;
  aoti_torch_get_dtype(like.get(), &dtype);
  AtenTensorHandle handle;
  const bool cpu = device == Device::cpu;
  if (aoti_torch_empty_strided(
          static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
          cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_mps(), 0, &handle) != 0)
    fail(op, "memory for the result must be available but got ", numel, " elements refused");
  Tensor y(handle);
  if (cpu) advise_huge_pages(y.data_ptr(), numel * size_of(floating(op, "like", View(like))));
  return y;
}

namespace {

// What a weight [n, k] of this type asks of the others.
void check(const char* op, Device device, const Tensor& input, torch::headeronly::ScalarType type,
           int64_t n, int64_t k, const std::optional<Tensor>& bias) {
  const View x(input, device);
  require_device(op, "input", input, x);
  floating(op, "input", x);
  if (type != x.type)
    fail(op, "weight must have input's dtype ", name_of(x.type), " but got ", name_of(type));
  if (x.rank() < 1) fail(op, "input must have at least 1 dimension but got shape ", shape_of(x));
  if (x.size(-1) != k)
    fail(op, "input's last dimension must be weight's K = ", k, " but got shape ", shape_of(x));
  if (!bias) return;
  const View b(*bias, device);
  require_device(op, "bias", *bias, b);
  if (b.type != x.type)
    fail(op, "bias must have input's dtype ", name_of(x.type), " but got ", name_of(b.type));
  if (b.rank() != 1 || b.size(0) != n)
    fail(op, "bias must be [N] = [", n, "] but got shape ", shape_of(b));
}

}  // namespace

LinearCall::LinearCall(const char* op_, const Tensor& input, const Tensor& weight,
                       const std::optional<Tensor>& bias, Device device_)
    : op(op_), device(device_), args{} {
  const View given(weight, device);
  require_device(op, "weight", weight, given);
  if (given.rank() != 2)
    fail(op, "weight must have 2 dimensions [N, K] but got shape ", shape_of(given));
  args.n = given.size(0), args.k = given.size(1);
  check(op, device, input, given.type, args.n, args.k, bias);
  weight_ = in_rows(weight);
  const View w(weight_, device);
  args.w = w.data;
  if (args.k > 0) rows_of(w, args.ldw);
  take(input, bias);
}

LinearCall::LinearCall(const char* op_, const Tensor& input, const PackedWeight& weight,
                       const std::optional<Tensor>& bias)
    : op(op_), device(Device::cpu), args{} {
  check(op, device, input, weight.type, weight.n, weight.k, bias);
  args.n = weight.n, args.k = weight.k;
  args.packed = weight.panels;
  take(input, bias);
}

void LinearCall::take(const Tensor& input, const std::optional<Tensor>& bias) {
  input_ = in_rows(input);
  if (bias) bias_ = in_rows(*bias);
  const View x(input_, device);
  type = floating(op, "input", x);
  shape.assign(x.sizes.begin(), x.sizes.end());
  shape.back() = args.n;
  args.m = 1;
  for (int64_t d = 0; d + 1 < x.rank(); d++) args.m *= x.size(d);
  args.x = x.data;
  if (bias) args.bias = View(bias_, device).data;
  if (args.k > 0) rows_of(x, args.ldx);
}

Tensor LinearCall::fresh_output() const { return fresh(op, input_, shape, device); }

void LinearCall::check_out(const Tensor& out, const View& y,
                           std::initializer_list<const Tensor*> read) const {
  require_device(op, "out", out, y);
  const View x(input_, device);
  if (y.type != x.type)
    fail(op, "out must have input's dtype ", name_of(x.type), " but got ", name_of(y.type));
  if (!std::equal(y.sizes.begin(), y.sizes.end(), shape.begin(), shape.end()))
    fail(op, "out must have the result's shape ", shape_of(shape), " but got ", shape_of(y));
  if (overlaps_itself(y))
    fail(op, "out must not overlap itself but got strides that repeat elements, shape ",
         shape_of(y));
  for (const Tensor* t : read)
    if (t && overlap(y, View(*t, device)))
      fail(op, "out must not share memory with the inputs but got a view of the same memory");
}

namespace {

void check_type(const char* op, const char* what, const View& v, const View& grad) {
  if (v.type != grad.type)
    fail(op, what, " must have grad's dtype ", name_of(grad.type), " but got ", name_of(v.type));
}

}  // namespace

void check_grad(const char* op, const Tensor& grad, const View& g) {
  require_device(op, "grad", grad, g);
  floating(op, "grad", g);
  if (g.rank() < 1) fail(op, "grad must have at least 1 dimension but got shape ", shape_of(g));
}

void check_z(const char* op, const Tensor& z, const View& g) {
  const View v(z, g.device);
  require_device(op, "z", z, v);
  check_type(op, "z", v, g);
  if (!same_shape(v, g))
    fail(op, "z must have grad's shape ", shape_of(g), " but got ", shape_of(v));
}

void check_layer(const char* op, const std::optional<Tensor>& input,
                 const std::optional<Tensor>& weight, const View& g) {
  if (input) {
    const View x(*input, g.device);
    require_device(op, "input", *input, x);
    check_type(op, "input", x, g);
    if (x.rank() != g.rank() ||
        !std::equal(x.sizes.begin(), x.sizes.end() - 1, g.sizes.begin(), g.sizes.end() - 1))
      fail(op, "input must have grad's shape ", shape_of(g), " but for the last dimension but got ",
           shape_of(x));
  }
  if (weight) {
    const View w(*weight, g.device);
    require_device(op, "weight", *weight, w);
    check_type(op, "weight", w, g);
    if (w.rank() != 2 || w.size(0) != g.size(-1))
      fail(op, "weight must be [N, K] with N = ", g.size(-1), " but got shape ", shape_of(w));
    if (input && View(*input, g.device).size(-1) != w.size(1))
      fail(op, "input's last dimension must be weight's K = ", w.size(1), " but got shape ",
           shape_of(View(*input, g.device)));
  }
}

// aten::mm.out has no Autocast kernel; aten::mm and aten::linear have.
void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack = {from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fusedops
