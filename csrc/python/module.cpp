// fusedops._C: build and CPU information, ISA control, limit probes, and NumPy entry points. No
// torch headers but DLPack's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../approximate.h"
#include "../check.h"
#include "../choice.h"
#include "../run.h"
#include "plan.h"

namespace py = pybind11;

namespace fusedops {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

template <class F>
void without_gil(const F& work) {
  py::gil_scoped_release released;
  work();
}

template <class T>
Array<T> rope(const Array<T>& x, const Array<T>& cos, const Array<T>& sin, bool interleaved) {
  const auto half = cos.ndim() == 2 ? cos.shape(1) : 0;
  if (x.ndim() != 4) fail("rope", "x must have 4 dimensions [B, H, S, D] but got ", x.ndim());
  if (cos.ndim() != 2 || sin.ndim() != 2 || sin.shape(0) != cos.shape(0) || sin.shape(1) != half)
    fail("rope",
         "cos and sin must have one shape [positions, rotary_dim / 2] but got other shapes");
  if (cos.shape(0) < x.shape(2))
    fail("rope", "the table must have at least seq = ", x.shape(2), " rows but got ", cos.shape(0));
  if (2 * half > x.shape(3))
    fail("rope", "rotary_dim must be at most head_dim ", x.shape(3), " but got ", 2 * half);
  Array<T> y({x.shape(0), x.shape(1), x.shape(2), x.shape(3)});
  RopeArgs a = {};
  a.x = x.data(), a.y = y.mutable_data(), a.cos = cos.data(), a.sin = sin.data();
  a.batch = x.shape(0), a.heads = x.shape(1), a.seq = x.shape(2), a.head_dim = x.shape(3),
  a.half = half;
  a.x_dim = a.y_dim = 1;
  a.x_seq = a.y_seq = a.head_dim;
  a.x_head = a.y_head = a.seq * a.x_seq;
  a.x_batch = a.y_batch = a.heads * a.x_head;
  a.cos_row = a.sin_row = half;
  a.interleaved = interleaved;
  without_gil([&] { run_rope(&a, 1, dtype_of<T>, dtype_of<T>); });
  return y;
}

template <class T>
Array<T> gelu(const Array<T>& x, const std::string& approximate) {
  Array<T> y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  GeluArgs a = {};
  a.x = x.data(), a.y = y.mutable_data(), a.act = activation_of("gelu", approximate);
  without_gil([&] { run_gelu(a, x.size(), dtype_of<T>); });
  return y;
}

template <class T>
Array<T> gelu_linear(const Array<T>& x, const Array<T>& w, const std::optional<Array<T>>& bias,
                     const std::string& approximate) {
  if (x.ndim() != 2 || w.ndim() != 2 || x.shape(1) != w.shape(1))
    fail("gelu_linear", "x must be [M, K] and weight [N, K] but got other shapes");
  if (bias && (bias->ndim() != 1 || bias->shape(0) != w.shape(0)))
    fail("gelu_linear", "bias must be [", w.shape(0), "] but got another shape");
  Array<T> y({x.shape(0), w.shape(0)});
  LinearArgs a = {};
  a.x = x.data(), a.w = w.data(), a.bias = bias ? bias->data() : nullptr, a.y = y.mutable_data();
  a.m = x.shape(0), a.n = w.shape(0), a.k = x.shape(1);
  a.ldx = a.ldw = a.k, a.ldy = a.n;
  a.act = activation_of("gelu_linear", approximate);
  without_gil([&] { run_linear(a, dtype_of<T>); });
  return y;
}

std::vector<std::tuple<int, std::string, int64_t, int>> cache_sizes() {
  std::vector<std::tuple<int, std::string, int64_t, int>> sizes;
  for (const Cache& c : caches()) sizes.emplace_back(c.level, c.type, c.bytes, c.sharers);
  return sizes;
}

double probe_pass(const std::string& probe, const std::string& way, const Array<float>& source,
                  Array<float>& target) {
  if (source.size() != target.size())
    fail("probe_once", "source and target must have one size but got ", source.size(), " and ",
         target.size());
  return probe_once(probe, way, source.data(), target.mutable_data(), source.nbytes());
}

constexpr const char* kProducts[] = {"forward", "input_gradient", "weight_gradient"};
constexpr const char* kTypes[] = {"f32", "f16", "bf16", "f64"};

Product product_named(const std::string& name) {
  for (int i = 0; i < 3; i++)
    if (name == kProducts[i]) return static_cast<Product>(i);
  fail("backend", "product must be forward, input_gradient or weight_gradient but got ", name);
}

// product, dtype, m, n, k, backend
using Row = std::tuple<std::string, std::string, int64_t, int64_t, int64_t, std::string>;

std::vector<Row> rows_of(const std::vector<Choice>& choices) {
  std::vector<Row> rows;
  for (const Choice& c : choices)
    rows.emplace_back(kProducts[static_cast<int>(c.product)], kTypes[static_cast<int>(c.type)], c.m,
                      c.n, c.k, name_of(c.backend));
  return rows;
}

void install(const std::string& isa, int threads, const std::vector<Row>& rows) {
  std::vector<Choice> choices;
  for (const auto& [product, dtype, m, n, k, backend] : rows)
    choices.push_back(
        {product_named(product), dtype_named(dtype), m, n, k, backend_named(backend)});
  install_choices(isa, threads, choices);
}

void bind_choice(py::module_& m) {
  using namespace py::literals;
  m.def("accelerate", &accelerate);
  m.def("backend_names", &backend_names);
  m.def("forced_backend", &forced_backend);
  m.def("force_backend", &force_backend, "name"_a);
  m.def(
      "backend_for",
      [](const std::string& product, const std::string& dtype, int64_t rows, int64_t n, int64_t k) {
        return name_of(backend_for(product_named(product), dtype_named(dtype), rows, n, k));
      },
      "product"_a, "dtype"_a, "m"_a, "n"_a, "k"_a);
  m.def("choice_bounds", [] {
    return std::pair(std::vector<int64_t>(kRowsFrom.begin(), kRowsFrom.end()),
                     std::vector<int64_t>(kFeaturesFrom.begin(), kFeaturesFrom.end()));
  });
  m.def(
      "default_choices",
      [](const std::string& isa, bool accelerate) {
        return rows_of(default_choices(isa, accelerate));
      },
      "isa"_a, "accelerate"_a);
  m.def(
      "choices", [](const std::string& isa, int threads) { return rows_of(choices(isa, threads)); },
      "isa"_a, "threads"_a);
  m.def("install_choices", &install, "isa"_a, "threads"_a, "rows"_a);
  m.def("forget_choices", &forget_choices);
}

using unlocked = py::call_guard<py::gil_scoped_release>;

template <class T>
void bind_numpy(py::module_& m) {
  using namespace py::literals;
  m.def("rope", &rope<T>, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(),
        "interleaved"_a = false,
        "NumPy float32 or float64, C order: x [B, H, S, D], cos and sin [P >= S, rotary_dim / 2].");
  m.def("gelu", &gelu<T>, "x"_a.noconvert(), "approximate"_a = "none");
  m.def("gelu_linear", &gelu_linear<T>, "x"_a.noconvert(), "weight"_a.noconvert(),
        "bias"_a.noconvert() = py::none(), "approximate"_a = "none",
        "gelu(x @ weight.T + bias) on [M, K] and [N, K].");
}

}  // namespace
}  // namespace fusedops

PYBIND11_MODULE(_C, m) {
  using namespace fusedops;
  using namespace py::literals;
  m.doc() = "fusedops without torch: information, ISA control, limit probes, NumPy entry points.";
  m.def("isa_compiled", &isa::compiled, "ISAs in this build, best first.");
  m.def("isa_supported", &isa::supported, "Of those, the ones this machine runs.");
  m.def("isa_current", &isa::current);
  m.def("isa_use", &isa::use, "name"_a);
  m.def("deterministic", &deterministic);
  m.def("set_deterministic", &set_deterministic, "on"_a);
  m.def("threads", &threads, "Threads of torch's pool.");
  m.def("last_cache_bytes", &last_cache_bytes, "Of the last level of data cache.");
  m.def("cache_bytes", &cache_sizes,
        "(level, type, bytes, CPUs that share it or 0) of the caches of the first CPU.");
  m.def("compiler", [] { return std::string(__VERSION__); });
  m.def("probe_copy", &probe_copy, "bytes"_a, "repeats"_a = 5, "cold"_a = false, unlocked(),
        "Best bytes/s (read + written) of a copy of `bytes` on torch's threads, of all ways.");
  m.def("probe_read", &probe_read, "bytes"_a, "repeats"_a = 5, "cold"_a = false, unlocked(),
        "Best bytes/s of reading `bytes`.");
  m.def("probe_in_place", &probe_in_place, "bytes"_a, "repeats"_a = 5, "cold"_a = false, unlocked(),
        "Best bytes/s (read + written) of changing `bytes` where they lie.");
  m.def("probe_fresh_copy", &probe_fresh_copy, "bytes"_a, "repeats"_a = 3, "huge"_a = true,
        unlocked(), "Best bytes/s (read + written) of a copy into memory never touched before.");
  m.def("probe_fma", &probe_fma, "dtype"_a = "f32", unlocked(),
        "Multiply-add operations/s on registers, all of torch's threads: f32, f64, bf16, int8.");
  m.def("fma_unit", &fma_unit, "dtype"_a = "f32", "What probe_fma executes for this dtype.");
  m.def("probe_ways", &probe_ways, "probe"_a, "How 'copy', 'read' or 'in_place' is tried.");
  m.def("probe_once", &probe_pass, "probe"_a, "way"_a, "source"_a.noconvert(),
        "target"_a.noconvert(), "One pass over arrays of one size; returns the sum that was read.");
  m.def(
      "packed_bytes",
      [](int64_t n, int64_t k, const std::string& dtype) {
        return packed_weight_bytes(n, k, dtype_named(dtype));
      },
      "n"_a, "k"_a, "dtype"_a, "Of what linear_pack returns on the ISA in use.");
  bind_choice(m);
  bind_plans(m);
  bind_numpy<float>(m);
  bind_numpy<double>(m);
}
