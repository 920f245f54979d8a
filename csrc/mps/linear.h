// Dense layers on MPS: who multiplies, and what follows the sums.
#pragma once
#include "../ops/linear.h"

namespace fusedops::mps {

// act(input @ weight^T + bias) of a checked call, and where `preact` is not null the pre-activation
// too; both are new tensors of the result's shape.
Tensor layer(const LinearCall& call, Activation act, Tensor* preact = nullptr);

}  // namespace fusedops::mps
