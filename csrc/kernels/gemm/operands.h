// How a storage type enters the multiplication: what a lane holds and how it is loaded.
#pragma once
#include "../../simd/simd.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// One element of k in a lane. x comes in the compute type, w as it is stored.
template <class T, bool Pairs>
struct Operands {
  using V = Vec<compute_t<T>>;
  using X = compute_t<T>;
  static constexpr int kStep = 1;  // elements of k in a lane

  template <class S>
  FUSEDOPS_INLINE V load(const S* p) {
    return FUSEDOPS_ISA::load<V>(p);
  }
  template <class S>
  FUSEDOPS_INLINE V load_n(const S* p, int n) {
    return FUSEDOPS_ISA::load_n<V>(p, n);
  }
  FUSEDOPS_INLINE V broadcast(const X* p) { return FUSEDOPS_ISA::broadcast<V>(p); }
  FUSEDOPS_INLINE V packed(V b) { return b; }
  FUSEDOPS_INLINE V multiply_add(V a, V b, V acc) { return mul_add(a, b, acc); }
  FUSEDOPS_INLINE V multiply_broadcast(V a, V b, V acc) { return mul_add(a, b, acc); }
};

template <class T>
constexpr bool kIsF16 = false;
template <>
constexpr bool kIsF16<f16> = true;

// Two 16-bit elements of k in a lane, x and w as they are stored. The dot product of bf16 takes
// subnormal inputs and sums as zero: an error of at most 2^-126 times the other factor, which the
// ops' contracts name. That of f16 is the same as widened, but for the order of few rows.
template <class T>
struct Operands<T, true> {
  using V = Vec<compute_t<T>>;
  using X = T;
  static constexpr int kStep = 2;

  FUSEDOPS_INLINE V load(const T* p) { return load_pairs(p); }
  FUSEDOPS_INLINE V load_n(const T* p, int n) { return load_pairs_n(p, n); }
  FUSEDOPS_INLINE V broadcast(const T* p) { return broadcast_pair(p); }
  FUSEDOPS_INLINE V broadcast_last(const T* p) { return broadcast_half(p); }
  FUSEDOPS_INLINE V packed(V b) {
    if constexpr (kIsF16<T>)
      return pack_pairs(b, static_cast<const T*>(nullptr));
    else
      return b;
  }
  FUSEDOPS_INLINE V multiply_add(V a, V b, V acc) {
    if constexpr (kIsF16<T>)
      return dot_pairs(acc, a, b, static_cast<const T*>(nullptr));
    else
      return dot_pairs(acc, a, b);
  }
  FUSEDOPS_INLINE V multiply_broadcast(V a, V b, V acc) {
    if constexpr (kIsF16<T>)
      return dot_broadcast(acc, a, b, static_cast<const T*>(nullptr));
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

// Whether x must be widened to the compute type before it is multiplied.
template <class T>
constexpr bool kWidenX = sizeof(typename operands_t<T>::X) != sizeof(T);

// Additions in a row to one accumulator. Short chains, added up, err less than one long chain;
// the rounding of a 16-bit result hides either.
template <class T>
constexpr int64_t kChainSteps = sizeof(T) == 2 ? 1024 : 128;

FUSEDOPS_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
