// Dispatches as files, which replay.py runs again under a sanitizer.
#pragma once

#include "runtime.h"

namespace emu {

// Writes the launch and all memory that is bound to it into the folder, unless a launch of the same
// kernel, grid and sizes is there already, or it is too large to be worth a file.
void capture(const Launch& launch, const char* folder);

}  // namespace emu
