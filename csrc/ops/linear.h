// What linear and gelu_linear share: the checks, and an input turned into rows.
#pragma once
#include <optional>
#include <vector>

#include "../run.h"
#include "tensor.h"

namespace fusedops {

// Elements from one row of the last dimension to the next, if one stride leads through all rows.
bool rows_of(const View& v, int64_t& stride);
Tensor in_rows(const Tensor& t);  // t itself if it has such rows, else a contiguous copy

// A contiguous tensor of like's dtype; pages of a large one are asked to be huge.
Tensor fresh(const char* op, const Tensor& like, const std::vector<int64_t>& shape);

// The checked arguments of a dense layer. Holds the copies of those whose strides no kernel reads.
struct LinearCall {
  LinearCall(const char* op, const Tensor& input, const Tensor& weight,
             const std::optional<Tensor>& bias);

  Tensor fresh_output() const;
  // Fill y (and z): tensors of the result's shape whose rows lie one stride apart.
  void run(Activation act, const View& y, const View* z = nullptr) const;
  void run_into(Activation act, Tensor& out, const View& y) const;  // any strides

  const char* op;
  DType type;
  std::vector<int64_t> shape;  // of the result
  LinearArgs args;

 private:
  Tensor input_, weight_, bias_;
};

}  // namespace fusedops
