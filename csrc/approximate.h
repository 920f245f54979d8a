// The `approximate` argument of the GELU ops.
#pragma once
#include <string_view>

#include "check.h"
#include "run.h"

namespace fusedops {

inline Activation activation_of(const char* op, std::string_view approximate) {
  if (approximate == "none") return Activation::gelu;
  if (approximate == "tanh") return Activation::gelu_tanh;
  if (approximate == "quick") return Activation::gelu_quick;
  fail(op, "approximate must be 'none', 'tanh' or 'quick' but got '", approximate, "'");
}

}  // namespace fusedops
