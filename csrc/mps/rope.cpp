// rope, rope_out, rope_, rope_qk, rope_qk_, rope_qk_check on MPS: grids and arguments.
#include "../ops/rope.h"

#include <algorithm>
#include <array>

#include "../../metal/params.h"
#include "faults.h"
#include "launch.h"

namespace fusedops::mps {
namespace {

namespace metal = fusedops_metal;

// A tensor of the dispatch: its strides as the shader takes them.
struct Side {
  const Turn* turn;
  RopeArgs args;
};

metal::BatchHead outer(int64_t batch, int64_t head) { return {narrow(batch), narrow(head)}; }
metal::SeqDim inner(int64_t seq, int64_t dim) { return {narrow(seq), narrow(dim)}; }

// A dimension of one element has a stride that nobody uses, and that may be anything.
RopeArgs without_idle_strides(RopeArgs a) {
  if (a.batch <= 1) a.x_batch = a.y_batch = a.cos_batch = a.sin_batch = a.id_batch = 0;
  if (a.heads <= 1) a.x_head = a.y_head = 0;
  if (a.seq <= 1) a.x_seq = a.y_seq = a.id_seq = 0;
  if (a.head_dim <= 1) a.x_dim = a.y_dim = 0;
  return a;
}

// Whether four pairs at a time may be read and written: addresses are then multiples of four
// elements all along.
bool by_four(const Side& side) {
  const RopeArgs& a = side.args;
  const View &x = side.turn->from, &y = side.turn->to;
  const DType type = floating("", "", x);
  if (a.half % 4 != 0 || a.head_dim % 4 != 0 || a.x_dim != 1 || a.y_dim != 1) return false;
  for (const int64_t stride : {a.x_batch, a.x_head, a.x_seq, a.y_batch, a.y_head, a.y_seq})
    if (stride % 4 != 0) return false;
  return vector_aligned(x, type) && vector_aligned(y, type);
}

bool by_four(const RopeArgs& a, const View& cos, const View& sin) {
  for (const int64_t stride : {a.cos_batch, a.cos_row, a.sin_batch, a.sin_row})
    if (stride % 4 != 0) return false;
  const DType type = floating("", "", cos);
  return vector_aligned(cos, type) && vector_aligned(sin, type);
}

metal::RopeFlags flags_of(const RopeArgs& a) {
  uint32_t bits = 0;
  if (a.interleaved) bits |= metal::kInterleaved;
  if (a.conjugate) bits |= metal::kConjugate;
  if (a.position_ids) bits |= metal::kHasIds;
  if (a.wide_ids) bits |= metal::kWideIds;
  return {bits};
}

// q and, of the same batch, length and head size or else null, k.
void dispatch(const RopeCall& c, const Tensor& cos, const View& cos_view, const Tensor& sin,
              const View& sin_view, const Side& q, const Side* k) {
  const RopeArgs& a = q.args;
  const bool wide = by_four(q) && (!k || by_four(*k)) && by_four(a, cos_view, sin_view);
  const int64_t lanes = wide ? 4 : 1;
  const bool in_place =
      q.turn->x.get() == q.turn->y.get() || same_elements(q.turn->from, q.turn->to);
  const int64_t rest = in_place ? 0 : a.head_dim - 2 * a.half;
  const auto groups = [](int64_t heads) {
    return (heads + metal::kRopeHeads - 1) / int64_t{metal::kRopeHeads};
  };
  const auto columns = static_cast<uint64_t>((a.half + rest) / lanes),
             rows = static_cast<uint64_t>(groups(a.heads) + (k ? groups(k->args.heads) : 0)),
             tokens = static_cast<uint64_t>(a.batch * a.seq);
  const uint64_t x = std::clamp<uint64_t>(columns, 1, 256),
                 y = std::clamp<uint64_t>(rows, 1, 256 / x);
  const Grid grid = {{columns, rows, tokens}, {x, y, 256 / (x * y)}};

  const Side& second = k ? *k : q;
  const RopeArgs& b = second.args;
  const DType type = floating(c.op, "x", q.turn->from), table = floating(c.op, "cos", cos_view);
  const Faults faults(q.turn->x);
  const bool turns = a.half > 0;  // else there are no tables, and an empty tensor cannot be bound
  launch(c.op,
         std::string("rope_") + short_name(type) + "_" + short_name(table) + (wide ? "_x4" : "_x1"),
         grid, q.turn->x, q.turn->y, second.turn->x, second.turn->y, turns ? cos : q.turn->x,
         turns ? sin : q.turn->x, c.position_ids ? *c.position_ids : q.turn->x, faults.flag(),
         metal::HeadCounts{narrow(a.heads), k ? narrow(b.heads) : 0}, metal::Width{narrow(a.half)},
         metal::Tokens{narrow(a.seq), narrow(cos_view.size(-2))}, outer(a.x_batch, a.x_head),
         inner(a.x_seq, a.x_dim), outer(a.y_batch, a.y_head), inner(a.y_seq, a.y_dim),
         outer(b.x_batch, b.x_head), inner(b.x_seq, b.x_dim), outer(b.y_batch, b.y_head),
         inner(b.y_seq, b.y_dim), metal::BatchRow{narrow(a.cos_batch), narrow(a.cos_row)},
         metal::BatchRow{narrow(a.sin_batch), narrow(a.sin_row)},
         metal::BatchRow{narrow(a.id_batch), narrow(a.id_seq)}, a.offset, flags_of(a));
  if (c.position_ids) faults.ask();
}

void run(const RopeCall& c, std::initializer_list<Turn> turns) {
  raise_arrived_fault(c.op);
  // A copy of tables whose columns are not adjacent: they are small beside x.
  const bool as_they_lie = adjacent(c.cos) && adjacent(c.sin);
  const Tensor cos = as_they_lie ? c.cos_tensor : torch::stable::contiguous(c.cos_tensor),
               sin = as_they_lie ? c.sin_tensor : torch::stable::contiguous(c.sin_tensor);
  const View cos_view(cos, Device::mps), sin_view(sin, Device::mps);
  check_extent(c.op, "cos", cos_view);
  check_extent(c.op, "sin", sin_view);
  if (c.position_ids) {
    const View ids(*c.position_ids, Device::mps);
    check_extent(c.op, "position_ids", ids);
    if (cos_view.size(-2) == 0 && ids.numel > 0)
      fail(c.op, "the table must have rows for position_ids but got shape ", shape_of(cos_view));
  }

  std::array<Side, 2> sides;
  size_t count = 0;
  for (const Turn& turn : turns) {
    check_extent(c.op, "x", turn.from);
    check_extent(c.op, "the result", turn.to);
    if (turn.from.numel == 0) continue;
    const RopeArgs args = rope_arguments(c, turn.from, turn.to, cos_view, sin_view);
    sides[count++] = {&turn, without_idle_strides(args)};
  }
  if (count == 0) return;
  const RopeArgs &q = sides[0].args, &k = sides[1].args;
  const bool together =
      count == 2 && q.batch == k.batch && q.seq == k.seq && q.head_dim == k.head_dim;
  dispatch(c, cos, cos_view, sin, sin_view, sides[0], together ? &sides[1] : nullptr);
  if (count == 2 && !together) dispatch(c, cos, cos_view, sin, sin_view, sides[1], nullptr);
}

using Ops = RopeOps<Device::mps, &run>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedops, MPS, m) {
  m.impl("rope", TORCH_BOX(&Ops::rope));
  m.impl("rope_nograd", TORCH_BOX(&Ops::rope));
  m.impl("rope_out", TORCH_BOX(&Ops::rope_out));
  m.impl("rope_out_nograd", TORCH_BOX(&Ops::rope_out));
  m.impl("rope_", TORCH_BOX(&Ops::rope_));
  m.impl("rope__nograd", TORCH_BOX(&Ops::rope_));
  m.impl("rope_qk", TORCH_BOX(&Ops::rope_qk));
  m.impl("rope_qk_nograd", TORCH_BOX(&Ops::rope_qk));
  m.impl("rope_qk_", TORCH_BOX(&Ops::rope_qk_));
  m.impl("rope_qk__nograd", TORCH_BOX(&Ops::rope_qk_));
  m.impl("rope_qk_check", TORCH_BOX(&Ops::rope_qk_check));
}

}  // namespace fusedops::mps
