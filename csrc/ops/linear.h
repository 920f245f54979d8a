// What linear and gelu_linear share: the checks, and an input turned into rows.
#pragma once
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "../choice.h"
#include "../run.h"
#include "tensor.h"

namespace fusedops {

// Elements from one row of the last dimension to the next, if one stride leads through all rows.
bool rows_of(const View& v, int64_t& stride);
Tensor in_rows(const Tensor& t);  // t itself if it has such rows, else a contiguous copy

// A contiguous tensor of like's dtype; pages of a large one are asked to be huge.
Tensor fresh(const char* op, const Tensor& like, const std::vector<int64_t>& shape,
             Device device = Device::cpu);

// What gradients ask of the tensors that are given, on g's device; g is the view of grad.
void check_grad(const char* op, const Tensor& grad, const View& g);
void check_z(const char* op, const Tensor& z, const View& g);
void check_layer(const char* op, const std::optional<Tensor>& input,
                 const std::optional<Tensor>& weight, const View& g);

// A weight as linear_pack wrote it: a header of 64 bytes, then the panels. All that the kernels'
// layout depends on stands in the header and is checked before the panels are read.
struct PackedWeight {
  // Fails unless `packed` holds out_features columns for the ISA in use.
  PackedWeight(const char* op, const Tensor& packed, int64_t out_features);

  torch::headeronly::ScalarType type;
  int64_t n, k;
  const void* panels;
};

// The checked arguments of a dense layer. Holds the copies of those whose strides no kernel reads.
struct LinearCall {
  LinearCall(const char* op, const Tensor& input, const Tensor& weight,
             const std::optional<Tensor>& bias, Device device = Device::cpu);
  LinearCall(const char* op, const Tensor& input, const PackedWeight& weight,
             const std::optional<Tensor>& bias);

  Tensor fresh_output() const;
  // On the CPU fill y (and z): tensors of the result's shape whose rows lie one stride apart.
  void run(Activation act, const View& y, const View* z = nullptr) const;
  void run_into(Activation act, Tensor& out, const View& y) const;  // any strides
  // Fails unless `out` can take the result; it must share no memory with the tensors that are read.
  void check_out(const Tensor& out, const View& y, std::initializer_list<const Tensor*> read) const;

  // In rows one stride apart; bias as it was, or a copy without gaps.
  const Tensor& input() const { return input_; }
  const Tensor& weight() const { return weight_; }
  const Tensor& bias() const { return bias_; }

  const char* op;
  Device device;
  DType type;
  std::vector<int64_t> shape;  // of the result
  LinearArgs args;

 private:
  void take(const Tensor& input, const std::optional<Tensor>& bias);

  Tensor input_, weight_, bias_;
};

// Bytes of the panels of a weight [n, k], and the panels: `to` is aligned to 64 at best.
int64_t packed_bytes(const LinearArgs& a, DType t);
void run_pack(const LinearArgs& a, DType t, void* to);
int64_t packed_columns(const LinearArgs& a, DType t);  // of one panel

// run_linear with PyTorch's product, on a plain weight; `by` is aten or aten_direct.
void run_by_torch(const LinearArgs& a, DType t, Backend by);

// A matrix where it lies, rows and columns any stride apart.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};
// out = a @ b by PyTorch as it is; it fails unless all are of one dtype. Autocast does not change
// it.
void mm_out(const Tensor& a, const Tensor& b, const Tensor& out);
// out = a @ b by PyTorch, all of one dtype: rounded once, or as PyTorch does.
void torch_product(const Matrix& a, const Matrix& b, const Matrix& out, DType t, Backend by);

// How run_linear does one shape with a packed weight on the ISA in use, to be kept. Of `a` the
// sizes count.
struct LinearSchedule;
std::shared_ptr<const LinearSchedule> schedule_packed(LinearArgs a, DType t, int threads);
int64_t work_bytes(const LinearSchedule& s);
// memory: work_bytes of it, aligned to 64, that nobody else uses meanwhile.
void run_linear(const LinearSchedule& s, const LinearArgs& a, char* memory);
int64_t packed_bytes(const LinearSchedule& s, const LinearArgs& a);
void run_pack(const LinearSchedule& s, const LinearArgs& a, void* to);

}  // namespace fusedops
