"""Compile the kernels at run time through NVRTC, keep the machine code on disk, load it and launch it."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch

from e88.errors import UserError
from e88.files import write_atomic
from e88.runtime import cache_folder

SOURCES = Path(__file__).parent


@cache
def source(kernel: str) -> str:
    """The text of a kernel with the headers it includes put in place, as NVRTC is given no folders to search."""
    lines = []
    for line in (SOURCES / f"{kernel}.cu").read_text().splitlines():
        if line.startswith('#include "'):
            lines.append((SOURCES / line.split('"')[1]).read_text())
        else:
            lines.append(line)
    return "\n".join(lines)


def compile_cubin(kernel: str, arch: str, defines: dict[str, int]) -> bytes:
    """Machine code of `kernel` ("forward", say) for `arch` ("sm_90"), from the disk if it is there."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    _check(error)
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    text = source(kernel)
    identity = "\n".join([text, arch, *flags, f"nvrtc {major}.{minor}"])
    path = cache_folder() / f"{kernel}-{arch}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = _nvrtc(text, kernel, [f"-arch={arch}", "-std=c++17", "-default-device", *flags])
    # A folder that cannot be written costs a compilation at every start, nothing else.
    with suppress(UserError):
        write_atomic(path, lambda temporary: temporary.write_bytes(code))
    return code


def _nvrtc(text: str, kernel: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(text.encode(), f"{kernel}.cu".encode(), 0, [], [])
    _check(error)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC cannot compile the {kernel} kernel: {log.decode(errors='replace')}")
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(error)
        code = b" " * size
        (error,) = nvrtc.nvrtcGetCUBIN(program, code)
        _check(error)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(error: Any) -> None:
    if int(error) != 0:
        raise RuntimeError(f"CUDA call failed: {error!r}")


_overlap: ContextVar[bool] = ContextVar("e88_overlap", default=False)


@contextmanager
def overlapped() -> Iterator[None]:
    """Inside, kernels of a decoding step begin while the one before ends, where the device can (Hopper and newer).

    They read weights and recurrent states early, so these must have been written at least two launches before.
    """
    token = _overlap.set(True)
    try:
        yield
    finally:
        _overlap.reset(token)


def overlapping(device: int) -> bool:
    """Whether a decoding kernel launched now is to begin early."""
    return _overlap.get() and torch.cuda.get_device_capability(device) >= (9, 0)


class Kernel:
    """A loaded kernel; call it with a launch shape, a stream and arguments (ctypes values, in order)."""

    def __init__(self, code: bytes, name: str, device: int, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        error, handle = driver.cuDeviceGet(device)
        _check(error)
        error, self._context = driver.cuDevicePrimaryCtxRetain(handle)
        _check(error)
        # The library keeps the handle's memory alive for the life of the process.
        error, self._library = driver.cuLibraryLoadData(code, [], [], 0, [], [], 0)
        _check(error)
        error, kernel = driver.cuLibraryGetKernel(self._library, name.encode())
        _check(error)
        self._shared_bytes = shared_bytes
        if shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, handle)[0])
        self._kernel, self._device = kernel, handle
        self._function = driver.CUfunction(int(kernel))

    def resources(self) -> dict[str, int]:
        """Registers of a thread, and the bytes of them that did not fit and went to memory."""
        names = self._driver.CUfunction_attribute
        found = {}
        for name, attribute in (
            ("registers", names.CU_FUNC_ATTRIBUTE_NUM_REGS),
            ("spilled_bytes", names.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
        ):
            error, found[name] = self._driver.cuKernelGetAttribute(attribute, self._kernel, self._device)
            _check(error)
        return found

    def __call__(self, blocks: int, threads: int, stream: int, arguments: list[Any], *, overlap: bool = False) -> None:
        """`overlap`: begin before the kernel launched last has ended, which this one must wait for by itself."""
        # A thread that has only allocated from torch's cache, as autograd's may have, has no context of its own yet.
        error, context = self._driver.cuCtxGetCurrent()
        _check(error)
        if int(context) == 0:
            _check(self._driver.cuCtxSetCurrent(self._context)[0])
        slots = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        if overlap:
            launch = self._overlapping(blocks, threads, stream)
            (error,) = self._driver.cuLaunchKernelEx(launch, self._function, ctypes.addressof(slots), 0)
        else:
            (error,) = self._driver.cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, ctypes.addressof(slots), 0
            )
        _check(error)

    def _overlapping(self, blocks: int, threads: int, stream: int) -> Any:
        attribute = self._driver.CUlaunchAttribute()
        attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        launch = self._driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = blocks, 1, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
        launch.sharedMemBytes, launch.hStream = self._shared_bytes, stream
        launch.attrs, launch.numAttrs = [attribute], 1
        return launch
