"""A Metal source as a shared library that the emulator loads; a lint of its address spaces.

``python compiler.py FILE`` prints the library's path and is what the C shim calls.
``python compiler.py --lint FILE...`` checks sources as each language mode would.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from msl2cpp import TranslationError, translate
from toolchain import BUILD, HERE, MissingToolchainError, clang, run

EMULATOR = HERE / "emulator"
CACHE = BUILD / "cache"
# Metal 3.1 and 3.2, which are C++14, and 4.0: what libtorch asks for on macOS 14, 15 and 26.
LANGUAGES = {"3.1": ("c++14", 310), "3.2": ("c++14", 320), "4.0": ("c++17", 400)}
# How every access is seen: by the emulator's own functions, or by a sanitizer.
INSTRUMENTATION = {
    "watch": [
        "-fsanitize=kernel-address",
        *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
        *("-mllvm", "-asan-stack=0", "-mllvm", "-asan-globals=0", "-mllvm", "-asan-opt=0"),
        *("-mllvm", "-asan-instrument-atomics=0"),
        *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
        "-fsanitize=alignment,bounds,integer-divide-by-zero",
        "-fno-sanitize-recover=alignment,bounds,integer-divide-by-zero",
    ],
    "asan": ["-fsanitize=address"],
    "tsan": ["-fsanitize=thread"],
}
# Metal's own headers, empty: emulator/metal_shim.h stands for all of them.
_STUBS = tuple(
    f"metal_{name}"
    for name in (
        *("array", "atomic", "command_buffer", "common", "compute", "config"),
        *("cooperative_tensor", "extended_vector", "function_pointers", "geometric", "graphics"),
        *("integer", "interpolate", "limits", "logging", "math", "matrix", "mesh", "numeric"),
        *("pack", "packed_vector", "quadgroup", "raytracing", "relational", "simdgroup"),
        *("simdgroup_matrix", "stdlib", "tensor", "texture", "type_traits", "types", "uniform"),
        "visible_function_table",
    )
)


class CompilationError(Exception):
    """The source does not compile."""


def _stubs() -> Path:
    folder = BUILD / "stubs"
    folder.mkdir(parents=True, exist_ok=True)
    for name in _STUBS:
        (folder / name).touch()
    return folder


def preprocessed(path: Path, language: str, include: Iterable[Path], defines: Iterable[str]) -> str:
    """The source with its own includes and macros expanded."""
    command = [
        *(str(clang()), "-E", "-x", "c++", "-std=c++14", "-nostdinc", "-undef", "-Wno-everything"),
        *("-D__METAL__=1", f"-D__METAL_VERSION__={LANGUAGES[language][1]}", "-D__HAVE_BFLOAT__=1"),
        *(f"-I{folder}" for folder in (_stubs(), *include)),
        *(f"-D{define}" for define in defines),
        str(path),
    ]
    result = run(command)
    if result.returncode:
        raise CompilationError(result.stderr)
    return result.stdout


def _flags(language: str) -> list[str]:
    standard, _ = LANGUAGES[language]
    machine = ["-mf16c", "-mfma"] if platform.machine() == "x86_64" else []
    # Nothing is vectorised: an access is as wide as the source has it.
    return [
        *(f"-std={standard}", "-O2", "-g1", "-fPIC", f"-I{EMULATOR}", *machine),
        *("-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-fno-math-errno"),
        *("-fno-vectorize", "-fno-slp-vectorize", "-fvisibility=hidden", "-ferror-limit=40"),
        *("-Xclang", "-cl-single-precision-constant"),
        *("-Xclang", "-ffloat16-excess-precision=none"),
        "-Wno-everything",
        "-Werror=c++17-extensions" if standard == "c++14" else "-Wno-c++17-extensions",
    ]


def compiled(
    path: Path,
    *,
    instrumentation: str = "watch",
    language: str = "3.1",
    include: Iterable[Path] = (),
    defines: Iterable[str] = (),
) -> Path:
    """The shared library of a source, made once for each content and kept in build/metal."""
    source = preprocessed(path, language, include, defines)
    flags = [*_flags(language), *INSTRUMENTATION[instrumentation]]
    text = translate(re.sub(r'^(# \d+ )"[^"]*/', r'\1"', source, flags=re.M))
    key = hashlib.sha256("\0".join((text, *flags, str(clang()))).encode())
    for header in ("metal_shim.h", "runtime.h"):
        key.update((EMULATOR / header).read_bytes())
    library = CACHE / f"{path.stem}-{instrumentation}-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    code = library.with_suffix(".cpp")
    code.write_text(text)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made, machine_code = Path(folder) / library.name, Path(folder) / "code.o"
        # Linked without the instrumentation's flags: its runtime comes with the process.
        for command in (
            [*flags, "-c", str(code), "-o", str(machine_code)],
            ["-shared", str(machine_code), "-o", str(made)],
        ):
            result = run([str(clang()), *command])
            if result.returncode:
                raise CompilationError(result.stderr)
        os.replace(made, library)
    return library


def lint(path: Path, language: str, include: Iterable[Path] = ()) -> str:
    """What is wrong with address spaces and syntax in a language mode; empty if nothing is."""
    text = translate(preprocessed(path, language, include, ()), lint=True)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / f"{path.stem}.cpp"
        code.write_text(text)
        result = run([str(clang()), *_flags(language), "-DEMU_LINT", "-fsyntax-only", str(code)])
    return _true_errors(result.stderr)


def _true_errors(report: str) -> str:
    """Without those that C++ alone has: Metal's structs are copied from any address space."""
    groups = re.split(r"^(?=\S+: error: )", report, flags=re.M)
    reasons = r"note: candidate (.*)"
    return "".join(
        group
        for group in groups
        if ": error: " in group
        and not (
            "no matching constructor for initialization" in group
            and all("address space" in r or "requires" in r for r in re.findall(reasons, group))
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("-I", dest="include", action="append", type=Path, default=[])
    parser.add_argument("--lint", action="store_true")
    parser.add_argument("--instrumentation", choices=INSTRUMENTATION, default="watch")
    arguments = parser.parse_args()
    failed = False
    try:
        for source in arguments.sources:
            if not arguments.lint:
                print(
                    compiled(
                        source,
                        instrumentation=arguments.instrumentation,
                        include=arguments.include,
                    )
                )
                continue
            for language in LANGUAGES:
                found = lint(source, language, arguments.include)
                failed |= bool(found)
                print(found or f"{source}: Metal {language}: ok")
    except (CompilationError, TranslationError, MissingToolchainError) as error:
        print(error)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
