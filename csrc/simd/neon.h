// armv8.0 Advanced SIMD: the portable vectors (the same registers) with fused multiply-add.
#pragma once
#include <arm_neon.h>

#define FUSEDOPS_VECTOR_FMA 1
#include "portable.h"

namespace fusedops::FUSEDOPS_ISA {

FUSEDOPS_INLINE Vf fma(Vf a, Vf b, Vf c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FUSEDOPS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
template <class T>
FUSEDOPS_INLINE Vec<T> mul_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  return fma(a, b, c);
}

}  // namespace fusedops::FUSEDOPS_ISA
