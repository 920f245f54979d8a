// The plans of the pybind11 module.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "../dtype.h"

namespace fusedops {

DType dtype_named(const std::string& name);  // f32, f16, bf16, f64
void bind_plans(pybind11::module_& m);

}  // namespace fusedops
