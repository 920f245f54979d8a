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

# Building for another machine: `linux-aarch64` or `macosx-14.0-arm64` in FUSEDOPS_TARGET, with CXX
# a compiler for it, the folder of its torch in FUSEDOPS_TARGET_TORCH and its Python headers, of the
# version that runs this, in FUSEDOPS_TARGET_PYTHON. scripts/wheel.sh does it.
TARGET = os.environ.get("FUSEDOPS_TARGET", "")
PLATFORM = TARGET or ("macosx" if sys.platform == "darwin" else sys.platform)
MACHINE = TARGET.rpartition("-")[2] or platform.machine()


def stop(message: str) -> None:
    """End the build with one line a user can act on."""
    raise SystemExit(f"fusedops: {message}")


def torch_paths() -> tuple[Path, Path]:
    """Include and library folders of this torch, or of the target's."""
    try:
        import torch
    except ImportError:
        stop(
            "building needs torch >= 2.10: pip install torch, then build with --no-build-isolation"
        )
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        stop(f"building needs torch >= 2.10, found {torch.__version__}")
    root = Path(os.environ.get("FUSEDOPS_TARGET_TORCH", Path(torch.__file__).parent))
    return root / "include", root / "lib"


def compiler() -> str:
    """The C++ compiler, as CXX or the system names it."""
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name.split()[0]) or (None if "CXX" in os.environ else shutil.which("g++"))
    if path is None:
        stop(f"building needs a C++20 compiler (g++ 11 or clang 14), '{name}' was not found")
    return " ".join([path, *name.split()[1:]])


def isa_rows() -> list[tuple[str, str, list[str]]]:
    """(name, simd header, compiler flags) of the rows of csrc/isa.inc that fit the machine."""
    return isa_rows_of(MACHINE)


def isa_rows_of(machine: str) -> list[tuple[str, str, list[str]]]:
    """The rows that fit a machine, by the name that `uname -m` has for it."""
    arch = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}.get(
        machine, "any"
    )
    rows = re.findall(
        r'^ISA\((\w+), (\w+), (\w+), "([^"]*)"\)', (CSRC / "isa.inc").read_text(), re.M
    )

    def flags(row_arch: str, features: str) -> list[str]:
        if row_arch == "arm64":
            return ["-march=" + "+".join(features.split())]
        return [f"-m{feature}" for feature in features.split()]

    return [
        (name, header, flags(row_arch, features))
        for name, row_arch, header, features in rows
        if row_arch in (arch, "any")
    ]


def extension_suffix() -> str:
    """What the file name of a module of this Python ends with, on the target."""
    if not TARGET:
        return str(sysconfig.get_config_var("EXT_SUFFIX"))
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    return (
        f".{tag}-darwin.so" if PLATFORM.startswith("macosx") else f".{tag}-{MACHINE}-linux-gnu.so"
    )


def python_include() -> Path:
    """The folder of Python.h, of this Python or of the target's."""
    if TARGET:
        return Path(os.environ["FUSEDOPS_TARGET_PYTHON"])
    return Path(sysconfig.get_paths()["include"])


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

    def __init__(self, name: str = "build") -> None:
        # One folder for editable installs, wheels and tests of a target: nothing twice.
        self.folder = ROOT / "build" / (f"ninja-{TARGET}" if TARGET else "ninja")
        self.file = f"{name}.ninja"
        self.lines = [
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out",
            "rule link\n  command = $cxx -shared $in -o $out $flags\n  description = link $out",
            "rule program\n  command = $cxx -static $in -o $out $flags\n  description = link $out",
        ]

    def compile(self, source: Path, tag: str, flags: list[str]) -> str:
        """Add one object; `tag` tells builds of one source apart."""
        place = source.relative_to(CSRC) if source.is_relative_to(CSRC) else Path(source.name)
        out = f"{tag}/{place.with_suffix('.o')}"
        self.lines.append(f"build {out}: cxx {_path(source)}\n  flags = {' '.join(flags)}")
        return out

    def link(self, out: Path, objects: list[str], flags: list[str], after: str = "") -> None:
        """Add one shared library."""
        wait = f" | {after}" if after else ""
        self.lines.append(
            f"build {_path(out)}: link {' '.join(objects)}{wait}\n  flags = {' '.join(flags)}"
        )

    def program(self, out: str, objects: list[str], flags: list[str]) -> Path:
        """Add one program that needs no library at run time."""
        self.lines.append(f"build {out}: program {' '.join(objects)}\n  flags = {' '.join(flags)}")
        return self.folder / out

    def run(self) -> None:
        """Write the file and bring everything up to date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = f"cxx = {compiler()}\n" + "\n".join(self.lines) + "\n"
        path = self.folder / self.file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        try:
            import ninja
        except ImportError:
            stop("building needs ninja: pip install ninja")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(self.folder), "-f", self.file]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.call(command) != 0:
            stop("the compiler failed; its message stands above")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def torch_flags(include: Path) -> list[str]:
    """What a source needs that includes torch's stable headers."""
    return [
        f"-isystem {_path(include)}",
        f"-isystem {_path(include / 'torch/csrc/api/include')}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL",
    ]


def library_objects(build: Ninja, include: Path) -> list[str]:
    """Compile what libfusedops is made of: the kernels once per ISA, everything else once."""
    kernels = [
        build.compile(source, f"isa_{name}", COMMON + WARNINGS + KERNEL + isa_flags)
        for name, header, flags in isa_rows()
        for isa_flags in [[*flags, *isa_defines(name, header)]]
        for source in sorted((CSRC / "kernels").glob("*.cpp"))
    ]
    return kernels + [
        build.compile(source, "core", COMMON + WARNINGS + torch_flags(include))
        for source in sorted(CSRC.glob("*.cpp")) + sorted((CSRC / "ops").glob("*.cpp"))
    ]


def isa_defines(name: str, header: str) -> list[str]:
    """What tells a source which ISA it is compiled for."""
    return [f"-DFUSEDOPS_ISA={name}", f"'-DFUSEDOPS_SIMD_HEADER=\"{header}.h\"'"]


def mps_objects(build: Ninja, include: Path) -> list[str]:
    """Compile the host side of the Metal kernels: plain C++ on every system."""
    flags = [*COMMON, *WARNINGS, *torch_flags(include), f"-I{_path(embed_shaders())}"]
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
        build = Ninja()
        mac = PLATFORM.startswith("macosx")

        objects = library_objects(build, include)
        if mac:
            objects += mps_objects(build, include)
        elif os.environ.get("FUSEDOPS_EMULATED_MPS") == "1":
            link_emulated(build, mps_objects(build, include), lib)
        library = package / ("libfusedops.dylib" if mac else "libfusedops.so")
        name_flag = "-Wl,-install_name,@rpath/" if mac else "-Wl,-soname,"
        strict = (
            ["-Wl,-rpath,@loader_path/../torch/lib"]
            if mac
            else ["-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,--gc-sections"]
        )
        build.link(
            library,
            objects,
            [f"{name_flag}{library.name}", *strict, f"-L{_path(lib)}", "-ltorch_cpu", "-lm"],
        )

        python = [
            f"-isystem {_path(python_include())}",
            f"-isystem {_path(Path(pybind11.get_include()))}",
            f"-isystem {_path(include)}",  # for DLPack's header, plain C
        ]
        if TARGET:  # Debian's Python.h includes a header of its machine by a path from there
            python.append(f"-idirafter {_path(python_include().parent)}")
        module = package / f"_C{extension_suffix()}"
        origin = "@loader_path" if mac else "'$$ORIGIN'"
        build.link(
            module,
            [
                *(
                    build.compile(source, "python", COMMON + WARNINGS + python)
                    for source in sorted((CSRC / "python").glob("*.cpp"))
                ),
                *[name for name in objects if name == "core/floor.o"],
            ],
            [f"-L{_path(package)}", "-lfusedops", f"-Wl,-rpath,{origin}"]
            + (
                [f"{name_flag}{module.name}", "-undefined dynamic_lookup"]
                if mac
                else ["-Wl,--allow-shlib-undefined"]
            ),
            after=_path(library),
        )
        build.run()


if __name__ == "__main__":
    options = {}
    if TARGET:  # its files are never packed with another's
        options["build"] = {"build_base": f"build/wheel-{TARGET}"}
        options["bdist_wheel"] = {"plat_name": TARGET.replace("-", "_").replace(".", "_")}
    setup(
        ext_modules=[Extension("fusedops._C", [])],
        cmdclass={"build_ext": BuildBinaries},
        options=options,
    )
