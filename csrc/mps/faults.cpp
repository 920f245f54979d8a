#include "faults.h"

#include <cstdint>
#include <mutex>

namespace fusedops::mps {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kWords = 4;

// Where copies arrive, also after everything else of the process has ended: a page of its own, as
// torch lends whole pages to Metal.
alignas(16384) uint32_t arrived[16384 / sizeof(uint32_t)];

std::mutex mutex;
Tensor* current = nullptr;  // never destroyed: it must not outlive torch's allocators

Tensor fresh_flag(const Tensor& like) {
  return torch::stable::new_zeros(like, {kWords}, ScalarType::Int);
}

// With the mutex held. The target is a new tensor each time: one made in inference mode could not
// be written outside it.
void copy_flag(bool wait) {
  Tensor target = torch::stable::from_blob(
      arrived, {kWords}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Int);
  torch::stable::copy_(target, *current, !wait);
}

uint32_t word(size_t i) { return static_cast<const volatile uint32_t*>(arrived)[i]; }

// With the mutex held, all copies done.
void raise_if_set(const char* op) {
  if (word(0) == 0) return;
  const auto id = static_cast<int64_t>(uint64_t{word(2)} << 32 | word(1));
  const uint32_t rows = word(3);
  *current = fresh_flag(*current);
  arrived[0] = 0;
  fail(op, "position_ids + offset must be in [0, ", rows, ") but got the position ", id,
       " in an earlier call on MPS, whose result is wrong");
}

}  // namespace

Faults::Faults(const Tensor& like) : guard_(mutex) {
  if (!current) current = new Tensor(fresh_flag(like));
}

const Tensor& Faults::flag() const { return *current; }

void Faults::ask() const { copy_flag(/*wait=*/false); }

void raise_arrived_fault(const char* op) {
  const std::lock_guard<std::mutex> guard(mutex);
  if (word(0) == 0) return;
  copy_flag(/*wait=*/true);
  raise_if_set(op);
}

void check() {
  const std::lock_guard<std::mutex> guard(mutex);
  if (!current) return;
  copy_flag(/*wait=*/true);
  raise_if_set("rope");
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) { m.def("mps_check() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fusedops, CompositeExplicitAutograd, m) {
  m.impl("mps_check", TORCH_BOX(&check));
}

}  // namespace fusedops::mps
