"""Build tests/kernels_test.cpp, one program without torch, and print its path.

For this machine, or for the one that FUSEDOPS_TARGET names, with the compiler in CXX.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402


def main() -> None:
    include, _ = build.torch_paths()
    ninja = build.Ninja("kernels_test")
    # floor.cpp replaces parts of the C++ library, which are in the program already.
    objects = [o for o in build.library_objects(ninja, include) if o != "core/floor.o"]
    flags = [*(f for f in build.COMMON if f != "-O3"), *build.WARNINGS, f"-I{build.CSRC}"]
    tests = ROOT / "tests"
    for name, header, isa in build.isa_rows():
        isa_flags = [*flags, "-O1", *isa, *build.isa_defines(name, header)]
        objects.append(ninja.compile(tests / "simd_test.cpp", f"isa_{name}", isa_flags))
    objects.append(ninja.compile(tests / "kernels_test.cpp", "core", [*flags, "-O2"]))
    # What the ops ask of libtorch is never called here.
    program = ninja.program("kernels_test", objects, ["-Wl,--unresolved-symbols=ignore-all"])
    ninja.run()
    sys.stdout.write(f"{program}\n")


if __name__ == "__main__":
    main()
