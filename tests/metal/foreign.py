"""Kernels of other projects on the emulator: is it Metal, or only what this project's shaders need?

The headers of the installed torch are always there. PyTorch's and MLX's kernels are fetched from
GitHub when it can be reached, used as input, and never kept in this repository. Prints what ran and
what was not to be had; fails if something that was there went wrong.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from compiler import CompilationError
from emulator import EmulatorError, Shaders

TORCH = Path(torch.__file__).parent / "include"
MLX = "https://codeload.github.com/ml-explore/mlx/tar.gz/refs/tags/v0.29.3"
PYTORCH = "https://codeload.github.com/pytorch/pytorch/tar.gz/refs/tags/v2.9.1"
NORM = "backend/metal/kernels"
_MLX_STUBS = {
    "bf16_math.h": "",
    "logging.h": "",
    # One for each address space, which are one where they are erased.
    "steel/utils/type_traits.h": """#pragma once
namespace metal {
template <typename T> struct is_empty : bool_constant<__is_empty(T)> {};
template <typename... Ts> struct make_void { typedef void type; };
template <typename... Ts> using void_t = typename make_void<Ts...>::type;
template <class T> struct is_static : bool_constant<is_empty<remove_cv_t<T>>::value> {};
template <typename T> struct pointer_element {};
template <typename T> struct pointer_element<T*> { using type = remove_cv_t<T>; };
template <typename T>
using pointer_element_t = typename pointer_element<remove_cv_t<T>>::type;
}
""",
    "complex.h": """#pragma once
template <typename T> struct complex_t {
  T real, imag;
  complex_t() = default;
  complex_t(T r, T i = 0) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
""",
}


def special_functions(folder: Path) -> str:
    """c10/metal/special_math.h against torch on the CPU."""
    source = folder / "special.metal"
    names = ("erf", "log_gamma", "digamma", "i0")
    kernels = "".join(
        f"kernel void {name}_f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) "
        f"{{ y[i] = c10::metal::{name}(y[i]); }}\n"
        for name in names
    )
    source.write_text(f"#include <c10/metal/special_math.h>\nusing namespace metal;\n{kernels}")
    shaders = Shaders(source, include=[TORCH])
    x = torch.linspace(0.1, 4.0, 64)
    own = {"erf": torch.erf, "log_gamma": torch.lgamma, "digamma": torch.digamma, "i0": torch.i0}
    for name in names:
        y = x.numpy().copy()
        shaders.run(f"{name}_f", [y], [64], [64])
        np.testing.assert_allclose(y, own[name](x.double()).numpy(), rtol=2e-5, atol=2e-6)
    return f"{len(names)} functions"


def reductions(folder: Path) -> str:
    """c10/metal/reduction_utils.h: sums and maxima of a threadgroup."""
    source = folder / "reduce.metal"
    source.write_text(
        textwrap.dedent("""
        #include <c10/metal/reduction_utils.h>
        using namespace metal;
        kernel void sums(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                         uint t [[thread_index_in_threadgroup]],
                         uint n [[threads_per_threadgroup]]) {
          threadgroup float shared[32];
          float sum = c10::metal::threadgroup_sum(shared, x[t], t, n);
          if (t == 0) y[0] = sum;
        }
        kernel void maxima(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                           uint t [[thread_index_in_threadgroup]],
                           uint n [[threads_per_threadgroup]]) {
          threadgroup float shared[32];
          float most = c10::metal::threadgroup_max(shared, x[t], t, n);
          if (t == 0) y[0] = most;
        }
        """)
    )
    shaders = Shaders(source, include=[TORCH])
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    for threads in (32, 64, 256, 1024):
        y = np.zeros(1, np.float32)
        shaders.run("sums", [x, y], [threads], [threads])
        np.testing.assert_allclose(y[0], x[:threads].astype(np.float64).sum(), rtol=1e-4, atol=1e-4)
        shaders.run("maxima", [x, y], [threads], [threads])
        assert y[0] == x[:threads].max()
    return "sums and maxima of 32 to 1024 threads"


def mlx(folder: Path) -> Path:
    """A copy of MLX's kernels without what is made of private built-ins of Apple's compiler."""
    copy = folder / "mlx-copy"
    if not copy.exists():
        kernels = fetched(folder, MLX) / "mlx" / NORM
        shutil.copytree(kernels, copy / "mlx" / NORM)
        for name, text in _MLX_STUBS.items():
            (copy / "mlx" / NORM / name).write_text(text)
    return copy


def mlx_rms_norm(folder: Path) -> str:
    """MLX's rms_norm in float32."""
    root = mlx(folder)
    shaders = Shaders(root / "mlx" / NORM / "rms_norm.metal", include=[root], language="4.0")
    random = np.random.default_rng(0)
    rows, width = 3, 512
    x = random.standard_normal((rows, width)).astype(np.float32)
    weight = random.standard_normal(width).astype(np.float32)
    y, eps = np.zeros_like(x), np.float32([1e-5])
    name = next(n for n in shaders.names() if n.startswith("rms") and n.endswith("float32"))
    arguments = [x, weight, y, eps, np.uint32([width]), np.uint32([1])]
    shaders.run(name, arguments, [rows * 128], [128])
    wide = x.astype(np.float64)
    scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, wide * scale * weight, rtol=1e-5, atol=1e-5)
    return name


# M, N, K, leading dimensions, tiles; batch strides; swizzle, whole steps of K, batch dimensions.
_GEMM_PARAMETERS = struct.Struct("8i3q3i4x")


def mlx_gemm(folder: Path) -> str:
    """MLX's steel GEMM, x times a transposed weight of ragged sizes."""
    root = mlx(folder)
    source = folder / "gemm.metal"
    instance = "gemm<float, 32, 32, 16, 2, 2, false, true>"
    source.write_text(
        "".join(
            f'#include "mlx/{NORM}/{name}"\n'
            for name in ("utils.h", "steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h")
        )
        + f'template [[host_name("f32")]] [[kernel]] decltype({instance}) {instance};\n'
    )
    shaders = Shaders(source, include=[root], language="4.0")
    random = np.random.default_rng(0)
    m, n, k = 37, 45, 50
    x, weight = (random.standard_normal(s).astype(np.float32) for s in ((m, k), (n, k)))
    y = np.zeros((m, n), np.float32)
    tiles = (n + 31) // 32, (m + 31) // 32
    parameters = _GEMM_PARAMETERS.pack(m, n, k, k, k, n, *tiles, 0, 0, 0, 0, k // 16, 0)
    unused = np.zeros(64, np.uint8)
    arguments = [x, weight, y, y, np.frombuffer(parameters, np.uint8), unused, unused, unused]
    shaders.run("f32", arguments, [tiles[0] * 32, tiles[1] * 2, 2], [32, 2, 2])
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-5)
    return f"{m}x{k} by {k}x{n}"


def pytorch_rms_norm(folder: Path) -> str:
    """PyTorch's RMSNorm."""
    root = fetched(folder, PYTORCH)
    path = root / "aten/src/ATen/native/mps/kernels/RMSNorm.metal"
    return f"{len(Shaders(path, include=[root, TORCH]).names())} kernels compile"


def fetched(folder: Path, address: str) -> Path:
    """The unpacked archive, or the checkout of that name in $FUSEDOPS_FOREIGN."""
    name = address.split("/")[4]
    if (checkouts := os.environ.get("FUSEDOPS_FOREIGN")) is not None:
        if not (Path(checkouts) / name).is_dir():
            raise FileNotFoundError(f"no {name} in {checkouts}")
        return Path(checkouts) / name
    target = folder / name
    if not target.exists():
        archive = folder / "archive.tar.gz"
        with urllib.request.urlopen(address, timeout=60) as answer:
            archive.write_bytes(answer.read())
        with tarfile.open(archive) as files:
            files.extractall(target, filter="data")
    return next(target.iterdir())


def main() -> int:
    failed = False
    checks: list[Callable[[Path], str]] = [
        special_functions,
        reductions,
        mlx_rms_norm,
        mlx_gemm,
        pytorch_rms_norm,
    ]
    with tempfile.TemporaryDirectory() as folder:
        for check in checks:
            try:
                outcome = check(Path(folder))
            except OSError as error:
                outcome = f"not to be had: {error}"
            except (AssertionError, CompilationError, EmulatorError) as error:
                outcome, failed = f"FAILED: {error}", True
            print(f"{check.__doc__} {outcome}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
