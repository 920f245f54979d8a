#include "tensor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <vector>

namespace fusedops {

using torch::headeronly::ScalarType;

// The library's dtype numbers come from functions; Tensor::scalar_type asks them one by one, on
// each call.
ScalarType type_of(const Tensor& t) {
  constexpr size_t known = 64;
  static const std::array<ScalarType, known> types = [] {
    std::array<ScalarType, known> all;
    all.fill(ScalarType::Undefined);
    for (int32_t dtype = 0; dtype < static_cast<int32_t>(known); dtype++) {
      try {
        all[static_cast<size_t>(dtype)] =
            torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype));
      } catch (const std::exception&) {
        // a type that this build has no name for stays undefined
      }
    }
    return all;
  }();
  int32_t dtype = 0;
  aoti_torch_get_dtype(t.get(), &dtype);
  return types[static_cast<size_t>(dtype)];
}

std::string shape_of(const torch::headeronly::IntHeaderOnlyArrayRef& sizes) {
  std::string out = "[";
  for (const int64_t n : sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + "]";
}

bool same_shape(const View& a, const View& b) {
  return std::equal(a.sizes.begin(), a.sizes.end(), b.sizes.begin(), b.sizes.end());
}

DType floating(const char* op, const char* what, const View& v) {
  switch (v.type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      if (v.device == Device::cpu) return DType::f64;
      fail(op, what, " must be float32, float16 or bfloat16 on MPS but got ", name_of(v.type));
    default:
      fail(op, what, " must be float32, float16, bfloat16 or float64 but got ", name_of(v.type));
  }
}

namespace {

// A term stride * i of an element's offset, low <= i <= high.
struct Term {
  int64_t stride, low, high;
};

void add_terms(std::vector<Term>& terms, const View& v, int64_t low_sign, int64_t high_sign) {
  for (int64_t d = 0; d < v.rank(); d++)
    if (v.size(d) > 1)
      terms.push_back({v.stride(d), low_sign * (v.size(d) - 1), high_sign * (v.size(d) - 1)});
}

// Whether the terms can add up to `rest`, and not only by all being 0 when `distinct` asks for
// that. Terms come by descending stride, so for nested strides each level leaves one or two
// candidates.
bool reachable(const std::vector<Term>& terms, size_t i, int64_t rest, bool distinct) {
  if (i == terms.size()) return rest == 0 && !distinct;
  int64_t low = 0, high = 0;  // what the terms after this one can reach
  for (size_t k = i + 1; k < terms.size(); k++) {
    low += terms[k].stride * terms[k].low;
    high += terms[k].stride * terms[k].high;
  }
  const Term& t = terms[i];
  int64_t first = t.low, last = t.high;
  if (t.stride > 0) {
    const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
    first = std::max(first, -floor_div(high - rest, t.stride));
    last = std::min(last, floor_div(rest - low, t.stride));
  }
  for (int64_t n = first; n <= last; n++)
    if (reachable(terms, i + 1, rest - n * t.stride, distinct && n == 0)) return true;
  return false;
}

bool reachable(std::vector<Term> terms, int64_t rest, bool distinct) {
  std::sort(terms.begin(), terms.end(),
            [](const Term& a, const Term& b) { return a.stride > b.stride; });
  // Equal strides make one term: the search would try every split of them.
  std::vector<Term> merged;
  for (const Term& t : terms) {
    if (merged.empty() || merged.back().stride != t.stride) {
      merged.push_back(t);
      continue;
    }
    if (distinct) return true;  // one step along the first, one back along the second
    merged.back().low += t.low;
    merged.back().high += t.high;
  }
  return reachable(merged, 0, rest, distinct);
}

struct Extent {
  const char *begin, *end;
};

Extent extent(const View& v, int64_t element) {
  int64_t last = 0;
  for (int64_t d = 0; d < v.rank(); d++) last += (v.size(d) - 1) * v.stride(d);
  const char* begin = static_cast<const char*>(v.data);
  return {begin, begin + (last + 1) * element};
}

int64_t element_size(const View& v) {
  switch (v.type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:  // at least, of what no op takes
      return 1;
  }
}

}  // namespace

void require_device(const char* op, const char* what, const Tensor& t, const View& v) {
  int32_t type = 0;
  aoti_torch_get_device_type(t.get(), &type);
  const bool cpu = v.device == Device::cpu;
  if (type != (cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_mps()))
    fail(op, what, " must be on ", cpu ? "the CPU" : "MPS",
         " like the other tensors but got another device");
  if (v.numel == 0) return;
  int64_t last = 0, bytes = 0;
  aoti_torch_get_storage_offset(t.get(), &last);
  aoti_torch_get_storage_size(t.get(), &bytes);
  for (int64_t d = 0; d < v.rank(); d++) last += (v.size(d) - 1) * v.stride(d);
  const int64_t needed = (last + 1) * element_size(v);
  if (!v.data || bytes < needed)
    fail(op, what, " must have a storage of at least ", needed, " bytes but got ", bytes,
         v.data ? "" : " and no memory");
}

namespace {

// Whether each dimension steps over all of those inside it, as in any slice of a contiguous tensor.
bool nested(const View& v) {
  int64_t span = 0;
  for (int64_t d = v.rank() - 1; d >= 0; d--) {
    if (v.size(d) <= 1) continue;
    if (v.stride(d) <= span) return false;
    span += (v.size(d) - 1) * v.stride(d);
  }
  return true;
}

}  // namespace

bool overlaps_itself(const View& v) {
  if (v.numel <= 1 || nested(v)) return false;
  std::vector<Term> terms;
  add_terms(terms, v, -1, 1);
  return reachable(std::move(terms), 0, true);
}

const void* View::buffer_of(const Tensor& t) const {
  int64_t offset = 0;
  aoti_torch_get_storage_offset(t.get(), &offset);
  return static_cast<const char*>(data) - offset * element_size(*this);
}

bool overlap(const View& a, const View& b) {
  if (a.numel == 0 || b.numel == 0 || a.buffer != b.buffer) return false;
  const int64_t size = element_size(a);
  const Extent x = extent(a, size), y = extent(b, element_size(b));
  if (x.end <= y.begin || y.end <= x.begin) return false;
  const int64_t bytes = y.begin - x.begin;
  if (size != element_size(b) || bytes % size != 0) return true;
  std::vector<Term> terms;
  add_terms(terms, a, 0, 1);
  add_terms(terms, b, -1, 0);
  return reachable(std::move(terms), bytes / size, false);
}

bool same_elements(const View& a, const View& b) {
  if (a.data != b.data || a.buffer != b.buffer || a.rank() != b.rank() || a.type != b.type)
    return false;
  for (int64_t d = 0; d < a.rank(); d++)
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

Tensor empty_like_output(const Tensor& x, const View& v) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t d = v.rank() - 1; d >= 0; d--) {
    contiguous = contiguous && (v.size(d) == 1 || v.stride(d) == expected);
    expected *= v.size(d);
  }
  if (!contiguous || v.device != Device::cpu) {
    Tensor y = torch::stable::empty_like(x);
    if (v.device == Device::cpu) advise_huge_pages(y.data_ptr(), v.numel * element_size(v));
    return y;
  }
  // The common case goes past the dispatcher.
  AtenTensorHandle handle;
  int32_t dtype = 0;
  aoti_torch_get_dtype(x.get(), &dtype);
  if (aoti_torch_empty_strided(v.rank(), v.sizes.data(), v.strides.data(), dtype,
                               aoti_torch_device_type_cpu(), 0, &handle) != 0)
    fail("fusedops", "memory for the result must be available but got ", v.numel,
         " elements refused");
  Tensor y(handle);
  advise_huge_pages(y.data_ptr(), v.numel * element_size(v));
  return y;
}

// First touch of fresh 4 KiB pages costs more time than the memory behind them; huge ones do not.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(2 * huge)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) & ~(huge - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fusedops
