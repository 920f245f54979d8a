// Every load and store of a shader, seen by the functions that clang's instrumentation calls:
// counts per buffer, and refuses what is out of bounds, never written, misaligned or a race.
//
// Absent from the lanes of the sanitizers, whose instrumentation takes its place.
#pragma once

#include <stdint.h>

#include "runtime.h"

namespace emu {

struct Traffic {
  uint64_t loads = 0, load_bytes = 0, stores = 0, store_bytes = 0;
};

inline constexpr size_t kThreadgroupBytes = 32 << 10;

// Where a thread stands: accesses of two threads are ordered if a barrier lies between them.
struct Position {
  uint64_t thread = 0;     // in the grid
  uint64_t group = 0;      // in the grid
  uint32_t simdgroup = 0;  // in the group
  uint32_t device_barriers = 0, threadgroup_barriers = 0;
  uint32_t simd_device_barriers = 0, simd_threadgroup_barriers = 0;
  const char* stack = nullptr;
};

void watch_begin(const Launch& launch);
// New threadgroup memory.
void watch_group(const char* memory);
// How much of it is declared.
void watch_declared(size_t bytes);
// The thread that runs; null where none does, and everything goes.
void watch_thread(const Position* position);
// Per argument, since watch_begin.
const Traffic* watch_end();
// The instruction behind the last access.
const void* watch_caller();
// Where a shader's own constants lie.
void watch_allow(const void* begin, const void* end);

}  // namespace emu
