// rope, rope_out, rope_, rope_qk, rope_qk_, rope_qk_check and rope_unfused: schemas, threading, CPU
// implementation.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../parallel.h"
#include "../run.h"
#include "rope.h"

namespace fusedops {
namespace {

using torch::headeronly::ScalarType;

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

void run(const RopeCall& c, std::initializer_list<Turn> turns) {
  const auto run_with = [&](const View& cos, const View& sin) {
    std::array<RopeArgs, 2> args;
    size_t n = 0;
    for (const Turn& turn : turns) args[n++] = rope_arguments(c, turn.from, turn.to, cos, sin);
    run_rope(args.data(), n, floating(c.op, "x", turns.begin()->from), floating(c.op, "cos", cos));
  };
  if (adjacent(c.cos) && adjacent(c.sin)) return run_with(c.cos, c.sin);
  const Tensor cos = torch::stable::contiguous(c.cos_tensor),
               sin = torch::stable::contiguous(c.sin_tensor);
  run_with(View(cos), View(sin));
}

using Ops = RopeOps<Device::cpu, &run>;

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
Tensor gathered(const RopeCall& c, const Tensor& table, ScalarType type, int64_t seq) {
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
  const RopeCall c{"rope_unfused", Device::cpu, cos,         sin,      position_ids,
                   offset,         bshd,        interleaved, conjugate};
  const View v(x);
  check_turned(c, "x", x, v);
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
  m.impl("rope_unfused", TORCH_BOX(&rope_unfused));
}

}  // namespace fusedops
