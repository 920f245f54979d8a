// Who computes the product of a dense layer: the engine or PyTorch. One table for each ISA and
// number of threads, by product, dtype and class of shape; docs/autotune.md.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "dtype.h"
#include "isa.h"

namespace fusedops {

// aten: PyTorch's, in float32 at least, so that a result is rounded once. aten_direct: PyTorch's,
// in the dtype that the tensors have.
enum class Backend : uint8_t { engine, aten, aten_direct };

// y = x @ w^T, dx = dy @ w and dw = dy^T @ x of one layer, x [m][k], w [n][k].
enum class Product : uint8_t { forward, input_gradient, weight_gradient };

// A size belongs to the class with the largest of these that is not above it.
constexpr std::array<int64_t, 8> kRowsFrom = {1, 2, 4, 16, 64, 256, 512, 2048};
constexpr std::array<int64_t, 5> kFeaturesFrom = {1, 64, 256, 1024, 4096};

// The backend of a call. The engine, whatever else is said, for empty tensors and in deterministic
// mode.
FUSEDOPS_API Backend backend_for(Product p, DType t, int64_t m, int64_t n, int64_t k);

// FUSEDOPS_BACKEND and fusedops.backend.use: one for all calls; "auto": the tables. Throws for an
// unknown name.
FUSEDOPS_API std::string forced_backend();
FUSEDOPS_API void force_backend(const std::string& name);
FUSEDOPS_API std::vector<std::string> backend_names();
FUSEDOPS_API Backend backend_named(const std::string& name);
FUSEDOPS_API std::string name_of(Backend b);

// One class of shapes, by the sizes from which it reaches.
struct Choice {
  Product product;
  DType type;
  int64_t m, n, k;
  Backend backend;
};

FUSEDOPS_API bool accelerate();  // whether this build is one for macOS, with Apple's matrix units
// Every class of the table of an ISA in the wheel, with those units or without.
FUSEDOPS_API std::vector<Choice> default_choices(const std::string& isa, bool with_units);
// Of the table that calls on that ISA and number of threads go by.
FUSEDOPS_API std::vector<Choice> choices(const std::string& isa, int threads);
// Make these the choices for that ISA and number of threads, over those of the wheel. Throws for a
// size that begins no class; forget_choices: the wheel's alone, for all.
FUSEDOPS_API void install_choices(const std::string& isa, int threads,
                                  const std::vector<Choice>& some);
FUSEDOPS_API void forget_choices();

}  // namespace fusedops
