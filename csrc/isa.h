// Which kernel table is in use, and what the machine can do.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"

#define FUSEDOPS_API __attribute__((visibility("default")))

namespace fusedops {

// The table in use. Chosen when the library is loaded: FUSEDOPS_ISA if set, else the best
// supported.
FUSEDOPS_API const KernelTable& kernels();

namespace isa {
FUSEDOPS_API std::vector<std::string> compiled();   // best first
FUSEDOPS_API std::vector<std::string> supported();  // of those, what this CPU and system run
FUSEDOPS_API std::string current();
FUSEDOPS_API size_t index();                     // of that one among the compiled
FUSEDOPS_API void use(const std::string& name);  // throws for an unknown or unsupported name
}  // namespace isa

// The caches that the first CPU reaches, as the system tells them, smallest
// level first.
struct Cache {
  int level;
  std::string type;  // data, instruction or unified
  int64_t bytes;
  int sharers;  // CPUs that share it, 0: not told
};
FUSEDOPS_API const std::vector<Cache>& caches();

// Bytes of the last level of data cache (32 MiB where the system does not say).
FUSEDOPS_API int64_t last_cache_bytes();

}  // namespace fusedops
