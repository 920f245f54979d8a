"""The code in docs/adding-an-op.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedops

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "csrc").is_dir():
    pytest.skip("needs the sources: csrc/ is not beside tests/", allow_module_level=True)
pytestmark = pytest.mark.source

sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402


def test_the_gated_pair_of_adding_an_op_compiles(tmp_path: Path) -> None:
    text = (ROOT / "docs/adding-an-op.md").read_text()
    (snippet,) = re.findall(r"^```cpp\n(with_activation.*?)^```", text, re.MULTILINE | re.DOTALL)
    source = tmp_path / "gated.cpp"
    source.write_text(
        '#include "kernels/gemm/epilogue.h"\n'
        "namespace fusedops::FUSEDOPS_ISA {\n"
        "template <class T>\n"
        "void gated(const LinearArgs& args, const compute_t<T>* sums, T* y, int64_t columns) {\n"
        f"using V = Vec<compute_t<T>>;\n{snippet}}}\n"
        "template void gated(const LinearArgs&, const float*, float*, int64_t);\n"
        "}\n"
    )
    name = fusedops.isa.supported()[-1]
    ((header, flags),) = [row[1:] for row in build.isa_rows() if row[0] == name]
    command = [*build.compiler().split(), *build.COMMON, *build.WARNINGS, *flags, "-fsyntax-only"]
    command += [f"-DFUSEDOPS_ISA={name}", f'-DFUSEDOPS_SIMD_HEADER="{header}.h"']
    run = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", str(source)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
