// The limits other kernels are measured against: the fastest copy and the multiply-add rate.
#include "../simd/simd.h"
#include "kernels.h"

namespace fusedops::FUSEDOPS_ISA {

// Blocks are read whole, then written whole, like a row of rope.
void probe_copy(const ProbeArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t block = kProbeBlock;
  constexpr int vectors = block / 4 / Vf::N;
  for (int64_t i = begin; i < end; i++) {
    const float* from = static_cast<const float*>(a.from) + i * block / 4;
    float* to = static_cast<float*>(a.to) + i * block / 4;
    if (a.prefetch)
      for (int64_t line = 0; line < block; line += 64)
        prefetch(reinterpret_cast<const char*>(from) + a.prefetch + line);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
      const Vf x = load<Vf>(from + v * Vf::N);
      if (a.stream)
        stream(to + v * Vf::N, x);
      else
        store(to + v * Vf::N, x);
    }
  }
  if (a.stream) stream_fence();
}

namespace {

// 24 independent chains hide the latency of any pipe; the empty asm keeps each link of them.
template <class Step>
FUSEDOPS_INLINE void chains(const ProbeArgs& a, int64_t begin, int64_t end, int flops,
                            const Step& step) {
  constexpr int n = Vf::N > 8 ? 24 : 12;
  Vf acc[n];
#pragma GCC unroll 24
  for (int c = 0; c < n; c++) acc[c] = set1<Vf>(0);
  const Vf x = set1<Vf>(1e-9), y = set1<Vf>(1e-9);
  for (int64_t i = begin * a.repeats; i < end * a.repeats; i++) {
#pragma GCC unroll 24
    for (int c = 0; c < n; c++) {
      acc[c] = step(acc[c], x, y);
      FUSEDOPS_KEEP(acc[c].v);
    }
  }
  Vf total = set1<Vf>(0);
#pragma GCC unroll 24
  for (int c = 0; c < n; c++) total = total + acc[c];
  *a.sink = sum(total);
  *a.flops_per_round = n * Vf::N * flops;
}

}  // namespace

void probe_fma_f32(const ProbeArgs& a, int64_t begin, int64_t end) {
  chains(a, begin, end, 2, [](Vf acc, Vf x, Vf y) { return mul_add(x, y, acc); });
}

void probe_fma_bf16(const ProbeArgs& a, int64_t begin, int64_t end) {
#ifdef FUSEDOPS_BF16_DOT
  chains(a, begin, end, 4, [](Vf acc, Vf x, Vf y) { return dot_pairs(acc, x, y); });
#else
  probe_fma_f32(a, begin, end);
#endif
}

}  // namespace fusedops::FUSEDOPS_ISA
