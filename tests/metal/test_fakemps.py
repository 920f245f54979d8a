"""The device of the tests and the C functions on it refuse what a Mac refuses, or hangs on."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import lane
import pytest
import torch
from helpers import python

import fusedops

if lane.DEVICE != "mps" or sys.platform == "darwin":
    pytest.skip("needs FUSEDOPS_TEST_DEVICE=mps and the emulator", allow_module_level=True)

import device

SOURCE = b"""
#include <metal_stdlib>
kernel void one(device float* y [[buffer(0)]]) { y[0] = 1; }
kernel void two(constant uint& n [[buffer(0)]]) {}
"""
Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class Shim:
    """aoti_torch_mps_*, each call's error as an exception."""

    def __init__(self) -> None:
        self._library = device.load()
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        self._what = torch_cpu.torch_exception_get_what_without_backtrace
        self._what.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: object) -> None:
        if getattr(self._library, f"aoti_torch_mps_{name}")(*arguments):
            raise RuntimeError(self._what().decode())

    def library(self, source: bytes = SOURCE) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self("create_shader_library", source, ctypes.byref(handle))
        return handle

    def function(self, name: bytes) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self("get_kernel_function", self.library(), name, ctypes.byref(handle))
        return handle

    def block(self, function: ctypes.c_void_p, body: Callable[[], None]) -> None:
        """Body inside a command block; what it raises is raised here."""
        raised: list[BaseException] = []

        def call(_function: object, _user: object) -> None:
            try:
                body()
            except RuntimeError as error:
                raised.append(error)

        self("run_command_block", function, Callback(call), None)
        if raised:
            raise raised[0]


@pytest.fixture
def shim() -> Shim:
    return Shim()


def launched(shim: Shim, threads: int, group: int, arguments: int = 1) -> None:
    function = shim.function(b"two")

    def body() -> None:
        shim("start_encoding", function)
        for index in range(arguments):
            shim("set_arg_int", function, index, ctypes.c_int64(3))
        size, side = ctypes.c_uint64(threads), ctypes.c_uint64(group)
        shim("dispatch_single_with_group_size", function, size, side)

    shim.block(function, body)


def test_launch(shim: Shim) -> None:
    launched(shim, 70, 32)
    launched(shim, 1024, 1024)


@pytest.mark.parametrize(
    ("threads", "group", "arguments", "message"),
    [
        (2048, 2048, 1, "Threadgroup size exceeds 1024 limit"),
        (0, 32, 1, "0 threads in dimension 0 of the grid"),
        (2**32, 32, 1, "4294967296 threads in dimension 0"),
        (32, 0, 1, "an empty group"),
        (32, 32, 0, r"buffer\(0\) is not bound"),
        (32, 32, 32, "argument 31 of at most 31"),
    ],
)
def test_launch_is_refused(
    threads: int, group: int, arguments: int, message: str, shim: Shim
) -> None:
    with pytest.raises(RuntimeError, match=message):
        launched(shim, threads, group, arguments)


def test_encoding_outside_of_a_block_is_refused(shim: Shim) -> None:
    function = shim.function(b"one")
    with pytest.raises(RuntimeError, match="start_encoding outside of a command block"):
        shim("start_encoding", function)
    with pytest.raises(RuntimeError, match="an argument before start_encoding"):
        shim.block(function, lambda: shim("set_arg_int", function, 0, ctypes.c_int64(0)))


def test_block_inside_a_block_is_refused(shim: Shim) -> None:
    function = shim.function(b"one")
    with pytest.raises(RuntimeError, match="a command block inside another"):
        shim.block(function, lambda: shim.block(function, lambda: None))


def test_torch_inside_a_block_is_refused(shim: Shim) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="inside a command block waits for itself"):
        shim.block(shim.function(b"one"), lambda: x.add_(1) and None)
    with pytest.raises(RuntimeError, match="inside a command block waits for itself"):
        shim.block(shim.function(b"one"), lambda: torch.empty(3) and None)


def test_two_threads_in_one_encoder_are_refused(shim: Shim) -> None:
    function = shim.function(b"one")
    errors: list[str] = []

    def other() -> None:
        with pytest.raises(RuntimeError) as caught:
            shim.block(function, lambda: None)
        errors.append(str(caught.value))

    def body() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    shim.block(function, body)
    assert "two threads share its encoder" in errors[0]


def test_bad_source_is_refused(shim: Shim) -> None:
    with pytest.raises(RuntimeError, match="must be ASCII"):
        shim.library("// \u00e4\n".encode() + SOURCE)
    with pytest.raises(RuntimeError, match=r"(?s)Failed to create metal library.*no_such"):
        shim.library(b"kernel void f(device float* y [[buffer(0)]]) { y[0] = no_such(); }")
    with pytest.raises(RuntimeError, match="Failed to create function state object for: three"):
        shim.function(b"three")


def test_memory_is_not_zero() -> None:
    assert torch.empty(100).isnan().all()
    assert torch.empty(100, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, dtype=torch.float64),
        lambda: torch.ones(3).double(),
        lambda: torch.ones(3, dtype=torch.float64, device="cpu").to("mps"),
    ],
)
def test_float64_is_refused(make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(TypeError, match="MPS framework doesn't support float64") as caught:
        make()
    assert lane.missing(caught.value)


def test_skips_are_for_what_the_test_asked() -> None:
    def of_the_library() -> None:
        raise TypeError("the MPS framework doesn't support float64")

    code = of_the_library.__code__.replace(co_filename=str(Path(fusedops.__file__)))
    with pytest.raises(TypeError) as caught:
        exec(code)
    assert lane.missing(caught.value) is None


def test_host_code_that_reads_device_memory_crashes() -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(device.__file__).parent)!r})
        import device
        device.load()
        import ctypes, torch
        x = torch.ones(3, device="mps")
        print(x.cpu().tolist(), flush=True)
        ctypes.string_at(x.data_ptr(), 4)
    """
    result = python(code)
    assert result.stdout == "[1.0, 1.0, 1.0]\n"
    assert result.returncode < 0


def test_deferred_launches_wait_for_a_look() -> None:
    x = torch.randn(2, 3, 5, 8)
    expected = fusedops.gelu(x).cpu()
    with device.deferred():
        y = fusedops.gelu(x)
        assert device.load().fakemps_waiting() == 1
        z = fusedops.gelu(y)
        assert device.load().fakemps_waiting() == 2
        assert torch.equal(y.cpu(), expected)
        assert device.load().fakemps_waiting() == 0
    assert torch.equal(z.cpu(), fusedops.gelu(expected.to("mps")).cpu())
