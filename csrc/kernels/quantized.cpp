// act(scale * (x @ w^T) + bias) on bf16 and int8 weights: the same bits on every ISA.
#define FUSEDOPS_SAME_BITS
#include "quantized/bytes.h"
#include "quantized/chains.h"

namespace fusedops::FUSEDOPS_ISA {

void quantized_shape_f32(const QuantizedArgs& a, int64_t rows, QuantizedShape& s) {
  floats_shape(a, rows, s);
}
void quantized_shape_u8(const QuantizedArgs& a, int64_t rows, QuantizedShape& s) {
  bytes_shape(a, rows, s);
}

#define QUANTIZED(T)                                                                             \
  void quantized_widen_##T(const QuantizedArgs& a, int64_t begin, int64_t end) {                 \
    float_rows<T>(a, begin, end);                                                                \
  }                                                                                              \
  void quantized_round_##T(const QuantizedArgs& a, int64_t begin, int64_t end) {                 \
    round_rows<T>(a, begin, end);                                                                \
  }                                                                                              \
  void quantized_sums_bf16_##T(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows, \
                               int64_t begin, int64_t end) {                                     \
    floats<bf16, T>(a, scratch, row, rows, begin, end);                                          \
  }                                                                                              \
  void quantized_sums_s8_##T(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,   \
                             int64_t begin, int64_t end) {                                       \
    floats<int8_t, T>(a, scratch, row, rows, begin, end);                                        \
  }                                                                                              \
  void quantized_dots_s8_##T(const QuantizedArgs& a, void* scratch, int64_t row, int64_t rows,   \
                             int64_t begin, int64_t end) {                                       \
    byte_dots<T>(a, scratch, row, rows, begin, end);                                             \
  }
QUANTIZED(f32)
QUANTIZED(f16)
QUANTIZED(bf16)
#undef QUANTIZED

}  // namespace fusedops::FUSEDOPS_ISA
