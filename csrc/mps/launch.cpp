#include "launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "shaders.h"

namespace fusedops::mps {
namespace {

// What torch says of the call that failed; torch 2.13 and later have it.
const char* reason() {
  using What = const char* (*)();
  static const What what =
      reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = what ? what() : nullptr;
  return text && *text ? text : "an error without a reason (torch 2.13 or later gives one)";
}

void require(AOTITorchError error, const char* op, const char* requirement) {
  if (error != AOTI_TORCH_SUCCESS) fail(op, requirement, " but got ", reason());
}

// torch's cache of functions is not locked, and a function's encoder is a member of it, shared by
// everybody who looked the function up: one mutex for the look-ups, one around each block. The
// library is never deleted: its static destruction would come after that of Metal.
struct Shaders {
  AOTIMetalShaderLibraryHandle library = nullptr;
  std::mutex lookup, block;

  AOTIMetalKernelFunctionHandle function(const char* op, const std::string& kernel) {
    const std::lock_guard<std::mutex> guard(lookup);
    if (!library)
      require(aoti_torch_mps_create_shader_library(kShaders, &library), op,
              "Metal must compile the shaders");
    AOTIMetalKernelFunctionHandle f = nullptr;
    require(aoti_torch_mps_get_kernel_function(library, kernel.c_str(), &f), op,
            ("Metal must have the kernel " + kernel).c_str());
    return f;
  }
};

Shaders& shaders() {
  static Shaders* const all = new Shaders;
  return *all;
}

struct Job {
  const char* op;
  const Grid& grid;
  const std::function<void(AOTIMetalKernelFunctionHandle)>& bind;
  std::exception_ptr error;

  void encode(AOTIMetalKernelFunctionHandle f) const {
    require(aoti_torch_mps_start_encoding(f), op, "Metal must give an encoder");
    bind(f);
    require(aoti_torch_mps_dispatch_array_with_group_size(
                f, grid.threads.data(), grid.threads.size(), grid.group.data(), grid.group.size()),
            op, "Metal must accept the dispatch");
  }
};

// No exception passes through torch's frames: the ones of 2.10 drop its text.
void encode(AOTIMetalKernelFunctionHandle f, void* user) {
  Job& job = *static_cast<Job*>(user);
  try {
    job.encode(f);
  } catch (...) {
    job.error = std::current_exception();
  }
}

}  // namespace

void check_extent(const char* op, const char* what, const View& v) {
  int64_t last = 0;
  for (int64_t d = 0; d < v.rank() && v.numel > 0; d++) last += (v.size(d) - 1) * v.stride(d);
  if (last >= kMost)
    fail(op, what, " must lie within 2^32 - 256 elements on MPS but got shape ", shape_of(v),
         " over ", last + 1, " elements");
}

void launch_with(const char* op, const std::string& kernel, const Grid& grid,
                 const std::function<void(AOTIMetalKernelFunctionHandle)>& bind) {
  Grid cut = grid;
  for (size_t i = 0; i < cut.threads.size(); i++) {
    if (cut.threads[i] == 0) return;
    if (cut.threads[i] > static_cast<uint64_t>(kMost))
      fail(op, "a grid on MPS must have at most 2^32 - 256 threads a dimension but got ",
           cut.threads[i]);
    cut.group[i] = std::min(cut.group[i], cut.threads[i]);
  }
  AOTIMetalKernelFunctionHandle f = shaders().function(op, kernel);
  Job job{op, cut, bind, nullptr};
  const std::lock_guard<std::mutex> guard(shaders().block);
  // No ATen call may happen inside: it would wait for the queue that runs this block.
  const AOTITorchError error = aoti_torch_mps_run_command_block(f, &encode, &job);
  if (job.error) std::rethrow_exception(job.error);
  require(error, op, "Metal must run the kernel");
}

void set_argument(AOTIMetalKernelFunctionHandle f, unsigned index, const Tensor& t) {
  require(aoti_torch_mps_set_arg_tensor(f, index, t.get()), "fusedops",
          "Metal must accept a tensor argument");
}

void set_argument(AOTIMetalKernelFunctionHandle f, unsigned index, int64_t bytes) {
  require(aoti_torch_mps_set_arg_int(f, index, bytes), "fusedops",
          "Metal must accept an argument of 8 bytes");
}

const char* short_name(DType t) {
  const char* const names[] = {"f32", "f16", "bf16", "f64"};
  return names[static_cast<int>(t)];
}

}  // namespace fusedops::mps
