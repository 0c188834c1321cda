"""Memory of one CUDA device through its driver, so that engines run where no torch is. Knows no engine. No GPU has run it yet."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
LIBRARY = "libcuda.so.1"


def why_not() -> str | None:
    """Why no CUDA device can be used here; None when one can."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return f"no CUDA driver ({LIBRARY}) is here"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the CUDA driver sees no device"
    return None


class Buffer:
    """Bytes on the device, freed with this object."""

    def __init__(self, device: Device, length: int) -> None:
        self.length = length
        self._device = device
        pointer = ctypes.c_uint64()
        device.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, length)))
        self.pointer = int(pointer.value)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._device.driver.cuMemFree_v2(ctypes.c_uint64(self.pointer))


class Device:
    """The first CUDA device, its primary context and one stream, in whose order everything happens."""

    def __init__(self) -> None:
        """Raises BackendError when there is none."""
        reason = why_not()
        if reason is not None:
            raise BackendError(f"CUDA memory is not to be had: {reason}; use another backend")
        self.driver: Any = ctypes.CDLL(LIBRARY)
        handle, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(handle), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), 0)
        self._handle, self._stream = handle, stream

    @property
    def stream(self) -> int:
        """The stream's handle, as other libraries take it."""
        return int(self._stream.value or 0)

    @property
    def chip(self) -> str:
        """Its compute capability, as `sm_89`."""
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._handle)
            parts.append(value.value)
        return f"sm_{parts[0]}{parts[1]}"

    def call(self, name: str, *arguments: Any) -> None:
        """One call of the driver; raises BackendError when it fails."""
        status = getattr(self.driver, name)(*arguments)
        if status != 0:
            raise BackendError(
                f"{name} of the CUDA driver must return 0, got {status}; free device memory or restart the process"
            )

    def zeros(self, length: int) -> Buffer:
        """That many bytes of zeros."""
        buffer = Buffer(self, length)
        self.call("cuMemsetD8Async", ctypes.c_uint64(buffer.pointer), ctypes.c_ubyte(0), ctypes.c_size_t(length), self._stream)
        return buffer

    def upload(self, buffer: Buffer, value: npt.NDArray[Any]) -> None:
        """Host -> device; returns when the host array may change again."""
        value = np.ascontiguousarray(value)
        address = ctypes.c_void_p(value.ctypes.data)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(buffer.pointer), address, ctypes.c_size_t(value.nbytes), self._stream)
        self.wait()

    def download(self, buffer: Buffer, value: npt.NDArray[Any]) -> None:
        """Device -> a contiguous host array."""
        address = ctypes.c_void_p(value.ctypes.data)
        self.call("cuMemcpyDtoHAsync_v2", address, ctypes.c_uint64(buffer.pointer), ctypes.c_size_t(value.nbytes), self._stream)
        self.wait()

    def copy(self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, length: int) -> None:
        """Bytes from one buffer to another."""
        places = ctypes.c_uint64(target.pointer + target_offset), ctypes.c_uint64(source.pointer + source_offset)
        self.call("cuMemcpyDtoDAsync_v2", *places, ctypes.c_size_t(length), self._stream)

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        self.call("cuStreamSynchronize", self._stream)
