"""The binaries: the symbols they import, the instructions they hold; and a build that cannot be.

Rows of instruction sets are read from setup.py, which reads csrc/isa.inc.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedops
from fusedops import _C, _library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fusedops.__file__).parent
LIBRARY = PACKAGE / _library._NAME
HAVE_SOURCES = (ROOT / "csrc").is_dir()

if HAVE_SOURCES:
    sys.path.insert(0, str(ROOT))
    import setup as build

elf = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("nm"), reason="needs ELF binaries and nm (binutils)"
)
x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump"),
    reason="needs x86-64 objects and objdump (binutils)",
)


def source(test: object) -> object:
    """Mark a test that reads the source tree."""
    mark = pytest.mark.skipif(not HAVE_SOURCES, reason="needs the sources: no csrc/ beside tests/")
    return pytest.mark.source(mark(test))


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined(path: Path) -> list[str]:
    """The symbols a shared library imports, with their versions."""
    return [line.split()[-1] for line in output("nm", "-D", "--undefined-only", path).splitlines()]


# --- what the shared libraries import -------------------------------------------------------------

# Resolved by the C and C++ runtimes, which say so by a version; or by the linker, if at all.
RUNTIME = re.compile(
    r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+$|_ITM_\w+$|__gmon_start__$|__cxa_finalize$"
)


@elf
def test_library_imports_the_stable_abi_alone() -> None:
    rest = [name for name in undefined(LIBRARY) if not RUNTIME.match(name)]
    assert [name for name in rest if not re.match(r"(aoti_torch|torch)_\w+$", name)] == []
    assert "aoti_torch_empty_strided" in rest
    assert "torch_parallel_for" in rest


# What manylinux_2_28 has: glibc 2.28 and the C++ library of GCC 8.
FLOOR = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@elf
@pytest.mark.parametrize("path", [LIBRARY, Path(_C.__file__)], ids=["library", "extension"])
def test_imports_are_no_newer_than_the_wheels_floor(path: Path) -> None:
    newer = []
    for name in undefined(path):
        match = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", name)
        if match and tuple(map(int, match[2].split("."))) > FLOOR[match[1]]:
            newer.append(name)
    assert newer == [], "csrc/floor.cpp can own them"


@elf
def test_extension_imports_python_and_fusedops_alone() -> None:
    rest = [name for name in undefined(Path(_C.__file__)) if not RUNTIME.match(name)]
    own = re.compile(r"_?Py\w+$|_ZNK?8fusedops\w+$")
    assert [name for name in rest if not own.match(name)] == []
    assert any(name.startswith("Py") for name in rest)


@elf
@pytest.mark.parametrize(
    ("path", "needed"),
    [(LIBRARY, r"libtorch_cpu\.so"), (Path(_C.__file__), r"libfusedops\.so")],
    ids=["library", "extension"],
)
def test_needed_libraries(path: Path, needed: str) -> None:
    dynamic = output("readelf", "-d", path)
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    system = r"(libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux.*)"
    assert [name for name in libraries if not re.fullmatch(rf"{needed}|{system}", name)] == []
    assert any(re.fullmatch(needed, name) for name in libraries)


@elf
def test_extension_finds_the_library_beside_it() -> None:
    assert "[$ORIGIN]" in output("readelf", "-d", _C.__file__)


@elf
def test_library_exports_no_kernel() -> None:
    exported = output("nm", "-D", "--defined-only", LIBRARY)
    assert "run_rope" in exported
    kernels = "|".join(f"{len(name)}{name}" for name in fusedops.isa.compiled())
    assert re.findall(rf"_ZN8fusedops({kernels})\w+", exported) == []


@elf
def test_no_stack_is_executable() -> None:
    flags = re.search(r"GNU_STACK( +0x\w+)+ +([RWE]+)", output("readelf", "-lW", LIBRARY))
    assert flags is not None
    assert flags[2] == "RW"


# --- the objects of each instruction set ----------------------------------------------------------


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@functools.cache
def objects(isa: str, scratch: Path) -> tuple[Path, ...]:
    """The kernel objects of the last build, or new ones where there was none."""
    built = tuple(sorted((ROOT / "build/ninja" / f"isa_{isa}" / "kernels").rglob("*.o")))
    return built or tuple(compile_kernels(isa, scratch / isa))


def compile_kernels(isa: str, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    header, flags = next((row[1], row[2]) for row in build.isa_rows() if row[0] == isa)
    defines = [f"-DFUSEDOPS_ISA={isa}", f'-DFUSEDOPS_SIMD_HEADER="{header}.h"']
    for path in sorted((ROOT / "csrc/kernels").glob("*.cpp")):
        made = folder / f"{path.stem}.o"
        all_flags = [*build.COMMON, *build.WARNINGS, *build.KERNEL, *flags, *defines]
        output(*build.compiler().split(), *all_flags, "-c", path, "-o", made)
        yield made


def symbols(isa: str, scratch: Path) -> list[tuple[str, str]]:
    """(type, name) of every symbol, types as nm's manual has them."""
    lines = output("nm", *objects(isa, scratch)).splitlines()
    return [(fields[-2], fields[-1]) for line in lines if len(fields := line.split()) >= 2]


each_isa = pytest.mark.parametrize("name", fusedops.isa.compiled())


# The linker keeps one copy of a weak symbol: an AVX-512 one may then run on a machine without.
@elf
@source
@each_isa
def test_kernels_leave_no_weak_symbol(name: str, scratch: Path) -> None:
    weak = [symbol for kind, symbol in symbols(name, scratch) if kind in "WwVvu"]
    assert weak == []


@elf
@source
@each_isa
def test_kernels_define_names_of_their_namespace_alone(name: str, scratch: Path) -> None:
    defined = [symbol for kind, symbol in symbols(name, scratch) if kind in "TDBRG"]
    assert f"_ZN8fusedops{len(name)}{name}5tableE" in defined
    assert [s for s in defined if f"8fusedops{len(name)}{name}" not in s] == []


@elf
@source
@each_isa
def test_kernels_call_no_runtime_but_c(name: str, scratch: Path) -> None:
    every = symbols(name, scratch)
    own = {symbol for kind, symbol in every if kind != "U"}
    called = {symbol for kind, symbol in every if kind == "U"} - own
    allowed = {"memcpy", "memmove", "memset", "erfc", "exp", "fma", "_GLOBAL_OFFSET_TABLE_"}
    assert called <= allowed


def instructions(paths: tuple[Path, ...]) -> str:
    return output("objdump", "-d", "--no-show-raw-insn", *paths)


VECTOR_CODE = re.compile(r"\t(v[a-z]\w+) .*%[xyz]mm\d")  # VEX or EVEX encoded
WIDE_CODE = re.compile(r"%zmm\d|%k[1-7]\b|%[xyz]mm(1[6-9]|2\d|3[01])\b")  # EVEX
BF16_DOT = re.compile(r"\tvdpbf16ps ")


@x86
@source
@pytest.mark.parametrize(
    ("name", "holds", "lacks"),
    [
        ("portable", None, VECTOR_CODE),
        ("avx2", VECTOR_CODE, WIDE_CODE),
        ("avx512", WIDE_CODE, BF16_DOT),
        ("avx512bf16", BF16_DOT, None),
    ],
)
def test_instructions_are_those_that_were_probed(
    name: str, holds: re.Pattern[str] | None, lacks: re.Pattern[str] | None, scratch: Path
) -> None:
    code = instructions(objects(name, scratch))
    assert "ret" in code
    assert holds is None or holds.search(code)
    assert lacks is None or not lacks.search(code)


# Everything of the library that is not a kernel runs on every machine.
@x86
@source
def test_the_rest_of_the_library_is_for_every_machine() -> None:
    kernels = re.compile(
        "|".join(rf"<_ZN?K?L?\w*8fusedops{len(n)}{n}" for n in fusedops.isa.compiled()[:-1])
    )
    functions = instructions((LIBRARY,)).split("\n\n")
    baseline = [text for text in functions if not kernels.match(text.partition(" ")[2])]
    assert len(baseline) > 100
    assert [text.splitlines()[0] for text in baseline if VECTOR_CODE.search(text)] == []


@source
@pytest.mark.parametrize(
    ("machine", "probe"),
    [("x86_64", r'\{"(\w+)", \d+, \d+, e'), ("aarch64", r'\{"([\w.-]+)", kHwcap')],
)
def test_every_probed_feature_is_known(machine: str, probe: str) -> None:
    probed = set(re.findall(probe, (ROOT / "csrc/isa.cpp").read_text()))
    flags = [flag for _, _, flags in build.isa_rows_of(machine) for flag in flags]
    words = {word for flag in flags for word in re.sub("^-m(arch=)?", "", flag).split("+")}
    assert words <= probed


# --- a build that cannot be -----------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that nothing is written beside the sources."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "fusedops").mkdir()
    return tmp_path


def failed_build(checkout: Path, **environment: str) -> str:
    """The last line of a build's error output, which must be all there is of it."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout / "fakes"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert list((checkout / "fusedops").iterdir()) == []
    lines = [line for line in done.stderr.splitlines() if line.startswith("fusedops: ")]
    assert lines == done.stderr.splitlines()[-1:]
    return lines[0]


def fake(checkout: Path, module: str, text: str) -> None:
    """A module that is found before the real one."""
    (checkout / "fakes").mkdir(exist_ok=True)
    (checkout / "fakes" / f"{module}.py").write_text(text)


@pytest.mark.slow
@source
def test_missing_compiler(checkout: Path) -> None:
    name = "no-such-compiler -m64"
    assert failed_build(checkout, CXX=name) == (
        f"fusedops: building needs a C++20 compiler (g++ 11 or clang 14), '{name}' was not found"
    )


@source
@pytest.mark.slow
def test_no_compiler_at_all(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert failed_build(checkout, PATH=str(checkout)) == (
        "fusedops: building needs a C++20 compiler (g++ 11 or clang 14), 'c++' was not found"
    )


@source
@pytest.mark.slow
def test_failing_compiler(checkout: Path) -> None:
    line = failed_build(checkout, CXX="false", MAX_JOBS="1")
    assert line == "fusedops: the compiler failed; its message stands above"


@source
@pytest.mark.parametrize("version", ["2.9.0", "2.9.1+cu128", "1.13.1", "2.4.0a0+git1234"])
def test_old_torch(version: str, checkout: Path) -> None:
    fake(checkout, "torch", f"__version__ = {version!r}")
    line = failed_build(checkout)
    assert line == f"fusedops: building needs torch >= 2.10, found {version}"


@source
@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("torch", "torch >= 2.10: pip install torch, then build with --no-build-isolation"),
        pytest.param("pybind11", "pybind11: pip install pybind11", marks=pytest.mark.slow),
        pytest.param("ninja", "ninja: pip install ninja", marks=pytest.mark.slow),
    ],
)
def test_missing_module(module: str, line: str, checkout: Path) -> None:
    fake(checkout, module, f"raise ImportError('No module named {module}')")
    assert failed_build(checkout) == f"fusedops: building needs {line}"
