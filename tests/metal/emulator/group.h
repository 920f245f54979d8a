// Runs the threadgroups of a dispatch, one after the other, each thread of one as a fiber.
#pragma once

#include <string>

#include "runtime.h"

namespace emu {

// What the environment asks for, read at every dispatch.
struct Options {
  // EMU_ORDER: 0 forward; 1 backward, one simdgroup at a time; 2 random, another for each EMU_SEED.
  int order = 0;
  unsigned seed = 0;
  // EMU_FUZZ_ULP: math functions err by up to so many ulps.
  int fuzz_ulp = 0;
};

struct Stats {
  uint64_t threads = 0, groups = 0, barriers = 0;
  size_t threadgroup_bytes = 0;
};

// Throws std::runtime_error when the shader did what it must not.
Stats run(const Launch& launch, Entry entry, const Options& options);

}  // namespace emu
