// The call of a plan. What must be asked of x and out goes to torch's DLPack functions, one call
// for memory, dtype, shape and strides, and straight to the tensor's own methods: in Python the
// questions would cost more than the kernel of a small layer.
#include "plan.h"

#include <ATen/dlpack.h>  // plain C, nothing of torch
#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../approximate.h"
#include "../check.h"
#include "../isa.h"
#include "../run.h"

namespace py = pybind11;

namespace fusedops {
namespace {

// An own reference, or null after an error.
py::object own(PyObject* p) { return py::reinterpret_steal<py::object>(p); }

py::object attribute(py::handle t, py::handle name) {
  return own(PyObject_GetAttr(t.ptr(), name.ptr()));
}
py::object method(py::handle t, py::handle name) {
  return own(PyObject_CallMethodNoArgs(t.ptr(), name.ptr()));
}
py::object call(py::handle f) { return own(PyObject_CallNoArgs(f.ptr())); }
py::object call(py::handle f, py::handle argument) {
  return argument ? own(PyObject_CallOneArg(f.ptr(), argument.ptr())) : py::object();
}

py::str interned(const char* name) {
  return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
}

// Names of a tensor's attributes, and what plan.py knows of torch under the same names as there.
struct Torch {
  explicit Torch(const py::dict& tools)
      : Tensor(tools["Tensor"]),
        Parameter(tools["Parameter"]),
        forward_ad(tools["forward_ad"].attr("__dict__")),
        is_grad_enabled(tools["is_grad_enabled"]),
        is_inference_mode_enabled(tools["is_inference_mode_enabled"]),
        transform_level(tools["transform_level"]),
        tracing_state(tools["tracing_state"]),
        mode_count(tools["mode_count"]),
        proxy_mode(tools["proxy_mode"]),
        is_before_dispatch(tools["is_before_dispatch"]),
        empty_like(tools["empty_like"]),
        count_write(tools["count_write"]) {
    const py::object capsule = Tensor.attr("__dlpack_c_exchange_api__");
    void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!api) throw py::error_already_set();
    dlpack = static_cast<const DLPackExchangeAPI*>(api);
    if (dlpack->header.version.major != DLPACK_MAJOR_VERSION)
      fail("plan", "torch must have DLPack ", DLPACK_MAJOR_VERSION, " but got ",
           dlpack->header.version.major);
    if (!dlpack->dltensor_from_py_object_no_sync)
      fail("plan", "torch must describe tensors by DLPack but got none that does");
  }

  py::object Tensor, Parameter;
  py::dict forward_ad;  // of that module
  py::object is_grad_enabled, is_inference_mode_enabled, transform_level, tracing_state;
  py::object mode_count, proxy_mode, is_before_dispatch, empty_like, count_write;
  const DLPackExchangeAPI* dlpack;

  py::str is_neg = interned("is_neg"), is_inference = interned("is_inference"),
          requires_grad = interned("requires_grad"), current_level = interned("_current_level");

  bool is_tensor(py::handle t) const {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t.ptr()));
    return type == Tensor.ptr() || type == Parameter.ptr();
  }

  bool is_recorded(py::handle t) const {
    return attribute(t, requires_grad).ptr() != Py_False && call(is_grad_enabled).ptr() != Py_False;
  }

  // To count all modes is quicker than to look for one, and there are none as a rule.
  bool has_proxy_mode() const {
    const py::object count = call(mode_count);
    return !(count && PyLong_AsLong(count.ptr()) == 0) && call(proxy_mode).ptr() != Py_None;
  }

  // No graph is being recorded, and no torch.func transform and no forward-mode level is open.
  bool is_alone() const {
    PyObject* level = PyDict_GetItemWithError(forward_ad.ptr(), current_level.ptr());  // borrowed
    return call(tracing_state).ptr() == Py_None && !has_proxy_mode() &&
           call(is_before_dispatch).ptr() == Py_False && call(transform_level).ptr() == Py_None &&
           level && PyLong_AsLong(level) == -1;
  }

  // A view of a tensor, good while nothing else runs; false after an error.
  bool describe(py::handle t, DLTensor& view) const {
    return dlpack->dltensor_from_py_object_no_sync(t.ptr(), &view) == 0;
  }
};

void* address(const DLTensor& t) {
  return t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
}

// What a plan wants of a tensor.
struct Form {
  explicit Form(const DLTensor& t) : type(t.dtype), shape(t.shape, t.shape + t.ndim) {}

  bool fits(const DLTensor& t) const {
    return t.device.device_type == kDLCPU && std::memcmp(&t.dtype, &type, sizeof type) == 0 &&
           static_cast<size_t>(t.ndim) == shape.size() &&
           std::equal(shape.begin(), shape.end(), t.shape) && is_contiguous(t);
  }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : shape) product *= size;
    return product;
  }

  DLDataType type;
  std::vector<int64_t> shape;

 private:
  bool is_contiguous(const DLTensor& t) const {
    if (!t.strides || numel() == 0) return true;
    int64_t expected = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      if (shape[d] != 1 && t.strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
};

// One plan, as Python calls it: plan(x, out=None), with offset=None where it takes one.
struct Call {
  std::string op;
  Torch torch;
  py::object dtype, like;
  py::object refuse;  // (op, name, tensor, dtype, shape) says what is wrong with a tensor
  Form of_x, of_y;
  std::function<void(const void*, void*, bool, int64_t)> run;
  bool takes_offset;
  int64_t usual_offset;

  // Whether nothing but the numbers of a tensor matters to a call. This may run Python.
  bool is_plain(py::handle t) const {
    return torch.is_tensor(t) && method(t, torch.is_neg).ptr() == Py_False && !torch.is_recorded(t);
  }

  // The memory of a plain tensor, for what runs no Python before the kernel; the errors say how one
  // does not fit.
  void* memory(const char* name, py::handle t, const Form& wanted) const {
    DLTensor view;
    if (!torch.describe(t, view) || !wanted.fits(view)) refused(name, t, wanted);
    // Null in a freed storage, and in tensors that torch keeps no elements of (ZeroTensor).
    void* const data = address(view);
    if (!data && wanted.numel() > 0)
      fail(op.c_str(), name, " must have memory but got a tensor without");
    return data;
  }

  [[noreturn]] void refused(const char* name, py::handle t, const Form& wanted) const {
    PyErr_Clear();
    refuse(op, name, t, dtype, py::tuple(py::cast(wanted.shape)));
    fail(op.c_str(), name, " must fit the plan but got one that does not");
  }

  void execute(py::handle x, const char* name, py::handle y, bool fresh, int64_t offset) const {
    const void* const from = memory("x", x, of_x);
    void* const to = memory(name, y, of_y);
    const py::gil_scoped_release released;
    run(from, to, fresh, offset);
  }

  py::object into_fresh(py::handle x, int64_t offset) const {
    py::object y = call(torch.empty_like, like);
    if (!y) throw py::error_already_set();
    if (!torch.is_tensor(y))
      fail(op.c_str(), "a plan must not be called under a mode that makes other tensors but got ",
           Py_TYPE(y.ptr())->tp_name);
    execute(x, "the result", y, true, offset);
    return y;
  }

  py::object into(py::handle out, py::handle x, int64_t offset) const {
    if (!is_plain(out)) refused("out", out, of_y);
    const bool counts = method(out, torch.is_inference).ptr() == Py_False;
    if (!counts && call(torch.is_inference_mode_enabled).ptr() != Py_True)
      fail(op.c_str(),
           "out, an inference tensor, must be written inside inference_mode but got a call "
           "outside it");
    execute(x, "out", out, false, offset);
    if (counts && !call(torch.count_write, own(PyTuple_Pack(1, out.ptr()))))
      throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(out);
  }
};

struct PlanObject {
  PyObject_HEAD Call* call;
  vectorcallfunc vectorcall;
};

// x, out and offset out of n positional arguments and, behind them, those of `names`; those not
// given stay None.
void parse(const Call& plan, PyObject* const* args, Py_ssize_t n, PyObject* names,
           std::array<PyObject*, 3>& values) {
  if (n > 2) throw py::type_error("a plan takes x and out by position");
  std::copy(args, args + n, values.begin());
  for (Py_ssize_t at = 0; names && at < PyTuple_GET_SIZE(names); at++) {
    const std::string key = py::cast<std::string>(PyTuple_GET_ITEM(names, at));
    const int i = key == "x" ? 0 : key == "out" ? 1 : key == "offset" && plan.takes_offset ? 2 : -1;
    if (i < 0) throw py::type_error("a plan of this kind takes no argument " + key);
    if (i < n) throw py::type_error("a plan takes one value of " + key);
    values[static_cast<size_t>(i)] = args[n + at];
  }
}

PyObject* call_plan(PyObject* self, PyObject* const* args, size_t count, PyObject* names) {
  try {
    const Call& plan = *reinterpret_cast<PlanObject*>(self)->call;
    std::array<PyObject*, 3> values = {Py_None, Py_None, Py_None};
    parse(plan, args, PyVectorcall_NARGS(count), names, values);
    const py::handle x = values[0], out = values[1];
    int64_t offset = plan.usual_offset;
    if (values[2] != Py_None) offset = PyLong_AsLongLong(values[2]);
    if (offset == -1 && PyErr_Occurred()) return nullptr;
    // In this order: the shape of a tensor that is being traced is made of tensors.
    if (!plan.torch.is_alone() || !plan.is_plain(x)) plan.refused("x", x, plan.of_x);
    return (out.is_none() ? plan.into_fresh(x, offset) : plan.into(out, x, offset)).release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const py::builtin_exception& e) {
    e.set_error();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

// A plan never changes: its copy is itself.
PyObject* copy_plan(PyObject* self, PyObject*) { return Py_NewRef(self); }

PyObject* reduce_plan(PyObject* self, PyObject*) {
  return PyErr_Format(PyExc_RuntimeError,
                      "[%s] a plan must be made where it runs but got a call to pickle it",
                      reinterpret_cast<PlanObject*>(self)->call->op.c_str());
}

void delete_plan(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<PlanObject*>(self)->call;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef plan_methods[] = {{"__copy__", &copy_plan, METH_NOARGS, nullptr},
                              {"__deepcopy__", &copy_plan, METH_O, nullptr},
                              {"__reduce__", &reduce_plan, METH_NOARGS, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

template <class F>
void* slot(F* f) {
  return reinterpret_cast<void*>(f);
}

// A type of our own: a call through pybind11 takes longer than the kernel of a small layer.
PyTypeObject* plan_type() {
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(PlanObject, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_call, slot(&PyVectorcall_Call)},
      {Py_tp_members, members},
      {Py_tp_dealloc, slot(&delete_plan)},
      {Py_tp_methods, plan_methods},
      {Py_tp_doc,
       const_cast<char*>("What fusedops.plan makes; fusedops.plan says how to call it.")},
      {0, nullptr}};
  static PyType_Spec spec = {
      "fusedops._C.Plan", sizeof(PlanObject), 0,
      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_VECTORCALL, slots};
  static PyObject* type = PyType_FromSpec(&spec);
  if (!type) throw py::error_already_set();
  return reinterpret_cast<PyTypeObject*>(type);
}

py::object object_of(Call&& call) {
  PlanObject* self = PyObject_New(PlanObject, plan_type());
  if (!self) throw py::error_already_set();
  self->call = new Call(std::move(call));
  self->vectorcall = &call_plan;
  return own(reinterpret_cast<PyObject*>(self));
}

// What a tensor was like: whether it is the same one, unwritten as far as can be seen. The version
// of an inference tensor is None.
struct Snapshot {
  explicit Snapshot(const py::object& t)
      : tensor(t),
        storage(t.attr("untyped_storage")()),  // kept: nothing else can come to lie there
        version(version_of(t)),
        pointer(t.attr("data_ptr")()),
        dtype(t.attr("dtype")),
        shape(t.attr("shape")),
        stride(t.attr("stride")()),
        table(&kernels()) {}

  static py::object version_of(py::handle t) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    py::object v = attribute(t, name);
    if (v) return v;
    PyErr_Clear();
    return py::none();
  }

  bool matches(py::handle t) const {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const dtype_ = PyUnicode_InternFromString("dtype");
    static PyObject* const shape_ = PyUnicode_InternFromString("shape");
    static PyObject* const stride_ = PyUnicode_InternFromString("stride");
    const auto equal = [](const py::object& a, const py::object& b) {
      return a && PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ) == 1;
    };
    return t.ptr() == tensor.ptr() && table == &kernels() && equal(version_of(t), version) &&
           equal(method(t, data_ptr), pointer) && attribute(t, dtype_).ptr() == dtype.ptr() &&
           equal(attribute(t, shape_), shape) && equal(method(t, stride_), stride);
  }

  py::object tensor, storage, version, pointer, dtype, shape, stride;
  const KernelTable* table;  // of the ISA in use then
};

PyObject* call_snapshot(PyObject* self, PyObject* tensor) {
  const bool same = static_cast<Snapshot*>(PyCapsule_GetPointer(self, nullptr))->matches(tensor);
  if (!same) PyErr_Clear();
  return PyBool_FromLong(same);
}

py::object snapshot(const py::object& tensor) {
  static PyMethodDef called = {"snapshot", &call_snapshot, METH_O, "(tensor): is it the same?"};
  const py::capsule self(new Snapshot(tensor), [](void* p) { delete static_cast<Snapshot*>(p); });
  return own(PyCFunction_New(&called, self.ptr()));
}

// Addresses are those of Tensor.data_ptr(). `given`: op, dtype, like and refuse of Call, the shape
// of x, and what Torch takes.
void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

Call call_of(const py::dict& given) {
  const Torch torch(given);
  DLTensor like;
  if (!torch.describe(given["like"], like)) throw py::error_already_set();
  const Form of_y(like);
  Form of_x = of_y;
  of_x.shape = given["shape"].cast<std::vector<int64_t>>();
  return {given["op"].cast<std::string>(),
          torch,
          given["dtype"],
          given["like"],
          given["refuse"],
          of_x,
          of_y,
          {},
          false,
          0};
}

py::object linear_plan(const py::dict& given, uintptr_t weight, uintptr_t bias, int64_t m,
                       int64_t n, int64_t k, const std::string& dtype,
                       const std::string& approximate, int threads) {
  Call call = call_of(given);
  LinearArgs a = {};
  a.w = at(weight), a.bias = at(bias);
  a.m = m, a.n = n, a.k = k;
  a.act = activation_of(call.op.c_str(), approximate);
  const LinearPlan plan(a, dtype_named(dtype), threads);
  call.run = [plan](const void* x, void* y, bool fresh, int64_t) { plan.run(x, y, fresh); };
  return object_of(std::move(call));
}

py::object rope_plan(const py::dict& given, uintptr_t cos, uintptr_t sin, uintptr_t position_ids,
                     const std::array<int64_t, 4>& shape, int64_t half, int64_t table_rows,
                     bool table_batched, bool ids_batched, const std::string& dtype,
                     const std::string& table_dtype, int64_t offset, bool bshd, bool interleaved,
                     bool conjugate) {
  Call call = call_of(given);
  call.takes_offset = true;
  call.usual_offset = offset;
  RopeArgs a = {};
  a.cos = at(cos), a.sin = at(sin), a.position_ids = at(position_ids);
  a.batch = shape[0], a.heads = shape[1], a.seq = shape[2], a.head_dim = shape[3];
  a.half = half;
  if (table_batched) a.cos_batch = a.sin_batch = table_rows * half;
  if (ids_batched) a.id_batch = a.seq;
  a.interleaved = interleaved, a.conjugate = conjugate;
  const RopePlan plan(a, dtype_named(dtype), dtype_named(table_dtype), table_rows, bshd);
  call.run = [plan](const void* x, void* y, bool fresh, int64_t by) { plan.run(x, y, by, fresh); };
  return object_of(std::move(call));
}

// What a plan does without what a call costs: neither tensor is looked at.
void repeat_plan(const py::object& plan, uintptr_t x, uintptr_t out, int64_t times) {
  if (Py_TYPE(plan.ptr()) != plan_type())
    fail("repeat_plan", "plan must be a plan but got ", Py_TYPE(plan.ptr())->tp_name);
  const Call& call = *reinterpret_cast<PlanObject*>(plan.ptr())->call;
  const py::gil_scoped_release released;
  for (int64_t i = 0; i < times; i++) call.run(at(x), at(out), false, call.usual_offset);
}

}  // namespace

DType dtype_named(const std::string& name) {
  const std::pair<const char*, DType> all[] = {
      {"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}, {"f64", DType::f64}};
  for (const auto& [known, type] : all)
    if (name == known) return type;
  fail("plan", "dtype must be f32, f16, bf16 or f64 but got ", name);
}

void bind_plans(py::module_& m) {
  using namespace py::literals;
  m.attr("Plan") = py::handle(reinterpret_cast<PyObject*>(plan_type()));
  m.def("snapshot", &snapshot, "tensor"_a,
        "A function that says whether a tensor is this one, unwritten and on this ISA.");
  m.def("linear_plan", &linear_plan, "given"_a, "weight"_a, "bias"_a, "m"_a, "n"_a, "k"_a,
        "dtype"_a, "approximate"_a, "threads"_a);
  m.def("rope_plan", &rope_plan, "given"_a, "cos"_a, "sin"_a, "position_ids"_a, "shape"_a, "half"_a,
        "table_rows"_a, "table_batched"_a, "ids_batched"_a, "dtype"_a, "table_dtype"_a, "offset"_a,
        "bshd"_a, "interleaved"_a, "conjugate"_a);
  m.def("repeat_plan", &repeat_plan, "plan"_a, "x"_a, "out"_a, "times"_a,
        "Run a plan on addresses of contiguous tensors that fit it, some times; for the bench.");
}

}  // namespace fusedops
