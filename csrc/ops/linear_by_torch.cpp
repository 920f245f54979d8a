// Dense layers whose product PyTorch computes: tile by tile, our epilogue on each while it is in
// the cache.
#include <algorithm>

#include "../parallel.h"
#include "linear.h"
#include "memory.h"

namespace fusedops {
namespace {

int32_t number_of(DType t) {
  switch (t) {
    case DType::f16:
      return aoti_torch_dtype_float16();
    case DType::bf16:
      return aoti_torch_dtype_bfloat16();
    case DType::f64:
      return aoti_torch_dtype_float64();
    default:
      return aoti_torch_dtype_float32();
  }
}

// A tensor on memory that outlives it.
Tensor tensor_of(const Matrix& m, DType t) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(const_cast<void*>(m.data), 2, sizes, strides, 0,
                                         number_of(t), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

bool is_narrow(DType t) { return size_of(t) == 2; }

// The values of `from` as floats, contiguous.
Matrix widen(const Matrix& from, DType t, float* to) {
  const Matrix wide = {to, from.rows, from.columns, from.columns, 1};
  Tensor target = tensor_of(wide, DType::f32);
  torch::stable::copy_(target, tensor_of(from, t));
  return wide;
}

void finish(const LinearArgs& a, DType t, const LinearSums& s) {
  constexpr int64_t columns = 2048;  // of a task
  const KernelTable& k = kernels();
  using Finish = void (*)(const LinearArgs&, const LinearSums&);
  const Finish by_type[] = {k.linear_finish_f32, k.linear_finish_f16, k.linear_finish_bf16,
                            k.linear_finish_f64};
  const Finish run = by_type[static_cast<int>(t)];
  const int64_t element = s.rounded ? size_of(t) : std::max<int64_t>(4, size_of(t));
  const int64_t rows = s.row_end - s.row_begin, across = pieces(s.col_end - s.col_begin, columns);
  // float64 calls libm for every element.
  const int64_t grain = t == DType::f64 ? 1 : pieces(8192 * across, s.col_end - s.col_begin);
  parallel_for(rows * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task / across, col = task % across * columns;
      LinearSums part = s;
      part.row_begin = s.row_begin + row, part.row_end = part.row_begin + 1;
      part.col_begin = s.col_begin + col;
      part.col_end = std::min(s.col_end, part.col_begin + columns);
      part.data = static_cast<const char*>(s.data) + (row * s.stride + col) * element;
      run(a, part);
    }
  });
}

// PyTorch orders an operand anew at each call: tiles are large for that, and small for the caches.
constexpr int64_t kTileBytes = 8 << 20;   // of sums
constexpr int64_t kTileRows = 256;        // at least
constexpr int64_t kWideBytes = 16 << 20;  // of a widened operand

// The sums are made where the result goes.
void run_in_place(const LinearArgs& a, DType t) {
  const int64_t element = size_of(t);
  const bool plain = a.act == Activation::identity && !a.bias && !a.z;
  const int64_t rows =
      plain ? a.m : std::max(kTileRows, kTileBytes / std::max<int64_t>(1, a.n * element));
  const Tensor w = tensor_of(Matrix{a.w, a.n, a.k, a.ldw, 1}.transposed(), t);
  for (int64_t row = 0; row < a.m; row += rows) {
    const int64_t count = std::min(rows, a.m - row);
    const char* x = static_cast<const char*>(a.x) + row * a.ldx * element;
    char* y = static_cast<char*>(a.y) + row * a.ldy * element;
    mm_out(tensor_of({x, count, a.k, a.ldx, 1}, t), w, tensor_of({y, count, a.n, a.ldy, 1}, t));
    if (!plain) finish(a, t, {y, a.ldy, true, row, row + count, 0, a.n});
  }
}

// 16-bit operands as floats, a block of each at a time.
void run_widened(const LinearArgs& a, DType t) {
  const int64_t element = size_of(t), wide = sizeof(float);
  const int64_t columns = std::clamp<int64_t>(kWideBytes / (a.k * wide), 256, 4096);
  const int64_t cols = pieces(a.n, pieces(a.n, columns));
  const int64_t most = std::max(kTileRows, kWideBytes / (a.k * wide));
  const int64_t rows = pieces(a.m, pieces(a.m, most));
  const int64_t tile = std::min(rows, std::max(kTileRows, kTileBytes / (cols * wide)));
  const Lease lease((rows * a.k + cols * a.k + tile * cols) * wide);
  float* x = reinterpret_cast<float*>(lease.memory);
  float *w = x + rows * a.k, *sums = w + cols * a.k;
  for (int64_t row = 0; row < a.m; row += rows) {
    const int64_t height = std::min(rows, a.m - row);
    const char* x_from = static_cast<const char*>(a.x) + row * a.ldx * element;
    widen({x_from, height, a.k, a.ldx, 1}, t, x);
    for (int64_t col = 0; col < a.n; col += cols) {
      const int64_t width = std::min(cols, a.n - col);
      const char* w_from = static_cast<const char*>(a.w) + col * a.ldw * element;
      const Tensor block =
          tensor_of(widen({w_from, width, a.k, a.ldw, 1}, t, w).transposed(), DType::f32);
      for (int64_t at = 0; at < height; at += tile) {
        const int64_t count = std::min(tile, height - at);
        mm_out(tensor_of({x + at * a.k, count, a.k, a.k, 1}, DType::f32), block,
               tensor_of({sums, count, width, width, 1}, DType::f32));
        finish(a, t, {sums, width, false, row + at, row + at + count, col, col + width});
      }
    }
  }
}

}  // namespace

void run_by_torch(const LinearArgs& a, DType t, Backend by) {
  is_narrow(t) && by == Backend::aten ? run_widened(a, t) : run_in_place(a, t);
}

void torch_product(const Matrix& a, const Matrix& b, const Matrix& out, DType t, Backend by) {
  if (!is_narrow(t) || by == Backend::aten_direct)
    return mm_out(tensor_of(a, t), tensor_of(b, t), tensor_of(out, t));
  const int64_t a_count = a.rows * a.columns, b_count = b.rows * b.columns;
  const Lease lease((a_count + b_count + out.rows * out.columns) *
                    static_cast<int64_t>(sizeof(float)));
  float* memory = reinterpret_cast<float*>(lease.memory);
  const Tensor wide_a = tensor_of(widen(a, t, memory), DType::f32);
  const Tensor wide_b = tensor_of(widen(b, t, memory + a_count), DType::f32);
  const Tensor sums =
      tensor_of({memory + a_count + b_count, out.rows, out.columns, out.columns, 1}, DType::f32);
  mm_out(wide_a, wide_b, sums);
  Tensor target = tensor_of(out, t);
  torch::stable::copy_(target, sums);
}

}  // namespace fusedops
