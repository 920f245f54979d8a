// Positions outside a table that a kernel met: a host that looked at them would wait for the
// device.
#pragma once
#include <mutex>

#include "../ops/tensor.h"

namespace fusedops::mps {

// The flag: four uint32 on the device, made at the first call: whether there was one, the
// position's low and high half, the table's rows. Held from before the launch that may raise it
// until after it: another thread that tells a fault puts a new flag in its place, and nobody looks
// at the old one again. The locks of a launch (launch.cpp) are taken inside this one, never around
// it.
class Faults {
 public:
  explicit Faults(const Tensor& like);
  const Tensor& flag() const;
  // Asks for the flag's value without waiting for it; after the launch.
  void ask() const;

 private:
  std::lock_guard<std::mutex> guard_;
};

// Fails, and lowers the flag, if the values that have arrived so far show a fault.
void raise_arrived_fault(const char* op);

// The same after waiting for all work: the op fusedops::mps_check.
void check();

}  // namespace fusedops::mps
