// The activations by name: value(x), grad(x), and the switch to them.
#pragma once
#include "../simd/math.h"
#include "kernels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// As many vectors of T's compute type as an activation is best applied to at once: their chains of
// instructions fill each other's gaps, until they no longer fit the registers. libm takes lane by
// lane anyway.
template <class T>
constexpr int kTogether = sizeof(T) == 8   ? 1
                          : sizeof(T) == 4 ? 3
                                           : 4;

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
struct Relu {
  template <class V>
  FUSEDOPS_INLINE V value(V x) {
    return max(set1<V>(0), x);  // NaN stays
  }
  template <class V>
  FUSEDOPS_INLINE V grad(V x) {
    const V zero = set1<V>(0);
    return if_negative(zero - max(x, zero), set1<V>(1), zero);  // 0 for NaN, as x > 0 says
  }
};
struct Relu2 {  // relu(x)^2
  template <class V>
  FUSEDOPS_INLINE V value(V x) {
    const V r = max(set1<V>(0), x);
    return r * r;
  }
  template <class V>
  FUSEDOPS_INLINE V grad(V x) {
    const V r = max(set1<V>(0), x);
    return r + r;
  }
};

// T: the storage type of the result, f16 and bf16 taking the narrow values.
#define ACTIVATION(Name, name, narrow) \
  template <class T>                   \
  struct Name {                        \
    template <class V>                 \
    FUSEDOPS_INLINE V value(V x) {     \
      if constexpr (sizeof(T) == 2)    \
        return narrow(x);              \
      else                             \
        return name(x);                \
    }                                  \
    template <class V>                 \
    FUSEDOPS_INLINE V grad(V x) {      \
      return name##_grad(x);           \
    }                                  \
  };
ACTIVATION(Gelu, gelu, gelu_narrow<T>)
ACTIVATION(GeluTanh, gelu_tanh, gelu_tanh_narrow<T>)
ACTIVATION(GeluQuick, gelu_quick, gelu_quick_narrow)
ACTIVATION(Silu, silu, silu_narrow)
#undef ACTIVATION

// T: what the values are stored as; without it they have the accuracy of the type they are in.
template <class T = f64, class F>
FUSEDOPS_INLINE void with_activation(Activation act, const F& fn) {
  switch (act) {
    case Activation::identity:
      return fn(Identity{});
    case Activation::gelu:
      return fn(Gelu<T>{});
    case Activation::gelu_tanh:
      return fn(GeluTanh<T>{});
    case Activation::gelu_quick:
      return fn(GeluQuick<T>{});
    case Activation::silu:
      return fn(Silu<T>{});
    case Activation::relu:
      return fn(Relu{});
    case Activation::relu2:
      return fn(Relu2{});
  }
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
