// A device "mps" for torch on Linux, backed by host memory, for tests alone. Operations of torch
// run on the CPU behind the scenes; the library's MPS kernels run as they would on a Mac, through
// the same dispatch key and on the C shim of shim_emu.cpp.
//
// To be loaded before torch first asks for its MPS hooks, which it does once per process.
#include "fakemps.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>

namespace {

using at::Tensor;
using fakemps::host_address;

// --- the queue -----------------------------------------------------------------------------------

std::recursive_mutex queue_mutex;
std::deque<std::function<void()>> queue;
bool deferred = false;

}  // namespace

void fakemps::submit(std::function<void()> launch) {
  std::lock_guard lock(queue_mutex);
  if (deferred) {
    queue.push_back(std::move(launch));
  } else {
    launch();
  }
}

void fakemps::drain() {
  TORCH_CHECK(!in_command_block(), "an operation of torch inside a command block waits for itself");
  std::lock_guard lock(queue_mutex);
  while (!queue.empty()) {
    const std::function<void()> launch = std::move(queue.front());
    queue.pop_front();
    launch();
  }
}

// For Python: whether launches wait for something that looks at their results.
extern "C" __attribute__((visibility("default"))) void fakemps_defer(int on) {
  std::lock_guard lock(queue_mutex);
  fakemps::drain();
  deferred = on != 0;
}

extern "C" __attribute__((visibility("default"))) void fakemps_drain() { fakemps::drain(); }

extern "C" __attribute__((visibility("default"))) int fakemps_waiting() {
  std::lock_guard lock(queue_mutex);
  return static_cast<int>(queue.size());
}

namespace {

// --- memory --------------------------------------------------------------------------------------

const c10::Device kDevice(c10::DeviceType::MPS, 0);

class Allocator final : public c10::Allocator {
 public:
  static void release(void* device) { std::free(host_address(device)); }

  // Filled with ones, which are NaN in every floating type: fresh memory of a GPU is not zero
  // either.
  c10::DataPtr allocate(size_t bytes) override {
    void* host = nullptr;
    if (bytes != 0) {
      TORCH_CHECK(posix_memalign(&host, 256, bytes) == 0, "MPS backend out of memory");
      std::memset(host, 0xff, bytes);
    }
    void* device = fakemps::device_address(host);
    return {device, device, &release, kDevice};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    fakemps::drain();
    std::memcpy(host_address(to), host_address(from), bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::MPS, &allocator);

// The same elements as a tensor of the CPU. Bits that a lazy negation leaves alone, it leaves alone
// too.
Tensor on_host(const Tensor& t) {
  if (!t.is_mps()) return t;
  fakemps::drain();
  const int64_t bytes = static_cast<int64_t>(t.storage().nbytes());
  Tensor all = at::from_blob(host_address(t.storage().data()), {bytes}, at::kByte);
  Tensor view = at::empty({0}, t.scalar_type());
  view.set_(all.storage(), t.storage_offset(), t.sizes(), t.strides());
  view._set_neg(t.is_neg());
  view._set_conj(t.is_conj());
  return view;
}

// --- what torch wants of a device ----------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::MPS; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(c10::DeviceIndex) const override { fakemps::drain(); }
};
C10_REGISTER_GUARD_IMPL(MPS, Guard);

// torch looks the hooks up under this very name.
struct MPSHooks final : at::MPSHooksInterface {
  MPSHooks() = default;
  explicit MPSHooks(at::MPSHooksArgs) {}
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void deviceSynchronize() const override { fakemps::drain(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

}  // namespace

namespace at {
REGISTER_MPS_HOOKS(MPSHooks);
}

namespace {

// --- operations ----------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

at::ScalarType checked(std::optional<at::ScalarType> dtype) {
  TORCH_CHECK(!fakemps::in_command_block(),
              "an allocation inside a command block waits for itself");
  const at::ScalarType type = dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  TORCH_CHECK_TYPE(
      type != at::kDouble && type != at::kComplexDouble,
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
      "Please use float32 instead.");
  return type;
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic_symint(size, &allocator, kKeys, checked(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_symint_generic(size, stride, &allocator, kKeys, checked(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  Tensor target = on_host(to);
  target.copy_(on_host(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  at::TensorImpl* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes = static_cast<size_t>(impl->numel() + t.storage_offset()) *
                       static_cast<size_t>(t.element_size());
  at::Storage storage = t.storage();
  if (bytes > storage.nbytes()) {
    c10::DataPtr larger = allocator.allocate(bytes);
    if (storage.nbytes() != 0) allocator.copy_data(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  return t;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) resize_(to, c10::fromIntArrayRefSlow(from.sizes()), {});
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& t) { return on_host(t).item(); }

Tensor& set_storage(Tensor& t, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  TORCH_CHECK(storage.device() == t.device(), "storage and tensor must be on one device");
  at::TensorImpl* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset.expect_int());
  if (stride.data() == nullptr || stride.size() != size.size()) {
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  } else {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  }
  return t;
}

Tensor& set_whole_storage(Tensor& t, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / t.element_size());
  return set_storage(t, std::move(storage), 0, {c10::SymInt(count)}, {});
}

Tensor& set_tensor(Tensor& t, const Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sym_sizes(),
                     source.sym_strides());
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  fakemps::drain();
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  // Views look at no memory: the CPU's own serve.
  m.impl("view", at::cpu::view_symint);
  m.impl("as_strided", at::cpu::as_strided_symint);
  m.impl("_reshape_alias", at::cpu::_reshape_alias_symint);
  m.impl("unfold", at::cpu::unfold);
}

TORCH_LIBRARY_IMPL(_, MPS, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

}  // namespace
