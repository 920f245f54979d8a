// The kernel table of the ISA this file is compiled for.
#include "kernels.h"

namespace fusedops::FUSEDOPS_ISA {

#define KERNEL(name, parameters) void name parameters;
#include "kernels.inc"
#undef KERNEL

extern const KernelTable table;
const KernelTable table = {
#define KERNEL(name, parameters) name,
#include "kernels.inc"
#undef KERNEL
};

}  // namespace fusedops::FUSEDOPS_ISA
