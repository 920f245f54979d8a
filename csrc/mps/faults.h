// Positions outside a table that a kernel met: a host that looked at them would wait for the
// device.
#pragma once
#include "../ops/tensor.h"

namespace fusedops::mps {

// Four uint32 on the device, made at the first call: whether there was one, the position's low and
// high half, the table's rows.
Tensor faults(const Tensor& like);

// Asks for the flag's value without waiting for it; after a launch that may raise it.
void ask_for_faults();

// Fails, and lowers the flag, if the values that have arrived so far show a fault.
void raise_arrived_fault(const char* op);

// The same after waiting for all work: the op fusedops::mps_check.
void check();

}  // namespace fusedops::mps
