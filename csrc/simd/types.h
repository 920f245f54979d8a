// Storage types of the kernels. f16 and bf16 are bit patterns: arithmetic happens in f32.
#pragma once
#include <stdint.h>

namespace fusedops {

using f32 = float;
using f64 = double;
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// The type a storage type is computed in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<f64> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace fusedops
