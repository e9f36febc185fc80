"""Under torchrun: the process group, and for ``aggregate`` each rank's own columns."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from skymask_gpu.defence.forms import client_state
from skymask_gpu.defence.parse import check_form, raise_none_left
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.io.user_files import UserUpdates, load_updates

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ShardedUpdates", "column_mesh", "column_sharded", "load_own_columns"]

# The number of bytes of a stacked file that are mapped at a time.
_BLOCK_BYTES = 2**24


@contextmanager
def column_mesh() -> Iterator["DeviceMesh | None"]:
    """The mesh of all processes that torchrun started; None for one process.

    The processes talk by NCCL if there is CUDA, and by gloo otherwise.

    Raises:
        ValueError: there are more processes than GPUs on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ValueError(f"torchrun: --nproc-per-node must be at most {num_gpus}, the number of GPUs of this machine")
        torch.cuda.set_device(local_rank)
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class ShardedUpdates(UserUpdates):
    """A ``DTensor`` of updates, and for each of its clients the buffers that it sent."""

    buffers: list[dict[str, Tensor]]


def load_own_columns(
    path: Path,
    model: FlatModel,
    module: nn.Module,
    global_state: Mapping[str, Tensor],
    mesh: "DeviceMesh",
    *,
    local_models: bool,
) -> ShardedUpdates:
    """Load updates so that each rank keeps only its own columns, in memory.

    The files are those that :func:`skymask_gpu.io.user_files.load_updates` takes. A state dict that
    does not fit the model counts as unreadable.

    Raises:
        ValueError: ``load_updates`` raises it, or no client is usable.
    """
    shards = ColumnShards(model.num_params, mesh)
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    if path.is_dir():
        sent = load_updates(path, model, global_state, local_models=local_models)
        return _from_state_dicts(sent, model, module, shards, mesh, device)
    # Only the header is read here. The contents are mapped into memory, and read when they are
    # used.
    sent = load_updates(path, model, global_state, local_models=False)
    assert isinstance(sent.updates, Tensor)
    check_form(sent.updates, model.num_params)
    own_NL = _from_stacked(path, sent.updates, model.initial_params if local_models else None, shards, device)
    return ShardedUpdates(column_sharded(own_NL, shards.num_params, mesh), sent.names, {}, [{} for _ in sent.names])


def _from_stacked(
    path: Path, stacked_NP: Tensor, global_params_P: Tensor | None, shards: ColumnShards, device: torch.device
) -> Tensor:
    num_clients, num_params = stacked_NP.shape
    own_NL = torch.empty(num_clients, shards.columns.stop - shards.columns.start, dtype=stacked_NP.dtype, device=device)
    step = max(1, _BLOCK_BYTES // (stacked_NP.element_size() * num_params))
    for first in range(0, num_clients, step):
        rows = slice(first, min(first + step, num_clients))
        # The file is opened anew for each block, so that what was mapped for the last one is given
        # back.
        with safe_open(path, "pt") as file:
            (name,) = file.keys()
            block = file.get_slice(name)[rows, shards.columns]
            own_NL[rows] = block if global_params_P is None else (block.float() - shards.own(global_params_P)).to(block.dtype)
    return own_NL


def _from_state_dicts(
    sent: UserUpdates, model: FlatModel, module: nn.Module, shards: ColumnShards, mesh: "DeviceMesh", device: torch.device
) -> ShardedUpdates:
    known = module.state_dict()
    buffer_names = {name for name, _ in module.named_buffers()}
    own_sizes = shards.own_sizes(model.layer_sizes)
    own_NL = torch.empty(len(sent.names), sum(own_sizes), device=device)
    names: list[str] = []
    faults: dict[str, str] = {}
    buffers: list[dict[str, Tensor]] = []
    for name, update in zip(sent.names, sent.updates, strict=True):
        state = client_state(update, model, known)
        if isinstance(state, str):
            faults[name] = state
            continue
        own_NL[len(names)] = _own_part(state, model, shards).to(device)
        names.append(name)
        buffers.append({b: state[b].to(device, known[b].dtype, copy=True) for b in buffer_names if b in state})
    if not names:
        raise_none_left(dict(enumerate(faults.values())))
    updates = column_sharded(own_NL[: len(names)], shards.num_params, mesh)
    return ShardedUpdates(updates, names, {**faults, **sent.unreadable}, buffers)


def _own_part(state: Mapping[str, Tensor], model: FlatModel, shards: ColumnShards) -> Tensor:
    """This rank's own columns of a state dict, float32; of a mapped file, only these are read."""
    parts, offset = [], 0
    for name, size in zip(model.shapes, model.layer_sizes, strict=True):
        begin, end = max(shards.columns.start - offset, 0), max(shards.columns.stop - offset, 0)
        parts.append(state[name].reshape(-1)[begin:end].float())
        offset += size
    return torch.cat(parts)


def column_sharded(own_NL: Tensor, num_params: int, mesh: "DeviceMesh") -> Tensor:
    """The ``DTensor`` ``(N, P)``, sharded by columns, of which ``own_NL`` is this rank's part."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((len(own_NL), num_params))
    return DTensor.from_local(own_NL, mesh, [Shard(1)], run_check=False, shape=shape, stride=(num_params, 1))
