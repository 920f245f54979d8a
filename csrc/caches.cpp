// What the system says about the caches of the first CPU.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "isa.h"

#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <unistd.h>
#endif

namespace fusedops {
namespace {

// The first line of a file, empty if there is none.
[[maybe_unused]] std::string line_of(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "32768K" or "1M"; 0 for anything else.
[[maybe_unused]] int64_t bytes_of(const std::string& size) {
  char* unit = nullptr;
  const int64_t n = std::strtoll(size.c_str(), &unit, 10);
  return *unit == 'K' ? n << 10 : *unit == 'M' ? n << 20 : n;
}

// CPUs of a list such as "0-3,8".
[[maybe_unused]] int count_of(const std::string& list) {
  std::istringstream ranges(list);
  int count = 0;
  for (std::string range; std::getline(ranges, range, ',');) {
    const size_t dash = range.find('-');
    const int first = std::atoi(range.c_str());
    count += dash == std::string::npos ? 1 : std::atoi(range.c_str() + dash + 1) - first + 1;
  }
  return count;
}

#ifdef __APPLE__
std::vector<Cache> ask() {
  std::vector<Cache> found;
  const auto add = [&](const char* name, int level, const char* type) {
    int64_t bytes = 0;
    size_t size = sizeof(bytes);
    if (sysctlbyname(name, &bytes, &size, nullptr, 0) == 0 && bytes > 0)
      found.push_back({level, type, bytes, 0});
  };
  add("hw.l1dcachesize", 1, "data");
  add("hw.l1icachesize", 1, "instruction");
  add("hw.l2cachesize", 2, "unified");
  add("hw.l3cachesize", 3, "unified");
  return found;
}
#else
// sysfs before sysconf: on a share of a machine, sysconf adds up caches that are out of reach.
std::vector<Cache> ask() {
  std::vector<Cache> found;
  for (int i = 0;; i++) {
    const std::string entry = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    const std::string level = line_of(entry + "level");
    if (level.empty()) break;
    std::string type = line_of(entry + "type");
    for (char& c : type) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    const int64_t bytes = bytes_of(line_of(entry + "size"));
    if (bytes > 0)
      found.push_back(
          {std::atoi(level.c_str()), type, bytes, count_of(line_of(entry + "shared_cpu_list"))});
  }
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (found.empty()) {
    const auto add = [&](int name, int level, const char* type) {
      if (const long bytes = sysconf(name); bytes > 0) found.push_back({level, type, bytes, 0});
    };
    add(_SC_LEVEL1_DCACHE_SIZE, 1, "data");
    add(_SC_LEVEL1_ICACHE_SIZE, 1, "instruction");
    add(_SC_LEVEL2_CACHE_SIZE, 2, "unified");
    add(_SC_LEVEL3_CACHE_SIZE, 3, "unified");
  }
#endif
  return found;
}
#endif

}  // namespace

const std::vector<Cache>& caches() {
  static const std::vector<Cache> all = [] {
    std::vector<Cache> found = ask();
    std::stable_sort(found.begin(), found.end(),
                     [](const Cache& a, const Cache& b) { return a.level < b.level; });
    return found;
  }();
  return all;
}

int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t last = 0;
    for (const Cache& cache : caches())
      if (cache.level > 1 && cache.type != "instruction") last = cache.bytes;
    return last > 0 ? last : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace fusedops
