"""Shared libraries that stand for NVIDIA's where an aarch64 torch is built for CUDA: no device.

Usage: cuda_stubs.py CROSS_TOOLS TORCH_LIB OUT. Does nothing for a torch built without CUDA.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

# The library of a function by the start of its name; the first that fits.
OWNERS = {
    "cudnn": "libcudnn",
    "cublasLt": "libcublasLt",
    "cublas": "libcublas",
    "cusparseLt": "libcusparseLt",
    "cusparse": "libcusparse",
    "cufft": "libcufft",
    "curand": "libcurand",
    "cusolver": "libcusolver",
    "cuFile": "libcufile",
    "nccl": "libnccl",
    "nvrtc": "libnvrtc",
    "nvshmem": "libnvshmem_host",
    "cupti": "libcupti",
    "nvJitLink": "libnvJitLink",
    "__cuda": "libcudart",
    "cuda": "libcudart",
}
# What torch calls while it is imported. 100 is cudaErrorNoDevice.
BODIES = {
    "cudaGetErrorString": 'const char* cudaGetErrorString(int e) { return "no CUDA here"; }',
    "cudaGetErrorName": 'const char* cudaGetErrorName(int e) { return "cudaErrorNoDevice"; }',
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void) { return 0; }",
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int* n) { *n = 0; return 100; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int* n) { *n = 0; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int* n) { *n = 13000; return 0; }",
    "__cudaRegisterFatBinary": (
        "static void* handle[4]; void** __cudaRegisterFatBinary(void* p) { return handle; }"
    ),
}


def body(name: str) -> str:
    result = 0 if name.startswith("__cuda") else 100
    return BODIES.get(name, f"int {name}(void) {{ return {result}; }}")


def main(tools: str, lib: str, out: str) -> None:
    def run(tool: str, *arguments: str | Path) -> str:
        command = [f"{tools}/aarch64-linux-gnu-{tool}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    file_names: dict[str, str] = {}
    symbols: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(Path(lib).glob("*.so*")):
        for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", path)):
            if needed.split(".so")[0] in OWNERS.values():
                file_names[needed.split(".so")[0]] = needed
        for line in run("nm", "-D", "--undefined-only", path).splitlines():
            match = re.match(r"\s+[Uw] ([A-Za-z_]\w*)(?:@@?(\S+))?$", line)
            if match is None or (match[2] or "").startswith("GLIBC"):
                continue
            owner = next((OWNERS[start] for start in OWNERS if match[1].startswith(start)), None)
            if owner is not None:
                symbols[owner][match[2] or ""].add(match[1])

    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source, versions = Path(folder, "stub.c"), Path(folder, "stub.map")
        for owner, file_name in sorted(file_names.items()):
            names = {n for group in symbols[owner].values() for n in group}
            source.write_text("\n".join(map(body, sorted(names))) + "\n")
            versions.write_text(
                "".join(
                    f"{version} {{ global: {' '.join(f'{n};' for n in sorted(group))} }};\n"
                    for version, group in sorted(symbols[owner].items())
                    if version
                )
            )
            script = [f"-Wl,--version-script={versions}"] if versions.stat().st_size else []
            flags = ["-w", "-O1", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{file_name}"]
            run("gcc", *flags, *script, source, "-o", Path(out, file_name))


if __name__ == "__main__":
    main(*sys.argv[1:])
