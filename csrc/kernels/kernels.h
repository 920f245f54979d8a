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

enum class Activation : int { identity, gelu, gelu_tanh, gelu_quick, silu, relu, relu2 };

// y[i] = act(x[i]), or dx[i] = dy[i] * act'(x[i]); contiguous.
struct GeluArgs {
  const void* x;
  const void* dy;  // backward only
  void* y;
  Activation act;
};

// y = act(x @ w^T + bias) on row-major x [m][k], w [n][k], y [m][n]; z, if not null, receives the
// pre-activation. packed, if not null, is w as linear_pack wrote it, and w is not read.
struct LinearArgs {
  const void *x, *w, *bias, *packed;
  void *y, *z;
  int64_t m, n, k;
  int64_t ldx, ldw, ldy, ldz;
  Activation act;
  bool deterministic;  // a row's bits depend on nothing but the row, w, bias and the ISA
  bool w_by_k;         // w is [k][n]; taken by linear_panels alone, not packed
};

// dz = dy * act'(z) over rows of n elements, and its sums over the rows. dz and its transpose are
// written where they are not null; rows of the transpose have room for a vector behind them.
struct PreactArgs {
  const void *dy, *z;
  void *dz, *transposed;
  void* sums;   // in the compute type: [blocks of kPreactRows rows][n]
  void* total;  // [n]
  int64_t rows, n;
  int64_t lddy, ldz, lddz, ldt;
  Activation act;
};
constexpr int64_t kPreactRows = 64;  // fixed: a sum has the same bits on any number of threads

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

// How the kernels of one ISA cut a linear: by n and k, and in_place by all m too. Two families:
// dots, for few rows or columns, takes w as it lies; panels takes it transposed, packed ahead or as
// it goes, and x as it lies or from linear_rows. A row's sums come in an order that is fixed within
// a family.
struct LinearShape {
  int64_t dot_rows, dot_columns;         // rows that pass w together, columns of a task
  int64_t dot_bytes, dot_row_bytes;      // scratch: of a task, and for each of its rows
  int64_t panel_columns;                 // of a task, and of a packed panel
  int64_t panel_bytes, panel_row_bytes;  // scratch: of a task, and for each of its rows
  int64_t packed_bytes;                  // of a panel that linear_pack writes
  int64_t tile_rows, row_bytes;          // linear_rows: rows of a tile at most, bytes of a row
  int64_t few_rows, few_columns;         // up to so many of either, dots is the faster one
  bool in_place;                         // panels reads x itself, not what linear_rows wrote
};

// A task: rows (dots) or tiles of rows (panels) of y, and columns, the first a multiple of a
// task's.
struct LinearPart {
  int64_t row_begin, row_end, col_begin, col_end;
  void* scratch;     // aligned to 64
  const void* rows;  // panels, but in_place: all of x as linear_rows wrote it
  bool new_rows;     // dots: the task before in this scratch had other rows
};

// Sums x @ w^T that another library made, of rows [row_begin, row_end) and columns
// [col_begin, col_end) of y: data points to the first; it may be y itself.
struct LinearSums {
  const void* data;
  int64_t stride;  // elements from row to row
  bool rounded;    // in the type of y, else in the compute type
  int64_t row_begin, row_end, col_begin, col_end;
};

// y = act(scale * (x @ w^T) + bias), x [m][k], w [n][k] in bf16 or int8, y [m][n], all of them
// without gaps. `rows` is x as the kernels read it: floats, or bytes 128 + q with x = row_scale *
// q. Behind the m rows of bytes lies one of 128s.
struct QuantizedArgs {
  const void *x, *w;
  const float *scale, *bias;  // [n], or null: 1 and 0
  void* y;
  void* rows;        // row_bytes apart, aligned to 64
  float* row_scale;  // [m], for bytes
  int64_t m, n, k, row_bytes;
  Activation act;
};

// How the kernels of one ISA cut a quantized layer: rows of y into tasks of at least `few_rows` +
// 1, or not at all, and `columns`; each call needs `scratch` bytes of its own, aligned to 64.
struct QuantizedShape {
  int64_t row_bytes, columns, few_rows, scratch;
};

struct KernelTable {
#define KERNEL(name, parameters) void(*name) parameters;
#include "kernels.inc"
#undef KERNEL
};

}  // namespace fusedops
