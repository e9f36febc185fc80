"""CUDA C++ without nvcc: NVRTC compiles it, and CUDA's driver loads and launches it.

Both libraries are called by their documented C interfaces, through ``ctypes``. Every CUDA build of
torch brings NVRTC along, and the driver belongs to the GPU. Torch has a wrapper of its own for both
(``torch.cuda._compile_kernel``), but it is private and differs between the versions that we admit.

The result is machine code for one kind of GPU, and no PTX. A driver that is older than NVRTC may
load such code as long as both are of the same major version of CUDA, but may not translate PTX.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["OPTIONS", "Compiled", "CudaError", "compile_source", "launch", "load"]

# All operations are rounded one by one, as IEEE 754 says: no a * b + c in one step, no
# approximations, and no flushing of subnormal numbers to zero. Results are then those of a CPU to
# the bit.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


class CudaError(RuntimeError):
    """NVRTC or the driver is not there, or one of their functions failed."""


class Compiled(NamedTuple):
    """Machine code, and the PTX that it was made from."""

    cubin: bytes
    ptx: str


def compile_source(source: str, sm: int, macros: Mapping[str, object]) -> Compiled:
    """Compile CUDA C++ for one kind of GPU, which need not be here.

    Args:
        source: the text of a ``.cu`` file that includes no other.
        sm: the GPU's compute capability, 90 for 9.0.
        macros: what the text takes for defined, by name.

    Raises:
        CudaError: there is no NVRTC, or the text cannot be compiled.
    """
    library, program = _nvrtc(), ctypes.c_void_p()
    options = [f"--gpu-architecture=sm_{sm}", *OPTIONS, *(f"-D{name}={value}" for name, value in macros.items())]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check_nvrtc(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None))
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            log = _output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise CudaError(f"NVRTC cannot compile for sm_{sm}: {' '.join(log.split())[:300]}")
        return Compiled(_output(program, "CUBIN"), _output(program, "PTX").rstrip(b"\0").decode())
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _output(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(_nvrtc()[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(_nvrtc()[f"nvrtcGet{what}"](program, buffer))
    return buffer.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    paths = list(_nvrtc_paths())
    for path in paths:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise CudaError(f"NVRTC is not there (looked for {', '.join(paths)})")


def _nvrtc_paths() -> Iterator[str]:
    """Where the library may be: in a wheel, as torch installs it, or where the system looks.

    Beside a CUDA build of torch, the major version must be torch's, because only that one is known
    to suit the driver. Without CUDA it is for the offline compile, and any version will do.
    """
    version = (torch.version.cuda or "").partition(".")[0]
    nvidia = find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations if nvidia else None) or ():
        yield from sorted(map(str, Path(folder).glob(f"*/lib/libnvrtc.so.{version or '*'}")))
    yield f"libnvrtc.so.{version}" if version else "libnvrtc.so"


def _check_nvrtc(code: int) -> None:
    if code:
        raise CudaError(f"NVRTC failed: {_nvrtc().nvrtcGetErrorString(code).decode()}")


# --- the driver -----------------------------------------------------------------------------------


def load(cubin: bytes, name: str, device: int) -> ctypes.c_void_p:
    """Load machine code to a GPU, and return the function of this name for :func:`launch`.

    Raises:
        CudaError: there is no driver, or it does not take the code.
    """
    _make_context_current(device)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call_driver("cuModuleLoadData", ctypes.byref(module), cubin)
    _call_driver("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return function


def launch(function: ctypes.c_void_p, blocks: int, threads: int, device: int, arguments: Sequence[Any]) -> None:
    """Launch a function on the current stream of a GPU, which must be torch's current device.

    Args:
        function: what :func:`load` returned for the same GPU.
        blocks: the number of blocks of threads.
        threads: the number of threads per block.
        device: the index of the GPU.
        arguments: a ``ctypes`` number per parameter of the function.

    Raises:
        CudaError: nothing was launched.
    """
    _make_context_current(device)
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    _call_driver("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, addresses, None)


def _make_context_current(device: int) -> None:
    """Torch makes a GPU's context current in a thread only when it has something to do there."""
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    _call_driver("cuInit", 0)
    _call_driver("cuCtxGetCurrent", ctypes.byref(context))
    if context.value is None:
        _call_driver("cuDeviceGet", ctypes.byref(handle), device)
        _call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        _call_driver("cuCtxSetCurrent", context)


def _call_driver(name: str, *arguments: Any) -> None:
    code = _driver()[name](*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{name} failed: {(text.value or b'unknown error').decode()}")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"CUDA's driver is not there ({error})") from error
