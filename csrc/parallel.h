// torch's own thread pool, and nothing else: torch.set_num_threads is obeyed.
#pragma once
#include <torch/csrc/stable/c/shim.h>

#include "check.h"

namespace fusedops {

inline int thread_count() {
  uint32_t n = 1;
  torch_get_num_threads(&n);
  return static_cast<int>(n);
}

inline int thread_index() {
  uint32_t i = 0;
  torch_get_thread_idx(&i);
  return static_cast<int>(i);
}

// fn(begin, end) over [0, n) in pieces of at least `grain`; fn must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& fn) {
  if (n <= 0) return;
  if (n <= grain) return fn(int64_t{0}, n);
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  if (torch_parallel_for(0, n, grain, call, const_cast<F*>(&fn)) != 0)
    fail("fusedops", "torch's threads must be available but got an error");
}

}  // namespace fusedops
