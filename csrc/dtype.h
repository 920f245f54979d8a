#pragma once
#include <cstdint>

namespace fusedops {

enum class DType : int { f32, f16, bf16, f64 };

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

}  // namespace fusedops
