// Memory of a call, kept for the thread's next one: fresh pages cost more than what is done in
// them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "tensor.h"

namespace fusedops {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }
  char* get(int64_t bytes) {
    if (bytes <= bytes_) return memory_;
    std::free(memory_);
    memory_ = nullptr, bytes_ = 0;
    constexpr int64_t huge = int64_t{2} << 20;
    const int64_t unit = bytes < huge / 8 ? 4096 : huge;
    const int64_t size = std::max((bytes + unit - 1) / unit, int64_t{2}) * unit;
    memory_ = static_cast<char*>(
        std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(size)));
    if (!memory_)
      fail("fusedops", "memory for the workspace must be available but got ", size,
           " bytes refused");
    advise_huge_pages(memory_, size);
    bytes_ = size;
    return memory_;
  }
  // Gives back what only an unusual call needs.
  void trim() {
    constexpr int64_t most = int64_t{64} << 20;
    if (bytes_ <= most) return;
    std::free(memory_);
    memory_ = nullptr, bytes_ = 0;
  }

 private:
  char* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fusedops
