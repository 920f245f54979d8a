// The checks of rope's calls, for the kernels of every device.
#include "rope.h"

namespace fusedops {

using torch::headeronly::ScalarType;

namespace {

void check_input(const RopeCall& c, const char* name, const View& x) {
  floating(c.op, name, x);
  if (x.rank() != 3 && x.rank() != 4)
    fail(c.op, name, " must have 3 or 4 dimensions ",
         c.bshd ? "([S, H, D] or [B, S, H, D])" : "([H, S, D] or [B, H, S, D])", " but got shape ",
         shape_of(x));
}

void check_tables(const RopeCall& c, const char* name, const View& x, int64_t batch, int64_t seq,
                  int64_t head_dim) {
  const View &cos = c.cos, &sin = c.sin;
  require_device(c.op, "cos", c.cos_tensor, cos);
  require_device(c.op, "sin", c.sin_tensor, sin);
  if (cos.type != sin.type)
    fail(c.op, "cos and sin must have one dtype but got ", name_of(cos.type), " and ",
         name_of(sin.type));
  if (cos.type != x.type && cos.type != ScalarType::Float)
    fail(c.op, "cos and sin must be Float or of ", name, "'s dtype ", name_of(x.type), " but got ",
         name_of(cos.type));
  if (cos.rank() != 2 && cos.rank() != 3)
    fail(c.op,
         "cos must be [positions, rotary_dim / 2] or [batch, seq, rotary_dim / 2] but got shape ",
         shape_of(cos));
  if (!same_shape(cos, sin))
    fail(c.op, "cos and sin must have one shape but got ", shape_of(cos), " and ", shape_of(sin));
  if (2 * cos.size(-1) > head_dim)
    fail(c.op, "rotary_dim must be at most head_dim ", head_dim, " but got ", 2 * cos.size(-1),
         " (tables are half width: rotary_dim / 2 columns)");
  if (cos.rank() == 3) {
    if (c.position_ids) fail(c.op, "position_ids must be None with a 3-D table but got a tensor");
    if (c.offset != 0) fail(c.op, "offset must be 0 with a 3-D table but got ", c.offset);
    if (cos.size(0) != 1 && cos.size(0) != batch)
      fail(c.op, "a 3-D table must have batch size 1 or ", batch, " but got ", cos.size(0));
    if (cos.size(1) != seq)
      fail(c.op, "a 3-D table must have ", seq, " rows but got ", cos.size(1));
  }
}

template <class Int>
void check_ids(const RopeCall& c, const View& ids, int64_t batch_stride, int64_t seq_stride,
               int64_t rows) {
  const Int* data = static_cast<const Int*>(ids.data);
  const int64_t batches = ids.rank() == 2 ? ids.size(0) : 1, seq = ids.size(-1);
  for (int64_t b = 0; b < batches; b++)
    for (int64_t s = 0; s < seq; s++) {
      const int64_t id = data[b * batch_stride + s * seq_stride];
      // Unsigned, a sum below zero or past int64 is larger than any table.
      if (static_cast<uint64_t>(id) + static_cast<uint64_t>(c.offset) >=
          static_cast<uint64_t>(rows))
        fail(c.op, "position_ids + offset must be in [0, ", rows, ") but got ", id, " + ",
             c.offset);
    }
}

// On the CPU every position is validated here, before the first write.
void check_positions(const RopeCall& c, int64_t batch, int64_t seq) {
  if (c.cos.rank() == 3) return;
  const int64_t rows = c.cos.size(0);
  if (!c.position_ids) {
    if (c.offset < 0) fail(c.op, "offset must not be negative but got ", c.offset);
    if (seq > 0 && c.offset > rows - seq)
      fail(c.op, "the table must have at least offset + seq = ",
           static_cast<uint64_t>(c.offset) + static_cast<uint64_t>(seq), " rows but got ", rows);
    return;
  }
  const View ids(*c.position_ids, c.device);
  require_device(c.op, "position_ids", *c.position_ids, ids);
  if (ids.type != ScalarType::Int && ids.type != ScalarType::Long)
    fail(c.op, "position_ids must be int32 or int64 but got ", name_of(ids.type));
  const bool fits =
      ids.rank() == 1 || (ids.rank() == 2 && (ids.size(0) == 1 || ids.size(0) == batch));
  if (!fits || ids.size(-1) != seq)
    fail(c.op, "position_ids must be [", seq, "] or [", batch, ", ", seq, "] but got shape ",
         shape_of(ids));
  if (c.device == Device::mps) return;  // the kernel looks at their values
  const int64_t batch_stride = ids.rank() == 2 ? ids.stride(0) : 0;
  if (ids.type == ScalarType::Long)
    check_ids<int64_t>(c, ids, batch_stride, ids.stride(-1), rows);
  else
    check_ids<int32_t>(c, ids, batch_stride, ids.stride(-1), rows);
}

}  // namespace

RopeArgs rope_arguments(const RopeCall& c, const View& x, const View& y, const View& cos,
                        const View& sin) {
  RopeArgs a = {};
  const bool batched = x.rank() == 4;
  const Dims size = ordered(x.sizes, batched, c.bshd), xs = ordered(x.strides, batched, c.bshd),
             ys = ordered(y.strides, batched, c.bshd);
  a.x = x.data, a.y = y.data, a.cos = cos.data, a.sin = sin.data;
  a.batch = batch_of(x), a.heads = size.head, a.seq = size.seq, a.head_dim = size.dim;
  a.half = cos.size(-1);
  a.x_batch = xs.batch, a.x_head = xs.head, a.x_seq = xs.seq, a.x_dim = xs.dim;
  a.y_batch = ys.batch, a.y_head = ys.head, a.y_seq = ys.seq, a.y_dim = ys.dim;
  const auto batch_stride = [](const View& table) {
    return table.rank() == 3 && table.size(0) > 1 ? table.stride(0) : 0;
  };
  a.cos_batch = batch_stride(cos), a.sin_batch = batch_stride(sin);
  a.cos_row = cos.stride(-2), a.sin_row = sin.stride(-2);
  if (c.position_ids) {
    const View ids(*c.position_ids, c.device);
    a.position_ids = ids.data;
    a.wide_ids = ids.type == ScalarType::Long;
    a.id_batch = ids.rank() == 2 && ids.size(0) > 1 ? ids.stride(0) : 0;
    a.id_seq = ids.stride(-1);
  }
  a.offset = c.offset;
  a.interleaved = c.interleaved, a.conjugate = c.conjugate;
  return a;
}

void check_turned(const RopeCall& c, const char* name, const Tensor& x, const View& v) {
  require_device(c.op, name, x, v);
  check_input(c, name, v);
  const Dims size = ordered(v.sizes, v.rank() == 4, c.bshd);
  check_tables(c, name, v, batch_of(v), size.seq, size.dim);
  check_positions(c, batch_of(v), size.seq);
}

void check_written(const RopeCall& c, const char* name, const View& y) {
  if (overlaps_itself(y))
    fail(c.op, name, " must not overlap itself but got strides that repeat elements, shape ",
         shape_of(y));
  for (const View* table : {&c.cos, &c.sin})
    if (overlap(y, *table))
      fail(c.op, name, " must not share memory with cos and sin but got a view of the same memory");
  if (c.position_ids && overlap(y, View(*c.position_ids, c.device)))
    fail(c.op, name, " must not share memory with position_ids but got a view of the same memory");
}

void check_out(const RopeCall& c, const View& v, const Tensor& out, const View& o) {
  require_device(c.op, "out", out, o);
  if (o.type != v.type)
    fail(c.op, "out must have x's dtype ", name_of(v.type), " but got ", name_of(o.type));
  if (!same_shape(o, v))
    fail(c.op, "out must have x's shape ", shape_of(v), " but got ", shape_of(o));
  check_written(c, "out", o);
  if (!same_elements(v, o) && overlap(v, o))
    fail(c.op, "out must be x itself or separate memory but got a view that overlaps x");
}

void check_pair(const RopeCall& c, const Tensor& q, const View& qv, const Tensor& k,
                const View& kv) {
  check_turned(c, "q", q, qv);
  check_turned(c, "k", k, kv);
  if (qv.type != kv.type)
    fail(c.op, "q and k must have one dtype but got ", name_of(qv.type), " and ", name_of(kv.type));
}

void check_written_pair(const RopeCall& c, const Tensor& q, const View& qv, const Tensor& k,
                        const View& kv) {
  check_pair(c, q, qv, k, kv);
  check_written(c, "q", qv);
  check_written(c, "k", kv);
  if (overlap(qv, kv)) fail(c.op, "q and k must not share memory but got views that overlap");
}

}  // namespace fusedops
