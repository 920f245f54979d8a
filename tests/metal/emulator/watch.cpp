#include "watch.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "fiber.h"

namespace emu {
namespace {

// Who touched a byte last. Of several readers since the last write, two different ones.
struct Access {
  uint64_t thread = 0;  // + 1; 0 is nobody
  uint64_t group = 0;
  uint32_t simdgroup = 0, barriers = 0, simd_barriers = 0;
};
struct History {
  Access writer, reader, other_reader;
};

// Larger buffers are not watched for races between threads: a History is 96 bytes.
constexpr size_t kWatchedBytes = 1 << 20;

struct Range {
  uintptr_t begin, end;
};

struct Watched {
  Range range{0, 0};
  bool shared = false;  // with another argument
  Traffic traffic;
  std::unique_ptr<std::vector<History>> history;
};

struct {
  const Launch* launch = nullptr;
  const Position* position = nullptr;
  Watched buffers[kArguments];
  int latest = 0;
  Range threadgroup{0, 0};
  bool written[kThreadgroupBytes];
  std::vector<History> history{kThreadgroupBytes};
  std::vector<Range> allowed;
  const void* caller = nullptr;  // the shader's instruction
} watch;

bool ordered(const Access& a, const Access& b) {
  if (a.thread == 0 || a.thread == b.thread) return true;
  if (a.group != b.group) return false;
  if (a.barriers != b.barriers) return true;
  return a.simdgroup == b.simdgroup && a.simd_barriers != b.simd_barriers;
}

// Remembers an access, and says whether another one races with it.
bool races(History& h, const Access& now, bool writes) {
  if (!ordered(h.writer, now)) return true;
  if (writes) {
    if (!ordered(h.reader, now) || !ordered(h.other_reader, now)) return true;
    h = {now, {}, {}};
    return false;
  }
  if (h.reader.thread == now.thread) {
    h.reader = now;
  } else if (h.reader.thread == 0 || ordered(h.reader, now)) {
    h.reader = now;  // whoever races with the former races with this one or was found out before
  } else {
    h.other_reader = now;
  }
  return false;
}

bool within(const Range& r, uintptr_t address) { return address >= r.begin && address < r.end; }

const char* verb(bool writes) { return writes ? "store" : "load"; }

void in_threadgroup_memory(uintptr_t address, size_t bytes, bool writes, bool atomic) {
  const size_t first = address - watch.threadgroup.begin;
  if (address + bytes > watch.threadgroup.end) {
    fail("%s of %zu bytes past the end of threadgroup memory", verb(writes), bytes);
  }
  const Position& p = *watch.position;
  const Access now{p.thread + 1, p.group, p.simdgroup, p.threadgroup_barriers,
                   p.simd_threadgroup_barriers};
  for (size_t i = first; i < first + bytes; ++i) {
    if (writes) {
      watch.written[i] = true;
    } else if (!watch.written[i]) {
      fail("load of threadgroup memory that no thread has written, at byte %zu", i);
    }
    if (!atomic && races(watch.history[i], now, writes)) {
      fail(
          "race: %s of threadgroup memory at byte %zu, which thread %llu touches with no barrier "
          "in between",
          verb(writes), i,
          static_cast<unsigned long long>(
              std::max(watch.history[i].writer.thread, watch.history[i].reader.thread) - 1));
    }
  }
}

void in_buffer(int index, uintptr_t address, size_t bytes, bool writes, bool atomic) {
  Watched& buffer = watch.buffers[index];
  if (address + bytes > buffer.range.end) {
    fail("%s of %zu bytes at byte %zu of buffer(%d), which has %zu", verb(writes), bytes,
         static_cast<size_t>(address - buffer.range.begin), index,
         static_cast<size_t>(buffer.range.end - buffer.range.begin));
  }
  (writes ? buffer.traffic.stores : buffer.traffic.loads) += 1;
  (writes ? buffer.traffic.store_bytes : buffer.traffic.load_bytes) += bytes;
  const size_t size = buffer.range.end - buffer.range.begin;
  if (atomic || size > kWatchedBytes) return;
  if (buffer.history == nullptr) {
    if (!writes) return;  // until something is written, nothing races
    buffer.history = std::make_unique<std::vector<History>>(size);
  }
  const Position& p = *watch.position;
  const Access now{p.thread + 1, p.group, p.simdgroup, p.device_barriers, p.simd_device_barriers};
  const size_t first = address - buffer.range.begin;
  for (size_t i = first; i < first + bytes; ++i) {
    History& h = (*buffer.history)[i];
    if (races(h, now, writes)) {
      fail("race: %s of buffer(%d) at byte %zu, which thread %llu of the grid touches in no order",
           verb(writes), index, i,
           static_cast<unsigned long long>(std::max(h.writer.thread, h.reader.thread) - 1));
    }
  }
}

// Of arguments that share memory the one that begins last, and of those the first.
int buffer_at(uintptr_t address) {
  const Watched& latest = watch.buffers[watch.latest];
  if (!latest.shared && within(latest.range, address)) return watch.latest;
  int found = -1;
  for (int i = 0; i < kArguments; ++i) {
    const Range& r = watch.buffers[i].range;
    if (!within(r, address)) continue;
    if (found < 0 || r.begin > watch.buffers[found].range.begin) found = i;
  }
  if (found >= 0) watch.latest = found;
  return found;
}

void touched(uintptr_t address, size_t bytes, bool writes, const void* caller,
             bool atomic = false) {
  watch.caller = caller;
  if (watch.position == nullptr || bytes == 0) return;
  if (address - reinterpret_cast<uintptr_t>(watch.position->stack) < kStackBytes) return;
  if (within(watch.threadgroup, address)) {
    in_threadgroup_memory(address, bytes, writes, atomic);
    return;
  }
  const int index = buffer_at(address);
  if (index >= 0) {
    in_buffer(index, address, bytes, writes, atomic);
    return;
  }
  for (const Range& r : watch.allowed) {
    if (within(r, address)) return;
  }
  // The buffer that it most likely meant.
  int nearest = -1;
  uintptr_t best = UINTPTR_MAX;
  for (int i = 0; i < kArguments; ++i) {
    const Range& r = watch.buffers[i].range;
    if (r.begin == r.end) continue;
    const uintptr_t distance = address < r.begin ? r.begin - address : address - r.end;
    if (distance < best) best = distance, nearest = i;
  }
  if (nearest < 0) fail("%s of %zu bytes outside of every buffer", verb(writes), bytes);
  const Range& r = watch.buffers[nearest].range;
  fail("%s of %zu bytes outside of every buffer, %zu bytes %s buffer(%d)", verb(writes), bytes,
       static_cast<size_t>(best), address < r.begin ? "before" : "past the end of", nearest);
}

}  // namespace

void watch_begin(const Launch& launch) {
  watch.launch = &launch;
  watch.latest = 0;
  for (int i = 0; i < kArguments; ++i) {
    const Argument& a = launch.arguments[i];
    const auto begin = reinterpret_cast<uintptr_t>(a.address);
    watch.buffers[i] = {};
    if (!a.bound) continue;
    watch.buffers[i].range = {begin, begin + a.bytes};
    for (int j = 0; j < i; ++j) {
      const Range& other = watch.buffers[j].range;
      if (begin < other.end && other.begin < begin + a.bytes) {
        watch.buffers[i].shared = watch.buffers[j].shared = true;
      }
    }
  }
}

void watch_group(const char* memory) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const size_t used = watch.threadgroup.end - watch.threadgroup.begin;
  std::fill_n(watch.written, used, false);
  std::fill_n(watch.history.begin(), used, History{});
  watch.threadgroup = {begin, begin};
}

void watch_declared(size_t bytes) { watch.threadgroup.end = watch.threadgroup.begin + bytes; }

void watch_thread(const Position* position) { watch.position = position; }

const Traffic* watch_end() {
  static Traffic traffic[kArguments];
  for (int i = 0; i < kArguments; ++i) traffic[i] = watch.buffers[i].traffic;
  watch.position = nullptr;
  return traffic;
}

void watch_allow(const void* begin, const void* end) {
  watch.allowed.push_back({reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(end)});
}

const void* watch_caller() { return watch.caller; }

void atomic_access(const volatile void* address, size_t bytes, bool writes) {
  touched(reinterpret_cast<uintptr_t>(address), bytes, writes, __builtin_return_address(0), true);
}

}  // namespace emu

// What clang calls: -fsanitize=kernel-address for accesses, UBSan's minimal runtime for the rest.
extern "C" {
#define EMU_CALLER __builtin_return_address(0)
#define EMU_SIZED(n)                                 \
  void __asan_load##n##_noabort(uintptr_t address) { \
    emu::touched(address, n, false, EMU_CALLER);     \
  }                                                  \
  void __asan_store##n##_noabort(uintptr_t address) { emu::touched(address, n, true, EMU_CALLER); }
EMU_SIZED(1)
EMU_SIZED(2)
EMU_SIZED(4)
EMU_SIZED(8)
EMU_SIZED(16)
#undef EMU_SIZED
void __asan_loadN_noabort(uintptr_t address, size_t bytes) {
  emu::touched(address, bytes, false, EMU_CALLER);
}
void __asan_storeN_noabort(uintptr_t address, size_t bytes) {
  emu::touched(address, bytes, true, EMU_CALLER);
}
void* __asan_memcpy(void* to, const void* from, size_t bytes) {
  emu::touched(reinterpret_cast<uintptr_t>(from), bytes, false, EMU_CALLER);
  emu::touched(reinterpret_cast<uintptr_t>(to), bytes, true, EMU_CALLER);
  return memcpy(to, from, bytes);
}
void* __asan_memmove(void* to, const void* from, size_t bytes) {
  emu::touched(reinterpret_cast<uintptr_t>(from), bytes, false, EMU_CALLER);
  emu::touched(reinterpret_cast<uintptr_t>(to), bytes, true, EMU_CALLER);
  return memmove(to, from, bytes);
}
void* __asan_memset(void* to, int value, size_t bytes) {
  emu::touched(reinterpret_cast<uintptr_t>(to), bytes, true, EMU_CALLER);
  return memset(to, value, bytes);
}
void __asan_handle_no_return(void) {}
// Of UBSan each handler's data begins with the place in the source.
struct Place {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1_abort(const Place* place, uintptr_t address) {
  emu::watch.caller = nullptr;
  emu::fail("access at %#zx is not aligned to its type (%s:%u)", static_cast<size_t>(address),
            place->file, place->line);
}
void __ubsan_handle_out_of_bounds_abort(const Place* place, uintptr_t index) {
  emu::watch.caller = nullptr;
  emu::fail("index %zd is out of the bounds of its array (%s:%u)", static_cast<ssize_t>(index),
            place->file, place->line);
}
void __ubsan_handle_divrem_overflow_abort(const Place* place, uintptr_t, uintptr_t) {
  emu::watch.caller = nullptr;
  emu::fail("an integer is divided by zero (%s:%u)", place->file, place->line);
}
}
