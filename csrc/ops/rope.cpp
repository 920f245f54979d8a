// rope, rope_out, rope_, rope_qk, rope_qk_, rope_qk_check and rope_unfused: schemas, checks,
// threading, CPU implementation.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../parallel.h"
#include "../run.h"
#include "tensor.h"

namespace fusedops {
namespace {

using torch::headeronly::ScalarType;

// Everything of a call that is not x: checked and turned into strides once, shared by q and k.
struct Call {
  Call(const char* op_, const Tensor& cos_, const Tensor& sin_,
       const std::optional<Tensor>& position_ids_, int64_t offset_, bool bshd_, bool interleaved_,
       bool conjugate_)
      : op(op_),
        cos_tensor(cos_),
        sin_tensor(sin_),
        position_ids(position_ids_),
        cos(cos_),
        sin(sin_),
        offset(offset_),
        bshd(bshd_),
        interleaved(interleaved_),
        conjugate(conjugate_) {}

  const char* op;
  const Tensor &cos_tensor, &sin_tensor;
  const std::optional<Tensor>& position_ids;
  const View cos, sin;
  int64_t offset;
  bool bshd, interleaved, conjugate;
};

int64_t batch_of(const View& x) { return x.rank() == 4 ? x.size(0) : 1; }

void check_input(const Call& c, const char* name, const View& x) {
  floating(c.op, name, x);
  if (x.rank() != 3 && x.rank() != 4)
    fail(c.op, name, " must have 3 or 4 dimensions ",
         c.bshd ? "([S, H, D] or [B, S, H, D])" : "([H, S, D] or [B, H, S, D])", " but got shape ",
         shape_of(x));
}

void check_tables(const Call& c, const char* name, const View& x, int64_t batch, int64_t seq,
                  int64_t head_dim) {
  const View &cos = c.cos, &sin = c.sin;
  require_cpu(c.op, "cos", c.cos_tensor, cos);
  require_cpu(c.op, "sin", c.sin_tensor, sin);
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
void check_ids(const Call& c, const View& ids, int64_t batch_stride, int64_t seq_stride,
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

// Every position is validated here, before the first write.
void check_positions(const Call& c, int64_t batch, int64_t seq) {
  if (c.cos.rank() == 3) return;
  const int64_t rows = c.cos.size(0);
  if (!c.position_ids) {
    if (c.offset < 0) fail(c.op, "offset must not be negative but got ", c.offset);
    if (seq > 0 && c.offset > rows - seq)
      fail(c.op, "the table must have at least offset + seq = ",
           static_cast<uint64_t>(c.offset) + static_cast<uint64_t>(seq), " rows but got ", rows);
    return;
  }
  const View ids(*c.position_ids);
  require_cpu(c.op, "position_ids", *c.position_ids, ids);
  if (ids.type != ScalarType::Int && ids.type != ScalarType::Long)
    fail(c.op, "position_ids must be int32 or int64 but got ", name_of(ids.type));
  const bool fits =
      ids.rank() == 1 || (ids.rank() == 2 && (ids.size(0) == 1 || ids.size(0) == batch));
  if (!fits || ids.size(-1) != seq)
    fail(c.op, "position_ids must be [", seq, "] or [", batch, ", ", seq, "] but got shape ",
         shape_of(ids));
  const int64_t batch_stride = ids.rank() == 2 ? ids.stride(0) : 0;
  if (ids.type == ScalarType::Long)
    check_ids<int64_t>(c, ids, batch_stride, ids.stride(-1), rows);
  else
    check_ids<int32_t>(c, ids, batch_stride, ids.stride(-1), rows);
}

// x's dimensions in the order batch, head, seq, dim.
struct Dims {
  int64_t batch, head, seq, dim;
};
Dims ordered(const torch::headeronly::IntHeaderOnlyArrayRef& of, bool batched, bool bshd) {
  const size_t first = batched ? 1 : 0;
  return {batched ? of[0] : 0, of[first + (bshd ? 1 : 0)], of[first + (bshd ? 0 : 1)],
          of[first + 2]};
}

RopeArgs arguments(const Call& c, const View& x, const View& y, const View& cos, const View& sin) {
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
    const View ids(*c.position_ids);
    a.position_ids = ids.data;
    a.wide_ids = ids.type == ScalarType::Long;
    a.id_batch = ids.rank() == 2 && ids.size(0) > 1 ? ids.stride(0) : 0;
    a.id_seq = ids.stride(-1);
  }
  a.offset = c.offset;
  a.interleaved = c.interleaved, a.conjugate = c.conjugate;
  return a;
}

using RopeKernel = void (*)(const RopeArgs&, int64_t, int64_t);

RopeKernel kernel_for(DType x, DType table) {
  const KernelTable& k = kernels();
  const bool same = x == table;
  switch (x) {
    case DType::f16:
      return same ? k.rope_f16_f16 : k.rope_f16_f32;
    case DType::bf16:
      return same ? k.rope_bf16_bf16 : k.rope_bf16_f32;
    case DType::f64:
      return same ? k.rope_f64_f64 : k.rope_f64_f32;
    default:
      return k.rope_f32_f32;
  }
}

constexpr int64_t kElementsPerTask =
    32768;  // about 5 us of work: below that a second thread costs more

// What is turned, and where the result goes.
struct Turn {
  const View &x, &y;
};

void run(const Call& c, std::initializer_list<Turn> turns) {
  // A table whose columns are not adjacent is small beside x: bring it together once.
  const auto adjacent = [](const View& table) {
    return table.size(-1) <= 1 || table.stride(-1) == 1;
  };
  const auto run_with = [&](const View& cos, const View& sin) {
    std::array<RopeArgs, 2> args;
    size_t n = 0;
    for (const Turn& turn : turns) args[n++] = arguments(c, turn.x, turn.y, cos, sin);
    run_rope(args.data(), n, floating(c.op, "x", turns.begin()->x), floating(c.op, "cos", cos));
  };
  if (adjacent(c.cos) && adjacent(c.sin)) return run_with(c.cos, c.sin);
  const Tensor cos = torch::stable::contiguous(c.cos_tensor),
               sin = torch::stable::contiguous(c.sin_tensor);
  run_with(View(cos), View(sin));
}

void check(const Call& c, const char* name, const Tensor& x, const View& v) {
  require_cpu(c.op, name, x, v);
  check_input(c, name, v);
  const Dims size = ordered(v.sizes, v.rank() == 4, c.bshd);
  check_tables(c, name, v, batch_of(v), size.seq, size.dim);
  check_positions(c, batch_of(v), size.seq);
}

// What is written must be its own memory, and none of what is read.
void check_written(const Call& c, const char* name, const View& y) {
  if (overlaps_itself(y))
    fail(c.op, name, " must not overlap itself but got strides that repeat elements, shape ",
         shape_of(y));
  for (const View* table : {&c.cos, &c.sin})
    if (overlap(y, *table))
      fail(c.op, name, " must not share memory with cos and sin but got a view of the same memory");
  if (c.position_ids && overlap(y, View(*c.position_ids)))
    fail(c.op, name, " must not share memory with position_ids but got a view of the same memory");
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
            const std::optional<Tensor>& position_ids, int64_t offset, bool bshd, bool interleaved,
            bool conjugate) {
  const Call c{"rope", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  const View v(x);
  check(c, "x", x, v);
  Tensor y = empty_like_output(x, v);
  const View to(y);
  run(c, {{v, to}});
  return y;
}

void rope_out(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& position_ids, int64_t offset, bool bshd,
              bool interleaved, bool conjugate, const Tensor& out) {
  const Call c{"rope", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  const View v(x), o(out);
  check(c, "x", x, v);
  require_cpu(c.op, "out", out, o);
  if (o.type != v.type)
    fail(c.op, "out must have x's dtype ", name_of(v.type), " but got ", name_of(o.type));
  if (!same_shape(o, v))
    fail(c.op, "out must have x's shape ", shape_of(v), " but got ", shape_of(o));
  check_written(c, "out", o);
  if (!same_elements(v, o) && overlap(v, o))
    fail(c.op, "out must be x itself or separate memory but got a view that overlaps x");
  run(c, {{v, o}});
}

void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin,
           const std::optional<Tensor>& position_ids, int64_t offset, bool bshd, bool interleaved,
           bool conjugate) {
  const Call c{"rope_", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  const View v(x);
  check(c, "x", x, v);
  check_written(c, "x", v);
  run(c, {{v, v}});
}

void check_pair(const Call& c, const Tensor& q, const View& qv, const Tensor& k, const View& kv) {
  check(c, "q", q, qv);
  check(c, "k", k, kv);
  if (qv.type != kv.type)
    fail(c.op, "q and k must have one dtype but got ", name_of(qv.type), " and ", name_of(kv.type));
}

std::tuple<Tensor, Tensor> rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos,
                                   const Tensor& sin, const std::optional<Tensor>& position_ids,
                                   int64_t offset, bool bshd, bool interleaved, bool conjugate) {
  const Call c{"rope_qk", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  const View qv(q), kv(k);
  check_pair(c, q, qv, k, kv);
  Tensor q_out = empty_like_output(q, qv), k_out = empty_like_output(k, kv);
  const View q_to(q_out), k_to(k_out);
  run(c, {{qv, q_to}, {kv, k_to}});
  return {q_out, k_out};
}

void check_written_pair(const Call& c, const Tensor& q, const View& qv, const Tensor& k,
                        const View& kv) {
  check_pair(c, q, qv, k, kv);
  check_written(c, "q", qv);
  check_written(c, "k", kv);
  if (overlap(qv, kv)) fail(c.op, "q and k must not share memory but got views that overlap");
}

// All checks of rope_qk_ and no write: autograd records q and k one after the other.
void rope_qk_check(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                   const std::optional<Tensor>& position_ids, int64_t offset, bool bshd,
                   bool interleaved, bool conjugate) {
  const Call c{"rope_qk_", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  check_written_pair(c, q, View(q), k, View(k));
}

void rope_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& position_ids, int64_t offset, bool bshd,
              bool interleaved, bool conjugate) {
  const Call c{"rope_qk_", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  const View qv(q), kv(k);
  check_written_pair(c, q, qv, k, kv);
  run(c, {{qv, qv}, {kv, kv}});
}

// The rung below fusion: what eager does, one vectorised kernel and one temporary for each of its
// steps. x becomes contiguous [batch, heads, seq, head_dim] in the compute type; the tables are
// gathered.
struct Steps {
  const KernelTable& k = kernels();
  RopeStepArgs args;
  int64_t rows;
  bool wide;  // double

  using Kernel = void (*)(const RopeStepArgs&, int64_t, int64_t);
  void step(Kernel narrow_kernel, Kernel wide_kernel, const Tensor& a, const Tensor& b,
            const Tensor& out) {
    args.a = a.data_ptr(), args.b = b.data_ptr(), args.out = out.data_ptr();
    const Kernel kernel = wide ? wide_kernel : narrow_kernel;
    parallel_for(rows, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, args.head_dim)),
                 [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  void rotate(const Tensor& a, const Tensor& out) {
    step(k.rope_step_rotate_f32, k.rope_step_rotate_f64, a, a, out);
  }
  void scale(const Tensor& a, const Tensor& table, const Tensor& out, bool negate) {
    args.negate = negate;
    step(k.rope_step_scale_f32, k.rope_step_scale_f64, a, table, out);
  }
  void add(const Tensor& a, const Tensor& b, const Tensor& out) {
    step(k.rope_step_add_f32, k.rope_step_add_f64, a, b, out);
  }
};

// The table's rows for every token, in the compute type: [1 or batch, seq, half].
Tensor gathered(const Call& c, const Tensor& table, ScalarType type, int64_t seq) {
  Tensor t = torch::stable::contiguous(torch::stable::to(table, type));
  if (t.dim() == 3) return t;
  if (!c.position_ids) {
    t = torch::stable::narrow(t, 0, c.offset, seq);
    return torch::stable::unsqueeze(t, 0);
  }
  const Tensor wide =
      torch::stable::contiguous(torch::stable::to(*c.position_ids, ScalarType::Long));
  const int64_t half = t.size(1), batches = wide.dim() == 2 ? wide.size(0) : 1;
  Tensor out = torch::stable::new_empty(t, {batches, seq, half});
  const int64_t bytes = half * static_cast<int64_t>(t.element_size());
  const int64_t* ids = static_cast<const int64_t*>(wide.data_ptr());
  const char* from = static_cast<const char*>(t.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  for (int64_t i = 0; i < batches * seq; i++)
    std::copy_n(from + (c.offset + ids[i]) * bytes, bytes, to + i * bytes);
  return out;
}

Tensor rope_unfused(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const std::optional<Tensor>& position_ids, int64_t offset, bool bshd,
                    bool interleaved, bool conjugate) {
  const Call c{"rope_unfused", cos, sin, position_ids, offset, bshd, interleaved, conjugate};
  const View v(x);
  check(c, "x", x, v);
  Tensor y = torch::stable::empty_like(x);
  if (v.numel == 0) return y;

  const ScalarType type = v.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto in_order = [&](const Tensor& t) {
    return bshd ? torch::stable::transpose(t, -3, -2) : t;
  };
  const Tensor xs = torch::stable::contiguous(torch::stable::to(in_order(x), type));
  const Dims size = ordered(v.sizes, v.rank() == 4, bshd);
  const Tensor cosines = gathered(c, c.cos_tensor, type, size.seq),
               sines = gathered(c, c.sin_tensor, type, size.seq);

  Steps steps;
  steps.args = {};
  steps.args.heads = size.head, steps.args.seq = size.seq, steps.args.head_dim = size.dim;
  steps.args.half = c.cos.size(-1), steps.args.interleaved = interleaved;
  steps.args.table_batch = cosines.size(0) > 1 ? cosines.stride(0) : 0;
  steps.rows = batch_of(v) * size.head * size.seq;
  steps.wide = type == ScalarType::Double;

  Tensor rotated = torch::stable::empty_like(xs), scaled = torch::stable::empty_like(xs);
  steps.rotate(xs, rotated);
  steps.scale(xs, cosines, scaled, false);
  steps.scale(rotated, sines, rotated, conjugate);
  steps.add(scaled, rotated, scaled);
  Tensor ordered_y = in_order(y);
  torch::stable::copy_(ordered_y, scaled);
  return y;
}

}  // namespace

void run_rope(const RopeArgs* given, size_t tensors, DType x, DType table) {
  const RopeKernel kernel = kernel_for(x, table);
  std::array<RopeArgs, 2> args;
  std::array<int64_t, 2> units = {};
  int64_t elements = 0, total = 0;
  for (size_t i = 0; i < tensors; i++) {
    RopeArgs& a = args[i] = given[i];
    const int64_t tokens = a.batch * a.heads * a.seq, size = tokens * a.head_dim * size_of(x);
    if (size == 0) continue;
    // In bhsd a unit is a block of positions of kSide heads, contiguous memory for each: long
    // blocks keep the hardware's prefetcher running, short ones the table rows in cache for the
    // next heads and all threads busy. In bshd, and for one position, a unit is all heads of a
    // position.
    const bool heads_first = a.seq == 1 || a.x_head < a.x_seq;
    a.block = heads_first ? 0 : std::clamp<int64_t>(tokens / kSide / (8 * thread_count()), 32, 512);
    a.prefetch = size > (1 << 20) ? 8192 : 0;
    a.stream = a.x != a.y && size >= last_cache_bytes() / 2;
    units[i] =
        a.batch *
        (heads_first ? a.seq : (a.seq + a.block - 1) / a.block * ((a.heads + kSide - 1) / kSide));
    total += units[i];
    elements += tokens * a.head_dim;
  }
  if (total == 0) return;
  // Both tensors are one piece of work: the threads are woken once.
  const int64_t unit = std::max<int64_t>(1, elements / total);
  parallel_for(total, std::max<int64_t>(1, kElementsPerTask / unit),
               [&](int64_t begin, int64_t end) {
                 const int64_t first = units[0];
                 if (begin < first) kernel(args[0], begin, std::min(end, first));
                 if (end > first) kernel(args[1], std::max(begin, first) - first, end - first);
               });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
#define TABLES "Tensor cos, Tensor sin, Tensor? position_ids, SymInt offset, "
#define FORM "bool bshd, bool interleaved, bool conjugate"
  m.def("rope(Tensor x, " TABLES FORM ") -> Tensor");
  m.def("rope_nograd(Tensor x, " TABLES FORM ") -> Tensor");
  m.def("rope_out(Tensor x, " TABLES FORM ", Tensor(a!) out) -> ()");
  m.def("rope_out_nograd(Tensor x, " TABLES FORM ", Tensor(a!) out) -> ()");
  m.def("rope_(Tensor(a!) x, " TABLES FORM ") -> ()");
  m.def("rope__nograd(Tensor(a!) x, " TABLES FORM ") -> ()");
  m.def("rope_qk(Tensor q, Tensor k, " TABLES FORM ") -> (Tensor, Tensor)");
  m.def("rope_qk_nograd(Tensor q, Tensor k, " TABLES FORM ") -> (Tensor, Tensor)");
  m.def("rope_qk_(Tensor(a!) q, Tensor(b!) k, " TABLES FORM ") -> ()");
  m.def("rope_qk__nograd(Tensor(a!) q, Tensor(b!) k, " TABLES FORM ") -> ()");
  m.def("rope_qk_check(Tensor q, Tensor k, " TABLES FORM ") -> ()");
  m.def("rope_unfused(Tensor x, " TABLES FORM ") -> Tensor");
#undef TABLES
#undef FORM
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_nograd", TORCH_BOX(&rope));
  m.impl("rope_out", TORCH_BOX(&rope_out));
  m.impl("rope_out_nograd", TORCH_BOX(&rope_out));
  m.impl("rope_", TORCH_BOX(&rope_));
  m.impl("rope__nograd", TORCH_BOX(&rope_));
  m.impl("rope_qk", TORCH_BOX(&rope_qk));
  m.impl("rope_qk_nograd", TORCH_BOX(&rope_qk));
  m.impl("rope_qk_", TORCH_BOX(&rope_qk_));
  m.impl("rope_qk__nograd", TORCH_BOX(&rope_qk_));
  m.impl("rope_qk_check", TORCH_BOX(&rope_qk_check));
  m.impl("rope_unfused", TORCH_BOX(&rope_unfused));
}

}  // namespace fusedops
