// The micro-kernel: a tile of rows of x times a block of a panel.
#pragma once
#include "operands.h"

namespace fusedops::FUSEDOPS_ISA {
namespace {

// Accumulators fill 3/4 of the registers.
constexpr int kTileRows = 6, kTileVectors = kVectorRegisters / 8;

template <class T>
constexpr int64_t kPanelColumns = kTileVectors * Vec<compute_t<T>>::N;

// Rows of x come in tiles of nearly one height: a short last one would waste a pass over w.
struct RowTiles {
  int64_t m, count;
  explicit RowTiles(int64_t rows) : m(rows), count((rows + kTileRows - 1) / kTileRows) {}
  int64_t row(int64_t tile) const { return tile * m / count; }
};

// to[step][row] = x[row][step] for the rows of one tile; elements past k are zero.
template <class T>
__attribute__((noinline)) void pack_tile(const T* x, int64_t ldx, int64_t rows, int64_t k,
                                         compute_t<T>* to) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int N = V::N;
  constexpr int64_t square = N * O::kStep;
  if (rows == 1) {
    int64_t e = 0;
    for (; e + square <= k; e += square) store(to + e / O::kStep, O::load(x + e));
    if (e < k)
      store_n(to + e / O::kStep, O::load_n(x + e, static_cast<int>(k - e)),
              static_cast<int>(steps_of<T>(k - e)));
    return;
  }
  for (int64_t row = 0; row < rows; row += N) {
    const int64_t lanes = at_most(N, rows - row);
    for (int64_t e = 0; e < k; e += square) {
      const int64_t rest = at_most(square, k - e), steps = steps_of<T>(rest);
      V r[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) {
        const T* p = x + (row + i) * ldx + e;
        if (i >= lanes)
          r[i] = set1<V>(0);
        else
          r[i] = rest == square ? O::load(p) : O::load_n(p, static_cast<int>(rest));
      }
      transpose(r);
      compute_t<T>* at = to + e / O::kStep * rows + row;
#pragma GCC unroll 16
      for (int i = 0; i < N; i++)
        if (i < steps) store_n(at + i * rows, r[i], static_cast<int>(lanes));
    }
  }
}

constexpr int kUnrolled = 4;
// Bytes of x fetched before their use: its tiles follow one another, and come from the last cache.
constexpr int64_t kRowsAhead = 6144;
constexpr int64_t kInPlaceAhead = 1024;  // of each row, where they lie apart

// Memory that is read soon: `lines` of 64 bytes are asked for every kUnrolled steps, and after
// `run` such times the walk goes on at the next row.
struct Ahead {
  const char* from;
  int64_t lines, run, left, jump;
};
// Into the first cache or the second.
template <bool first>
FUSEDOPS_INLINE void ask(Ahead& ahead) {
  for (int64_t l = 0; l < ahead.lines; l++)
    first ? prefetch(ahead.from + 64 * l) : prefetch_far(ahead.from + 64 * l);
  ahead.from += 64 * ahead.lines;
  if (--ahead.left == 0) ahead.from += ahead.jump, ahead.left = ahead.run;
}

// How a tile finds its block of the panel: in the second cache, beside which it asks for the next
// one; in the first cache, short, which several tiles pass in turn, and asks there for the next
// one; or at first use, as the only tile: then it asks for its own, kPanelAhead bytes on.
enum class Source { cached, shared, streamed };
constexpr int64_t kPanelAhead = 8192;

// The rows of x that a tile takes: as pack_tile wrote them, step by step... `half`: the last step
// has one element of its pair.
template <class T>
struct PackedRows {
  const compute_t<T>* x;
  bool half;
  static constexpr bool kInPlace = false;
};
// ... or as they lie in memory, where a packed copy would be read too seldom to pay. `end` is that
// of the first row, `next`: elements from there to where the first row of the next tile begins.
template <class T>
struct RowsInPlace {
  const T* x;
  bool half;
  const T* end;
  int64_t ldx, next;
  static constexpr bool kInPlace = true;
};

// One step of `Rows` rows as factors; u steps on.
template <class T, int Rows>
FUSEDOPS_INLINE auto step_at(const PackedRows<T>& r, int u) {
  return factors<Vec<compute_t<T>>, Rows>(r.x + u * Rows);
}
template <class T>
struct StepInPlace {
  const T* x;
  int64_t ldx;
};
template <class T, int Rows>
FUSEDOPS_INLINE StepInPlace<T> step_at(const RowsInPlace<T>& r, int u) {
  return {r.x + u * operands_t<T>::kStep, r.ldx};
}
using FUSEDOPS_ISA::factor;
template <class V, class T>
FUSEDOPS_INLINE V factor(const StepInPlace<T>& step, int i) {
  return broadcast<V>(reinterpret_cast<const compute_t<T>*>(step.x + i * step.ldx));
}
template <class T, int Rows>
FUSEDOPS_INLINE void advance(PackedRows<T>& r, int64_t steps) {
  r.x += steps * Rows;
}
template <class T, int Rows>
FUSEDOPS_INLINE void advance(RowsInPlace<T>& r, int64_t steps) {
  r.x += steps * operands_t<T>::kStep;
}
// The element that is left of each row, in a lane of its own.
template <class T, int Rows>
FUSEDOPS_INLINE auto half_step(const RowsInPlace<T>& r, compute_t<T> (&lanes)[Rows]) {
  for (int i = 0; i < Rows; i++) {
    lanes[i] = 0;
    __builtin_memcpy(lanes + i, r.x + i * r.ldx, sizeof(T));
  }
  return factors<Vec<compute_t<T>>, Rows>(lanes);
}

// c[i][j] (+)= sum over steps of x[step][i] * panel[step][j], for the first `Vectors` of a panel.
// The order of the additions depends on nothing but the steps, x.half, `Vectors` and `from`.
template <class T, int Rows, int Vectors, Source from, class X, class P>
__attribute__((noinline)) void tile(X x, int64_t steps, const P* panel, compute_t<T>* c, bool add,
                                    Ahead ahead) {
  using O = operands_t<T>;
  using V = typename O::V;
  constexpr int64_t columns = kPanelColumns<T>,
                    row_bytes = columns * static_cast<int64_t>(sizeof(P)), lane = sizeof(*x.x);
  // Of each element: a narrow tile has so few that each addition would wait for the one before.
  constexpr int kSums = kTileVectors / Vectors;
  const int64_t longest = from == Source::cached   ? chain_steps<T>(steps, kChainSteps<T>)
                          : from == Source::shared ? steps
                                                   : short_chain_steps<T>(steps);
  do {
    V acc[Rows * kSums][Vectors];
#pragma GCC unroll 24
    for (int i = 0; i < Rows * kSums; i++)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) acc[i][j] = set1<V>(0);
    const auto multiply = [&](const auto& xs, int u) __attribute__((always_inline)) {
      if constexpr (from == Source::streamed)
#pragma GCC unroll 4
        for (int64_t b = 0; b < row_bytes; b += 64)
          prefetch(reinterpret_cast<const char*>(panel + u * columns) + kPanelAhead + b);
      V b[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) b[j] = load<V>(panel + u * columns + j * V::N);
      // Loaded once: the compiler would repeat the load in every multiplication.
      if constexpr (Rows > 1)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) FUSEDOPS_KEEP(b[j].v);
#pragma GCC unroll 6
      for (int i = 0; i < Rows; i++) {
        const auto a = factor<V>(xs, i);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; j++) {
          V& sum = acc[u % kSums * Rows + i][j];
          sum = O::multiply_add(a, b[j], sum);
        }
      }
    };
    const int64_t chain = at_most(steps, longest);
    // Half a step comes alone, wherever the rows lie: its sum is the same one of kSums.
    const int64_t whole = chain - (x.half && chain == steps), alone = X::kInPlace ? whole : chain;
    int64_t s = 0;
    for (; s + kUnrolled <= whole; s += kUnrolled) {
      if constexpr (from != Source::streamed) ask<from == Source::shared>(ahead);
      if constexpr (X::kInPlace) {
        // Some of the rows each time, all of them by the next line.
        constexpr int turns = 64 / (kUnrolled * static_cast<int>(sizeof(compute_t<T>)));
        constexpr int share = (Rows + turns - 1) / turns;
        const auto* later = x.x + kInPlaceAhead / static_cast<int64_t>(sizeof(T));
        if (later >= x.end) later += x.next;
        later += s / kUnrolled % turns * share * x.ldx;
#pragma GCC unroll 6
        for (int i = 0; i < share; i++) prefetch(later + i * x.ldx);
      } else if constexpr (from != Source::streamed) {
        const int64_t later = from == Source::cached ? kRowsAhead : steps * Rows * lane;
#pragma GCC unroll 4
        for (int64_t l = 0; l < Rows * kUnrolled * lane; l += 64)
          prefetch(reinterpret_cast<const char*>(x.x) + later + l);
      }
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled; u++) multiply(step_at<T, Rows>(x, u), u);
      advance<T, Rows>(x, kUnrolled);
      panel += kUnrolled * columns;
    }
    for (; s < alone; s++) {
      multiply(step_at<T, Rows>(x, 0), 0);
      advance<T, Rows>(x, 1);
      panel += columns;
    }
    if constexpr (X::kInPlace)
      if (alone < chain) {
        compute_t<T> lanes[Rows];
        multiply(half_step<T, Rows>(x, lanes), 0);
      }
#pragma GCC unroll 6
    for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; j++) {
        compute_t<T>* to = c + i * columns + j * V::N;
        V sum = acc[i][j];
#pragma GCC unroll 4
        for (int g = 1; g < kSums; g++) sum = sum + acc[g * Rows + i][j];
        store(to, add ? load<V>(to) + sum : sum);
      }
    add = true;
    steps -= chain;
  } while (steps > 0);
}

template <class T, int Vectors, Source from, class X, class P>
FUSEDOPS_INLINE void tile_of(int64_t rows, const X& x, int64_t steps, const P* panel,
                             compute_t<T>* c, bool add, const Ahead& ahead) {
  switch (rows) {
    case 1:
      return tile<T, 1, Vectors, from>(x, steps, panel, c, add, ahead);
    case 2:
      return tile<T, 2, Vectors, from>(x, steps, panel, c, add, ahead);
    case 3:
      return tile<T, 3, Vectors, from>(x, steps, panel, c, add, ahead);
    case 4:
      return tile<T, 4, Vectors, from>(x, steps, panel, c, add, ahead);
    case 5:
      return tile<T, 5, Vectors, from>(x, steps, panel, c, add, ahead);
    default:
      return tile<T, kTileRows, Vectors, from>(x, steps, panel, c, add, ahead);
  }
}

// The vectors that hold the first `cols` columns: the last panel of a layer may be nearly empty.
template <class T, class X, class P>
FUSEDOPS_INLINE void any_tile(int64_t rows, int64_t cols, const X& x, int64_t steps, const P* panel,
                              compute_t<T>* c, bool add, const Ahead& ahead) {
  constexpr int N = Vec<compute_t<T>>::N;
  if (cols > (kTileVectors - 1) * N)
    return tile_of<T, kTileVectors, Source::cached>(rows, x, steps, panel, c, add, ahead);
  if constexpr (kTileVectors > 2) {
    if (cols > 2 * N) return tile_of<T, 3, Source::cached>(rows, x, steps, panel, c, add, ahead);
    if (cols > N) return tile_of<T, 2, Source::cached>(rows, x, steps, panel, c, add, ahead);
  }
  return tile_of<T, 1, Source::cached>(rows, x, steps, panel, c, add, ahead);
}

}  // namespace
}  // namespace fusedops::FUSEDOPS_ISA
