"""The audits of the wheels find what they claim to find: planted violations in small real binaries.

The binaries are linked by zig for macOS and for Linux; nothing needs torch, a Mac or a network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import linux_wheel  # noqa: E402
import macho  # noqa: E402
import macos_wheel  # noqa: E402


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


pytestmark = pytest.mark.source
zig = pytest.mark.skipif(missing("ziglang"), reason="needs ziglang: requirements/wheels.txt")


def compile_c(out: Path, source: str, *flags: str | Path) -> Path:
    """Link a shared library for macOS from C source."""
    file = out.with_suffix(".c")
    visible = '#define VISIBLE __attribute__((visibility("default")))\n'
    file.write_text(visible + source)
    cache = str(ROOT / "build/zig")
    defaults = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        "aarch64-macos.14.0",
        "-O2",
        "-shared",
    ]
    subprocess.run(
        [*command, "-fvisibility=hidden", "-o", out, file, *flags],
        check=True,
        env={**defaults, **os.environ},
    )
    return out


def uses(*symbols: str) -> str:
    """C that takes the address of each symbol, a name as the linker has it."""
    lines = [f'extern char s{i}[] __asm__("{symbol}");' for i, symbol in enumerate(symbols)]
    terms = ", ".join(f"s{i}" for i in range(len(symbols)))
    return "\n".join([*lines, f"VISIBLE const void* const used_here[] = {{{terms}}};\n"])


# --- macOS ----------------------------------------------------------------------------------------

LAUNCH = ["_aoti_torch_mps_run_command_block", "_aoti_torch_mps_set_arg_tensor"]
RECORDS = {
    torch: {
        "macos": macos,
        "exports": ["_torch_parallel_for", *LAUNCH, *more],
        "imports": {
            "/usr/lib/libc++.1.dylib": ["___cxa_throw", *libcxx],
            "/usr/lib/libSystem.B.dylib": ["_strlen"],
        },
        "python": ["_PyModule_Create2"],
    }
    for torch, macos, more, libcxx in [
        ("2.10.0", "11.0", [], []),
        ("2.13.0", "14.0", ["_torch_from_2_13"], []),
        # What a torch of a newer macOS imports proves nothing for macOS 14.
        ("2.99.0", "26.0", ["_torch_from_2_13"], ["__ZNSt3__113__hash_memoryEPKvm"]),
    ]
}
STUBS = {
    "@rpath/libtorch_cpu.dylib": [
        *RECORDS["2.13.0"]["exports"],
        "__ZN2at5emptyEv",
        "__ZN5torch3NopEv",
    ],
    "@rpath/libc10.dylib": ["__ZN3c1011SymIntArrayEv"],
    "@rpath/libfusedops.dylib": ["_used_here"],
    "/usr/lib/libc++.1.dylib": ["___cxa_throw", "__ZNSt3__113__hash_memoryEPKvm"],
    "/usr/lib/libSystem.B.dylib": ["_strlen", "_os_sync_wake_by_address_any"],
}
LIBRARY_USES = ["_torch_parallel_for", *LAUNCH, "___cxa_throw", "_strlen"]
EXTENSION_USES = ["_PyModule_Create2", "_PyLong_AsLong", "_used_here", "___cxa_throw", "_strlen"]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


class Plan(NamedTuple):
    """How a library is made; what differs from the sound one is planted."""

    uses: tuple[str, ...] = ()  # more symbols
    source: str = ""
    name: str = "@rpath/libfusedops.dylib"
    rpath: str = "@loader_path/../torch/lib"
    loads: tuple[str, ...] = ()  # more libraries
    flags: tuple[str, ...] = ()
    edit: Callable[[bytearray], None] = lambda data: None
    sign: bool = True  # again, after the edit


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    for name, symbols in STUBS.items():
        (folder / f"{Path(name).stem}.tbd").write_text(macos_wheel.stub(name, symbols))
    return folder


def library(folder: Path, stubs: Path, plan: Plan) -> Path:
    names = ["libtorch_cpu", "libc++.1", "libSystem.B", *plan.loads]
    out = compile_c(
        folder / "libfusedops.dylib",
        plan.source + uses(*LIBRARY_USES, *plan.uses),
        *(stubs / f"{name}.tbd" for name in names),
        f"-Wl,-install_name,{plan.name}",
        f"-Wl,-rpath,{plan.rpath}",
        *plan.flags,
    )
    data = bytearray(out.read_bytes())
    plan.edit(data)
    if plan.sign and data != out.read_bytes():
        sign_again(data)
    out.write_bytes(data)
    return out


def extension(folder: Path, stubs: Path, *more: str, also: tuple[str, ...] = ()) -> Path:
    name = macos_wheel.EXTENSION.format(TAG[2:])
    return compile_c(
        folder / name,
        uses(*EXTENSION_USES, *more),
        *(stubs / f"{stub}.tbd" for stub in ("libfusedops", "libc++.1", "libSystem.B", *also)),
        f"-Wl,-install_name,@rpath/{name}",
        "-Wl,-rpath,@loader_path",
        "-undefined",
        "dynamic_lookup",
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, stubs: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sound")
    return {
        f"fusedops/{path.name}": path
        for path in (library(folder, stubs, Plan()), extension(folder, stubs))
    }


def faults(folder: Path, files: dict[str, Path], tag: str = "macosx_14_0_arm64") -> list[str]:
    """What the audit says of a wheel of these files, without the names of the files."""
    wheel = folder / f"fusedops-0.1.0-{TAG}-{TAG}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, path in files.items():
            archive.write(path, name)
    return [line.partition(": ")[2] for line in macos_wheel.audit(wheel, RECORDS)[1]]


def directory(data: bytearray) -> int:
    """Where the hashes of the signature are described."""
    return data.index(struct.pack(">I", macho.DIRECTORY))


def sign_again(data: bytearray) -> None:
    """Make the hashes those of the edited file."""
    at = directory(data)
    hashes, _, _, slots, limit = struct.unpack_from(">5I", data, at + 16)
    page = data[at + 39]
    for slot in range(slots):
        block = data[slot << page : min(limit, slot + 1 << page)]
        start = at + hashes + 32 * slot
        data[start : start + 32] = hashlib.sha256(block).digest()


def replaced(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    """An edit of the first place where `old` stands."""

    def edit(data: bytearray) -> None:
        at = data.index(old)
        data[at : at + len(old)] = new

    return edit


def with_flag(flag: int, on: bool) -> Callable[[bytearray], None]:
    """An edit of the flags in the header."""

    def edit(data: bytearray) -> None:
        flags = struct.unpack_from("<I", data, 24)[0]
        struct.pack_into("<I", data, 24, flags | flag if on else flags & ~flag)

    return edit


def for_system(platform_of: int, major: int) -> Callable[[bytearray], None]:
    """An edit of the system that the file asks for."""
    here, there = ((macho.MACOS, 14 << 16), (platform_of, major << 16))
    return replaced(struct.pack("<2I", *here), struct.pack("<2I", *there))


def signed_by_someone(data: bytearray) -> None:
    struct.pack_into(">I", data, directory(data) + 12, 0)


@zig
@pytest.mark.slow
def test_a_sound_wheel_for_macos_has_no_fault(tmp_path: Path, sound: dict[str, Path]) -> None:
    assert faults(tmp_path, sound) == []
    wheel = next(tmp_path.glob("*.whl"))
    listing = "\n".join(macos_wheel.audit(wheel, RECORDS)[0])
    assert "@rpath/libtorch_cpu.dylib: 3 symbols" in listing
    assert "whoever has it: 2 symbols" in listing


LIBRARY_FAULTS = {
    "imports __ZN2at5emptyEv, which is not of the stable ABI": Plan(uses=("__ZN2at5emptyEv",)),
    "imports _torch_from_2_13, which torch 2.10.0 lacks": Plan(uses=("_torch_from_2_13",)),
    "loads @rpath/libc10.dylib": Plan(uses=("__ZN3c1011SymIntArrayEv",), loads=("libc10",)),
    "imports __ZNSt3__113__hash_memoryEPKvm, which no torch proves to be in macOS 14.0": Plan(
        uses=("__ZNSt3__113__hash_memoryEPKvm",)
    ),
    "imports _os_sync_wake_by_address_any, which no torch proves to be in macOS 14.0": Plan(
        uses=("_os_sync_wake_by_address_any",)
    ),
    "takes _from_anywhere from anywhere": Plan(
        uses=("_from_anywhere",), flags=("-undefined", "dynamic_lookup")
    ),
    "is for platform 1, version 15.0": Plan(edit=for_system(1, 15)),
    "is for platform 1, version 13.0": Plan(edit=for_system(1, 13)),
    "is for platform 2, version 14.0": Plan(edit=for_system(2, 14)),
    "libfusedops.dylib is not a Mach-O file for arm64": Plan(
        edit=replaced(struct.pack("<I", macho.ARM64), struct.pack("<I", 0x01000007))
    ),
    "is called '/tmp/libfusedops.dylib' and not '@rpath/libfusedops.dylib'": Plan(
        name="/tmp/libfusedops.dylib"
    ),
    "looks for libraries in ['/opt/torch'] and not in ['@loader_path/../torch/lib']": Plan(
        rpath="/opt/torch"
    ),
    "has a ___cxa_begin_catch of its own": Plan(source="VISIBLE void __cxa_begin_catch(void) {}\n"),
    "exports __ZN8fusedops4neon5tableE": Plan(
        source='VISIBLE int table __asm__("__ZN8fusedops4neon5tableE") = 1;\n'
    ),
    "leaves it to chance whose __ZN8fusedops4onceE is taken": Plan(
        source='VISIBLE __attribute__((weak)) int once __asm__("__ZN8fusedops4onceE") = 1;\n'
        "VISIBLE int* where = &once;\n"
    ),
    "does not say of which library its symbols are": Plan(edit=with_flag(1 << 7, False)),
    "binds other symbols than it imports: ['_strlem', '_strlen']": Plan(
        edit=replaced(b"_strlen\0", b"_strlem\0")
    ),
    "has no signature": Plan(
        edit=replaced(struct.pack("<2I", 0x1D, 16), struct.pack("<2I", 0x7F, 16)), sign=False
    ),
    "was changed after it was signed": Plan(edit=with_flag(1 << 25, True), sign=False),
    "has a signature that is not ad hoc": Plan(edit=signed_by_someone),
}


@zig
@pytest.mark.slow
@pytest.mark.parametrize("fault", LIBRARY_FAULTS)
def test_a_planted_fault_of_the_library_is_found(
    fault: str, tmp_path: Path, stubs: Path, sound: dict[str, Path]
) -> None:
    made = library(tmp_path, stubs, LIBRARY_FAULTS[fault])
    assert faults(tmp_path, {**sound, "fusedops/libfusedops.dylib": made}) == [fault]


@zig
@pytest.mark.slow
@pytest.mark.parametrize(
    ("symbol", "also", "fault"),
    [
        ("_fusedops_missing", (), "takes _fusedops_missing from anywhere"),
        ("_PyNo_Such", (), "takes _PyNo_Such from Python, which may lack it"),
        ("_torch_parallel_for", ("libtorch_cpu",), "loads @rpath/libtorch_cpu.dylib"),
    ],
)
def test_a_planted_fault_of_the_extension_is_found(
    symbol: str,
    also: tuple[str, ...],
    fault: str,
    tmp_path: Path,
    stubs: Path,
    sound: dict[str, Path],
) -> None:
    made = extension(tmp_path, stubs, symbol, also=also)
    assert faults(tmp_path, {**sound, f"fusedops/{made.name}": made}) == [fault]


@zig
@pytest.mark.slow
def test_a_wheel_for_macos_has_two_binaries(tmp_path: Path, sound: dict[str, Path]) -> None:
    (first, path), (second, _) = sound.items()
    assert faults(tmp_path, {first: path}) == ["is missing"]
    assert faults(tmp_path, {**sound, "fusedops/old.so": path}) == ["does not belong here"]
    swapped = faults(tmp_path, {**sound, second: path})
    assert f"does not load {macos_wheel.OWN}" in swapped
    assert faults(tmp_path, sound, tag="macosx_13_0_arm64") == ["is for macosx_13_0_arm64"]


# --- Linux ----------------------------------------------------------------------------------------


def elf(out: Path, source: str, *flags: str | Path) -> Path:
    """Link a shared library for this machine that knows of no other."""
    out.with_suffix(".c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{out.name}", "-o", out]
    subprocess.run([*command, out.with_suffix(".c"), *flags], check=True)
    return out


def linux_report(folder: Path, glibc: str, loads: str) -> dict[str, Any]:
    """What auditwheel says of a library that takes a function of libc and one of `loads`."""
    version = folder / "version"
    version.write_text(f"GLIBC_{glibc} {{ global: *; }};\n")
    libc = elf(folder / "libc.so.6", "void of_libc(void) {}\n", f"-Wl,--version-script={version}")
    other = elf(folder / loads, "void of_other(void) {}\n")
    source = "void of_libc(void), of_other(void);\nvoid f(void) { of_libc(), of_other(); }\n"
    made = elf(folder / "libfusedops.so", source, libc, other)
    wheel = folder / f"fusedops-0.1.0-py3-none-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(made, f"fusedops/{made.name}")
        archive.writestr("fusedops-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("fusedops-0.1.0.dist-info/RECORD", f"fusedops/{made.name},,\n")
    return linux_wheel.show(wheel)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or missing("auditwheel"), reason="needs Linux and auditwheel"
)
@pytest.mark.parametrize(
    ("glibc", "loads", "fault"),
    [
        ("2.28", "libtorch_cpu.so", None),
        ("2.34", "libtorch_cpu.so", "needs manylinux_2_34_"),
        ("2.28", "libc10.so", "needs ['libc10.so'] and not ['libtorch_cpu.so'] alone"),
    ],
)
def test_the_floor_of_a_wheel_for_linux(
    glibc: str, loads: str, fault: str | None, tmp_path: Path
) -> None:
    found = linux_wheel.faults(linux_report(tmp_path, glibc, loads))
    assert len(found) == (fault is not None), found
    assert fault is None or found[0].startswith(fault)


# --- sdist ----------------------------------------------------------------------------------------

# Reads what it would compile, so that a file that is not there fails, and writes nothing of it.
READER = """#!{python}
import subprocess, sys
out = sys.argv[sys.argv.index("-o") + 1]
if "-c" in sys.argv:
    subprocess.run(["c++", "-E", *sys.argv[1:]], check=True)
open(out, "w").close()
"""


@pytest.mark.slow
def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    def run(folder: Path, *command: str | Path) -> None:
        no_network = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
        environment = {**os.environ, **no_network, "CXX": str(tmp_path / "reader")}
        environment.pop("FUSEDOPS_TARGET", None)
        subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True
        )

    reader = tmp_path / "reader"
    reader.write_text(READER.format(python=sys.executable))
    reader.chmod(0o755)
    run(ROOT, "setup.py", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.glob("fusedops-*/"))
    wheel = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, "."]
    run(unpacked, *wheel)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "fusedops"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    package = tracked or [str(p.relative_to(ROOT)) for p in ROOT.glob("fusedops/**/*.py")]
    assert sorted(set(package) - names) == []
    binaries = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert binaries == {"_C", "libfusedops"}
