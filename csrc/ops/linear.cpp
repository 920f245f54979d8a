// linear: schema, checks, CPU implementation; and run_linear, the threading of every dense layer.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>

#include "../parallel.h"
#include "memory.h"

namespace fusedops {

namespace {

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const LinearCall call("linear", input, weight, bias);
  Tensor y = call.fresh_output();
  call.run(Activation::identity, View(y));
  return y;
}

}  // namespace

void LinearCall::run(Activation act, const View& y, const View* z) const {
  LinearArgs a = args;
  a.act = act;
  a.y = y.data;
  rows_of(y, a.ldy);
  if (z) a.z = z->data, rows_of(*z, a.ldz);
  const Backend by =
      a.packed ? Backend::engine : backend_for(Product::forward, type, a.m, a.n, a.k);
  by == Backend::engine ? run_linear(a, type) : run_by_torch(a, type, by);
}

void LinearCall::run_into(Activation act, Tensor& out, const View& y) const {
  int64_t stride;
  if (rows_of(y, stride)) return run(act, y);
  const Tensor fresh = fresh_output();
  run(act, View(fresh));
  torch::stable::copy_(out, fresh);
}

namespace {

struct LinearKernels {
  void (*shape)(const LinearArgs&, LinearShape&);
  void (*dots)(const LinearArgs&, const LinearPart&);
  void (*panels)(const LinearArgs&, const LinearPart&);
  void (*pack)(const LinearArgs&, void*, int64_t, int64_t);
  void (*rows)(const LinearArgs&, void*, int64_t, int64_t);
};

LinearKernels kernels_for(DType t) {
  const KernelTable& k = kernels();
#define OF(T)                                                                      \
  {                                                                                \
    k.linear_shape_##T, k.linear_dots_##T, k.linear_panels_##T, k.linear_pack_##T, \
        k.linear_rows_##T                                                          \
  }
  switch (t) {
    case DType::f16:
      return OF(f16);
    case DType::bf16:
      return OF(bf16);
    case DType::f64:
      return OF(f64);
    default:
      return OF(f32);
  }
#undef OF
}

// Work is multiply-adds, and reading w once, which costs as much as some more of them.
int64_t worker_count(const LinearArgs& a, int threads) {
  constexpr int64_t per_thread = int64_t{1} << 19;  // 5 to 10 us
  const int64_t work = a.n * a.k * (a.m + 8);
  return std::clamp<int64_t>(work / per_thread, 1, threads);
}

constexpr int64_t kDotChunk = 64;             // rows whose sums stay in the first cache
constexpr int64_t kPrivateRows = 32;          // so few each worker packs for itself: nobody waits
constexpr int64_t kPrivateBytes = 256 << 10;  // of them at most
constexpr int64_t kRowsBytes = 16 << 20;      // of packed x at once
constexpr int64_t kChunkBytes = 4 << 20;      // of packed x that pass by one panel after the other
constexpr int64_t kChunkRows = 1024;  // whose sums stay in the second cache between blocks of k
constexpr int64_t kTogether = 8;      // columns of a task that has few rows, in those of one
constexpr int64_t kLeastRows = 128;   // worth a panel
constexpr int64_t kLastParts = 8;     // of the last task of a worker, at most

// y in tasks of `rows` rows (or tiles of rows) x `columns` columns.
struct Tasks {
  bool dots, own_rows;
  int64_t m, rows, n, columns;
  int64_t scratch;  // bytes for each worker
  int64_t workers;
  int64_t parts;  // the last task of a worker is handed out in so many, that all end together

  int64_t down() const { return pieces(m, rows); }
  int64_t across() const { return pieces(n, columns); }
};

// A few rows pass the columns of a task in a moment: so many make one.
int64_t together(const Tasks& t) {
  return std::clamp<int64_t>(t.across() / (8 * t.workers), 1, kTogether);
}

Tasks cut(const LinearArgs& a, const LinearShape& shape, bool dots, int threads) {
  Tasks t = {};
  t.parts = 1;
  t.workers = worker_count(a, threads);
  t.dots = dots;
  t.n = a.n;
  t.columns = dots ? shape.dot_columns : shape.panel_columns;
  // Enough tasks for all threads to end together, but of rows enough to be worth a panel.
  // Each chunk of rows transposes a plain panel anew: a single one is cut less finely.
  const int64_t each = t.across() == 1 ? 4 : 8;
  const int64_t wanted = t.workers > 1 ? pieces(each * t.workers, t.across()) : 1;
  if (dots) {
    const int64_t chunks =
        std::max(pieces(a.m, kDotChunk), std::min(wanted, pieces(a.m, kDotChunk / 4)));
    t.m = a.m;
    t.rows = pieces(a.m, chunks);
    t.scratch = aligned(t.rows * shape.dot_row_bytes + shape.dot_bytes);
    if (a.m <= shape.dot_rows) t.columns *= together(t);
    t.workers = std::min(t.workers, t.down() * t.across());
    return t;
  }
  int64_t most = std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(1, shape.row_bytes),
                                     kLeastRows, a.m + kLeastRows);
  if (shape.panel_row_bytes > 0) most = std::min(most, kChunkRows);
  const int64_t chunks = std::max(pieces(a.m, most), std::min(wanted, pieces(a.m, kLeastRows)));
  t.m = pieces(a.m, shape.tile_rows);  // in tiles from here on
  t.rows = pieces(t.m, chunks);
  t.scratch = aligned(shape.panel_bytes + t.rows * shape.tile_rows * shape.panel_row_bytes);
  t.own_rows = !shape.in_place && a.m <= kPrivateRows && a.m * shape.row_bytes <= kPrivateBytes;
  // A panel that is not packed is transposed once more for each part.
  if (t.workers > 1) t.parts = std::clamp<int64_t>(t.rows / (a.packed ? 4 : 12), 1, kLastParts);
  if (t.m == 1) t.columns *= together(t);
  // More workers than tasks still help to pack rows that are shared.
  if (t.own_rows || shape.in_place) t.workers = std::min(t.workers, t.down() * t.across());
  return t;
}

std::atomic<bool> same_bits{false};

using Counter = std::atomic<int64_t>;
constexpr int64_t kCounterBytes = 64;  // apart: no two share a line

// Hands out the tasks: each worker has a range of its own, and then helps the others with theirs.
// Within a range the columns of w follow one another, for each chunk of rows in turn.
class Queue {
 public:
  // memory: kCounterBytes for each worker.
  Queue(const Tasks& t, char* memory)
      : tasks_(t), by_columns_(t.across() >= 2 * t.workers), memory_(memory) {
    for (int64_t w = 0; w < t.workers; w++) new (memory + w * kCounterBytes) Counter(0);
  }

  // The next task of a worker into `part`; false when there is none.
  bool next(int64_t worker, LinearPart& part) {
    const int64_t down = tasks_.down(), across = tasks_.across();
    for (int64_t turn = 0; turn < tasks_.workers; turn++) {
      const int64_t owner = (worker + turn) % tasks_.workers;
      const int64_t first = share(owner), own = share(owner + 1) - first;
      Counter& taken = *std::launder(reinterpret_cast<Counter*>(memory_ + owner * kCounterBytes));
      const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
      const int64_t width = by_columns_ ? own : across;
      const int64_t last = own * (by_columns_ ? down : across) - 1;
      if (last < 0) continue;
      const int64_t whole = std::min(task, last);
      const int64_t row = whole / width + (by_columns_ ? 0 : first);
      const int64_t col = whole % width + (by_columns_ ? first : 0);
      const int64_t begin = row * tasks_.rows, end = std::min(tasks_.m, begin + tasks_.rows);
      const int64_t parts = whole == last ? std::min(tasks_.parts, end - begin) : 1;
      if (task >= whole + parts) continue;
      part.row_begin = begin + (task - whole) * (end - begin) / parts;
      part.row_end = begin + (task - whole + 1) * (end - begin) / parts;
      part.col_begin = col * tasks_.columns;
      part.col_end = std::min(tasks_.n, part.col_begin + tasks_.columns);
      return true;
    }
    return false;
  }

 private:
  int64_t share(int64_t worker) const {
    return worker * (by_columns_ ? tasks_.across() : tasks_.down()) / tasks_.workers;
  }

  const Tasks& tasks_;
  const bool by_columns_;
  char* memory_;
};

void wait_for(const Counter& done, int64_t count) {
  for (int spins = 0; done.load(std::memory_order_acquire) < count; spins++)
    if (spins > 1000) std::this_thread::yield();
}

// All workers pack the tiles of x, in groups, and go on when the last one is there.
void share_rows(const LinearArgs& a, const LinearKernels& k, int64_t tiles, char* to,
                Counter& taken, Counter& done) {
  constexpr int64_t group = 4;
  for (;;) {
    const int64_t tile = taken.fetch_add(group, std::memory_order_relaxed);
    if (tile >= tiles) break;
    const int64_t end = std::min(tiles, tile + group);
    k.rows(a, to, tile, end);
    done.fetch_add(end - tile, std::memory_order_release);
  }
  wait_for(done, tiles);
}

}  // namespace

// A pass is as many rows as have their packed copy in memory at once; all, where x is not packed.
struct LinearSchedule {
  LinearKernels kernels;
  LinearShape shape;
  Tasks tasks;               // of a whole pass
  int64_t rows;              // of a pass
  int64_t element;           // bytes of one
  int64_t shared_rows, own;  // bytes: packed x for all workers, and what each has for itself
};

namespace {

LinearSchedule schedule(const LinearArgs& a, DType type, int threads) {
  LinearSchedule s = {};
  s.kernels = kernels_for(type);
  s.kernels.shape(a, s.shape);
  if (a.m == 0 || a.n == 0) return s;  // nothing to cut
  s.element = size_of(type);
  // The one choice that changes a row's bits: within a family its sums depend on the row alone.
  const bool dots = !a.packed && !a.w_by_k && !deterministic() &&
                    (a.m <= s.shape.few_rows || a.n <= s.shape.few_columns);
  const int64_t row_bytes = std::max<int64_t>(1, s.shape.row_bytes);
  const int64_t most = std::max(kRowsBytes / row_bytes / kLeastRows, int64_t{1}) * kLeastRows;
  const bool as_it_lies = dots || s.shape.in_place;
  s.rows = as_it_lies ? a.m : pieces(a.m, pieces(a.m, most));
  LinearArgs pass = a;
  pass.m = s.rows;
  s.tasks = cut(pass, s.shape, dots, threads);
  const int64_t rows_bytes = as_it_lies ? 0 : aligned(s.rows * s.shape.row_bytes);
  s.own = s.tasks.scratch + (s.tasks.own_rows ? rows_bytes : 0);
  s.shared_rows = s.tasks.own_rows ? 0 : rows_bytes;
  return s;
}

void run_pass(const LinearSchedule& s, const LinearArgs& a, char* memory) {
  const LinearKernels& k = s.kernels;
  Tasks t = s.tasks;
  t.m = t.dots ? a.m : pieces(a.m, s.shape.tile_rows);
  char* scratch = memory + s.shared_rows;
  Queue queue(t, scratch + t.workers * s.own);
  alignas(kCounterBytes) Counter taken{0};
  alignas(kCounterBytes) Counter done{0};
  // A range may hold several workers (torch's pool was busy): its first one then does all the work.
  parallel_for(t.workers, 1, [&](int64_t worker, int64_t) {
    LinearPart part = {};
    char* mine = scratch + worker * s.own;
    part.scratch = mine;
    part.rows = memory;
    if (t.own_rows) {
      k.rows(a, mine + t.scratch, 0, t.m);
      part.rows = mine + t.scratch;
    } else if (!t.dots && !s.shape.in_place) {
      share_rows(a, k, t.m, memory, taken, done);
    }
    for (int64_t row = -1; queue.next(worker, part); row = part.row_begin) {
      part.new_rows = part.row_begin != row;
      (t.dots ? k.dots : k.panels)(a, part);
    }
  });
}

void pack(const LinearKernels& k, const LinearArgs& a, void* to) {
  LinearShape shape = {};
  k.shape(a, shape);
  const int64_t columns = shape.panel_columns;
  const int64_t grain = pieces(1 << 15, std::max<int64_t>(1, a.k * columns));
  parallel_for(pieces(a.n, columns), grain,
               [&](int64_t begin, int64_t end) { k.pack(a, to, begin, end); });
}

int64_t packed_bytes(const LinearKernels& k, const LinearArgs& a) {
  LinearShape shape = {};
  k.shape(a, shape);
  return pieces(a.n, shape.panel_columns) * shape.packed_bytes;
}

}  // namespace

bool deterministic() { return same_bits.load(std::memory_order_relaxed); }
void set_deterministic(bool on) { same_bits = on; }

std::shared_ptr<const LinearSchedule> schedule_packed(LinearArgs a, DType type, int threads) {
  static constexpr char some = 0;
  a.packed = &some;  // that there is one is all that a schedule asks
  return std::make_shared<const LinearSchedule>(schedule(a, type, threads));
}

int64_t work_bytes(const LinearSchedule& s) {
  return s.shared_rows + s.tasks.workers * (s.own + kCounterBytes);
}

void run_linear(const LinearSchedule& s, const LinearArgs& a, char* memory) {
  if (a.m == 0 || a.n == 0) return;
  for (int64_t row = 0; row < a.m; row += s.rows) {
    LinearArgs part = a;
    part.deterministic = deterministic();
    part.m = std::min(s.rows, a.m - row);
    part.x = static_cast<const char*>(a.x) + row * a.ldx * s.element;
    part.y = static_cast<char*>(a.y) + row * a.ldy * s.element;
    if (a.z) part.z = static_cast<char*>(a.z) + row * a.ldz * s.element;
    run_pass(s, part, memory);
  }
}

void run_linear(const LinearArgs& a, DType type) {
  if (a.m == 0 || a.n == 0) return;
  const LinearSchedule s = schedule(a, type, thread_count());
  run_linear(s, a, Lease(work_bytes(s)).memory);
}

int64_t packed_columns(const LinearArgs& a, DType type) {
  LinearShape shape = {};
  kernels_for(type).shape(a, shape);
  return shape.panel_columns;
}

int64_t packed_bytes(const LinearArgs& a, DType type) { return packed_bytes(kernels_for(type), a); }
int64_t packed_bytes(const LinearSchedule& s, const LinearArgs& a) {
  return packed_bytes(s.kernels, a);
}

void run_pack(const LinearArgs& a, DType type, void* to) { pack(kernels_for(type), a, to); }
void run_pack(const LinearSchedule& s, const LinearArgs& a, void* to) { pack(s.kernels, a, to); }

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_nograd(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_nograd", TORCH_BOX(&linear));
}

}  // namespace fusedops
