// What the kernels take, and the table of them that one ISA fills.
// Kernels are torch-free: pointers, strides (in elements) and sizes; they never allocate, check or
// thread.
#pragma once
#include "../simd/types.h"

namespace fusedops {

// A rotation of x[batch][heads][seq][head_dim] into y; y may be x itself.
// One unit of work is `block` positions of kSide heads, units running (batch, position block,
// heads), heads fastest; or, block 0, all heads of one position, units running (batch, position).
constexpr int64_t kSide = 2;  // heads that pass side by side over a table row
struct RopeArgs {
  const void *x, *cos, *sin;
  void* y;
  const void* position_ids;                   // null: 0, 1, 2, ...
  int64_t batch, heads, seq, head_dim, half;  // half = rotary_dim / 2
  int64_t x_batch, x_head, x_seq, x_dim;
  int64_t y_batch, y_head, y_seq, y_dim;
  int64_t cos_batch, cos_row, sin_batch,
      sin_row;  // table row of a token: batch * cos_batch + position * cos_row
  int64_t id_batch, id_seq;
  int64_t offset;
  int64_t block;     // this and the next two are set by run_rope
  int64_t prefetch;  // bytes of x ahead of their use, 0: none
  bool stream;       // y is larger than the last cache: store around it
  bool wide_ids;     // position_ids are int64, else int32
  bool interleaved, conjugate;
};

// One eager step over rows of head_dim elements, row = (batch * heads + head) * seq + position.
struct RopeStepArgs {
  const void *a, *b;  // scale: b is the gathered table [batch or 1][seq][half]
  void* out;
  int64_t heads, seq, head_dim, half;
  int64_t table_batch;  // elements between two batches of b, 0 if shared
  bool interleaved, negate;
};

enum class Activation : int { identity, gelu, gelu_tanh, gelu_quick };

// y[i] = act(x[i]), or dx[i] = dy[i] * act'(x[i]); contiguous.
struct GeluArgs {
  const void* x;
  const void* dy;  // backward only
  void* y;
  Activation act;
};

// y = act(x @ w^T + bias) on row-major x [m][k], w [n][k], y [m][n]; z, if not null, receives the
// pre-activation. For a kernel whose LinearShape says so, x is in the compute type.
struct LinearArgs {
  const void *x, *w, *bias;
  void *y, *z;
  int64_t m, n, k;
  int64_t ldx, ldw, ldy, ldz;
  Activation act;
};

// Limit probes: passes over 64-byte aligned buffers in blocks of kProbeBlock
// bytes, or rounds of multiply-adds on registers.
constexpr int64_t kProbeBlock = 512;
enum class ProbeBy : int { stores, streams, library, string };  // library, string: copy alone
struct ProbeArgs {
  const void* from;  // copy and read
  void* to;          // copy and in place
  int64_t rounds;
  ProbeBy by;
  int64_t prefetch,
      prefetch_to;         // bytes ahead of their use, 0: none; prefetch_to: copy alone
  int64_t streams;         // places of the range that are walked side by side
  double* result;          // read: the sum of the floats of all passes
  double* work_per_round;  // multiply-adds: operations
  const char** unit;       // multiply-adds: what was executed
};

// How the kernels of one ISA cut a linear. Work is handed out in whole `columns` of y; each call
// needs `scratch` bytes of its own, aligned to 64.
struct LinearShape {
  int64_t dot_columns, dot_scratch;      // linear_dots: few rows, w as it lies
  int64_t panel_columns, panel_scratch;  // linear_panels: many rows, w transposed panel by panel
  int64_t few_rows;                      // up to so many rows linear_dots is the faster one
  bool widen_x;                          // both take x from linear_widen
};

struct KernelTable {
#define KERNEL(name, parameters) void(*name) parameters;
#include "kernels.inc"
#undef KERNEL
};

}  // namespace fusedops
