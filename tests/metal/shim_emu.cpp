// libtorch's C functions for Metal (aoti_torch_mps_*), as the library's host code calls them, on
// the emulator of emulator/emu.cpp. They refuse what goes wrong or undefined on a Mac.
#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "emu.h"
#include "fakemps.h"

namespace {

constexpr unsigned kArguments = 31;  // of Metal's table of buffers
constexpr size_t kScalarBytes = 8;   // set_arg_int is setBytes of an int64

struct Argument {
  at::Tensor tensor;  // keeps the memory until the launch has run
  char* address = nullptr;
  size_t bytes = 0;
  int64_t scalar = 0;
  bool bound = false;
};
using Arguments = std::array<Argument, kArguments>;

struct Function {
  std::string name;
  void* kernel = nullptr;
  bool encoding = false;
  Arguments arguments;
};

struct Library {
  void* handle = nullptr;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::atomic<int> lookups{0};
};

thread_local bool in_block = false;
// The function whose block is open: only one thread may be in one, its encoder being shared.
std::mutex block_mutex;
std::set<Function*> open_blocks;

// Long enough for another thread to come in where nothing keeps it out.
void linger() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

Function& function_of(AOTIMetalKernelFunctionHandle handle) {
  return *reinterpret_cast<Function*>(handle);
}

Function& encoding(AOTIMetalKernelFunctionHandle handle, unsigned index) {
  Function& function = function_of(handle);
  TORCH_CHECK(function.encoding, function.name, ": an argument before start_encoding");
  TORCH_CHECK(index < kArguments, function.name, ": argument ", index, " of at most ", kArguments);
  return function;
}

// The source as a shared library: what Python's emulator.py prints when it is given a file.
std::string compiled(const std::string& source) {
  const char* compiler = std::getenv("FUSEDOPS_METAL_COMPILER");
  TORCH_CHECK(compiler != nullptr, "FUSEDOPS_METAL_COMPILER names no compiler of shaders");
  for (const char c : source) {
    TORCH_CHECK(static_cast<unsigned char>(c) < 128, "a shader's source must be ASCII");
  }
  std::string folder = std::filesystem::temp_directory_path() / "fusedops-XXXXXX";
  TORCH_CHECK(mkdtemp(folder.data()) != nullptr, "no temporary folder for a shader");
  const std::string path = folder + "/shaders.metal";
  std::ofstream(path) << source;
  std::string answer;
  FILE* pipe = popen((std::string(compiler) + " " + path).c_str(), "r");
  TORCH_CHECK(pipe != nullptr, "the compiler of shaders does not start");
  std::array<char, 4096> buffer;
  while (std::fgets(buffer.data(), buffer.size(), pipe) != nullptr) answer += buffer.data();
  const int status = pclose(pipe);
  std::remove(path.c_str());
  std::remove(folder.c_str());
  TORCH_CHECK(status == 0, "Failed to create metal library, error: ", answer);
  answer.erase(answer.find_last_not_of('\n') + 1);
  return answer;
}

// What is bound when the dispatch is encoded, run when the queue comes to it.
struct Launch {
  std::string name;
  void* kernel;
  std::array<uint32_t, 3> grid, group;
  Arguments arguments;

  void operator()() {
    std::array<const void*, kArguments> addresses{};
    std::array<size_t, kArguments> sizes{};
    for (unsigned i = 0; i < kArguments; ++i) {
      const Argument& a = arguments[i];
      if (!a.bound) continue;
      addresses[i] = a.tensor.defined() ? a.address : reinterpret_cast<const char*>(&a.scalar);
      sizes[i] = a.tensor.defined() ? a.bytes : kScalarBytes;
    }
    const int failed = emu_dispatch(kernel, name.c_str(), grid.data(), group.data(),
                                    addresses.data(), sizes.data(), kArguments);
    TORCH_CHECK(failed == 0, name, ": ", emu_last_error());
  }
};

void dispatch(AOTIMetalKernelFunctionHandle handle, const uint64_t* length, size_t length_size,
              const uint64_t* group, size_t group_size) {
  Function& function = function_of(handle);
  TORCH_CHECK(function.encoding, function.name, ": dispatch before start_encoding");
  TORCH_CHECK(length_size >= 1 && length_size <= 3, function.name, ": ", length_size,
              " dimensions of the grid");
  TORCH_CHECK(group_size == 0 || group_size == length_size, function.name, ": ", group_size,
              " dimensions of a group, ", length_size, " of the grid");
  Launch launch{function.name, function.kernel, {1, 1, 1}, {1, 1, 1}, function.arguments};
  uint64_t threads = 1;
  for (size_t i = 0; i < length_size; ++i) {
    TORCH_CHECK(length[i] > 0 && length[i] <= UINT32_MAX, function.name, ": ", length[i],
                " threads in dimension ", i, " of the grid");
    launch.grid[i] = static_cast<uint32_t>(length[i]);
    const uint64_t side =
        group_size != 0 ? group[i] : (i == 0 ? std::min<uint64_t>(length[0], 1024) : 1);
    TORCH_CHECK(side > 0, function.name, ": an empty group");
    launch.group[i] = static_cast<uint32_t>(std::min<uint64_t>(side, UINT32_MAX));
    threads = std::min<uint64_t>(threads * launch.group[i], UINT32_MAX);
  }
  TORCH_CHECK(threads <= 1024, function.name, ": Threadgroup size exceeds 1024 limit");
  fakemps::submit(std::move(launch));
}

struct Block {
  explicit Block(Function& f) : function(f) {
    TORCH_CHECK(!in_block, f.name, ": a command block inside another waits for itself");
    {
      std::lock_guard lock(block_mutex);
      TORCH_CHECK(open_blocks.insert(&f).second, f.name, ": two threads share its encoder");
    }
    in_block = true;
    linger();
  }
  ~Block() {
    std::lock_guard lock(block_mutex);
    open_blocks.erase(&function);
    function.encoding = false;
    in_block = false;
  }
  Function& function;
};

// Whoever looks functions up while another does sees libtorch's unordered_map half made.
struct Lookup {
  explicit Lookup(Library& l) : library(l) {
    if (library.lookups++ != 0) {
      --library.lookups;
      TORCH_CHECK(false, "two threads look functions up in one library");
    }
    linger();
  }
  ~Lookup() { --library.lookups; }
  Library& library;
};

}  // namespace

bool fakemps::in_command_block() { return in_block; }

#define SHIM AOTI_TORCH_EXPORT AOTITorchError
#define GUARDED(...) AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(__VA_ARGS__)

extern "C" {

SHIM aoti_torch_mps_create_shader_library(const char* source,
                                          AOTIMetalShaderLibraryHandle* out){GUARDED({
  const std::string path = compiled(source);
  void* handle = emu_open(path.c_str());
  TORCH_CHECK(handle != nullptr, "Failed to create metal library, error: ", emu_last_error());
  auto library = std::make_unique<Library>();
  library->handle = handle;
  *out = reinterpret_cast<AOTIMetalShaderLibraryHandle>(library.release());
})}

SHIM aoti_torch_mps_delete_shader_library(AOTIMetalShaderLibraryHandle handle){
    GUARDED({ delete reinterpret_cast<Library*>(handle); })}

SHIM aoti_torch_mps_get_kernel_function(AOTIMetalShaderLibraryHandle handle, const char* name,
                                        AOTIMetalKernelFunctionHandle* out){GUARDED({
  Library& library = *reinterpret_cast<Library*>(handle);
  const Lookup lookup(library);
  std::unique_ptr<Function>& function = library.functions[name];
  if (function == nullptr) {
    void* kernel = emu_find(library.handle, name);
    TORCH_CHECK(kernel != nullptr, "Failed to create function state object for: ", name);
    function = std::make_unique<Function>();
    function->name = name;
    function->kernel = kernel;
  }
  *out = reinterpret_cast<AOTIMetalKernelFunctionHandle>(function.get());
})}

SHIM aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionHandle handle,
                                      aoti_torch_mps_command_block_callback_t callback,
                                      void* user){GUARDED({
  const Block block(function_of(handle));
  callback(handle, user);
})}

SHIM aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle handle){GUARDED({
  Function& function = function_of(handle);
  TORCH_CHECK(in_block, function.name, ": start_encoding outside of a command block");
  function.encoding = true;
  function.arguments = {};
})}

SHIM aoti_torch_mps_set_arg_tensor(AOTIMetalKernelFunctionHandle handle, unsigned index,
                                   AtenTensorHandle tensor){GUARDED({
  Function& function = encoding(handle, index);
  const at::Tensor& t = *torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor);
  TORCH_CHECK(t.is_mps(), "Placeholder storage has not been allocated on MPS device! (argument ",
              index, " of ", function.name, " is on ", t.device(), ")");
  const size_t offset =
      static_cast<size_t>(t.storage_offset()) * static_cast<size_t>(t.element_size());
  TORCH_CHECK(offset <= t.storage().nbytes(), function.name, ": argument ", index,
              " starts behind its memory");
  Argument& argument = function.arguments[index];
  argument = {t, fakemps::host_address(t.storage().data()) + offset, t.storage().nbytes() - offset,
              0, true};
})}

SHIM aoti_torch_mps_set_arg_int(AOTIMetalKernelFunctionHandle handle, unsigned index,
                                int64_t value){GUARDED({
  Argument& argument = encoding(handle, index).arguments[index];
  argument = {};
  argument.scalar = value;
  argument.bound = true;
})}

SHIM aoti_torch_mps_dispatch_single(AOTIMetalKernelFunctionHandle handle, uint64_t length){
    GUARDED({ dispatch(handle, &length, 1, nullptr, 0); })}

SHIM aoti_torch_mps_dispatch_single_with_group_size(AOTIMetalKernelFunctionHandle handle,
                                                    uint64_t length, uint64_t group){
    GUARDED({ dispatch(handle, &length, 1, &group, 1); })}

SHIM aoti_torch_mps_dispatch_array(AOTIMetalKernelFunctionHandle handle, const uint64_t* length,
                                   size_t length_size){
    GUARDED({ dispatch(handle, length, length_size, nullptr, 0); })}

SHIM aoti_torch_mps_dispatch_array_with_group_size(AOTIMetalKernelFunctionHandle handle,
                                                   const uint64_t* length, size_t length_size,
                                                   const uint64_t* group, size_t group_size) {
  GUARDED({ dispatch(handle, length, length_size, group, group_size); })
}

}  // extern "C"
