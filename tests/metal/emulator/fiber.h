// Threads of a GPU as fibers of one thread of the CPU: a switch is 15 instructions.
#pragma once

#include <stddef.h>

namespace emu {

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // of kStackBytes
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

inline constexpr size_t kStackBytes = 256 << 10;

// Makes the fiber begin at entry, which leaves for good and never returns, when it is first
// entered.
void prepare(Fiber& fiber, void (*entry)());

// From the scheduler to the fiber, until it leaves.
void enter(Fiber& fiber);

// First of all in a fiber's entry.
void arrived();

// Back to the scheduler. For good: the fiber will not be entered again.
void leave(bool for_good);

// After it has left for good, or will not be entered again.
void dispose(Fiber& fiber);

// What ThreadSanitizer, where it is loaded, is told of the order of fibers; nothing follows from a
// switch alone. An object is known by its address.
bool races_are_watched();
void release(void* object);
void acquire(void* object);

}  // namespace emu
