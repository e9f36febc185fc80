"""CUDA tensors that are none, so that the path of a GPU can be walked on a machine without one.

Method. A :class:`Pretended` tensor tells Python that it is on cuda:0 and holds its values in a CPU tensor, ``inner``. Inside
``with pretended_cuda() as gpu:`` two modes of PyTorch look at everything that is done:

* a function mode sees every call of torch's Python interface: it answers questions about the device (also within ``vmap``,
  where tensors are wrapped), moves tensors between the two devices, makes new ones on the device that is asked for, and looks
  at the generators;
* a dispatch mode sees every ATen operation below autograd: it refuses what CUDA refuses, counts, and computes on the CPU.

``torch.cuda`` is replaced by just what the product uses; anything else raises as it does without a GPU. A CUDA graph is
emulated: what is captured is noted and undone, and a replay does exactly the same operations on the same memory, so a step
that depends on a Python variable goes wrong here as it does on a GPU. Triton's launchers are either replaced by the kernels
of the CPU (quick), or run as they are, with their kernels in Triton's interpreter (``interpreter=True``).

What it finds, each a :class:`PretendedError` at once:

* a CPU tensor beside a CUDA tensor, unless it is a number or indexes; a CUDA tensor that indexes a CPU tensor;
* NumPy on a CUDA tensor;
* a generator of the other device;
* a CPU tensor given to a Triton kernel;
* arithmetic on uint16, uint32 and uint64, of which CUDA has little more than copies, fills and views.

What it counts, by the phase of ``engine/profiling.py`` that is open: launches (operations that compute or copy; one operation
may be several kernels on a GPU) and waits (the host has to wait for the device: values read, masks as indices, pageable
copies, in either direction). A wait within a capture is an error, and a warning while synchronisation is being debugged,
as on a GPU.

What it cannot find: races, since there is one stream; other reasons for which a capture is illegal; what cuDNN, cuBLAS and
cuSOLVER do or refuse; memory and time; float results other than the CPU's. C++ takes a pretended tensor for one of the CPU,
so autocast for CUDA does nothing, operations are those that the CPU would choose, and a gradient that goes back through a move
from CUDA to the CPU stays there. In a backward pass a ``torch.autograd.Function`` in Python cannot ask for a device. DTensor
and NCCL are not covered.
"""

import collections
import contextlib
import importlib
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from skymask_gpu.engine import profiling, step_loop
from skymask_gpu.kernels import mixture, tree

__all__ = ["CUDA", "Pretence", "Pretended", "PretendedError", "pretended_cuda", "to_cuda"]

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# The name under which operations count that are captured in a graph; each replay is one launch of the phase around it.
CAPTURED = "captured step"


class PretendedError(AssertionError):
    """What a GPU would refuse. No RuntimeError, so that nobody takes it for one of PyTorch's and goes on."""


# --- the tensor -----------------------------------------------------------------------------------------------------------


class Pretended(Tensor):
    """A tensor that Python sees on cuda:0; ``inner`` holds its values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        # C++ is told the truth: without a GPU autograd has no thread for a device of the type cuda
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
        )
        self.inner = inner.detach()
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise PretendedError(f"{func} on a pretended tensor, but its pretended GPU is gone")

    def __repr__(self, **kwargs: Any) -> str:
        return f"Pretended({self.inner!r})"

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _active().wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        _active().fault("can't convert a cuda:0 tensor to NumPy; use Tensor.cpu()")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        _active().fault("can't convert a cuda:0 tensor to NumPy; use Tensor.cpu()")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied


_Generator = torch.Generator


class PretendedGenerator(_Generator):
    """A generator that says it is one of cuda:0."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]


class _Generators(type):
    """In the place of ``torch.Generator``: makes either kind, and both are instances of it."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return PretendedGenerator() if torch.device(device).type == "cuda" else _Generator(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Generator)


class _EitherGenerator(metaclass=_Generators):
    pass


def _inner(x: Any) -> Any:
    """Arguments as the CPU can take them."""
    if type(x) is Pretended:
        return x.inner
    if isinstance(x, list | tuple):
        return type(x)(map(_inner, x)) if type(x) in (list, tuple) else x
    return x


def _wrapped(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pretended(x)
    return type(x)(map(_wrapped, x)) if isinstance(x, list | tuple) else x


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _is_pretended(x: Any) -> bool:
    """Also within ``vmap`` and ``grad``, which wrap tensors."""
    while isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return type(x) is Pretended


def to_cuda(tensor: Tensor) -> Tensor:
    """A pretended copy, which is not counted as a wait: how a test makes its arguments."""
    return Pretended(tensor.detach().clone())


# --- what is noted --------------------------------------------------------------------------------------------------------

_ACTIVE: list["Pretence"] = []


def _active() -> "Pretence":
    assert _ACTIVE, "a pretended tensor, but its pretended GPU is gone"
    return _ACTIVE[-1]


class Pretence:
    """The pretended GPU: what was done on it.

    Attributes:
        launches, waits: by phase.
        places: how often the host waited, by phase, what for and the line of the product.
        faults: the text of each fault.
    """

    def __init__(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.operations: collections.Counter[tuple[str, str]] = collections.Counter()
        self.faults: list[str] = []
        self.asked: str | None = None  # the type of device that the running call names
        self.helpers = False  # whether tensors that it makes of nothing are the GPU's
        self.graph: _Graph | None = None  # being captured
        self.sync_debug = 0
        self.pinned: list[Tensor] = []  # kept, so that no other tensor gets the same address
        self._phases = ["no phase"]

    @contextlib.contextmanager
    def phase(self, name: str, *moved: object) -> Iterator[None]:
        """In the place of ``Recording.phase``."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    @property
    def name(self) -> str:
        return CAPTURED if self.graph is not None else self._phases[-1]

    def table(self) -> dict[str, tuple[int, int]]:
        """Launches and waits by phase."""
        return {name: (self.launches[name], self.waits[name]) for name in sorted({*self.launches, *self.waits})}

    def launch(self, operation: str) -> None:
        self.launches[self.name] += 1
        self.operations[self.name, operation] += 1

    def wait(self, why: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})")
        self.waits[self.name] += 1
        self.places[f"{self.name}: {why}, at {_place()}"] += 1
        if self.sync_debug:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def fault(self, text: str) -> None:
        self.faults.append(f"{text}, at {_place()}")
        raise PretendedError(self.faults[-1])

    @contextlib.contextmanager
    def asking(self, device: Any, helpers: bool = False) -> Iterator[None]:
        before = self.asked, self.helpers
        self.asked, self.helpers = None if device is None else torch.device(device).type, helpers
        try:
            yield
        finally:
            self.asked, self.helpers = before

    def run_kernel(self, name: str, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A kernel of our own, on what the tensors hold; what it writes is not known, so all of them may be written."""
        tensors = list(_tensors([*args, *kwargs.values()]))
        if not all(type(x) is Pretended for x in tensors):
            self.fault(
                f"Triton kernel {name}: shapes {[tuple(x.shape) for x in tensors if type(x) is not Pretended]} on the CPU"
            )
        self.launch(name)
        args, kwargs = _inner(args), {key: _inner(value) for key, value in kwargs.items()}

        def run() -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                return kernel(*args, **kwargs)

        if self.graph is None:
            return run()
        return self.graph.note(run, written=[x.inner for x in tensors])


def _place() -> str:
    """The innermost line of the product."""
    for frame in reversed(traceback.extract_stack()):
        for part in ("/engine/", "/kernels/", "/skymask_gpu/"):
            if part in frame.filename and "/tests/" not in frame.filename and "site-packages" not in frame.filename:
                return f"{part[1:]}{frame.filename.rsplit(part, 1)[1]}:{frame.lineno}"
    return "the test"


# --- the modes ------------------------------------------------------------------------------------------------------------

_DEVICE_QUESTIONS: dict[Any, Any] = {
    Tensor.device.__get__: CUDA,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: 0,
}
_MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
_TORCH = Path(torch.__file__).parent
# Code that may leave it to C++ on which device helper tensors are; and what lies between it and the dispatch mode.
_OF_TORCH = (str(_TORCH), __file__)
_BETWEEN = tuple(str(_TORCH / name) for name in ("_compile.py", "_dynamo", "utils/_python_dispatch.py"))


def _called_by_torch() -> bool:
    """Or by somebody's own backward pass, who did not say on which device?"""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_OF_TORCH)


class _Functions(TorchFunctionMode):
    """What C++ would get wrong, since it takes a pretended tensor for one of the CPU."""

    def __init__(self, gpu: Pretence) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func in _DEVICE_QUESTIONS and _is_pretended(args[0]):
            return _DEVICE_QUESTIONS[func]
        if func in _MOVES:
            return self._move(func, *args, **kwargs)
        device = kwargs.get("device")
        if kwargs.pop("pin_memory", False):
            self._gpu.pinned.append(func(*args, **kwargs))
            return self._gpu.pinned[-1]
        self._check_generator([*args, *kwargs.values()], device)
        if device is None:
            # helper tensors, which C++ makes where it takes the arguments to be
            with self._gpu.asking(None, helpers=any(map(_is_pretended, _tensors([*args, *kwargs.values()])))):
                return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            del kwargs["device"]
            return self._moved(func(*args, **kwargs), torch.device(device))
        with self._gpu.asking(device):
            return func(*args, **{**kwargs, "device": "cpu"})

    def _check_generator(self, arguments: list[Any], device: Any) -> None:
        generators = [x for x in arguments if isinstance(x, _Generator)]
        if generators:
            on_cuda = any(map(_is_pretended, arguments)) if device is None else torch.device(device).type == "cuda"
            for generator in generators:
                if generator.device.type != ("cuda" if on_cuda else "cpu"):
                    self._gpu.fault(f"a generator of {generator.device} for a tensor of {CUDA if on_cuda else CPU}")

    def _move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``Tensor.to``, ``cpu`` and ``cuda``."""
        if func is not Tensor.to:
            return self._moved(tensor, CUDA if func is Tensor.cuda else CPU)
        other = next(_tensors([*args, kwargs.get("other")]), None)
        if other is not None:
            device, dtype, layout, copy = (CUDA if _is_pretended(other) else CPU), other.dtype, None, kwargs.get("copy", False)
        else:
            copy = kwargs.pop("copy", False)
            memory_format = kwargs.pop("memory_format", None)
            device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
            layout = layout or memory_format
        here = CUDA if _is_pretended(tensor) else CPU
        if device is None or device.type == here.type:
            formats = {} if layout is None else {"memory_format": layout}
            return Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy, **formats)
        return self._moved(tensor, device, dtype, layout)

    def _moved(self, tensor: Tensor, device: Any, dtype: Any = None, layout: Any = None) -> Tensor:
        if _is_pretended(tensor) == (device.type == "cuda"):
            return tensor
        with self._gpu.asking(device):
            return torch.ops.aten._to_copy(tensor, dtype=dtype, memory_format=layout)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that change what a tensor looks like and not what it holds.
_IN_PLACE_VIEWS = _names("unsqueeze_ squeeze_ t_ transpose_ as_strided_ detach_")
# Operations that launch nothing.
_FREE = _IN_PLACE_VIEWS | _names(
    "view _unsafe_view as_strided expand t transpose permute select slice split split_with_sizes unbind unsqueeze squeeze "
    "detach alias diagonal unfold narrow view_as_real view_as_complex real imag movedim _reshape_alias lift_fresh empty "
    "empty_like empty_strided new_empty new_empty_strided _local_scalar_dense is_same_size record_stream"
)
# Operations for which the host waits for the device.
_WAITING = _names(
    "_local_scalar_dense is_nonzero equal nonzero masked_select _unique2 unique_dim unique_consecutive repeat_interleave "
    "multinomial _linalg_eigh linalg_inv_ex linalg_cholesky_ex _linalg_svd linalg_qr bincount histc"
)
_INDEXING = _names("index index_put index_put_ _index_put_impl_ _unsafe_index")
# Operations that want all tensors on one device, numbers too.
_STRICT = _names("cat stack index_select gather scatter scatter_ scatter_add scatter_add_ index_add_ index_copy_ embedding")
# What CUDA has for uint16, uint32 and uint64.
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
_COPIES_FILLS_VIEWS = _FREE | _names("_to_copy copy_ clone fill_ zero_ zeros zeros_like new_zeros full full_like")


class _Operations(TorchDispatchMode):
    """What CUDA refuses, what the host waits for, and how many launches there are."""

    def __init__(self, gpu: Pretence) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = kwargs or {}, self._gpu
        tensors = list(_tensors([*args, *kwargs.values()]))
        pretended = [x for x in tensors if type(x) is Pretended]
        if not pretended and gpu.asked != "cuda" and (tensors or not gpu.helpers or not _called_by_torch()):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self._check(func, name, args, tensors, pretended)
        self._count_waits(name, args, tensors, pretended)
        if name not in _FREE:
            gpu.launch(name)
        written, fresh = _written(func, args, kwargs)
        inner_args, inner_kwargs = _inner(args), {key: _inner(value) for key, value in kwargs.items()}

        def run() -> Any:
            return func(*inner_args, **inner_kwargs)

        if gpu.graph is None or not (written or (fresh and name not in _FREE)):
            out = run()
        else:
            out = gpu.graph.note(run, written=[_inner(x) for x in written.values()])
        if name in _IN_PLACE_VIEWS:
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)  # of the tensor that Python sees, too
        if any(x.shape != _inner(x).shape for x in _tensors(written.values())):
            gpu.fault(f"{func} changes the size of a tensor, which is not pretended")
        return _result(func, out, written, to_cuda=gpu.asked != "cpu")

    def _check(self, func: Any, name: str, args: Any, tensors: list[Tensor], pretended: list[Tensor]) -> None:
        unsigned = [str(x.dtype) for x in pretended if x.dtype in _UNSIGNED]
        if unsigned and name not in _COPIES_FILLS_VIEWS:
            self._gpu.fault(f"{func}: perhaps not implemented on CUDA for {', '.join(unsigned)}")
        if not pretended or name in ("_to_copy", "copy_"):
            return
        indices = {id(x) for x in args[1] if x is not None} if name in _INDEXING and type(args[0]) is Pretended else set()
        for x in tensors:
            if type(x) is not Pretended and (x.dim() > 0 or name in _STRICT) and id(x) not in indices:
                shapes = ", ".join(f"{tuple(y.shape)} {'cuda' if type(y) is Pretended else 'cpu'}" for y in tensors)
                self._gpu.fault(f"{func}: expected all tensors to be on the same device, found {shapes}")

    def _count_waits(self, name: str, args: Any, tensors: list[Tensor], pretended: list[Tensor]) -> None:
        gpu = self._gpu
        if name in _WAITING:
            gpu.wait(name)
        if name in _INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
            gpu.wait("indexing by a mask")
        if name in _INDEXING and any(x is not None and type(x) is not Pretended for x in args[1]):
            gpu.wait("indices to the device")
        if name == "_to_copy" and gpu.asked is not None:
            gpu.wait("copy to the host" if gpu.asked == "cpu" else "copy to the device")
        if name == "copy_" and len(pretended) < len(tensors) and (tensors[1].dim() > 0 or type(tensors[1]) is Pretended):
            source = tensors[1]
            if type(source) is Pretended or not (len(args) > 2 and args[2] and any(x is source for x in gpu.pinned)):
                gpu.wait("copy between the devices")


def _written(func: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], bool]:
    """The arguments that an operation writes, by the name of their memory; and whether it returns new memory."""
    schema = func._schema
    written = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if value is not None:
                written[str(argument.alias_info.before_set)] = value
    return written, any(ret.alias_info is None for ret in schema.returns)


def _result(func: Any, out: Any, written: dict[str, Any], to_cuda: bool) -> Any:
    """What is written is returned itself; all else is wrapped, if it is on the GPU."""
    if not written:
        return _wrapped(out) if to_cuda else out
    results = []
    for ret, value in zip(func._schema.returns, out if isinstance(out, tuple) else (out,), strict=False):
        same = written.get(str(ret.alias_info.before_set)) if ret.alias_info is not None and ret.alias_info.is_write else None
        results.append(same if same is not None else _wrapped(value) if to_cuda else value)
    return tuple(results) if isinstance(out, tuple) else results[0] if results else None


# --- torch.cuda -----------------------------------------------------------------------------------------------------------


class _Graph:
    """A CUDA graph: a capture leaves all values as they were, a replay does the same operations on the same memory."""

    def __init__(self) -> None:
        self._runs: list[Callable[[], None]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert _active().graph is None
        _active().graph = self

    def capture_end(self) -> None:
        _active().graph = None
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before.clear()

    def note(self, run: Callable[[], Any], written: list[Tensor]) -> Any:
        self._before += [(tensor, tensor.clone()) for tensor in written]
        out = run()
        made = list(_tensors([out]))

        def again() -> None:
            for tensor, value in zip(made, _tensors([run()]), strict=True):
                tensor.copy_(value)

        self._runs.append(again)
        return out

    def replay(self) -> None:
        _active().launch("graph")
        with torch.utils._python_dispatch._disable_current_modes():
            for run in self._runs:
                run()

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self._runs.clear()


class _Stream:
    device = CUDA
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None:
        _active().wait("Stream.synchronize")


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1000 * (end._seconds - self._seconds)


class _Context(contextlib.nullcontext):
    """``torch.cuda.device`` and ``torch.cuda.stream``."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


class _MemPool:
    id = (0, 1)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


def _fake_cuda(gpu: Pretence) -> dict[str, Any]:
    """What the product uses of ``torch.cuda``, for one GPU of 80 GiB with 60 free."""

    def set_sync_debug_mode(mode: int | str) -> None:
        gpu.sync_debug = mode if isinstance(mode, int) else ("default", "warn", "error").index(mode)

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    stream = _Stream()
    properties = types.SimpleNamespace(name="NVIDIA Pretended", total_memory=80 * 2**30, major=9, minor=0)
    return {
        "CUDAGraph": _Graph,
        "Event": _Event,
        "MemPool": _MemPool,
        "Stream": _Stream,
        "current_device": lambda: 0,
        "current_stream": lambda *args: stream,
        "device": _Context,
        "device_count": lambda: 1,
        "empty_cache": nothing,
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda *args: properties,
        "get_device_name": lambda *args: "NVIDIA Pretended",
        "get_sync_debug_mode": lambda: gpu.sync_debug,
        "graph_pool_handle": lambda: (0, 1),
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "manual_seed_all": nothing,
        "max_memory_allocated": lambda *args: 0,
        "mem_get_info": lambda *args: (60 * 2**30, 80 * 2**30),
        "memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "reset_peak_memory_stats": nothing,
        "set_sync_debug_mode": set_sync_debug_mode,
        "stream": _Context,
        "synchronize": lambda *args: gpu.wait("synchronize"),
    }


# --- our own kernels ------------------------------------------------------------------------------------------------------


def _cpu_kernels() -> dict[Any, dict[str, Callable[..., Any]]]:
    """For each module of Triton launchers the functions of the CPU that do the same."""

    def launchers(kernel: str) -> Any:
        return importlib.import_module(f"skymask_gpu.kernels.{kernel}.triton")

    def alike(kernel: str, *names: str) -> dict[Any, dict[str, Callable[..., Any]]]:
        cpu = importlib.import_module(f"skymask_gpu.kernels.{kernel}.cpu")
        return {launchers(kernel): {name: getattr(cpu, name) for name in names}}

    mixtures = {"two_normals": mixture.two_normals_reference, "gaussian_mixture": mixture.gaussian_mixture_reference}
    return {
        **alike("bins", "bin_edges", "bin_rows", "bin_weights", "bin_step"),
        **alike("cuts", "replay", "find_cuts", "cut_bits", "replay_bits"),
        **alike("hamming", "hamming_counts", "hamming_counts_between"),
        **alike("mask_step", "first_step", "next_step", "last_step"),
        **alike("mean", "chosen_mean"),
        **alike("ones", "varying_ones"),
        **alike("sums", "group_sums"),
        launchers("mixture"): mixtures,
        launchers("tree"): {"path_maxima": tree.path_maxima_reference},
    }


def _replace_launchers(patch: pytest.MonkeyPatch, gpu: Pretence) -> None:
    for module, functions in _cpu_kernels().items():
        for name, function in functions.items():

            def launcher(*args: Any, _name: str = name, _function: Callable[..., Any] = function, **kwargs: Any) -> Any:
                return _wrapped(gpu.run_kernel(_name, _function, args, kwargs))

            patch.setattr(module, name, launcher)


def _run_in_interpreter(patch: pytest.MonkeyPatch, gpu: Pretence) -> None:
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        gpu.run_kernel(self.fn.__name__, lambda *a, **k: call(self, *a, **k), args, kwargs)

    patch.setattr(interpreter.GridExecutor, "__call__", launch)


# --- the whole ------------------------------------------------------------------------------------------------------------


def _forget_streams() -> None:
    """What the product keeps for each device it has seen."""
    for value in vars(step_loop).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@contextlib.contextmanager
def pretended_cuda(*, interpreter: bool = False) -> Iterator[Pretence]:
    """A machine with one GPU, as far as Python can see; everything is as before afterwards.

    Args:
        interpreter: run Triton's kernels in its interpreter behind the real launchers, instead of those of the CPU.
    """
    assert not torch.cuda.is_available(), "a GPU is here: there is nothing to pretend"
    gpu = Pretence()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    _forget_streams()
    _ACTIVE.append(gpu)
    token = profiling._current.set(gpu)  # type: ignore[arg-type]
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            for name, value in _fake_cuda(gpu).items():
                patch.setattr(torch.cuda, name, value)
            # what a failed capture leaves to be undone
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                patch.setattr(torch._C, name, lambda *args: None, raising=False)
            peak = {"allocated_bytes": {"all": {"peak": 0}}}
            patch.setattr(torch.cuda.memory, "memory_stats_as_nested_dict", lambda *args: peak)
            patch.setattr(torch, "Generator", _EitherGenerator)
            (_run_in_interpreter if interpreter else _replace_launchers)(patch, gpu)
            # else nn.Module.to() would put a pretended tensor's C++ part, which says CPU, into the old parameter
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            # the backward pass in this thread, where the modes are
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(_Operations(gpu))
            stack.enter_context(_Functions(gpu))
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        profiling._current.reset(token)
        _ACTIVE.pop()
        _forget_streams()
