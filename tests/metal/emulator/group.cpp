#include "group.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "watch.h"

namespace emu {
namespace {

enum class State { ready, at_barrier, at_exchange, done };

constexpr unsigned kLanes = 32;
constexpr size_t kOperandBytes = 32;
constexpr uint32_t kDeviceFlag = 1, kThreadgroupFlag = 2;  // of mem_flags

struct Operand {
  alignas(32) unsigned char bytes[kOperandBytes];
};

struct Running {
  Fiber fiber;
  Thread thread;
  Position position;
  State state = State::done;
  uint32_t barriers = 0, flags = 0;
  int kind = 0;  // of the operation of the simdgroup that it waits in
  size_t operand_bytes = 0;
  uint32_t partners = 0;
  Operand operand;
};

// One dispatch at a time; the lock in emu.cpp sees to that.
struct {
  const Launch* launch = nullptr;
  Entry entry = nullptr;
  Options options;
  std::vector<Running> threads;
  std::vector<Operand> operands;  // of all lanes, as they were when the last exchange was complete
  Running* now = nullptr;
  std::string error;
  std::mt19937 random;
  Stats stats;
  char* stacks = nullptr;
  size_t stack_count = 0;
  char* memory = nullptr;  // of the threadgroup
  size_t used = 0;
  std::vector<std::pair<const void*, char*>> variables;
  std::vector<std::pair<void*, size_t>> mappings;  // that only this dispatch needs
} group;

// What ThreadSanitizer knows orders by; eight bytes apart at least, of one cache line each.
struct alignas(64) Order {
  char object;
};
Order launched, finished;

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the emulator");
  return static_cast<char*>(memory);
}

// Not memcpy, which ThreadSanitizer would take for the shader's.
void copy(void* to, const void* from, size_t bytes) {
  auto* t = static_cast<volatile unsigned char*>(to);
  auto* f = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) t[i] = f[i];
}

void finish() {
  group.now->state = State::done;
  release(&finished);
  leave(true);
}

void thread_main() {
  arrived();
  acquire(&launched);
  group.entry(group.now->thread);
  finish();
}

void resume(Running& r) {
  group.now = &r;
  watch_thread(&r.position);
  enter(r.fiber);
  watch_thread(nullptr);
  group.now = nullptr;
  if (r.state == State::done) dispose(r.fiber);
  if (!group.error.empty()) throw std::runtime_error(group.error);
}

Size minus_one_up(const Size& a, const Size& b) {
  Size r;
  for (int i = 0; i < 3; ++i)
    r.d[i] = static_cast<uint32_t>((uint64_t{a.d[i]} + b.d[i] - 1) / b.d[i]);
  return r;
}

// Threadgroups are in no order: under ThreadSanitizer none sees the memory of another.
void provide_memory(size_t count) {
  if (races_are_watched() || group.stack_count < count) {
    if (group.stacks != nullptr && !races_are_watched()) {
      munmap(group.stacks, group.stack_count * kStackBytes);
    }
    group.stacks = map(count * kStackBytes);
    group.stack_count = count;
    if (races_are_watched()) group.mappings.push_back({group.stacks, count * kStackBytes});
  }
  if (races_are_watched() || group.memory == nullptr) {
    group.memory = map(kThreadgroupBytes);
    if (races_are_watched()) group.mappings.push_back({group.memory, kThreadgroupBytes});
  }
  memset(group.memory, 0xff, kThreadgroupBytes);  // NaN in every floating type
  group.used = 0;
  group.variables.clear();
  watch_group(group.memory);
}

void set_up(const Size& at, const Size& groups) {
  const Launch& launch = *group.launch;
  Size size;
  for (int i = 0; i < 3; ++i) {
    size.d[i] = std::min(launch.group.d[i], launch.grid.d[i] - at.d[i] * launch.group.d[i]);
  }
  const uint32_t count = size.d[0] * size.d[1] * size.d[2];
  const uint32_t simdgroups = (count + kLanes - 1) / kLanes;
  group.threads.resize(count);
  group.operands.resize(simdgroups * kLanes);
  provide_memory(count);
  const uint64_t group_index =
      at.d[0] + uint64_t{groups.d[0]} * (at.d[1] + uint64_t{groups.d[1]} * at.d[2]);
  for (uint32_t i = 0; i < count; ++i) {
    Running& r = group.threads[i];
    Thread& t = r.thread;
    t.launch = &launch;
    t.in_group = {{i % size.d[0], i / size.d[0] % size.d[1], i / (size.d[0] * size.d[1])}};
    t.group_in_grid = at;
    t.groups = groups;
    t.size = size;
    for (int k = 0; k < 3; ++k) t.in_grid.d[k] = at.d[k] * launch.group.d[k] + t.in_group.d[k];
    t.index = i;
    t.lane = i % kLanes;
    t.simdgroup = i / kLanes;
    t.simdgroups = simdgroups;
    r.state = State::ready;
    r.barriers = 0;
    r.fiber.stack = group.stacks + i * kStackBytes;
    r.position = {};
    r.position.thread =
        t.in_grid.d[0] +
        uint64_t{launch.grid.d[0]} * (t.in_grid.d[1] + uint64_t{launch.grid.d[1]} * t.in_grid.d[2]);
    r.position.group = group_index;
    r.position.simdgroup = t.simdgroup;
    r.position.stack = r.fiber.stack;
    prepare(r.fiber, thread_main);
  }
}

bool is_ready(const Running& r) { return r.state == State::ready; }

// Lets threads run until each waits or is done; those of some simdgroups only, as the order has it.
// Whether any did.
bool step(std::vector<uint32_t>& order) {
  std::vector<Running>& threads = group.threads;
  if (std::none_of(threads.begin(), threads.end(), is_ready)) return false;
  uint32_t simdgroups = ~0u;
  if (group.options.order == 1) {
    const auto last = std::find_if(threads.rbegin(), threads.rend(), is_ready);
    simdgroups = 1u << last->thread.simdgroup;
  } else if (group.options.order == 2) {
    std::shuffle(order.begin(), order.end(), group.random);
    simdgroups = group.random();
    const auto first =
        std::find_if(order.begin(), order.end(), [&](uint32_t i) { return is_ready(threads[i]); });
    simdgroups |= 1u << threads[*first].thread.simdgroup;
  }
  for (const uint32_t i : order) {
    Running& r = threads[i];
    if (is_ready(r) && (simdgroups >> r.thread.simdgroup & 1) != 0) resume(r);
  }
  return true;
}

// Releases the lanes of a simdgroup that wait in the same operation, once none of it still runs.
// Lanes that wait in another one, or at a barrier, are elsewhere in divergent code.
bool complete_exchange(uint32_t simdgroup) {
  const uint32_t begin = simdgroup * kLanes;
  const uint32_t end =
      std::min<uint32_t>(begin + kLanes, static_cast<uint32_t>(group.threads.size()));
  Running* first = nullptr;
  for (uint32_t i = begin; i < end; ++i) {
    Running& r = group.threads[i];
    if (is_ready(r)) return false;
    if (r.state == State::at_exchange && first == nullptr) first = &r;
  }
  if (first == nullptr) return false;
  const int kind = first->kind;
  const size_t bytes = first->operand_bytes;
  uint32_t partners = 0;
  for (uint32_t i = begin; i < end; ++i) {
    const Running& r = group.threads[i];
    const bool same = r.state == State::at_exchange && r.kind == kind && r.operand_bytes == bytes;
    if (same) partners |= 1u << (i - begin);
    const bool whole = kind == kMatrixMultiply || kind == kSimdgroupBarrier;
    if (whole && !same) {
      throw std::runtime_error(
          "an operation of the whole simdgroup in divergent control flow: "
          "lane " +
          std::to_string(i - begin) + " of simdgroup " + std::to_string(simdgroup) +
          " is elsewhere");
    }
  }
  for (uint32_t i = begin; i < end; ++i) {
    if ((partners >> (i - begin) & 1) == 0) continue;
    Running& r = group.threads[i];
    r.partners = partners;
    r.state = State::ready;
    copy(group.operands[i].bytes, r.operand.bytes, kOperandBytes);
  }
  return true;
}

// Whether all threads are done. Releases a barrier that all have reached.
bool complete_barrier() {
  std::vector<Running>& threads = group.threads;
  size_t waiting = 0, done = 0;
  for (const Running& r : threads) {
    waiting += r.state == State::at_barrier;
    done += r.state == State::done;
  }
  if (done == threads.size()) return true;
  if (waiting + done != threads.size()) {
    throw std::runtime_error("deadlock: a barrier in divergent control flow");
  }
  if (done != 0) {
    throw std::runtime_error("threadgroup_barrier reached by " + std::to_string(waiting) + " of " +
                             std::to_string(threads.size()) + " threads: the others have returned");
  }
  for (Running& r : threads) {
    if (r.flags != threads[0].flags) {
      throw std::runtime_error("threads meet at two different barriers");
    }
    r.state = State::ready;
    ++r.barriers;
    r.position.device_barriers += (r.flags & kDeviceFlag) != 0;
    r.position.threadgroup_barriers += (r.flags & kThreadgroupFlag) != 0;
  }
  ++group.stats.barriers;
  return false;
}

void run_group(const Size& at, const Size& groups) {
  set_up(at, groups);
  std::vector<uint32_t> order(group.threads.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  if (group.options.order == 1) std::reverse(order.begin(), order.end());
  const uint32_t simdgroups = group.threads[0].thread.simdgroups;
  for (;;) {
    bool moved = step(order);
    for (uint32_t s = 0; s < simdgroups; ++s) moved |= complete_exchange(s);
    if (!moved && complete_barrier()) break;
  }
  group.stats.threadgroup_bytes = std::max(group.stats.threadgroup_bytes, group.used);
}

void run_all(uint64_t count, const Size& groups) {
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = group.options.order == 1 ? count - 1 - i : i;
    run_group({{static_cast<uint32_t>(at % groups.d[0]),
                static_cast<uint32_t>(at / groups.d[0] % groups.d[1]),
                static_cast<uint32_t>(at / groups.d[0] / groups.d[1])}},
              groups);
  }
}

void clean_up() {
  for (Running& r : group.threads) dispose(r.fiber);
  for (const auto& [memory, bytes] : group.mappings) munmap(memory, bytes);
  if (!group.mappings.empty()) {
    group.mappings.clear();
    group.stacks = nullptr;
    group.memory = nullptr;
    group.stack_count = 0;
  }
  acquire(&finished);
  watch_thread(nullptr);
  group.now = nullptr;
}

// The line of the shader, where the access has one.
std::string source_line(const void* address) {
  Dl_info info;
  if (address == nullptr || dladdr(address, &info) == 0) return "";
  char command[4096];
  const size_t offset =
      static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase);
  snprintf(command, sizeof command, "LD_PRELOAD= addr2line -s -e '%s' %#zx 2>/dev/null",
           info.dli_fname, offset - 1);
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "";
  char line[512] = "";
  if (fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
  pclose(pipe);
  line[strcspn(line, "\n")] = 0;
  return line[0] == 0 || line[0] == '?' ? "" : " (" + std::string(line) + ")";
}

}  // namespace

Stats run(const Launch& launch, Entry entry, const Options& options) {
  group.launch = &launch;
  group.entry = entry;
  group.options = options;
  group.random.seed(options.seed + 1);
  group.error.clear();
  group.stats = {};
  const Size groups = minus_one_up(launch.grid, launch.group);
  const uint64_t count = uint64_t{groups.d[0]} * groups.d[1] * groups.d[2];
  watch_begin(launch);
  release(&launched);
  try {
    run_all(count, groups);
  } catch (...) {
    clean_up();
    throw;
  }
  clean_up();
  group.stats.groups = count;
  group.stats.threads = uint64_t{launch.grid.d[0]} * launch.grid.d[1] * launch.grid.d[2];
  return group.stats;
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (group.now == nullptr) throw std::runtime_error(text);
  const Thread& t = group.now->thread;
  char where[256];
  snprintf(where, sizeof where, " [threadgroup (%u, %u, %u), thread (%u, %u, %u)]",
           t.group_in_grid.d[0], t.group_in_grid.d[1], t.group_in_grid.d[2], t.in_group.d[0],
           t.in_group.d[1], t.in_group.d[2]);
  watch_thread(nullptr);
  group.error = std::string(text) + where + source_line(watch_caller());
  finish();
  __builtin_unreachable();
}

uint32_t lane() { return group.now->thread.lane; }

void threadgroup_barrier(uint32_t flags) {
  Running& r = *group.now;
  // Two objects in turn: what a fast thread releases at the next barrier must not reach a slow one.
  char* order = group.memory + 64 * (r.barriers & 1);
  r.state = State::at_barrier;
  r.flags = flags;
  if (flags != 0) release(order);
  leave(false);
  if (flags != 0) acquire(order);
}

void simdgroup_barrier(uint32_t flags) {
  Running& r = *group.now;
  const uint32_t turn = r.position.simd_device_barriers + r.position.simd_threadgroup_barriers;
  char* order = group.memory + 128 * (r.thread.simdgroup + 1) + 64 * (turn & 1);
  r.state = State::at_exchange;
  r.kind = kSimdgroupBarrier;
  r.operand_bytes = flags;
  if (flags != 0) release(order);
  leave(false);
  if (flags != 0) acquire(order);
  r.position.simd_device_barriers += (flags & kDeviceFlag) != 0;
  r.position.simd_threadgroup_barriers += (flags & kThreadgroupFlag) != 0;
}

uint32_t exchange(int kind, const void* operand, size_t bytes, void* of_all_lanes) {
  Running& r = *group.now;
  if (bytes > kOperandBytes)
    fail("an operand of the simdgroup has %zu bytes, at most 32 do", bytes);
  copy(r.operand.bytes, operand, bytes);
  r.state = State::at_exchange;
  r.kind = kind;
  r.operand_bytes = bytes;
  leave(false);
  for (uint32_t i = 0; i < kLanes; ++i) {
    copy(static_cast<char*>(of_all_lanes) + i * bytes,
         group.operands[r.thread.simdgroup * kLanes + i].bytes, bytes);
  }
  return r.partners;
}

void* threadgroup_memory(const void* declaration, size_t bytes, size_t alignment) {
  for (const auto& [known, memory] : group.variables) {
    if (known == declaration) return memory;
  }
  const size_t unit = std::max<size_t>(alignment, 16);
  const size_t begin = (group.used + unit - 1) / unit * unit;
  if (begin + bytes > kThreadgroupBytes) {
    fail("threadgroup memory: %zu bytes, there are %zu", begin + bytes, kThreadgroupBytes);
  }
  group.used = begin + bytes;
  watch_declared(group.used);
  group.variables.emplace_back(declaration, group.memory + begin);
  return group.memory + begin;
}

float fuzz(float x) {
  const int range = group.options.fuzz_ulp;
  if (range == 0 || x != x || __builtin_isinf(x) || x == 0) return x;
  const float size = __builtin_fabsf(x);
  int32_t bits;
  memcpy(&bits, &size, sizeof bits);
  bits += static_cast<int32_t>(group.random() % (2u * static_cast<unsigned>(range) + 1)) - range;
  bits = std::min(std::max(bits, 0), 0x7f800000);  // below the least float is zero
  float y;
  memcpy(&y, &bits, sizeof y);
  return __builtin_copysignf(y, x);
}

}  // namespace emu
