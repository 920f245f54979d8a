// The vector contract of the kernels. Vec<float> and Vec<double> hold N lanes; every header beside
// this one implements the functions below for its instruction set, in the namespace of the ISA
// being compiled.
//
//   set1<V>(x)          all lanes x
//   load<V>(p), store(p, v)            N elements, p of any storage type of V (conversion included,
//                       one rounding to nearest even; NaN stays NaN); no alignment needed;
//                       Vec<float> also loads int8_t
//   load_n<V>(p, n), store_n(p, v, n)  the first n lanes, 0 <= n <= N; nothing else is touched,
//                       lanes past n read as 0
//   stream(p, v)        store around the caches where the ISA can; p aligned to the vector
//   stream_fence()      after the last stream()
//   load2(p, a, b), store2(p, a, b), stream2(p, a, b)  the same for 2N elements; p of stream2
//                       aligned to what is written, at most 64 bytes
//   + - * /, -v         one rounding each, never contracted
//   fma(a, b, c)        a*b + c with one rounding, the same bits on every ISA
//   mul_add(a, b, c)    a*b + c, as fast as the ISA can (fused where it has FMA; always fused where
//                       FUSEDOPS_SAME_BITS is defined, see below)
//   min max abs         min/max return the second operand when either is NaN (x86 rule)
//   round(v)            to the nearest integer, ties to even, |v| < 2^22 (2^51 for double)
//   scale2(v, n)        v * 2^n, n integral, correct into the subnormals, n in [-300, 254]
//                       (double: [-2200, 2046])
//   if_negative(x, a, b)  a where the sign bit of x is set (-0 too), else b
//   min_abs(x, limit)   min(|x|, limit); limit or NaN for NaN (Vec<float> only)
//   entry16(u), lookup16(table, e)  table[bits 21 to 24 of u]: one of 16 for each quarter octave,
//                       four octaves long (Vec<float> only)
//   deinterleave(a, b, even, odd)  even/odd elements of the 2N elements a, b; interleave is the
//                       inverse
//   transpose(r)        N x N in registers
//   sum(v)              of all lanes, in a fixed order
//   sums(r)             lane i is the sum of all lanes of r[i], in a fixed order
//   broadcast<V>(p)     all lanes *p, loaded once and held in a register
//   factors<V, n>(p), factor<V>(f, i)  n values in memory, read at once where an instruction can
//                       take one lane of a register for all (kLaneFactors); and the i-th of them,
//                       i known to the compiler: an a of mul_add and of the dot products below, in
//                       all lanes
//   kVectorRegisters    that an instruction can name: 16 or 32
//   kBf16Dot            whether there is a dot product of bf16 pairs, in Vec<float> lanes that hold
//                       two bf16 each: load_pairs(p), load_pairs_n(p, n) (2N and the first n
//                       elements), pair_up(a, b) (of widened lanes), dot_pairs(acc, a, b). It takes
//                       subnormals as 0.
//   kF16Dot             the same for f16, exact products, one rounding each: load_pairs,
//                       load_pairs_n; pair_up_f16(a, b); dot_f16_pairs(acc, a, b): the sums of all
//                       lanes are the dot product, not lane by lane; lane by lane where a is a
//                       factor and b was moved by pack_pairs(b)
//   prefetch(p), prefetch_far(p), prefetch_to_write(p)  hints, any address: into the first cache,
//                       the second, and to be overwritten
//   copy_string(to, from, n)  n bytes by the CPU's own copy instruction, else by memcpy
//   dot_bytes(acc, x, y)  the ISA's best products of bytes on Vi, kByteProducts of them: what the
//                       int8 probe runs; kByteDot says what it is
//   Vi as 4 Vf::N bytes, or as Vf::N integers of 32 bits:
//   load_bytes(p), load_bytes_n(p, n)  that many bytes, or the first n and zeros behind them
//   broadcast_bytes(p)  the four bytes at p, in every lane
//   dot_quads(acc, x, y)  acc[i] += the four products u8 x * s8 y of lane i: exact modulo 2^32, no
//                       sum on the way saturates
//   + -                 of integers, modulo 2^32
//   load_ints(p), store_ints(p, v)  Vf::N integers
//   to_float(v)         of integers, to nearest even
//   as_float(v), as_ints(v)  the same bits
//   store_bytes(p, v)   Vf::N bytes from lanes of Vec<float> that hold 0, 1, ... 255
//
// A kernel that promises the same bits on every ISA defines FUSEDOPS_SAME_BITS before it includes
// this, and sums in an order that does not depend on V::N.
#pragma once
#include "types.h"

// Functions here must not exist out of line: the linker could hand one ISA's copy to another.
#define FUSEDOPS_INLINE static inline __attribute__((always_inline, unused))

// Keeps a register value as it is at this point: no folding, no rematerialisation.
#if defined(__x86_64__)
#define FUSEDOPS_KEEP(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define FUSEDOPS_KEEP(x) __asm__ volatile("" : "+w"(x))
#else
#define FUSEDOPS_KEEP(x) __asm__ volatile("" : "+m"(x))
#endif

namespace fusedops::FUSEDOPS_ISA {

template <class T>
struct Vec;

}  // namespace fusedops::FUSEDOPS_ISA

#include FUSEDOPS_SIMD_HEADER

namespace fusedops::FUSEDOPS_ISA {

#ifdef FUSEDOPS_F16_DOT
constexpr bool kF16Dot = true;
#else
constexpr bool kF16Dot = false;
#endif

FUSEDOPS_INLINE void copy_string(char* to, const char* from, int64_t n) {
#if defined(__x86_64__)
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
#else
  __builtin_memcpy(to, from, n);
#endif
}
FUSEDOPS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
FUSEDOPS_INLINE void prefetch_to_write(const void* p) {
#if defined(__x86_64__)
  __asm__ volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}
FUSEDOPS_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

#ifndef FUSEDOPS_LANE_FACTORS
constexpr bool kLaneFactors = false;
template <class V, int n, class T>
FUSEDOPS_INLINE const T* factors(const T* p) {
  return p;
}
template <class V, class T>
FUSEDOPS_INLINE V factor(const T* p, int i) {
  return broadcast<V>(p + i);
}
#endif

// Headers overload these where both vectors together are cheaper.
template <class T, class V>
FUSEDOPS_INLINE void load2(const T* p, V& a, V& b) {
  a = load<V>(p);
  b = load<V>(p + V::N);
}
template <class T, class V>
FUSEDOPS_INLINE void store2(T* p, V a, V b) {
  store(p, a);
  store(p + V::N, b);
}
template <class T, class V>
FUSEDOPS_INLINE void stream2(T* p, V a, V b) {
  if constexpr (sizeof(T) == 2) {
    store2(p, a, b);
  } else {
    stream(p, a);
    stream(p + V::N, b);
  }
}

}  // namespace fusedops::FUSEDOPS_ISA
