// The only way to Metal: torch's C functions aoti_torch_mps_*. No Objective-C, no ATen, nothing of
// Apple's headers. On macOS libtorch_cpu.dylib has them; tests on Linux load a library that has
// them on an emulator (tests/metal), under the same names, and run the same object files.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>

#include <array>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#include "../ops/tensor.h"

namespace fusedops::mps {

// Elements of a tensor's extent and threads of a grid's dimension: the shaders count in 32 bits, a
// step past the end included, which is 128 at most (layer_rows).
constexpr int64_t kMost = (int64_t{1} << 32) - 256;

// Fails unless every element of v lies within kMost of the first; such sizes and strides fit
// uint32.
void check_extent(const char* op, const char* what, const View& v);

inline uint32_t narrow(int64_t n) { return static_cast<uint32_t>(n); }

using Size = std::array<uint64_t, 3>;

// `group` is at most 1024 threads, and is cut to the grid. `threads` is the total, as for
// dispatchThreads: a group at the edge is smaller.
struct Grid {
  Size threads, group;
};

// Runs bind(function) between start_encoding and the dispatch, with all locks that libtorch leaves
// to us. An empty grid launches nothing.
void launch_with(const char* op, const std::string& kernel, const Grid& grid,
                 const std::function<void(AOTIMetalKernelFunctionHandle)>& bind);

void set_argument(AOTIMetalKernelFunctionHandle f, unsigned index, const Tensor& t);
void set_argument(AOTIMetalKernelFunctionHandle f, unsigned index, int64_t bytes);

// Anything else is a POD of at most 8 bytes: up to torch 2.13 set_arg_int is all that there is, and
// it hands 8 bytes to the shader as they are.
template <class T>
  requires(!std::is_same_v<T, Tensor> && !std::is_same_v<T, int64_t>)
void set_argument(AOTIMetalKernelFunctionHandle f, unsigned index, const T& pod) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(int64_t));
  int64_t bytes = 0;
  std::memcpy(&bytes, &pod, sizeof pod);
  set_argument(f, index, bytes);
}

// Buffers are numbered in the order of the arguments.
template <class... Args>
void launch(const char* op, const std::string& kernel, const Grid& grid, const Args&... args) {
  launch_with(op, kernel, grid, [&](AOTIMetalKernelFunctionHandle f) {
    unsigned index = 0;
    (set_argument(f, index++, args), ...);
  });
}

// "f32", as the shaders' names have it.
const char* short_name(DType t);

// Whether W = 4 may be used for these bytes from the buffer's start: vectors lie at multiples of
// their size.
inline bool vector_aligned(const View& v, DType t) { return v.offset() % (4 * size_of(t)) == 0; }

}  // namespace fusedops::mps
