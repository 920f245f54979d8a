// Rotary embedding of one tensor, or of q and k in one dispatch. x is read once and written once: a
// thread turns W pairs of up to kRopeHeads heads of one token, by table values that it reads once.
#include "common.h"

// Positions outside the table: [0] whether there was one, [1] and [2] the low and high half of the
// first that any thread met, [3] the rows of the table it missed.
inline void report(device atomic_uint* fault, long position, uint rows) {
  if (atomic_exchange_explicit(fault, 1u, memory_order_relaxed) != 0u) return;
  atomic_store_explicit(fault + 1, uint(position), memory_order_relaxed);
  atomic_store_explicit(fault + 2, uint(ulong(position) >> 32), memory_order_relaxed);
  atomic_store_explicit(fault + 3, rows, memory_order_relaxed);
}

// Grid: (columns, groups of heads of q and then of k, batch * seq). The first pairs / W columns
// turn pairs, those behind them copy the elements past rotary_dim; in place there are none of
// these. W = 4: every address is a multiple of four elements, and the elements of a row are
// adjacent.
// In place a buffer is bound twice, as x and as y: each element is loaded and stored by one thread,
// and stored after both of its pair were loaded.
template <typename T, typename C, uint W>
[[kernel, max_total_threads_per_threadgroup(256)]] void rope(
    device const T* q [[buffer(0)]], device T* q_out [[buffer(1)]], device const T* k [[buffer(2)]],
    device T* k_out [[buffer(3)]], device const C* cosines [[buffer(4)]],
    device const C* sines [[buffer(5)]], device const int* ids [[buffer(6)]],
    device atomic_uint* fault [[buffer(7)]], constant HeadCounts& heads [[buffer(8)]],
    constant Width& width [[buffer(9)]], constant Tokens& tokens [[buffer(10)]],
    constant BatchHead& q_outer [[buffer(11)]], constant SeqDim& q_inner [[buffer(12)]],
    constant BatchHead& q_out_outer [[buffer(13)]], constant SeqDim& q_out_inner [[buffer(14)]],
    constant BatchHead& k_outer [[buffer(15)]], constant SeqDim& k_inner [[buffer(16)]],
    constant BatchHead& k_out_outer [[buffer(17)]], constant SeqDim& k_out_inner [[buffer(18)]],
    constant BatchRow& cos_step [[buffer(19)]], constant BatchRow& sin_step [[buffer(20)]],
    constant BatchRow& id_step [[buffer(21)]], constant long& offset [[buffer(22)]],
    constant RopeFlags& flags [[buffer(23)]], uint3 at [[thread_position_in_grid]]) {
  typedef typename Lanes<W>::value value;
  const uint batch = at.z / tokens.seq, s = at.z % tokens.seq;
  const uint groups = (heads.q + kRopeHeads - 1) / kRopeHeads;
  const bool is_q = at.y < groups;
  const uint first_head = (is_q ? at.y : at.y - groups) * kRopeHeads;
  const uint last_head = min(first_head + kRopeHeads, is_q ? heads.q : heads.k);
  const BatchHead outer = is_q ? q_outer : k_outer, out_outer = is_q ? q_out_outer : k_out_outer;
  const SeqDim inner = is_q ? q_inner : k_inner, out_inner = is_q ? q_out_inner : k_out_inner;
  device const T* x = (is_q ? q : k) + (batch * outer.batch + s * inner.seq);
  device T* y = (is_q ? q_out : k_out) + (batch * out_outer.batch + s * out_inner.seq);
  const uint turning = width.pairs / W;

  if (at.x >= turning) {
    const uint d = 2 * width.pairs + (at.x - turning) * W;
    for (uint h = first_head; h < last_head; ++h)
      Lanes<W>::copy(x + (h * outer.head + d * inner.dim),
                     y + (h * out_outer.head + d * out_inner.dim));
    return;
  }

  long position = long(s);
  if (flags.bits & kHasIds) {
    const uint id = batch * id_step.batch + s * id_step.row;
    position = (flags.bits & kWideIds) ? ((device const long*)ids)[id] : long(ids[id]);
    // Unsigned, a sum below zero or past int64 is larger than any table.
    if (ulong(position) + ulong(offset) >= ulong(tokens.rows)) {
      report(fault, position, tokens.rows);
      position = -offset;  // row 0
    }
  }
  const uint row = uint(ulong(position) + ulong(offset)), p = at.x * W;
  const value c = Lanes<W>::load(cosines + (batch * cos_step.batch + row * cos_step.row + p));
  value sn = Lanes<W>::load(sines + (batch * sin_step.batch + row * sin_step.row + p));
  if (flags.bits & kConjugate) sn = -sn;

  for (uint h = first_head; h < last_head; ++h) {
    device const T* from = x + h * outer.head;
    device T* to = y + h * out_outer.head;
    value first, second;
    if (flags.bits & kInterleaved) {
      Lanes<W>::load_pairs(from + 2 * p * inner.dim, inner.dim, first, second);
      Lanes<W>::store_pairs(to + 2 * p * out_inner.dim, out_inner.dim, first * c - second * sn,
                            second * c + first * sn);
    } else {
      first = Lanes<W>::load(from + p * inner.dim);
      second = Lanes<W>::load(from + (p + width.pairs) * inner.dim);
      Lanes<W>::store(to + p * out_inner.dim, first * c - second * sn);
      Lanes<W>::store(to + (p + width.pairs) * out_inner.dim, second * c + first * sn);
    }
  }
}

#define INSTANCE(T, t, C, c, W) \
  template [[host_name("rope_" t "_" c "_x" #W)]] [[kernel]] decltype(rope<T, C, W>) rope<T, C, W>;
#define INSTANCES(T, t, C, c) INSTANCE(T, t, C, c, 1) INSTANCE(T, t, C, c, 4)
INSTANCES(float, "f32", float, "f32")
INSTANCES(half, "f16", float, "f32")
INSTANCES(half, "f16", half, "f16")
INSTANCES(bfloat, "bf16", float, "f32")
INSTANCES(bfloat, "bf16", bfloat, "bf16")
#undef INSTANCES
#undef INSTANCE
