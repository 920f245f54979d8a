// The activations in double, and the largest error of float results; for accuracy.py, through
// ctypes.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum Kind { gelu, gelu_tanh, gelu_quick, silu };

// Below it the first terms of the series have all the digits; above it (14.9 and more) all results
// are x or 0, but those of the logistic ones, which are computed.
constexpr double kSmall = 0x1p-14;

double logistic(double x, double v) {
  return v < 0 ? x * std::exp(v) / (1 + std::exp(v)) : x / (1 + std::exp(-v));
}

double exact(Kind kind, double x) {
  if (std::isinf(x)) return x > 0 ? x : 0;
  if (kind == gelu && std::fabs(x) < kSmall) return x * (0.5 + 0.3989422804014327 * x);
  if (x > 40) return x;
  switch (kind) {
    case gelu:
      return x < -20 ? 0 : 0.5 * x * std::erfc(-x * 0.70710678118654752440);
    case gelu_tanh:
      return logistic(x, 1.5957691216057308 * (x + 0.044715 * x * x * x));
    case gelu_quick:
      return logistic(x, 1.702 * x);
    default:
      return logistic(x, x);
  }
}

double ulp(double y) {  // of float, subnormals included
  uint64_t bits;
  std::memcpy(&bits, &y, sizeof(bits));
  bits &= uint64_t{0x7ff} << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  const double u = power * 0x1p-23;
  return u < 0x1p-149 ? 0x1p-149 : u;
}

}  // namespace

extern "C" void exact_values(int kind, const float* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = exact(static_cast<Kind>(kind), static_cast<double>(x[i]));
}

// worst[0]: the largest error in ulp, worst[1]: the x of it. A NaN for anything but a NaN counts
// as infinite.
extern "C" void worst_error(const float* x, const double* expected, const float* actual, int64_t n,
                            double* worst) {
  for (int64_t i = 0; i < n; i++) {
    if (std::isnan(x[i]) ? std::isnan(actual[i]) : actual[i] == expected[i]) continue;
    const double error = std::fabs(actual[i] - expected[i]) / ulp(expected[i]);
    if (error <= worst[0]) continue;
    worst[0] = std::isnan(error) ? INFINITY : error;
    worst[1] = static_cast<double>(x[i]);
  }
}
