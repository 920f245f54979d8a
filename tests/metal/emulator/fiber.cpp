#include "fiber.h"

#include <stdlib.h>

// Of the sanitizers' runtimes, which are there in their lanes only.
extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void* __tsan_get_current_fiber(void);
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* object);
WEAK void __tsan_release(void* object);

// Stores the stack pointer and what a callee must keep, and takes up the other's.
void emu_switch(void** from, void** to);
}

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top) - 3;  // entry is aligned as after a call
  *--frame = reinterpret_cast<void*>(entry);
  return frame - 6;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, %function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  ldr x9, [x1]
  mov sp, x9
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top - 160);
  frame[11] = reinterpret_cast<void*>(entry);  // x30
  return frame;
}
#else
#error "a context switch has to be written for this architecture"
#endif

namespace emu {
namespace {

constexpr unsigned kNoSync = 1;  // a switch orders nothing

// One thread of the CPU at a time runs fibers.
struct {
  void* stack_pointer;
  void* tsan_fiber;
  const void* stack_bottom;
  size_t stack_size;
} scheduler;
Fiber* running = nullptr;

}  // namespace

bool races_are_watched() { return __tsan_create_fiber != nullptr; }

void release(void* object) {
  if (races_are_watched()) __tsan_release(object);
}

void acquire(void* object) {
  if (races_are_watched()) __tsan_acquire(object);
}

void prepare(Fiber& fiber, void (*entry)()) {
  fiber.stack_pointer = first_frame(fiber.stack + kStackBytes, entry);
  fiber.asan_stack = nullptr;
  if (races_are_watched()) fiber.tsan_fiber = __tsan_create_fiber(0);
}

void enter(Fiber& fiber) {
  running = &fiber;
  if (races_are_watched()) {
    scheduler.tsan_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.tsan_fiber, kNoSync);
  }
  void* save = nullptr;
  if (__sanitizer_start_switch_fiber != nullptr && !races_are_watched()) {
    __sanitizer_start_switch_fiber(&save, fiber.stack, kStackBytes);
  }
  emu_switch(&scheduler.stack_pointer, &fiber.stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr && !races_are_watched()) {
    __sanitizer_finish_switch_fiber(save, nullptr, nullptr);
  }
}

void arrived() {
  if (__sanitizer_finish_switch_fiber != nullptr && !races_are_watched()) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
  }
}

void leave(bool for_good) {
  Fiber& fiber = *running;
  if (races_are_watched()) __tsan_switch_to_fiber(scheduler.tsan_fiber, kNoSync);
  if (__sanitizer_start_switch_fiber != nullptr && !races_are_watched()) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.asan_stack, scheduler.stack_bottom,
                                   scheduler.stack_size);
  }
  emu_switch(&fiber.stack_pointer, &scheduler.stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr && !races_are_watched()) {
    __sanitizer_finish_switch_fiber(fiber.asan_stack, nullptr, nullptr);
  }
}

void dispose(Fiber& fiber) {
  if (fiber.tsan_fiber != nullptr) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = nullptr;
}

}  // namespace emu
