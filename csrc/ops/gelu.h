// The checks of the elementwise activations, for the kernels of every device.
#pragma once
#include "tensor.h"

namespace fusedops {

// empty_like keeps the strides of a tensor whose elements fill its memory, and only of such a one:
// else an elementwise kernel, which reads and writes in one order, works on a copy.
inline bool same_strides(const View& a, const View& b) {
  for (int64_t d = 0; d < a.rank(); d++)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

inline void check_gelu_backward(const char* op, const Tensor& grad, const View& g, const Tensor& x,
                                const View& v) {
  require_device(op, "x", x, v);
  require_device(op, "grad", grad, g);
  floating(op, "x", v);
  if (g.type != v.type)
    fail(op, "grad must have x's dtype ", name_of(v.type), " but got ", name_of(g.type));
  if (!same_shape(g, v))
    fail(op, "grad must have x's shape ", shape_of(v), " but got ", shape_of(g));
}

}  // namespace fusedops
