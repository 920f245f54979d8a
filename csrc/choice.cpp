#include "choice.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "check.h"
#include "run.h"

namespace fusedops {
namespace {

constexpr size_t kProducts = 3, kTypes = 4;

template <size_t N>
size_t class_of(int64_t size, const std::array<int64_t, N>& from) {
  size_t at = N - 1;
  while (at > 0 && size < from[at]) at--;
  return at;
}

class Table {
 public:
  Backend get(Product p, DType t, int64_t m, int64_t n, int64_t k) const {
    return of_[index(p, t, m, n, k)];
  }
  void set(const Choice& c) { of_[index(c.product, c.type, c.m, c.n, c.k)] = c.backend; }

 private:
  static constexpr size_t rows = kRowsFrom.size(), features = kFeaturesFrom.size();

  static size_t index(Product p, DType t, int64_t m, int64_t n, int64_t k) {
    const size_t layer = static_cast<size_t>(p) * kTypes + static_cast<size_t>(t);
    const size_t of_rows = layer * rows + class_of(m, kRowsFrom);
    return (of_rows * features + class_of(n, kFeaturesFrom)) * features +
           class_of(k, kFeaturesFrom);
  }

  std::array<Backend, kProducts * kTypes * rows * features * features> of_ = {};
};

template <class F>
void each_class(const F& fn) {
  for (size_t p = 0; p < kProducts; p++)
    for (size_t t = 0; t < kTypes; t++)
      for (const int64_t m : kRowsFrom)
        for (const int64_t n : kFeaturesFrom)
          for (const int64_t k : kFeaturesFrom)
            fn(static_cast<Product>(p), static_cast<DType>(t), m, n, k);
}

// What the wheel says; docs/autotune.md tells what was measured. The panels of the engine are 64
// columns wide: gradients narrower than one are where PyTorch is ahead, and sums of few terms.
Backend by_default(const std::string& isa, bool with_units, Product p, DType t, int64_t m,
                   int64_t n, int64_t k) {
  // Accelerate multiplies on matrix units that no other library reaches.
  if (with_units && m >= 64 && n >= 256 && k >= 256) return Backend::aten;
  const bool pairs = isa == "avx512bf16", avx512 = pairs || isa == "avx512";
  const bool few = m >= 4 && m < 16;
  bool aten = false, direct = false;
  if (p == Product::forward) return Backend::engine;
  if (p == Product::input_gradient) {
    const bool one = m == 1 && (n >= 1024 ? k < 1024 : n >= 256 && k >= 1024);
    aten = avx512 && t == DType::f32 && (one || (few && n >= 1024 && k < 64));
    direct = pairs && t == DType::bf16 && n >= 1024 && k < 64 && m >= 256;
  } else if (t == DType::bf16) {
    const bool wide = n >= 4096 || (n >= 1024 && k >= 64) || (n >= 256 && k >= 256);
    direct = pairs && (m < 512 ? wide : n >= 256 && k < 64);
  } else if (t == DType::f16) {
    aten = avx512 && m == 1 && n >= 1024 && k < 256;
  } else {
    aten =
        m == 1 ? n >= 64 || k >= 256 : avx512 && t == DType::f32 && m < 16 && n >= 256 && k < 256;
  }
  return aten ? Backend::aten : direct ? Backend::aten_direct : Backend::engine;
}

Table default_table(const std::string& isa, bool with_units) {
  Table table = {};
  each_class([&](Product p, DType t, int64_t m, int64_t n, int64_t k) {
    table.set({p, t, m, n, k, by_default(isa, with_units, p, t, m, n, k)});
  });
  return table;
}

const std::vector<Table>& default_tables() {
  static const std::vector<Table> all = [] {
    std::vector<Table> tables;
    for (const std::string& isa : isa::compiled())
      tables.push_back(default_table(isa, accelerate()));
    return tables;
  }();
  return all;
}

size_t index_of(const std::string& isa) {
  const std::vector<std::string> names = isa::compiled();
  const auto at = std::find(names.begin(), names.end(), isa);
  if (at == names.end()) fail("backend", "isa must be one that was compiled but got ", isa);
  return static_cast<size_t>(at - names.begin());
}

// Installed tables are never changed and never freed: a call on another thread may be reading one.
struct Installed {
  size_t isa;
  int threads;
  Table table;
  const Installed* next;
};
std::atomic<const Installed*> installed{nullptr};
std::mutex installing;

const Table& table_for(size_t isa, int threads) {
  for (const Installed* one = installed.load(std::memory_order_acquire); one; one = one->next)
    if (one->isa == isa && one->threads == threads) return one->table;
  return default_tables()[isa];
}

constexpr const char* kNames[] = {"engine", "aten", "aten_direct"};
constexpr int kAuto = -1;

int forced_by(const std::string& name) {
  return name == "auto" ? kAuto : static_cast<int>(backend_named(name));
}

std::atomic<int>& forced() {
  static std::atomic<int> one{[] {
    const char* wanted = std::getenv("FUSEDOPS_BACKEND");
    return wanted && *wanted ? forced_by(wanted) : kAuto;
  }()};
  return one;
}

std::vector<Choice> listed(const Table& table) {
  std::vector<Choice> all;
  each_class([&](Product p, DType t, int64_t m, int64_t n, int64_t k) {
    all.push_back({p, t, m, n, k, table.get(p, t, m, n, k)});
  });
  return all;
}

}  // namespace

Backend backend_for(Product p, DType t, int64_t m, int64_t n, int64_t k) {
  if (m <= 0 || n <= 0 || k <= 0 || deterministic()) return Backend::engine;
  const int one = forced().load(std::memory_order_relaxed);
  if (one != kAuto) return static_cast<Backend>(one);
  return table_for(isa::index(), threads()).get(p, t, m, n, k);
}

bool accelerate() {
#if defined(__APPLE__) && defined(__aarch64__)
  return true;
#else
  return false;
#endif
}

std::vector<std::string> backend_names() { return {std::begin(kNames), std::end(kNames)}; }

std::string name_of(Backend b) { return kNames[static_cast<size_t>(b)]; }

Backend backend_named(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); i++)
    if (name == kNames[i]) return static_cast<Backend>(i);
  fail("backend", "name must be auto, engine, aten or aten_direct but got ", name);
}

std::string forced_backend() {
  const int one = forced().load();
  return one == kAuto ? "auto" : kNames[one];
}

void force_backend(const std::string& name) { forced() = forced_by(name); }

std::vector<Choice> default_choices(const std::string& isa, bool with_units) {
  return listed(default_table(isa, with_units));
}

std::vector<Choice> choices(const std::string& isa, int threads) {
  return listed(table_for(index_of(isa), threads));
}

void install_choices(const std::string& isa, int threads, const std::vector<Choice>& some) {
  const auto begins = [](int64_t size, const auto& from) {
    return std::find(from.begin(), from.end(), size) != from.end();
  };
  auto made = std::make_unique<Installed>();
  made->isa = index_of(isa), made->threads = threads;
  made->table = default_tables()[made->isa];
  for (const Choice& c : some) {
    if (!begins(c.m, kRowsFrom) || !begins(c.n, kFeaturesFrom) || !begins(c.k, kFeaturesFrom))
      fail("backend", "sizes must begin a class but got ", c.m, ", ", c.n, ", ", c.k);
    made->table.set(c);
  }
  const std::lock_guard lock(installing);
  made->next = installed.load();
  installed.store(made.release(), std::memory_order_release);
}

void forget_choices() {
  const std::lock_guard lock(installing);
  installed.store(nullptr, std::memory_order_release);
}

}  // namespace fusedops
