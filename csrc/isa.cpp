#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <sstream>

#include "check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace fusedops {

#define ISA(name, arch, header, features) \
  namespace name {                        \
  extern const KernelTable table;         \
  }
#include "isa.inc"
#undef ISA

namespace {

#if defined(__x86_64__)
enum Register { eax, ebx, ecx, edx };
struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register reg;
  int bit;
  unsigned long long state;  // bits of XCR0 the system must have switched on
};
constexpr unsigned long long kYmm = 0x6, kZmm = 0xe6;
constexpr Feature kFeatures[] = {
    {"fma", 1, 0, ecx, 12, kYmm},        {"f16c", 1, 0, ecx, 29, kYmm},
    {"avx2", 7, 0, ebx, 5, kYmm},        {"avx512f", 7, 0, ebx, 16, kZmm},
    {"avx512dq", 7, 0, ebx, 17, kZmm},   {"avx512bw", 7, 0, ebx, 30, kZmm},
    {"avx512vl", 7, 0, ebx, 31, kZmm},   {"avx512bf16", 7, 1, eax, 5, kZmm},
    {"avx512vnni", 7, 0, ecx, 11, kZmm},
};

unsigned long long enabled_state() {
  unsigned r[4];
  if (!__get_cpuid(1, &r[0], &r[1], &r[2], &r[3]) || !(r[2] >> 27 & 1)) return 0;
  unsigned lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<unsigned long long>(hi) << 32 | lo;
}

bool has(const std::string& name) {
  for (const Feature& f : kFeatures) {
    if (name != f.name) continue;
    unsigned r[4];
    return __get_cpuid_count(f.leaf, f.subleaf, &r[0], &r[1], &r[2], &r[3]) &&
           (r[f.reg] >> f.bit & 1) && (enabled_state() & f.state) == f.state;
  }
  return false;  // a feature nobody taught this file to probe is never used
}
#elif defined(__aarch64__)
// What the system reports: a bit of the Linux auxiliary vector's word, or a sysctl of macOS.
struct Feature {
  const char* name;
  int word, bit;
  const char* sysctl;
};
constexpr int kHwcap = 16, kHwcap2 = 26;  // AT_HWCAP and AT_HWCAP2
// armv8.2-a is a flag of the compiler that adds what 8.1 made mandatory.
constexpr Feature kFeatures[] = {
    {"armv8-a", kHwcap, 1, "hw.optional.AdvSIMD"},
    {"armv8.2-a", kHwcap, 7, "hw.optional.armv8_crc32"},
    {"armv8.2-a", kHwcap, 8, "hw.optional.arm.FEAT_LSE"},
    {"armv8.2-a", kHwcap, 12, "hw.optional.arm.FEAT_RDM"},
    {"fp16", kHwcap, 9, "hw.optional.arm.FEAT_FP16"},
    {"fp16", kHwcap, 10, "hw.optional.arm.FEAT_FP16"},
    {"fp16fml", kHwcap, 23, "hw.optional.arm.FEAT_FHM"},
    {"dotprod", kHwcap, 20, "hw.optional.arm.FEAT_DotProd"},
    {"bf16", kHwcap2, 14, "hw.optional.arm.FEAT_BF16"},
    {"i8mm", kHwcap2, 13, "hw.optional.arm.FEAT_I8MM"},
};

bool reported(const Feature& f) {
#if defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(f.sysctl, &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return getauxval(f.word) >> f.bit & 1;
#endif
}

bool has(const std::string& name) {
  bool known = false;
  for (const Feature& f : kFeatures) {
    if (name != f.name) continue;
    if (!reported(f)) return false;
    known = true;
  }
  return known;
}
#else
bool has(const std::string&) { return false; }
#endif

bool has_all(const char* features) {
  std::istringstream words(features);
  for (std::string word; words >> word;)
    if (!has(word)) return false;
  return true;
}

struct Row {
  const char* name;
  const KernelTable* table;
  bool supported;
};

const std::vector<Row>& rows() {
  static const std::vector<Row> all = {
#define ISA(name, arch, header, features) {#name, &name::table, has_all(features)},
#include "isa.inc"
#undef ISA
  };
  return all;
}

std::vector<std::string> names(bool supported_only) {
  std::vector<std::string> out;
  for (const Row& row : rows())
    if (row.supported || !supported_only) out.push_back(row.name);
  return out;
}

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

const Row& find(const std::string& name) {
  for (const Row& row : rows()) {
    if (name != row.name) continue;
    if (!row.supported)
      fail("isa", "this CPU must support the ISA (it supports ", joined(names(true)), ") but got ",
           name);
    return row;
  }
  fail("isa", "name must be one of ", joined(names(false)), " but got ", name);
}

const Row& initial() {
  const char* wanted = std::getenv("FUSEDOPS_ISA");
  if (wanted && *wanted) return find(wanted);
  for (const Row& row : rows())
    if (row.supported) return row;
  fail("isa", "the build must hold a table for this CPU but got ", joined(names(false)));
}

std::atomic<const Row*>& current_row() {
  static std::atomic<const Row*> row{&initial()};
  return row;
}

}  // namespace

const KernelTable& kernels() { return *current_row().load(std::memory_order_relaxed)->table; }

namespace isa {
std::vector<std::string> compiled() { return names(false); }
std::vector<std::string> supported() { return names(true); }
std::string current() { return current_row().load()->name; }
size_t index() {
  return static_cast<size_t>(current_row().load(std::memory_order_relaxed) - rows().data());
}
void use(const std::string& name) { current_row().store(&find(name)); }
}  // namespace isa

}  // namespace fusedops
