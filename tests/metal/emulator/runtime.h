// What a translated shader sees of the emulator.
#pragma once
#pragma clang system_header  // as Metal's own headers are: no warning of a shader comes from here

#include <stddef.h>
#include <stdint.h>

#include <type_traits>

namespace emu {

// Ends the dispatch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Size {
  uint32_t d[3];
};

struct Argument {
  char* address;
  size_t bytes;
  bool bound;
};

constexpr int kArguments = 31;

// One dispatchThreads: grid threads in threadgroups of group.
struct Launch {
  const char* name;
  Size grid, group;
  Argument arguments[kArguments];
};

// What a thread of a kernel can ask for. Threadgroups at the edge of the grid are smaller than
// group.
struct Thread {
  const Launch* launch;
  Size in_grid, in_group, group_in_grid, groups, size;
  uint32_t index, lane, simdgroup, simdgroups;
};

uint32_t lane();
void threadgroup_barrier(uint32_t flags);
void simdgroup_barrier(uint32_t flags);
// Gives every lane of the simdgroup the operand of each other, and which of them take part. Kinds
// tell operations apart: lanes that meet must do the same.
uint32_t exchange(int kind, const void* operand, size_t bytes, void* of_all_lanes);
constexpr int kMatrixMultiply = 42;
constexpr int kSimdgroupBarrier = 1000;
// Threadgroup memory of one declaration, the same for every thread of the group.
void* threadgroup_memory(const void* declaration, size_t bytes, size_t alignment);
// Of an atomic operation: ordered with others like it, but within bounds like everything.
void atomic_access(const volatile void* address, size_t bytes, bool writes);
// x, or a float some ulps away where EMU_FUZZ_ULP says so.
float fuzz(float x);

#ifdef EMU_LINT
template <class T>
__attribute__((address_space(3))) T& threadgroup_variable(const void* declaration);
#else
template <class T>
inline T& threadgroup_variable(const void* declaration) {
  return *static_cast<T*>(threadgroup_memory(declaration, sizeof(T), alignof(T)));
}
#endif

// Of functions that read the emulator's own memory.
#define EMU_UNWATCHED \
  __attribute__((no_sanitize("kernel-address", "address", "thread", "alignment")))

// --- a kernel's arguments ------------------------------------------------------------------------

template <int N>
struct Buffer {};

// A built-in of Metal as a Size, of which an integer takes the first number and a vector its own.
#define EMU_BUILTINS(X)                                          \
  X(thread_position_in_grid, t.in_grid)                          \
  X(thread_position_in_threadgroup, t.in_group)                  \
  X(threadgroup_position_in_grid, t.group_in_grid)               \
  X(threadgroups_per_grid, t.groups)                             \
  X(threads_per_threadgroup, t.size)                             \
  X(dispatch_threads_per_threadgroup, t.launch->group)           \
  X(threads_per_grid, t.launch->grid)                            \
  X(thread_index_in_threadgroup, (Size{{t.index, 1, 1}}))        \
  X(thread_index_in_simdgroup, (Size{{t.lane, 1, 1}}))           \
  X(simdgroup_index_in_threadgroup, (Size{{t.simdgroup, 1, 1}})) \
  X(simdgroups_per_threadgroup, (Size{{t.simdgroups, 1, 1}}))    \
  X(threads_per_simdgroup, (Size{{32, 1, 1}}))                   \
  X(thread_execution_width, (Size{{32, 1, 1}}))                  \
  X(thread_index_in_quadgroup, (Size{{t.lane & 3, 1, 1}}))       \
  X(quadgroup_index_in_threadgroup, (Size{{t.index / 4, 1, 1}}))

template <class P, class = void>
struct FromSize {
  EMU_UNWATCHED static P get(const Size& s) { return P(s.d[0], s.d[1]); }
};
template <class P>
struct FromSize<P, std::enable_if_t<std::is_integral<P>::value>> {
  EMU_UNWATCHED static P get(const Size& s) { return static_cast<P>(s.d[0]); }
};
template <class P>
struct FromSize<P, std::enable_if_t<!std::is_integral<P>::value && P::kCount == 3>> {
  EMU_UNWATCHED static P get(const Size& s) { return P(s.d[0], s.d[1], s.d[2]); }
};

template <class P, class Kind>
struct Get;
template <class P, int N>
struct Get<P*, Buffer<N>> {
  EMU_UNWATCHED static P* get(const Thread& t) {
    const Argument& a = t.launch->arguments[N];
    if (!a.bound) fail("buffer(%d) is not bound", N);
    return reinterpret_cast<P*>(a.address);
  }
};
template <class P, int N>
struct Get<P&, Buffer<N>> {
  EMU_UNWATCHED static P& get(const Thread& t) {
    const Argument& a = t.launch->arguments[N];
    if (!a.bound) fail("buffer(%d) is not bound", N);
    if (a.bytes < sizeof(P)) {
      fail("buffer(%d): %zu bytes are bound, the kernel's constant has %zu", N, a.bytes, sizeof(P));
    }
    return *reinterpret_cast<P*>(a.address);
  }
};
#define EMU_GET(name, value)                                                        \
  struct b_##name {};                                                               \
  template <class P>                                                                \
  struct Get<P, b_##name> {                                                         \
    EMU_UNWATCHED static P get(const Thread& t) { return FromSize<P>::get(value); } \
  };
EMU_BUILTINS(EMU_GET)
#undef EMU_GET

// A kernel as a function of a thread: Kinds say where each of its parameters comes from.
using Entry = void (*)(const Thread&);
template <class... Kinds>
struct Parameters {};
template <class Function, Function function, class P>
struct Kernel;
template <class... P, void (*function)(P...), class... Kinds>
struct Kernel<void (*)(P...), function, Parameters<Kinds...>> {
  static_assert(sizeof...(P) == sizeof...(Kinds), "every parameter of a kernel has an attribute");
  EMU_UNWATCHED static void call(const Thread& t) { function(Get<P, Kinds>::get(t)...); }
};

// Static objects of a translated shader, by which its kernels and function constants are known.
struct Registered {
  Registered(const char* host_name, Entry entry, int largest_group);
};
struct FunctionConstant {
  FunctionConstant(int index, void* value, size_t bytes);
};

}  // namespace emu
