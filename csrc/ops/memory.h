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
inline Memory allocate(const char* op, int64_t bytes, int64_t unit = 64) {
  const int64_t size = pieces(std::max<int64_t>(bytes, 1), unit) * unit;
  char* p =
      static_cast<char*>(std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(size)));
  if (!p) fail(op, "memory for the workspace must be available but got ", bytes, " bytes refused");
  advise_huge_pages(p, size);
  return {p, &std::free};
}

// The same for what is kept from call to call: in huge pages from where they pay. A second one is
// taken because few huge pages are never asked for; memory that is not touched costs nothing.
inline int64_t kept_unit(int64_t bytes) {
  constexpr int64_t huge = int64_t{2} << 20;
  return bytes < huge / 8 ? 4096 : huge;
}
inline int64_t kept_bytes(int64_t bytes) {
  const int64_t unit = kept_unit(bytes);
  return std::max(pieces(bytes, unit), int64_t{2}) * unit;
}
inline Memory allocate_kept(const char* op, int64_t bytes) {
  return allocate(op, kept_bytes(bytes), kept_unit(bytes));
}

// Memory of a call, kept for the thread's next one: fresh pages cost more than what is done in
// them.
class Workspace {
 public:
  char* get(int64_t bytes) {
    if (bytes <= bytes_) return memory_.get();
    memory_.reset();
    bytes_ = 0;
    memory_ = allocate_kept("fusedops", bytes);
    bytes_ = kept_bytes(bytes);
    return memory_.get();
  }
  // Gives back what only an unusual call needs.
  void trim() {
    constexpr int64_t most = int64_t{64} << 20;
    if (bytes_ <= most) return;
    memory_.reset();
    bytes_ = 0;
  }

 private:
  Memory memory_{nullptr, &std::free};
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
