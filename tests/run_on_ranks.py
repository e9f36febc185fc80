"""Call functions of a test file on gloo ranks: ``python run_on_ranks.py FILE FOLDER FUNCTION:RANKS ...``

For each so many processes are forked, of which each calls ``FUNCTION(FOLDER, mesh)``; for one rank there is no process group,
and the mesh is None. Forked, so that torch is imported once for all. A rank that fails or hangs ends the program.
"""

import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.distributed.tensor  # noqa: F401  # for all ranks at once
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Longer than any test takes, shorter than its caller's patience.
SECONDS = 120


def run(function: Callable[[Path, DeviceMesh | None], None], folder: Path, rank: int, num_ranks: int, store: str) -> None:
    if num_ranks == 1:
        function(folder, None)
        return
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    function(folder, init_device_mesh("cpu", (num_ranks,)))
    dist.destroy_process_group()


def main(file: str, folder: str, *calls: str) -> None:
    spec = importlib.util.spec_from_file_location("on_ranks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fork = multiprocessing.get_context("fork")
    for call in calls:
        name, _, count = call.partition(":")
        num_ranks = int(count)
        with tempfile.TemporaryDirectory() as store:
            arguments = (num_ranks, f"{store}/store")
            processes = [
                fork.Process(target=run, args=(getattr(module, name), Path(folder), rank, *arguments))
                for rank in range(num_ranks)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(SECONDS)
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
        if any(code != 0 for code in codes):
            sys.exit(f"{call}: the ranks ended with {codes} (None: it hung)")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(*sys.argv[1:])
