"""Build of the two binaries: libfusedops.so (kernels and torch ops) and _C (pybind11 module).

Kernels are compiled once per ISA row of csrc/isa.inc; ninja runs the compiler.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
METAL = ROOT / "metal"
MINIMUM_TORCH = (2, 10)
# The stable ABI of torch 2.10: what libfusedops.so may use, whatever torch it is built against.
TORCH_TARGET = "0x020a000000000000"

COMMON = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
]
# gcc 12's own AVX-512 headers trip -Wuninitialized; clang does not know all of these names.
# Warnings are errors in this repository's own builds (the Makefile says so), not in a user's.
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
    *(["-Werror"] if os.environ.get("FUSEDOPS_WERROR") == "1" else []),
]
KERNEL = ["-fno-exceptions", "-fno-rtti"]


def stop(message: str) -> None:
    """End the build with one line a user can act on."""
    raise SystemExit(f"fusedops: {message}")


def torch_paths() -> tuple[Path, Path]:
    """Include and library folders of the installed torch."""
    try:
        import torch
    except ImportError:
        stop(
            "building needs torch >= 2.10: pip install torch, then build with --no-build-isolation"
        )
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        stop(f"building needs torch >= 2.10, found {torch.__version__}")
    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def compiler() -> str:
    """The C++ compiler, as CXX or the system names it."""
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name.split()[0]) or (None if "CXX" in os.environ else shutil.which("g++"))
    if path is None:
        stop(f"building needs a C++20 compiler (g++ 11 or clang 14), '{name}' was not found")
    return " ".join([path, *name.split()[1:]])


def isa_rows() -> list[tuple[str, str, list[str]]]:
    """(name, simd header, compiler flags) of the rows of csrc/isa.inc that fit this machine."""
    arch = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}.get(
        platform.machine(), "any"
    )
    rows = re.findall(
        r'^ISA\((\w+), (\w+), (\w+), "([^"]*)"\)', (CSRC / "isa.inc").read_text(), re.M
    )
    return [
        (name, header, [f"-m{feature}" for feature in features.split()])
        for name, row_arch, header, features in rows
        if row_arch in (arch, "any")
    ]


def shader_source(folder: Path = METAL) -> str:
    """All shaders as one source: what the library hands to Metal's compiler."""
    seen: set[Path] = set()
    system: list[str] = []

    def merged(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        lines = []
        for line in path.read_text("ascii").splitlines(keepends=True):
            own = re.match(r'#include "([^"]+)"', line)
            if own:
                lines.append(merged(path.parent / own[1]))
            elif line.startswith("#include <"):
                system.append(line)
            elif not line.startswith("#pragma once"):
                lines.append(line)
        return "".join(lines)

    body = "".join(merged(path) for path in sorted(folder.glob("*.metal")))
    return "".join(dict.fromkeys(system)) + body


def shader_header(source: str) -> str:
    """The source as a C++ string, in pieces: compilers take no literal of any length."""
    piece = 12_000
    pieces = [source[i : i + piece] for i in range(0, len(source), piece)]
    literal = "\n".join(f'R"metal({part})metal"' for part in pieces)
    name = "namespace fusedops::mps"
    return f"#pragma once\n{name} {{\nconstexpr char kShaders[] =\n{literal};\n}}  // {name}\n"


def embed_shaders() -> Path:
    """Write shaders.h, which has the source as a string; the folder it is in."""
    header, text = ROOT / "build/metal/shaders.h", shader_header(shader_source())
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text("ascii") != text:
        header.write_text(text, "ascii")
    return header.parent


class Ninja:
    """A build.ninja being written: one rule per kind of command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out",
            "rule link\n  command = $cxx -shared $in -o $out $flags\n  description = link $out",
        ]

    def compile(self, source: Path, tag: str, flags: list[str]) -> str:
        """Add one object; `tag` tells builds of one source apart."""
        out = f"{tag}/{source.relative_to(CSRC).with_suffix('.o')}"
        self.lines.append(f"build {out}: cxx {_path(source)}\n  flags = {' '.join(flags)}")
        return out

    def link(self, out: Path, objects: list[str], flags: list[str], after: str = "") -> None:
        """Add one shared library."""
        wait = f" | {after}" if after else ""
        self.lines.append(
            f"build {_path(out)}: link {' '.join(objects)}{wait}\n  flags = {' '.join(flags)}"
        )

    def run(self) -> None:
        """Write build.ninja and bring everything up to date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = f"cxx = {compiler()}\n" + "\n".join(self.lines) + "\n"
        path = self.folder / "build.ninja"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        try:
            import ninja
        except ImportError:
            stop("building needs ninja: pip install ninja")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(self.folder)]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.call(command) != 0:
            stop("the compiler failed; its message stands above")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def mps_objects(build: Ninja, torch_flags: list[str]) -> list[str]:
    """Compile the host side of the Metal kernels: plain C++ on every system."""
    flags = [*COMMON, *WARNINGS, *torch_flags, f"-I{_path(embed_shaders())}"]
    return [build.compile(source, "core", flags) for source in sorted((CSRC / "mps").glob("*.cpp"))]


def link_emulated(build: Ninja, objects: list[str], lib: Path) -> None:
    """Link what macOS has in libfusedops.dylib as a library for tests on Linux.

    The object files are those of macOS, compiled here, and the checks that they share with the CPU.
    Who loads it has loaded the emulator's aoti_torch_mps_* before (tests/metal); no package has it.
    """
    shared = [f"core/ops/{name}.o" for name in ("tensor", "rope_call", "linear_call")]
    flags = ["-Wl,--as-needed", f"-L{_path(lib)}", "-ltorch_cpu"]
    build.link(ROOT / "build/metal/libfusedops_mps.so", [*objects, *shared], flags)


class BuildBinaries(build_ext):
    """Build libfusedops.so beside _C, both in the package."""

    def run(self) -> None:
        """Compile and link through ninja, in place for an editable install."""
        include, lib = torch_paths()
        try:
            import pybind11
        except ImportError:
            stop("building needs pybind11: pip install pybind11")

        package = ROOT / "fusedops" if self.inplace else Path(self.build_lib).resolve() / "fusedops"
        package.mkdir(parents=True, exist_ok=True)
        build = Ninja(
            ROOT / "build/ninja"
        )  # one folder for editable installs and wheels: nothing twice
        mac = sys.platform == "darwin"

        torch_flags = [
            f"-isystem {_path(include)}",
            f"-isystem {_path(include / 'torch/csrc/api/include')}",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL",
        ]
        objects = [
            build.compile(
                source,
                f"isa_{name}",
                COMMON
                + WARNINGS
                + KERNEL
                + flags
                + [
                    f"-DFUSEDOPS_ISA={name}",
                    f"'-DFUSEDOPS_SIMD_HEADER=\"{header}.h\"'",
                ],
            )
            for name, header, flags in isa_rows()
            for source in sorted((CSRC / "kernels").glob("*.cpp"))
        ]
        objects += [
            build.compile(source, "core", COMMON + WARNINGS + torch_flags)
            for source in sorted(CSRC.glob("*.cpp")) + sorted((CSRC / "ops").glob("*.cpp"))
        ]
        if mac:
            objects += mps_objects(build, torch_flags)
        elif os.environ.get("FUSEDOPS_EMULATED_MPS") == "1":
            link_emulated(build, mps_objects(build, torch_flags), lib)
        library = package / ("libfusedops.dylib" if mac else "libfusedops.so")
        name_flag = (
            "-Wl,-install_name,@rpath/libfusedops.dylib" if mac else "-Wl,-soname,libfusedops.so"
        )
        strict = [] if mac else ["-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,--gc-sections"]
        build.link(library, objects, [name_flag, *strict, f"-L{_path(lib)}", "-ltorch_cpu", "-lm"])

        python = [
            f"-isystem {_path(Path(sysconfig.get_paths()['include']))}",
            f"-isystem {_path(Path(pybind11.get_include()))}",
        ]
        module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        origin = "@loader_path" if mac else "'$$ORIGIN'"
        build.link(
            module,
            [
                build.compile(source, "python", COMMON + WARNINGS + python)
                for source in sorted((CSRC / "python").glob("*.cpp"))
            ],
            [f"-L{_path(package)}", "-lfusedops", f"-Wl,-rpath,{origin}"]
            + (["-undefined dynamic_lookup"] if mac else ["-Wl,--allow-shlib-undefined"]),
            after=_path(library),
        )
        build.run()


if __name__ == "__main__":
    setup(ext_modules=[Extension("fusedops._C", [])], cmdclass={"build_ext": BuildBinaries})
