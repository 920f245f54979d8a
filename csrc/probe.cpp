// The machine's limits, measured on torch's threads with the kernels of the ISA in use. The best of
// all ways and repeats is the limit: noise only ever slows.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <string>
#include <vector>

#include "parallel.h"
#include "run.h"

namespace fusedops {
namespace {

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

// Seconds from the moment that every unit has a thread to the end of the last one: waking threads
// is no limit of the machine. work(u) for the units [0, n).
template <class F>
double together(int64_t n, const F& work) {
  std::atomic<int64_t> arrived{0};
  std::vector<double> start(static_cast<size_t>(n)), stop(static_cast<size_t>(n));
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    arrived += end - begin;
    // Not for ever: nobody promises that all threads run at once.
    for (const double patience = seconds() + 2e-3; arrived < n && seconds() < patience;) continue;
    for (int64_t u = begin; u < end; u++) {
      start[static_cast<size_t>(u)] = seconds();
      work(u);
      stop[static_cast<size_t>(u)] = seconds();
    }
  });
  return *std::max_element(stop.begin(), stop.end()) -
         *std::min_element(start.begin(), start.end());
}

constexpr int64_t kHugePage = 2 << 20;

// Memory from the system, aligned for huge pages; its pages come with their first touch.
class Fresh {
 public:
  Fresh(const char* op, int64_t bytes, [[maybe_unused]] bool huge)
      : bytes_(static_cast<size_t>(bytes + kHugePage)) {
    start_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED)
      fail(op, "memory for the buffers must be available but got ", bytes, " bytes refused");
    const uintptr_t first = reinterpret_cast<uintptr_t>(start_) + kHugePage - 1;
    data_ = reinterpret_cast<void*>(first / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(start_, bytes_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  }
  Fresh(const Fresh&) = delete;
  Fresh& operator=(const Fresh&) = delete;
  ~Fresh() { munmap(start_, bytes_); }
  void* get() const { return data_; }

 private:
  void *start_, *data_;
  size_t bytes_;
};

using Kernel = void (*)(const ProbeArgs&, int64_t, int64_t);

// Ways to move bytes. Which is the fastest depends on the level that holds them.
struct Way {
  const char* name;
  ProbeBy by;
  int64_t prefetch, prefetch_to, streams;
};
constexpr Way kCopyWays[] = {
    {"stores", ProbeBy::stores, 0, 0, 1},
    {"stores, prefetch 2 KiB", ProbeBy::stores, 2048, 0, 1},
    {"stores, prefetch 8 KiB", ProbeBy::stores, 8192, 0, 1},
    {"stores, prefetch both", ProbeBy::stores, 2048, 2048, 1},
    {"streams", ProbeBy::streams, 0, 0, 1},
    {"streams, prefetch 2 KiB", ProbeBy::streams, 2048, 0, 1},
    {"streams, prefetch 8 KiB", ProbeBy::streams, 8192, 0, 1},
    {"streams at 4 places", ProbeBy::streams, 2048, 0, 4},
    {"memcpy", ProbeBy::library, 0, 0, 1},
    {"copy instruction", ProbeBy::string, 0, 0, 1},
};
constexpr Way kReadWays[] = {
    {"loads", ProbeBy::stores, 0, 0, 1},
    {"loads, prefetch 2 KiB", ProbeBy::stores, 2048, 0, 1},
    {"loads, prefetch 8 KiB", ProbeBy::stores, 8192, 0, 1},
    {"loads at 4 places", ProbeBy::stores, 0, 0, 4},
    {"loads at 4 places, prefetch 2 KiB", ProbeBy::stores, 2048, 0, 4},
};
constexpr Way kInPlaceWays[] = {
    {"stores", ProbeBy::stores, 0, 0, 1},
    {"stores, prefetch 2 KiB", ProbeBy::stores, 2048, 0, 1},
    {"stores, prefetch 8 KiB", ProbeBy::stores, 8192, 0, 1},
    {"stores at 4 places", ProbeBy::stores, 2048, 0, 4},
    {"streams, prefetch 2 KiB", ProbeBy::streams, 2048, 0, 1},
};

struct Probe {
  const char* op;
  Kernel kernel;
  std::vector<Way> ways;
  int traffic;  // bytes read and written for each byte of the buffer
};

Probe probe_of(const std::string& name) {
  const KernelTable& k = kernels();
  if (name == "copy")
    return {"probe_copy", k.probe_copy, {std::begin(kCopyWays), std::end(kCopyWays)}, 2};
  if (name == "read")
    return {"probe_read", k.probe_read, {std::begin(kReadWays), std::end(kReadWays)}, 1};
  if (name == "in_place")
    return {
        "probe_in_place", k.probe_in_place, {std::begin(kInPlaceWays), std::end(kInPlaceWays)}, 2};
  fail("probe", "name must be 'copy', 'read' or 'in_place' but got '", name, "'");
}

ProbeArgs args_of(const Way& way, const void* from, void* to, int64_t rounds) {
  ProbeArgs args = {};
  args.from = from, args.to = to, args.rounds = rounds;
  args.by = way.by, args.prefetch = way.prefetch, args.prefetch_to = way.prefetch_to;
  args.streams = way.streams;
  return args;
}

// Each of `units` threads makes its rounds of passes over its own share of the blocks. total: of
// all that was read.
double run(const Probe& probe, const ProbeArgs& all, int64_t blocks, int64_t units,
           double* total = nullptr) {
  std::vector<double> sums(static_cast<size_t>(units) * 8);  // a cache line each
  const double time = together(units, [&](int64_t u) {
    ProbeArgs args = all;
    args.result = &sums[static_cast<size_t>(u) * 8];
    probe.kernel(args, blocks * u / units, blocks * (u + 1) / units);
  });
  if (total) *total = std::accumulate(sums.begin(), sums.end(), 0.0);
  return time;
}

// Pages that are there already, each touched by the thread that will use it; small whole numbers.
class Buffer {
 public:
  Buffer(const char* op, int64_t blocks) : memory_(op, blocks * kProbeBlock, true) {
    const int64_t units = thread_count(), floats = blocks * kProbeBlock / 4;
    float* data = static_cast<float*>(memory_.get());
    parallel_for(units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = floats * begin / units; i < floats * end / units; i++)
        data[i] = static_cast<float>(i & 3);
    });
  }
  void* get() const { return memory_.get(); }

 private:
  Fresh memory_;
};

int64_t checked_blocks(const char* op, int64_t bytes, int repeats) {
  const int64_t most =
      static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) / 4 * static_cast<int64_t>(getpagesize());
  if (bytes < kProbeBlock) fail(op, "bytes must be at least ", kProbeBlock, " but got ", bytes);
  if (bytes > most)
    fail(op, "bytes must be at most a quarter of the memory, ", most, ", but got ", bytes);
  if (repeats < 1) fail(op, "repeats must be at least 1 but got ", repeats);
  return bytes / kProbeBlock;
}

// Passes over so many bytes are worth one reading of the clock: about 0.1 ms and more.
constexpr int64_t kRegion = 32 << 20;

// Best bytes/s; cold: the caches hold none of it when a pass begins.
double best_rate(const Probe& probe, int64_t bytes, int repeats, bool cold) {
  const int64_t blocks = checked_blocks(probe.op, bytes, repeats);
  const Buffer from(probe.op, blocks), to(probe.op, probe.traffic == 2 ? blocks : 1);
  void* const place = probe.kernel == kernels().probe_read ? nullptr : to.get();
  const Probe reader = probe_of("read");
  const int64_t other_blocks = cold ? 2 * last_cache_bytes() / kProbeBlock : 1;
  const Buffer other(probe.op, other_blocks);
  const ProbeArgs evict = args_of(kReadWays[0], other.get(), nullptr, 1);

  const int64_t traffic = probe.traffic * blocks * kProbeBlock;
  const int64_t rounds = cold ? 1 : std::max<int64_t>(1, kRegion / traffic);
  const double work = static_cast<double>(traffic * rounds);
  // One thread as well: beside other work it may well be the fastest.
  const int64_t all = thread_count();
  std::vector<double> best(2 * probe.ways.size());
  double most = 0;
  for (int i = 0; i < repeats; i++)
    for (size_t w = 0; w < best.size(); w++) {
      if (w % 2 == 1 && all == 1) continue;
      if (i > 0 && best[w] < 0.6 * most) continue;  // not the fastest way at this size
      if (cold) run(reader, evict, other_blocks, all);
      const ProbeArgs args = args_of(probe.ways[w / 2], from.get(), place, rounds);
      const double time = run(probe, args, blocks, w % 2 == 1 ? 1 : all);
      best[w] = std::max(best[w], work / time);
      most = std::max(most, best[w]);
    }
  return most;
}

using FmaKernel = void (*)(const ProbeArgs&, int64_t, int64_t);

FmaKernel fma_kernel(const std::string& dtype) {
  const KernelTable& k = kernels();
  if (dtype == "f32") return k.probe_fma_f32;
  if (dtype == "f64") return k.probe_fma_f64;
  if (dtype == "bf16") return k.probe_fma_bf16;
  if (dtype == "int8") return k.probe_fma_int8;
  fail("probe_fma", "dtype must be 'f32', 'f64', 'bf16' or 'int8' but got '", dtype, "'");
}

}  // namespace

double probe_copy(int64_t bytes, int repeats, bool cold) {
  return best_rate(probe_of("copy"), bytes, repeats, cold);
}
double probe_read(int64_t bytes, int repeats, bool cold) {
  return best_rate(probe_of("read"), bytes, repeats, cold);
}
double probe_in_place(int64_t bytes, int repeats, bool cold) {
  return best_rate(probe_of("in_place"), bytes, repeats, cold);
}

double probe_fresh_copy(int64_t bytes, int repeats, bool huge) {
  const char* op = "probe_fresh_copy";
  const int64_t blocks = checked_blocks(op, bytes, repeats);
  const Probe probe = probe_of("copy");
  const Buffer from(op, blocks);
  double best = 0;
  for (int i = 0; i < repeats; i++)
    for (const Way& way : {kCopyWays[0], kCopyWays[2], kCopyWays[6]}) {
      const double start = seconds();
      const Fresh to(op, blocks * kProbeBlock, huge);
      const double mapped = seconds();
      const double time = run(probe, args_of(way, from.get(), to.get(), 1), blocks, thread_count());
      best =
          std::max(best, static_cast<double>(2 * blocks * kProbeBlock) / (mapped - start + time));
    }
  return best;
}

double probe_fma(const std::string& dtype) {
  const FmaKernel kernel = fma_kernel(dtype);
  const int64_t units = thread_count(), rounds = 100000;
  double best = 0;
  for (int in_vain = 0; in_vain < 24; in_vain++) {
    std::vector<double> work(static_cast<size_t>(units));
    const double time = together(units, [&](int64_t u) {
      const char* unit = nullptr;
      ProbeArgs args = {};
      args.rounds = rounds, args.unit = &unit, args.work_per_round = &work[static_cast<size_t>(u)];
      kernel(args, u, u + 1);
    });
    const double rate = work[0] * static_cast<double>(rounds * units) / time;
    if (rate > 1.01 * best) in_vain = 0;
    best = std::max(best, rate);
  }
  return best;
}

std::string fma_unit(const std::string& dtype) {
  const char* unit = nullptr;
  double work = 0;
  ProbeArgs args = {};
  args.unit = &unit, args.work_per_round = &work;
  fma_kernel(dtype)(args, 0, 0);
  return unit;
}

std::vector<std::string> probe_ways(const std::string& probe) {
  std::vector<std::string> names;
  for (const Way& way : probe_of(probe).ways) names.push_back(way.name);
  return names;
}

double probe_once(const std::string& name, const std::string& way, const float* from, float* to,
                  int64_t bytes) {
  const Probe probe = probe_of(name);
  if (bytes < kProbeBlock || bytes % kProbeBlock != 0)
    fail("probe_once", "the arrays must hold a multiple of ", kProbeBlock, " bytes but got ",
         bytes);
  for (const void* p : {static_cast<const void*>(from), static_cast<const void*>(to)})
    if (reinterpret_cast<uintptr_t>(p) % 64 != 0)
      fail("probe_once", "the arrays must be aligned to 64 bytes but got others");
  for (const Way& known : probe.ways)
    if (way == known.name) {
      double total = 0;
      run(probe, args_of(known, from, to, 1), bytes / kProbeBlock, thread_count(), &total);
      return total;
    }
  fail("probe_once", "way must be one of probe_ways('", name, "') but got '", way, "'");
}

int threads() { return thread_count(); }

}  // namespace fusedops
