// Errors a user sees: "[op] requirement but got value", nothing else.
#pragma once
#include <sstream>
#include <stdexcept>

namespace fusedops {

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << '[' << op << "] ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace fusedops
