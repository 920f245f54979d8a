// Work memory of the ops, and how many pieces of a size make a whole.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "tensor.h"

namespace fusedops {

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t aligned(int64_t bytes) { return pieces(bytes, 64) * 64; }

using Memory = std::unique_ptr<char, decltype(&std::free)>;

// Aligned to 64, and some even for 0 bytes; pages of much are asked to be huge.
inline Memory allocate(const char* op, int64_t bytes) {
  const int64_t size = aligned(std::max<int64_t>(bytes, 1));
  char* p = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size)));
  if (!p) fail(op, "memory for the workspace must be available but got ", bytes, " bytes refused");
  advise_huge_pages(p, size);
  return {p, &std::free};
}

}  // namespace fusedops
