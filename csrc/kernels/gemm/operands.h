// How a storage type enters the multiplication: what a lane holds and how it is loaded.
#pragma once
#include "../../simd/simd.h"
#include "../kernels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// One element of k in a lane.
template <class T, bool Pairs>
struct Operands {
  using V = Vec<compute_t<T>>;
  using P = T;                     // w in a packed panel: as it is stored
  static constexpr int kStep = 1;  // elements of k in a lane

  template <class S>
  FUSEDOPS_INLINE V load(const S* p) {
    return FUSEDOPS_ISA::load<V>(p);
  }
  template <class S>
  FUSEDOPS_INLINE V load_n(const S* p, int n) {
    return FUSEDOPS_ISA::load_n<V>(p, n);
  }
  // One step of n columns of a w by k, of which k are left; lanes past n are 0.
  FUSEDOPS_INLINE V load_across(const T* p, int64_t, int64_t, int n) {
    return n == V::N ? FUSEDOPS_ISA::load<V>(p) : FUSEDOPS_ISA::load_n<V>(p, n);
  }
  FUSEDOPS_INLINE V packed(V b) { return b; }
  template <class A>  // a vector or a factor
  FUSEDOPS_INLINE V multiply_add(A a, V b, V acc) {
    return mul_add(a, b, acc);
  }
};

template <class T>
constexpr bool kIsF16 = false;
template <>
constexpr bool kIsF16<f16> = true;

// Two 16-bit elements of k in a lane, x and w as they are stored. The dot product of bf16 takes
// subnormal inputs and sums as zero: an error of at most 2^-126 times the other factor, which the
// ops' contracts name. That of f16 is the same as widened, but for the order of few rows and of
// narrow tiles.
template <class T>
struct Operands<T, true> {
  using V = Vec<compute_t<T>>;
  using P = compute_t<T>;  // the bits of a pair
  static constexpr int kStep = 2;

  FUSEDOPS_INLINE V load(const T* p) { return load_pairs(p); }
  FUSEDOPS_INLINE V load_n(const T* p, int n) { return load_pairs_n(p, n); }
  // The same: rows p and p + ldw, the second of which is 0 where one k is left.
  FUSEDOPS_INLINE V load_across(const T* p, int64_t ldw, int64_t k, int n) {
    const V low = n == V::N ? FUSEDOPS_ISA::load<V>(p) : FUSEDOPS_ISA::load_n<V>(p, n);
    const T* q = p + ldw;
    if (k == 1) return pairs(low, set1<V>(0));
    return pairs(low, n == V::N ? FUSEDOPS_ISA::load<V>(q) : FUSEDOPS_ISA::load_n<V>(q, n));
  }
  FUSEDOPS_INLINE V pairs(V low, V high) {
    if constexpr (kIsF16<T>)
      return pair_up_f16(low, high);
    else
      return pair_up(low, high);
  }
  // Of lanes that hold pairs: as a factor meets them.
  FUSEDOPS_INLINE V packed(V b) {
    if constexpr (kIsF16<T>)
      return pack_pairs(b);
    else
      return b;
  }
  template <class A>
  FUSEDOPS_INLINE V multiply_add(A a, V b, V acc) {
    if constexpr (kIsF16<T>)
      return dot_f16_pairs(acc, a, b);
    else
      return dot_pairs(acc, a, b);
  }
};

template <class T>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<bf16> = kBf16Dot;
template <>
constexpr bool kInPairs<f16> = kF16Dot;
template <class T>
using operands_t = Operands<T, kInPairs<T>>;
template <class T>
using packed_t = typename operands_t<T>::P;

// Whether a value of x is wider in a lane than in memory.
template <class T>
constexpr bool kWidenX = !kInPairs<T> && sizeof(compute_t<T>) != sizeof(T);

// Additions in a row to one accumulator. Short chains, added up, err less than one long chain;
// the rounding of a 16-bit result hides either.
template <class T>
constexpr int64_t kChainSteps = sizeof(T) == 2 ? 1024 : 128;

FUSEDOPS_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// A sum that would be one or two chains is two or four, where they are worth adding up.
constexpr int64_t kLeastChainSteps = 8;
template <class T>
FUSEDOPS_INLINE int64_t chain_steps(int64_t steps, int64_t longest) {
  if (sizeof(T) == 2 || steps > 2 * longest || steps <= kLeastChainSteps) return longest;
  return (at_most(steps, longest) + 1) / 2;
}

// For few rows other libraries sum in shorter chains still, above all where the sum is short.
constexpr int64_t kFewSteps = 64;
template <class T>
FUSEDOPS_INLINE int64_t short_chain_steps(int64_t steps) {
  if (sizeof(T) == 2) return kChainSteps<T>;
  const int64_t part = steps / 64 * 4;
  return part < kFewSteps / 4 ? kFewSteps / 4 : at_most(part, kFewSteps);
}

// Steps of k elements: the last one may be half full.
template <class T>
FUSEDOPS_INLINE int64_t steps_of(int64_t k) {
  return (k + operands_t<T>::kStep - 1) / operands_t<T>::kStep;
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
