// The activations by name: value(x), grad(x), and the switch to them.
#pragma once
#include "../simd/math.h"
#include "kernels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

struct Identity {
  template <class V>
  FUSEDOPS_INLINE V value(V x) {
    return x;
  }
  template <class V>
  FUSEDOPS_INLINE V grad(V) {
    return set1<V>(1);
  }
};
struct Gelu {
  template <class V>
  FUSEDOPS_INLINE V value(V x) {
    return gelu(x);
  }
  template <class V>
  FUSEDOPS_INLINE V grad(V x) {
    return gelu_grad(x);
  }
};
struct GeluTanh {
  template <class V>
  FUSEDOPS_INLINE V value(V x) {
    return gelu_tanh(x);
  }
  template <class V>
  FUSEDOPS_INLINE V grad(V x) {
    return gelu_tanh_grad(x);
  }
};
struct GeluQuick {
  template <class V>
  FUSEDOPS_INLINE V value(V x) {
    return gelu_quick(x);
  }
  template <class V>
  FUSEDOPS_INLINE V grad(V x) {
    return gelu_quick_grad(x);
  }
};

template <class F>
FUSEDOPS_INLINE void with_activation(Activation act, const F& fn) {
  switch (act) {
    case Activation::identity:
      return fn(Identity{});
    case Activation::gelu:
      return fn(Gelu{});
    case Activation::gelu_tanh:
      return fn(GeluTanh{});
    case Activation::gelu_quick:
      return fn(GeluQuick{});
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
