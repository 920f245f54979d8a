#include "emu.h"

#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "capture.h"
#include "group.h"
#include "runtime.h"
#include "watch.h"

namespace {

struct Kernel {
  emu::Entry entry;
  int largest_group;
};
using Library = std::map<std::string, Kernel>;

struct Constant {
  int index;
  void* value;
  size_t bytes;
};

std::mutex one_at_a_time;
Library* loading = nullptr;  // the library whose static objects register
bool recording = false;
std::string record;
thread_local std::string last_error;

std::vector<Constant>& constants() {
  static auto* all = new std::vector<Constant>;
  return *all;
}

int number(const char* variable) {
  const char* value = getenv(variable);
  return value != nullptr ? atoi(value) : 0;
}

// A shader may read its own constants, and the emulator's tables.
int allow_module(dl_phdr_info* info, size_t, void* address) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type != PT_LOAD || wanted < begin || wanted >= begin + segment.p_memsz) continue;
    for (int k = 0; k < info->dlpi_phnum; ++k) {
      const ElfW(Phdr) & other = info->dlpi_phdr[k];
      if (other.p_type != PT_LOAD) continue;
      const char* at = reinterpret_cast<const char*>(info->dlpi_addr + other.p_vaddr);
      emu::watch_allow(at, at + other.p_memsz);
    }
    return 1;
  }
  return 0;
}

void append(const emu::Launch& launch, const emu::Stats& stats, const emu::Traffic* traffic) {
  const auto size = [](const emu::Size& s) {
    return "[" + std::to_string(s.d[0]) + ", " + std::to_string(s.d[1]) + ", " +
           std::to_string(s.d[2]) + "]";
  };
  record += record.empty() ? "" : ",\n";
  record +=
      "{\"kernel\": \"" + std::string(launch.name) + "\", \"grid\": " + size(launch.grid) +
      ", \"group\": " + size(launch.group) + ", \"barriers\": " + std::to_string(stats.barriers) +
      ", \"threadgroup_bytes\": " + std::to_string(stats.threadgroup_bytes) + ", \"buffers\": {";
  const char* comma = "";
  for (int i = 0; i < emu::kArguments; ++i) {
    if (!launch.arguments[i].bound) continue;
    const emu::Traffic& t = traffic[i];
    record += std::string(comma) + "\"" + std::to_string(i) + "\": [" + std::to_string(t.loads) +
              ", " + std::to_string(t.load_bytes) + ", " + std::to_string(t.stores) + ", " +
              std::to_string(t.store_bytes) + "]";
    comma = ", ";
  }
  record += "}}";
}

void dispatch(const Kernel& kernel, const emu::Launch& launch) {
  uint64_t threads = 1;
  for (int i = 0; i < 3; ++i) {
    if (launch.grid.d[i] == 0 || launch.group.d[i] == 0) throw std::runtime_error("an empty grid");
    threads *= launch.group.d[i];
  }
  if (threads > 1024) throw std::runtime_error("a threadgroup of more than 1024 threads");
  if (kernel.largest_group != 0 && threads > static_cast<uint64_t>(kernel.largest_group)) {
    throw std::runtime_error("a threadgroup larger than max_total_threads_per_threadgroup");
  }
  if (const char* folder = getenv("EMU_CAPTURE")) emu::capture(launch, folder);
  const emu::Options options{number("EMU_ORDER"), static_cast<unsigned>(number("EMU_SEED")),
                             number("EMU_FUZZ_ULP")};
  const emu::Stats stats = emu::run(launch, kernel.entry, options);
  const emu::Traffic* traffic = emu::watch_end();
  if (recording) append(launch, stats, traffic);
}

int put(const std::string& text, char* out, int capacity) {
  if (static_cast<int>(text.size()) < capacity) strcpy(out, text.c_str());
  return static_cast<int>(text.size()) + 1;
}

}  // namespace

emu::Registered::Registered(const char* host_name, Entry entry, int largest_group) {
  if (loading != nullptr) (*loading)[host_name] = {entry, largest_group};
}

emu::FunctionConstant::FunctionConstant(int index, void* value, size_t bytes) {
  constants().push_back({index, value, bytes});
}

extern "C" {

const char* emu_last_error(void) { return last_error.c_str(); }

void* emu_open(const char* path) {
  const std::lock_guard lock(one_at_a_time);
  static std::map<std::string, std::unique_ptr<Library>> open;
  if (const auto found = open.find(path); found != open.end()) return found->second.get();
  auto library = std::make_unique<Library>();
  loading = library.get();
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  loading = nullptr;
  if (handle == nullptr) {
    last_error = dlerror();
    return nullptr;
  }
  if (library->empty()) {
    last_error = std::string(path) + " holds no kernel";
    return nullptr;
  }
  void* inside = reinterpret_cast<void*>(library->begin()->second.entry);
  dl_iterate_phdr(allow_module, inside);
  return (open[path] = std::move(library)).get();
}

void* emu_find(void* library, const char* name) {
  auto& kernels = *static_cast<Library*>(library);
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : &found->second;
}

int emu_names(void* library, char* out, int capacity) {
  std::string names;
  for (const auto& [name, kernel] : *static_cast<Library*>(library)) names += name + "\n";
  return put(names, out, capacity);
}

int emu_set_constant(int index, const void* value, size_t bytes) {
  int count = 0;
  for (const Constant& c : constants()) {
    if (c.index != index || c.bytes != bytes) continue;
    memcpy(c.value, value, bytes);
    ++count;
  }
  return count;
}

int emu_dispatch(void* kernel, const char* name, const uint32_t* grid, const uint32_t* group,
                 const void* const* addresses, const size_t* sizes, int count) {
  const std::lock_guard lock(one_at_a_time);
  emu::Launch launch{};
  launch.name = name;
  for (int i = 0; i < 3; ++i) {
    launch.grid.d[i] = grid[i];
    launch.group.d[i] = group[i];
  }
  for (int i = 0; i < count && i < emu::kArguments; ++i) {
    auto* address = static_cast<char*>(const_cast<void*>(addresses[i]));
    launch.arguments[i] = {address, sizes[i], address != nullptr || sizes[i] != 0};
  }
  try {
    dispatch(*static_cast<Kernel*>(kernel), launch);
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

void emu_record(int on) {
  const std::lock_guard lock(one_at_a_time);
  recording = on != 0;
  if (recording) record.clear();
}

int emu_recorded(char* out, int capacity) {
  const std::lock_guard lock(one_at_a_time);
  return put("[" + record + "]", out, capacity);
}

// Conversions that older libgcc lack: round to nearest, ties to even.
__attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const auto high = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40
                                                 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  __bf16 result;
  memcpy(&result, &high, sizeof result);
  return result;
}

__attribute__((weak)) __bf16 __truncdfbf2(double x) { return __truncsfbf2(static_cast<float>(x)); }
}
