// LinearPlan and RopePlan: everything about a call but x and y, decided and allocated ahead.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "linear.h"
#include "memory.h"

namespace fusedops {
namespace {

Memory copy(const char* op, const void* from, int64_t bytes) {
  Memory to = allocate(op, bytes);
  if (bytes > 0) std::memcpy(to.get(), from, static_cast<size_t>(bytes));
  return to;
}

bool overlap(const void* x, int64_t x_bytes, const void* y, int64_t y_bytes) {
  const char *a = static_cast<const char*>(x), *b = static_cast<const char*>(y);
  return x_bytes > 0 && y_bytes > 0 && a < b + y_bytes && b < a + x_bytes;
}

LinearArgs contiguous(LinearArgs a) {
  a.ldx = a.ldw = a.k;
  a.ldy = a.n;
  return a;
}

}  // namespace

struct LinearPlan::State {
  static constexpr const char* op = "plan.gelu_linear";

  State(const LinearArgs& given, DType type, int threads)
      : args(contiguous(given)),
        schedule(schedule_packed(args, type, threads)),
        panels(allocate_kept(op, packed_bytes(*schedule, args))),
        bias(copy(op, args.bias, args.bias ? args.n * size_of(type) : 0)),
        memory(allocate_kept(op, work_bytes(*schedule))),
        x_bytes(args.m * args.k * size_of(type)),
        y_bytes(args.m * args.n * size_of(type)) {
    if (args.n * args.k > 0) run_pack(*schedule, args, panels.get());
    args.w = nullptr;
    args.packed = panels.get();
    if (args.bias) args.bias = bias.get();
  }

  static void free_again(std::atomic_flag* flag) { flag->clear(std::memory_order_release); }

  void run(const void* x, void* y) {
    LinearArgs a = args;
    a.x = x, a.y = y;
    if (!busy.test_and_set(std::memory_order_acquire)) {
      const std::unique_ptr<std::atomic_flag, decltype(&free_again)> held(&busy, &free_again);
      return run_linear(*schedule, a, memory.get());
    }
    run_linear(*schedule, a, allocate(op, work_bytes(*schedule)).get());
  }

  LinearArgs args;
  std::shared_ptr<const LinearSchedule> schedule;
  Memory panels, bias, memory;
  int64_t x_bytes, y_bytes;
  std::atomic_flag busy = ATOMIC_FLAG_INIT;  // another thread works in `memory`
};

LinearPlan::LinearPlan(const LinearArgs& a, DType type, int threads)
    : state_(std::make_shared<State>(a, type, threads)) {}

void LinearPlan::run(const void* x, void* y, bool fresh) const {
  State& s = *state_;
  if (fresh) advise_huge_pages(y, s.y_bytes);
  if (overlap(x, s.x_bytes, y, s.y_bytes))
    fail(State::op, "out must not share memory with x but got a view of the same memory");
  s.run(x, y);
}

struct RopePlan::State {
  static constexpr const char* op = "plan.rope";

  State(const RopeArgs& a, DType x, DType table, int64_t table_rows, bool bshd)
      : args(a),
        x_type(x),
        table_type(table),
        bytes(a.batch * a.heads * a.seq * a.head_dim * size_of(x)),
        rows(table_rows),
        cos(copy(op, a.cos, table_bytes())),
        sin(copy(op, a.sin, table_bytes())),
        ids(copy(op, a.position_ids, a.position_ids ? id_count() * int64_t{sizeof(int64_t)} : 0)) {
    const int64_t d = a.head_dim;
    args.x_dim = args.y_dim = 1;
    args.x_head = args.y_head = bshd ? d : a.seq * d;
    args.x_seq = args.y_seq = bshd ? a.heads * d : d;
    args.x_batch = args.y_batch = a.heads * a.seq * d;
    args.cos = cos.get(), args.sin = sin.get();
    args.cos_row = args.sin_row = a.half;
    last = a.seq - 1;
    if (!a.position_ids || id_count() == 0) return;
    const int64_t* id = reinterpret_cast<const int64_t*>(ids.get());
    first = *std::min_element(id, id + id_count());
    last = *std::max_element(id, id + id_count());
    args.position_ids = id;
    args.wide_ids = true, args.id_seq = 1;
  }

  int64_t table_bytes() const {
    return (args.cos_batch > 0 ? args.batch : 1) * rows * args.half * size_of(table_type);
  }
  int64_t id_count() const { return (args.id_batch > 0 ? args.batch : 1) * args.seq; }

  RopeArgs args;
  DType x_type, table_type;
  int64_t bytes, rows;
  Memory cos, sin, ids;
  int64_t first = 0, last = -1;  // positions without the offset
};

RopePlan::RopePlan(const RopeArgs& a, DType x, DType table, int64_t table_rows, bool bshd)
    : state_(std::make_shared<const State>(a, x, table, table_rows, bshd)) {}

void RopePlan::run(const void* x, void* y, int64_t offset, bool fresh) const {
  const State& s = *state_;
  if (offset < -s.first || offset > s.rows - 1 - s.last)
    fail(State::op, "offset must be in [", -s.first, ", ", s.rows - 1 - s.last,
         "] for these tables and positions but got ", offset);
  if (x != y && overlap(x, s.bytes, y, s.bytes))
    fail(State::op, "out must be x itself or separate memory but got a view that overlaps x");
  if (fresh) advise_huge_pages(y, s.bytes);
  RopeArgs a = s.args;
  a.x = x, a.y = y, a.offset = offset;
  run_rope(&a, 1, s.x_type, s.table_type);
}

}  // namespace fusedops
