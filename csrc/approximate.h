// The names of activations: the `approximate` argument of the GELU ops, the `activation` of linear.
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

inline Activation activation_named(const char* op, std::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu_quick") return Activation::gelu_quick;
  fail(op,
       "activation must be 'relu', 'relu2', 'silu', 'gelu', 'gelu_tanh' or 'gelu_quick' "
       "but got '",
       name, "'");
}

}  // namespace fusedops
