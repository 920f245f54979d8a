// The limits other kernels are measured against: the fastest copy, read and change in place, and
// the multiply-add rates of registers.
#include "../simd/simd.h"
#include "kernels.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

constexpr int64_t kFloats = kProbeBlock / 4;
constexpr int kVectors = static_cast<int>(kFloats) / Vf::N;

FUSEDOPS_INLINE void prefetch_block(const float* p, int64_t ahead) {
  const char* line = reinterpret_cast<const char*>(p) + ahead;
  for (int64_t i = 0; i < kProbeBlock; i += 64) prefetch(line + i);
}

// block(i) for the blocks [begin, end) of one pass, in order or at `streams` places side by side.
template <class Block>
FUSEDOPS_INLINE void walk(const ProbeArgs& a, int64_t begin, int64_t end, const Block& block) {
  if (a.streams == 1) {
    for (int64_t i = begin; i < end; i++) block(i);
    return;
  }
  const int64_t part = (end - begin) / a.streams;
  for (int64_t i = begin; i < begin + part; i++)
    for (int64_t s = 0; s < a.streams; s++) block(i + s * part);
  for (int64_t i = begin + a.streams * part; i < end; i++) block(i);
}

// No pass may be skipped because it repeats the one before.
FUSEDOPS_INLINE void next_pass() { __asm__ volatile("" ::: "memory"); }

template <bool streaming>
FUSEDOPS_INLINE void put(float* p, Vf x) {
  if constexpr (streaming)
    stream(p, x);
  else
    store(p, x);
}

// Blocks are read whole, then written whole, like a row of rope.
template <bool streaming>
FUSEDOPS_INLINE void copy_blocks(const ProbeArgs& a, int64_t begin, int64_t end) {
  walk(a, begin, end, [&a](int64_t i) __attribute__((always_inline)) {
    const float* from = static_cast<const float*>(a.from) + i * kFloats;
    float* to = static_cast<float*>(a.to) + i * kFloats;
    if (a.prefetch) prefetch_block(from, a.prefetch);
    if (a.prefetch_to) prefetch_block(to, a.prefetch_to);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) put<streaming>(to + v * Vf::N, load<Vf>(from + v * Vf::N));
  });
}

template <bool streaming>
FUSEDOPS_INLINE void change_blocks(const ProbeArgs& a, int64_t begin, int64_t end) {
  const Vf one = set1<Vf>(1);
  walk(a, begin, end, [&a, one](int64_t i) __attribute__((always_inline)) {
    float* at = static_cast<float*>(a.to) + i * kFloats;
    if (a.prefetch) prefetch_block(at, a.prefetch);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++)
      put<streaming>(at + v * Vf::N, load<Vf>(at + v * Vf::N) + one);
  });
}

}  // namespace

void probe_copy(const ProbeArgs& a, int64_t begin, int64_t end) {
  const char* from = static_cast<const char*>(a.from) + begin * kProbeBlock;
  char* to = static_cast<char*>(a.to) + begin * kProbeBlock;
  const int64_t bytes = (end - begin) * kProbeBlock;
  for (int64_t r = 0; r < a.rounds; r++) {
    if (a.by == ProbeBy::library)
      __builtin_memcpy(to, from, bytes);
    else if (a.by == ProbeBy::string)
      copy_string(to, from, bytes);
    else if (a.by == ProbeBy::streams)
      copy_blocks<true>(a, begin, end);
    else
      copy_blocks<false>(a, begin, end);
    next_pass();
  }
  stream_fence();
}

void probe_in_place(const ProbeArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < a.rounds; r++) {
    if (a.by == ProbeBy::streams)
      change_blocks<true>(a, begin, end);
    else
      change_blocks<false>(a, begin, end);
    next_pass();
  }
  stream_fence();
}

void probe_read(const ProbeArgs& a, int64_t begin, int64_t end) {
  constexpr int sums = kVectors < 8 ? kVectors : 8;
  Vf acc[sums];
#pragma GCC unroll 8
  for (int c = 0; c < sums; c++) acc[c] = set1<Vf>(0);
  for (int64_t r = 0; r < a.rounds; r++) {
    walk(a, begin, end, [&a, &acc](int64_t i) __attribute__((always_inline)) {
      const float* from = static_cast<const float*>(a.from) + i * kFloats;
      if (a.prefetch) prefetch_block(from, a.prefetch);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += sums)
#pragma GCC unroll 8
        for (int c = 0; c < sums; c++) acc[c] = acc[c] + load<Vf>(from + (v + c) * Vf::N);
    });
    next_pass();
  }
  double total = 0;
#pragma GCC unroll 8
  for (int c = 0; c < sums; c++) total += static_cast<double>(sum(acc[c]));
  *a.result = total;
}

namespace {

// Enough independent chains to hide the latency of any pipe; the empty asm keeps each link, and x
// and y from being known.
template <class V, class Step>
FUSEDOPS_INLINE void chains(const ProbeArgs& a, int64_t begin, int64_t end, V x, V y, int work,
                            const char* unit, const Step& step) {
  constexpr int n = kVectorRegisters > 16 ? 24 : 12;
  *a.unit = unit;
  *a.work_per_round = n * work;
  V acc[n] = {};
  FUSEDOPS_KEEP(y.v);
  for (int64_t i = begin * a.rounds; i < end * a.rounds; i++) {
#pragma GCC unroll 24
    for (int c = 0; c < n; c++) {
      FUSEDOPS_KEEP(x.v);
      acc[c] = step(acc[c], x, y);
      FUSEDOPS_KEEP(acc[c].v);
    }
  }
}

}  // namespace

void probe_fma_f32(const ProbeArgs& a, int64_t begin, int64_t end) {
  const Vf tiny = set1<Vf>(1e-9);
  chains(a, begin, end, tiny, tiny, 2 * Vf::N, "f32 multiply-add",
         [](Vf acc, Vf x, Vf y) { return mul_add(x, y, acc); });
}

void probe_fma_f64(const ProbeArgs& a, int64_t begin, int64_t end) {
  const Vd tiny = set1<Vd>(1e-9);
  chains(a, begin, end, tiny, tiny, 2 * Vd::N, "f64 multiply-add",
         [](Vd acc, Vd x, Vd y) { return mul_add(x, y, acc); });
}

void probe_fma_bf16(const ProbeArgs& a, int64_t begin, int64_t end) {
#ifdef FUSEDOPS_BF16_DOT
  const Vf tiny = set1<Vf>(1e-9);
  chains(a, begin, end, tiny, tiny, 4 * Vf::N, "bf16 pair dot product",
         [](Vf acc, Vf x, Vf y) { return dot_pairs(acc, x, y); });
#else
  probe_fma_f32(a, begin, end);
#endif
}

void probe_fma_int8(const ProbeArgs& a, int64_t begin, int64_t end) {
  const Vi zero = {};
  chains(a, begin, end, zero, zero, 2 * kByteProducts, kByteDot,
         [](Vi acc, Vi x, Vi y) { return dot_bytes(acc, x, y); });
}

}  // namespace fusedops::FUSEDOPS_ISA
