// What the host passes to the shaders by value. One argument is at most 8 bytes, because
// aoti_torch_mps_set_arg_int is all that torch 2.10 to 2.13 have (csrc/mps/launch.h); sizes and
// strides count elements and are below 2^32, which the host checks.
#pragma once

namespace fusedops_metal {

// As fusedops::Activation, in its order.
enum Activation : unsigned {
  kIdentity,
  kGelu,
  kGeluTanh,
  kGeluQuick,
  kSilu,
  kRelu,
  kRelu2,
};

struct HeadCounts {
  unsigned q, k;  // k is 0 where one tensor is turned
};
struct Width {
  unsigned pairs;  // rotary_dim / 2; not named half, which is a keyword of Metal
};
struct Tokens {
  unsigned seq, rows;  // rows of the table
};
struct BatchHead {
  unsigned batch, head;
};
struct SeqDim {
  unsigned seq, dim;
};
struct BatchRow {
  unsigned batch, row;
};
struct RopeFlags {
  unsigned bits;
};
enum RopeBits : unsigned {
  kInterleaved = 1,
  kConjugate = 2,
  kHasIds = 4,
  kWideIds = 8,  // int64, else int32
};

struct Count {
  unsigned elements, activation;
};

// A dense layer: y [m][n] = act(x [m][k] @ w [n][k]^T + bias [n]).
struct Matrix {
  unsigned m, n;
};
struct Depth {
  unsigned k;
};
struct Leading {
  unsigned x, w;  // elements from one row to the next
};
enum LayerBits : unsigned {
  kHasBias = 1,
  kKeepPreact = 2,
  kWriteDz = 4,
  kSumBias = 8,
};
struct LayerFlags {
  unsigned bits, activation;
};

// Constants, as Metal takes them outside functions without an address space.
enum : unsigned {
  kRopeHeads = 4,   // that one thread turns by the table values it has read
  kSimdgroups = 4,  // of a threadgroup of the matrix-vector kernel
  kLanes = 32,      // of a simdgroup, on every Apple GPU
  kTile = 32,       // rows and columns of y that a threadgroup of matmul makes
  kSumRows = 64,    // that one thread of preact_grad adds up
};

// Outputs of a simdgroup of the matrix-vector kernel for so many rows of x.
constexpr unsigned outputs_of(unsigned rows) { return rows <= 2 ? 4 : 2; }

}  // namespace fusedops_metal
