// The operations on raw memory, threaded and dispatched to the ISA in use: what the torch ops and
// the NumPy entry points of the pybind11 module share. No torch type appears here.
#pragma once
#include "dtype.h"
#include "isa.h"
#include "kernels/kernels.h"

namespace fusedops {

FUSEDOPS_API void run_rope(const RopeArgs& a, DType x, DType table);
FUSEDOPS_API void run_gelu(const GeluArgs& a, int64_t n, DType t);
FUSEDOPS_API void run_gelu_backward(const GeluArgs& a, int64_t n, DType t);
FUSEDOPS_API void run_linear(const LinearArgs& a, DType t);

// Limits of this machine on torch's threads, for the ISA in use.
FUSEDOPS_API double probe_copy(int64_t bytes, int repeats);  // best bytes/s, read + written
FUSEDOPS_API double probe_fma(DType t);  // flop/s, f32, or bf16 pairs where the ISA has them
FUSEDOPS_API int threads();

}  // namespace fusedops
