#include "capture.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace emu {
namespace {

constexpr size_t kMostBytes = 1 << 20;
constexpr uint64_t kMostThreads = 1 << 14;

struct Region {
  char *begin, *end;
};

// What is bound, arguments that share memory together.
std::vector<Region> regions(const Launch& launch) {
  std::vector<Region> all;
  for (const Argument& a : launch.arguments) {
    if (a.bound) all.push_back({a.address, a.address + a.bytes});
  }
  std::sort(all.begin(), all.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  std::vector<Region> merged;
  for (const Region& r : all) {
    if (!merged.empty() && r.begin < merged.back().end) {
      merged.back().end = std::max(merged.back().end, r.end);
    } else {
      merged.push_back(r);
    }
  }
  return merged;
}

std::string numbers(std::initializer_list<uint64_t> values) {
  std::string text;
  for (const uint64_t v : values) text += (text.empty() ? "" : " ") + std::to_string(v);
  return text;
}

}  // namespace

// Lines of text: the kernel, grid and group, bytes of every region, then argument, region and
// offset of everything that is bound; an empty line, and the regions' bytes.
void capture(const Launch& launch, const char* folder) {
  static std::set<std::string> seen;
  const std::vector<Region> memory = regions(launch);
  std::string head = std::string(launch.name) + "\n";
  head += numbers({launch.grid.d[0], launch.grid.d[1], launch.grid.d[2], launch.group.d[0],
                   launch.group.d[1], launch.group.d[2]}) +
          "\n";
  size_t bytes = 0;
  for (const Region& r : memory) {
    const auto size = static_cast<size_t>(r.end - r.begin);
    bytes += size;
    head += std::to_string(size) + " ";
  }
  head += "\n";
  for (int i = 0; i < kArguments; ++i) {
    const Argument& a = launch.arguments[i];
    if (!a.bound) continue;
    for (size_t r = 0; r < memory.size(); ++r) {
      if (a.address < memory[r].begin || a.address + a.bytes > memory[r].end) continue;
      head += numbers({static_cast<uint64_t>(i), r,
                       static_cast<uint64_t>(a.address - memory[r].begin)}) +
              "\n";
      break;
    }
  }
  const uint64_t threads = uint64_t{launch.grid.d[0]} * launch.grid.d[1] * launch.grid.d[2];
  if (bytes > kMostBytes || threads > kMostThreads || !seen.insert(folder + head).second) return;
  std::ofstream file(
      std::string(folder) + "/" + std::to_string(std::hash<std::string>()(head)) + ".launch",
      std::ios::binary);
  file << head << "\n";
  for (const Region& r : memory) file.write(r.begin, r.end - r.begin);
}

}  // namespace emu
