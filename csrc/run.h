// The operations on raw memory, threaded and dispatched to the ISA in use: what the torch ops and
// the NumPy entry points of the pybind11 module share. No torch type appears here.
#pragma once
#include <memory>

#include "dtype.h"
#include "isa.h"
#include "kernels/kernels.h"

namespace fusedops {

FUSEDOPS_API void run_rope(const RopeArgs* tensors, size_t n, DType x, DType table);  // n <= 2
FUSEDOPS_API void run_gelu(const GeluArgs& a, int64_t n, DType t);
FUSEDOPS_API void run_gelu_backward(const GeluArgs& a, int64_t n, DType t);
FUSEDOPS_API void run_linear(const LinearArgs& a, DType t);

// Whether dense layers give a row the same bits in any batch, for all threads of the process.
FUSEDOPS_API bool deterministic();
FUSEDOPS_API void set_deterministic(bool on);

// Bytes of what the op linear_pack returns for a weight [n, k] on the ISA in use.
FUSEDOPS_API int64_t packed_weight_bytes(int64_t n, int64_t k, DType t);

// A dense layer of fixed shape and weights: packed, cut and given its memory once, for the ISA that
// was in use then. Any number of threads may run one.
class FUSEDOPS_API LinearPlan {
 public:
  // a: contiguous w and bias, which are copied; m, n, k and act.
  LinearPlan(const LinearArgs& a, DType t, int threads);
  // x [m][k] to y [m][n], contiguous; fresh: y was just allocated and never touched.
  void run(const void* x, void* y, bool fresh) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// The same for a rotation of contiguous tensors by contiguous tables.
class FUSEDOPS_API RopePlan {
 public:
  // a: sizes, cos, sin and their batch strides, int64 position_ids or null and their batch stride,
  // interleaved, conjugate; tables and ids are copied. table_rows: of cos, or of one batch of it.
  // bshd: x is [batch][seq][heads][head_dim].
  RopePlan(const RopeArgs& a, DType x, DType table, int64_t table_rows, bool bshd);
  void run(const void* x, void* y, int64_t offset, bool fresh) const;  // y: x or separate

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// Limits of this machine on torch's threads, for the ISA in use: the best of all ways that the
// probe knows. Bytes/s count what is read and what is written. cold: nothing of it is in the
// caches.
FUSEDOPS_API double probe_copy(int64_t bytes, int repeats, bool cold);
FUSEDOPS_API double probe_read(int64_t bytes, int repeats, bool cold);
FUSEDOPS_API double probe_in_place(int64_t bytes, int repeats, bool cold);
// A copy into memory that no page backs yet, in huge pages where the system grants them.
FUSEDOPS_API double probe_fresh_copy(int64_t bytes, int repeats, bool huge);
// Multiply-adds of f32, f64, bf16 or int8 a second, two operations each; and what was executed.
FUSEDOPS_API double probe_fma(const std::string& dtype);
FUSEDOPS_API std::string fma_unit(const std::string& dtype);
// One pass by one way of the probe copy, read or in_place, for tests: the sum of what was read.
FUSEDOPS_API std::vector<std::string> probe_ways(const std::string& probe);
FUSEDOPS_API double probe_once(const std::string& probe, const std::string& way, const float* from,
                               float* to, int64_t bytes);
FUSEDOPS_API int threads();

}  // namespace fusedops
