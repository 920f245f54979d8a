// The machine's limits, measured on torch's threads with the kernels of the ISA in use.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "parallel.h"
#include "run.h"

namespace fusedops {
namespace {

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

// Pages that are there already, huge where the system grants it.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED)
      fail("probe_copy", "memory for the buffers must be available but got ", bytes, " refused");
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    std::memset(data_, 1, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(data_, bytes_); }
  void* get() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

double copy_rate(const ProbeArgs& args, int64_t blocks) {
  const double start = seconds();
  parallel_for(blocks, 64,
               [&](int64_t begin, int64_t end) { kernels().probe_copy(args, begin, end); });
  return 2.0 * static_cast<double>(blocks * kProbeBlock) / (seconds() - start);
}

}  // namespace

double probe_copy(int64_t bytes, int repeats) {
  const int64_t blocks = bytes / kProbeBlock;
  if (blocks < 1 || repeats < 1)
    fail("probe_copy", "bytes must be at least ", kProbeBlock, " and repeats at least 1 but got ",
         bytes, " and ", repeats);
  const Buffer from(blocks * kProbeBlock), to(blocks * kProbeBlock);
  double best = 0;
  for (int i = 0; i < repeats; i++)
    for (bool stream : {false, true})
      for (int64_t prefetch : {0, 2048, 8192}) {
        ProbeArgs args = {};
        args.from = from.get(), args.to = to.get(), args.stream = stream, args.prefetch = prefetch;
        best = std::max(best, copy_rate(args, blocks));
      }
  return best;
}

double probe_fma(DType t) {
  const auto kernel = t == DType::bf16 ? kernels().probe_fma_bf16 : kernels().probe_fma_f32;
  volatile float sink = 0;
  volatile double flops = 0;
  ProbeArgs args = {};
  args.repeats = 200000, args.sink = &sink, args.flops_per_round = &flops;
  const int64_t units = thread_count();
  double best = 0;
  for (int i = 0; i < 12; i++) {
    const double start = seconds();
    parallel_for(units, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    best = std::max(best, flops * static_cast<double>(args.repeats * units) / (seconds() - start));
  }
  return best;
}

int threads() { return thread_count(); }

}  // namespace fusedops
