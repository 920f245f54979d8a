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

// Memory of a call, kept for the thread's next one: fresh pages cost more than what is done in
// them.
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
    const int64_t size = std::max(pieces(bytes, unit), int64_t{2}) * unit;
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

// The thread's own memory during one call.
class Lease {
 public:
  explicit Lease(int64_t bytes) : memory(workspace().get(bytes)) {}
  Lease(const Lease&) = delete;
  ~Lease() { workspace().trim(); }
  char* const memory;

 private:
  static Workspace& workspace() {
    static thread_local Workspace one;
    return one;
  }
};

}  // namespace fusedops
