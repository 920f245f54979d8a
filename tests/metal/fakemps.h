// What the device "mps" of the tests and the C shim on it know of each other.
#pragma once

#include <cstdint>
#include <functional>

namespace fakemps {

// A tensor on the device carries this bit in its address, which makes it no address at all: host
// code that reads or writes device memory by itself crashes, as it would with the id<MTLBuffer> of
// a Mac.
inline constexpr uintptr_t kDeviceBit = uintptr_t{1} << 54;

inline void* device_address(void* host) {
  return host == nullptr ? nullptr
                         : reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) | kDeviceBit);
}

// The memory behind it.
inline char* host_address(const void* device) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(device) & ~kDeviceBit);
}

// Runs a launch now, or keeps it until the queue is drained where launches are deferred.
void submit(std::function<void()> launch);

// Runs what waits, in order. Everything that looks at device memory calls it first.
void drain();

// Whether this thread is inside a command block, where a call of ATen would wait for itself.
bool in_command_block();

}  // namespace fakemps
