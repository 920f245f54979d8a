// linear_pack, linear_packed, gelu_linear_packed and their _out forms: the packed weight's header,
// schemas, CPU implementation.
#include <algorithm>
#include <cstring>

#include "../approximate.h"
#include "linear.h"

namespace fusedops {
namespace {

using torch::headeronly::ScalarType;

// Changes with every change of what linear_pack writes: header, panels or their order.
constexpr uint32_t kLayout = 1;
constexpr char kMagic[8] = {'f', 'u', 's', 'e', 'd', 'o', 'p', 's'};

// As it lies in memory, at any alignment. The panels follow at once: aligned to 64 where the tensor
// is, and readable where a copy of it is not.
struct Header {
  char magic[8];
  uint32_t layout;
  int32_t dtype;  // DType
  char isa[16];
  int64_t n, k;
  int64_t columns;  // of a panel
  int64_t bytes;    // of header and panels
};
static_assert(sizeof(Header) == 64);

constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16,
                                 ScalarType::Double};

void name_isa(Header& h) {
  const std::string name = isa::current();
  std::memcpy(h.isa, name.data(), std::min(name.size(), sizeof(h.isa) - 1));
}

Header header_of(const LinearArgs& a, DType type) {
  Header h = {};
  std::memcpy(h.magic, kMagic, sizeof(kMagic));
  h.layout = kLayout;
  h.dtype = static_cast<int32_t>(type);
  name_isa(h);
  h.n = a.n, h.k = a.k;
  h.columns = packed_columns(a, type);
  h.bytes = static_cast<int64_t>(sizeof(Header)) + packed_bytes(a, type);
  return h;
}

// The header of a packed weight that the kernels in use can read.
Header checked_header(const char* op, const View& v) {
  constexpr const char* what = "packed must be a weight as fusedops::linear_pack returns it";
  if (v.type != ScalarType::Byte || v.rank() != 1 || (v.numel > 1 && v.stride(0) != 1))
    fail(op, what, ", contiguous bytes, but got ", name_of(v.type), " of shape ", shape_of(v));
  Header h = {}, own = {};
  if (v.numel < static_cast<int64_t>(sizeof(h)))
    fail(op, what, " but got ", v.numel, " bytes, less than its header");
  std::memcpy(&h, v.data, sizeof(h));
  if (std::memcmp(h.magic, kMagic, sizeof(kMagic)) != 0)
    fail(op, what, " but got other bytes (its first 8 are not 'fusedops')");
  if (h.layout != kLayout)
    fail(op, "packed must have layout ", kLayout, " of this version of fusedops but got layout ",
         h.layout, ": pack the weight again");
  h.isa[sizeof(h.isa) - 1] = 0;
  name_isa(own);
  if (std::memcmp(h.isa, own.isa, sizeof(h.isa)) != 0)
    fail(op, "packed must be packed for the ISA in use, ", own.isa, ", but got one for ", h.isa,
         ": pack the weight again");
  constexpr int64_t kMost = int64_t{1} << 40;  // elements of a side: no sum of them overflows
  if (h.dtype < 0 || h.dtype > static_cast<int32_t>(DType::f64) || h.n < 0 || h.k < 0 ||
      h.n > kMost || h.k > kMost)
    fail(op, what, " but got a header that names no dtype or size");
  // Nor may their product overflow: an element takes a byte at least.
  if (h.n > 0 && h.k > 0 && h.n > v.numel / h.k)
    fail(op, "packed must hold the [", h.n, ", ", h.k, "] elements that its header names but got ",
         v.numel, " bytes");
  return h;
}

Tensor linear_pack(const Tensor& weight) {
  constexpr const char* op = "linear_pack";
  const View given(weight);
  require_device(op, "weight", weight, given);
  const DType type = floating(op, "weight", given);
  if (given.rank() != 2)
    fail(op, "weight must have 2 dimensions [N, K] but got shape ", shape_of(given));
  const Tensor rows = given.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  const View w(rows);
  LinearArgs a = {};
  a.w = w.data, a.n = w.size(0), a.k = w.size(1), a.ldw = w.stride(0);
  const Header header = header_of(a, type);
  const int64_t stride = 1;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(1, &header.bytes, &stride, aoti_torch_dtype_uint8(),
                               aoti_torch_device_type_cpu(), 0, &handle) != 0)
    fail(op, "memory for the packed weight must be available but got ", header.bytes,
         " bytes refused");
  Tensor packed(handle);
  char* to = static_cast<char*>(View(packed).data);
  advise_huge_pages(to, header.bytes);
  std::memcpy(to, &header, sizeof(header));
  if (header.bytes > static_cast<int64_t>(sizeof(header))) run_pack(a, type, to + sizeof(header));
  return packed;
}

Tensor run(const char* op, Activation act, const Tensor& input, const Tensor& packed,
           const std::optional<Tensor>& bias, int64_t out_features) {
  const LinearCall call(op, input, PackedWeight(op, packed, out_features), bias);
  Tensor y = call.fresh_output();
  call.run(act, View(y));
  return y;
}

void run_out(const char* op, Activation act, const Tensor& input, const Tensor& packed,
             const std::optional<Tensor>& bias, int64_t out_features, Tensor& out) {
  const LinearCall call(op, input, PackedWeight(op, packed, out_features), bias);
  const View y(out);
  call.check_out(out, y, {&input, &packed, bias ? &*bias : nullptr});
  call.run_into(act, out, y);
}

constexpr const char *kLinear = "linear", *kGelu = "gelu_linear";

Tensor linear_packed(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                     int64_t out_features) {
  return run(kLinear, Activation::identity, input, packed, bias, out_features);
}
void linear_packed_out(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                       int64_t out_features, Tensor out) {
  run_out(kLinear, Activation::identity, input, packed, bias, out_features, out);
}
Tensor gelu_linear_packed(const Tensor& input, const Tensor& packed,
                          const std::optional<Tensor>& bias, int64_t out_features,
                          const Text& approximate) {
  return run(kGelu, activation_of(kGelu, approximate), input, packed, bias, out_features);
}
void gelu_linear_packed_out(const Tensor& input, const Tensor& packed,
                            const std::optional<Tensor>& bias, int64_t out_features,
                            const Text& approximate, Tensor out) {
  run_out(kGelu, activation_of(kGelu, approximate), input, packed, bias, out_features, out);
}

}  // namespace

int64_t packed_weight_bytes(int64_t n, int64_t k, DType type) {
  LinearArgs a = {};
  a.n = n, a.k = k;
  return header_of(a, type).bytes;
}

PackedWeight::PackedWeight(const char* op, const Tensor& packed, int64_t out_features) {
  const View v(packed);
  require_device(op, "packed", packed, v);
  const Header h = checked_header(op, v);
  if (h.n != out_features)
    fail(op, "out_features must be the packed weight's N = ", h.n, " but got ", out_features);
  LinearArgs a = {};
  a.n = h.n, a.k = h.k;
  const DType dtype = static_cast<DType>(h.dtype);
  const Header own = header_of(a, dtype);
  if (h.columns != own.columns || h.bytes != own.bytes)
    fail(op, "packed must hold ", own.bytes, " bytes in panels of ", own.columns,
         " columns by its header but got one that says ", h.bytes, " and ", h.columns);
  if (v.numel != h.bytes)
    fail(op, "packed must hold the ", h.bytes, " bytes that its header names but got ", v.numel);
  type = kTypes[h.dtype];
  n = h.n, k = h.k;
  panels = static_cast<const char*>(v.data) + sizeof(Header);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusedops, m) {
#define LAYER "Tensor input, Tensor packed, Tensor? bias, SymInt out_features"
  m.def("linear_pack(Tensor weight) -> Tensor");
  m.def("linear_packed(" LAYER ") -> Tensor");
  m.def("linear_packed_nograd(" LAYER ") -> Tensor");
  m.def("linear_packed_out(" LAYER ", Tensor(a!) out) -> ()");
  m.def("gelu_linear_packed(" LAYER ", str approximate) -> Tensor");
  m.def("gelu_linear_packed_nograd(" LAYER ", str approximate) -> Tensor");
  m.def("gelu_linear_packed_out(" LAYER ", str approximate, Tensor(a!) out) -> ()");
  m.def("gelu_linear_packed_out_nograd(" LAYER ", str approximate, Tensor(a!) out) -> ()");
#undef LAYER
}

STABLE_TORCH_LIBRARY_IMPL(fusedops, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("linear_packed_nograd", TORCH_BOX(&linear_packed));
  m.impl("linear_packed_out", TORCH_BOX(&linear_packed_out));
  m.impl("gelu_linear_packed", TORCH_BOX(&gelu_linear_packed));
  m.impl("gelu_linear_packed_nograd", TORCH_BOX(&gelu_linear_packed));
  m.impl("gelu_linear_packed_out", TORCH_BOX(&gelu_linear_packed_out));
  m.impl("gelu_linear_packed_out_nograd", TORCH_BOX(&gelu_linear_packed_out));
}

}  // namespace fusedops
