// What rope is on every device: the checks, and the ops in terms of `run`, which turns what has
// been checked.
#pragma once
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../run.h"
#include "tensor.h"

namespace fusedops {

// Everything of a call that is not x: checked and turned into strides once, shared by q and k.
struct RopeCall {
  RopeCall(const char* op_, Device device_, const Tensor& cos_, const Tensor& sin_,
           const std::optional<Tensor>& position_ids_, int64_t offset_, bool bshd_,
           bool interleaved_, bool conjugate_)
      : op(op_),
        device(device_),
        cos_tensor(cos_),
        sin_tensor(sin_),
        position_ids(position_ids_),
        cos(cos_, device_),
        sin(sin_, device_),
        offset(offset_),
        bshd(bshd_),
        interleaved(interleaved_),
        conjugate(conjugate_) {}

  const char* op;
  Device device;
  const Tensor &cos_tensor, &sin_tensor;
  const std::optional<Tensor>& position_ids;
  const View cos, sin;
  int64_t offset;
  bool bshd, interleaved, conjugate;
};

// What is turned, and where the result goes.
struct Turn {
  const Tensor& x;
  const View& from;
  const Tensor& y;
  const View& to;
};

inline int64_t batch_of(const View& x) { return x.rank() == 4 ? x.size(0) : 1; }
// x's dimensions in the order batch, head, seq, dim.
struct Dims {
  int64_t batch, head, seq, dim;
};
inline Dims ordered(const torch::headeronly::IntHeaderOnlyArrayRef& of, bool batched, bool bshd) {
  const size_t first = batched ? 1 : 0;
  return {batched ? of[0] : 0, of[first + (bshd ? 1 : 0)], of[first + (bshd ? 0 : 1)],
          of[first + 2]};
}

// A table whose columns are not adjacent is small beside x: a kernel reads a copy.
inline bool adjacent(const View& table) { return table.size(-1) <= 1 || table.stride(-1) == 1; }

RopeArgs rope_arguments(const RopeCall& c, const View& x, const View& y, const View& cos,
                        const View& sin);
void check_turned(const RopeCall& c, const char* name, const Tensor& x, const View& v);
// Fails unless `out` can take the rotation of x.
void check_out(const RopeCall& c, const View& v, const Tensor& out, const View& o);
// What is written must be its own memory, and none of what is read.
void check_written(const RopeCall& c, const char* name, const View& y);
void check_pair(const RopeCall& c, const Tensor& q, const View& qv, const Tensor& k,
                const View& kv);
void check_written_pair(const RopeCall& c, const Tensor& q, const View& qv, const Tensor& k,
                        const View& kv);

// The ops of a device. `run` is given one turn or two, checked.
template <Device device, void (*run)(const RopeCall&, std::initializer_list<Turn>)>
struct RopeOps {
  using MaybeTensor = std::optional<Tensor>;

  static Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const MaybeTensor& position_ids, int64_t offset, bool bshd, bool interleaved,
                     bool conjugate) {
    const RopeCall c{"rope", device, cos, sin, position_ids, offset, bshd, interleaved, conjugate};
    const View v(x, device);
    check_turned(c, "x", x, v);
    Tensor y = empty_like_output(x, v);
    const View to(y, device);
    run(c, {{x, v, y, to}});
    return y;
  }

  static void rope_out(const Tensor& x, const Tensor& cos, const Tensor& sin,
                       const MaybeTensor& position_ids, int64_t offset, bool bshd, bool interleaved,
                       bool conjugate, const Tensor& out) {
    const RopeCall c{"rope", device, cos, sin, position_ids, offset, bshd, interleaved, conjugate};
    const View v(x, device), o(out, device);
    check_turned(c, "x", x, v);
    check_out(c, v, out, o);
    run(c, {{x, v, out, o}});
  }

  static void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const MaybeTensor& position_ids, int64_t offset, bool bshd, bool interleaved,
                    bool conjugate) {
    const RopeCall c{"rope_", device, cos, sin, position_ids, offset, bshd, interleaved, conjugate};
    const View v(x, device);
    check_turned(c, "x", x, v);
    check_written(c, "x", v);
    run(c, {{x, v, x, v}});
  }

  static std::tuple<Tensor, Tensor> rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos,
                                            const Tensor& sin, const MaybeTensor& position_ids,
                                            int64_t offset, bool bshd, bool interleaved,
                                            bool conjugate) {
    const RopeCall c{"rope_qk", device, cos,         sin,      position_ids,
                     offset,    bshd,   interleaved, conjugate};
    const View qv(q, device), kv(k, device);
    check_pair(c, q, qv, k, kv);
    Tensor q_out = empty_like_output(q, qv), k_out = empty_like_output(k, kv);
    const View q_to(q_out, device), k_to(k_out, device);
    run(c, {{q, qv, q_out, q_to}, {k, kv, k_out, k_to}});
    return {q_out, k_out};
  }

  // All checks of rope_qk_ and no write: autograd records q and k one after the other.
  static void rope_qk_check(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                            const MaybeTensor& position_ids, int64_t offset, bool bshd,
                            bool interleaved, bool conjugate) {
    const RopeCall c{"rope_qk_", device, cos,         sin,      position_ids,
                     offset,     bshd,   interleaved, conjugate};
    check_written_pair(c, q, View(q, device), k, View(k, device));
  }

  static void rope_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                       const MaybeTensor& position_ids, int64_t offset, bool bshd, bool interleaved,
                       bool conjugate) {
    const RopeCall c{"rope_qk_", device, cos,         sin,      position_ids,
                     offset,     bshd,   interleaved, conjugate};
    const View qv(q, device), kv(k, device);
    check_written_pair(c, q, qv, k, kv);
    run(c, {{q, qv, q, qv}, {k, kv, k, kv}});
  }
};

}  // namespace fusedops
