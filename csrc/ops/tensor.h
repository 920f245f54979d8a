// What the ops need of a tensor, over the LibTorch stable ABI.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "../check.h"
#include "../dtype.h"

// A newer torch's name; under TORCH_TARGET_VERSION 2.10 it means the same.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace fusedops {

using torch::stable::Tensor;

// A `str` argument. The header's conversion to std::string leaks the string it copies from.
struct Text {
  std::string text;
  operator std::string_view() const { return text; }
};

inline const char* name_of(torch::headeronly::ScalarType type) {
  return torch::headeronly::toString(type);
}

torch::headeronly::ScalarType type_of(const Tensor& t);

// Whose kernels an op calls, and so where its tensors must be.
enum class Device : int { cpu, mps };

// Sizes, strides and data of a tensor, read once; borrowed from it.
struct View {
  explicit View(const Tensor& t, Device on = Device::cpu) : device(on), type(type_of(t)) {
    int64_t rank = 0, *size = nullptr, *stride = nullptr;
    aoti_torch_get_dim(t.get(), &rank);
    aoti_torch_get_sizes(t.get(), &size);
    aoti_torch_get_strides(t.get(), &stride);
    aoti_torch_get_data_ptr(t.get(), &data);
    sizes = {size, static_cast<size_t>(rank)};
    strides = {stride, static_cast<size_t>(rank)};
    for (const int64_t n : sizes) numel *= n;
    if (device == Device::mps) buffer = buffer_of(t);
  }
  int64_t rank() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t d) const { return sizes[static_cast<size_t>(d < 0 ? d + rank() : d)]; }
  int64_t stride(int64_t d) const { return strides[static_cast<size_t>(d < 0 ? d + rank() : d)]; }

  // Bytes from the start of the Metal buffer.
  int64_t offset() const {
    return static_cast<const char*>(data) - static_cast<const char*>(buffer);
  }

  Device device;
  torch::headeronly::ScalarType type;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  // On MPS no address but that of a Metal buffer's object plus bytes, to be compared within one.
  void* data = nullptr;
  const void* buffer = nullptr;  // that object; null on the CPU
  int64_t numel = 1;

 private:
  const void* buffer_of(const Tensor& t) const;
};

std::string shape_of(const torch::headeronly::IntHeaderOnlyArrayRef& sizes);
inline std::string shape_of(const View& v) { return shape_of(v.sizes); }
bool same_shape(const View& a, const View& b);

// The dtype as the kernels name it; fails for anything but f32, f16, bf16 and, on the CPU, f64.
DType floating(const char* op, const char* what, const View& v);

// On the device of its view `v`, and with memory for all of its elements: a storage can be freed or
// shrunk under a tensor (resize_).
void require_device(const char* op, const char* what, const Tensor& t, const View& v);

// Whether two elements of `v` share memory (a stride of 0, or strides that fold back), and whether
// an element of `a` shares memory with one of `b`. Exact for any strides where both have one
// element size and lie a whole number of elements apart; else views overlap when their extents do.
bool overlaps_itself(const View& v);
bool overlap(const View& a, const View& b);
bool same_elements(const View& a, const View& b);

// torch.empty_like(x); pages of a large fresh output are asked to be huge.
Tensor empty_like_output(const Tensor& x, const View& v);
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fusedops

namespace torch::stable::detail {
template <>
struct ToImpl<fusedops::Text> {
  static fusedops::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    fusedops::Text copy{{data, length}};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return copy;
  }
};
}  // namespace torch::stable::detail
