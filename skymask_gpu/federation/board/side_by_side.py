"""Make the sets of several recipes and seeds at the same time, each in a process of its own."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import torch

from skymask_gpu.federation.board.config import SetKey, read_board
from skymask_gpu.federation.board.making import SETS, by_cell, make_sets
from skymask_gpu.federation.sweep import end_with_parent, processes, threads_per_job

__all__ = ["make_sets_side_by_side"]

_POLL_SECONDS = 0.5


def make_sets_side_by_side(
    config: Path, data_dir: Path | None, changes: Sequence[str], keys: list[SetKey], folder: Path, jobs: int
) -> Iterator[list[SetKey]]:
    """Make the sets of ``keys``, and yield those that were stored since the last time.

    The sets are those that :func:`~skymask_gpu.federation.board.making.make_sets` makes. A recipe
    that fails leaves the others alone; its error is raised when they are done.

    Args:
        config: the board's file, which each process reads for itself.
        data_dir: the folder with the data set's files, or None.
        changes: settings that replace those of the file, each as ``"key=value"``.
        keys: the sets to make.
        folder: the board's folder.
        jobs: the number of processes that work at the same time; they share the threads.

    Raises:
        ValueError: see :func:`~skymask_gpu.federation.board.making.make_sets`.
    """
    # Sets that are made again lie there already, so a file counts once it has been replaced.
    before = {key: _stored_at(folder, key) for key in keys}
    with ProcessPoolExecutor(jobs, processes(), initializer=_begin, initargs=(threads_per_job(jobs),)) as pool:
        futures = [pool.submit(_make, config, data_dir, changes, own, folder) for own in by_cell(keys).values()]
        try:
            running = set(futures)
            while running:
                running = wait(running, timeout=_POLL_SECONDS).not_done
                stored = [key for key, then in before.items() if _stored_at(folder, key) != then]
                for key in stored:
                    del before[key]
                if stored:
                    yield stored
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for future in futures:
        future.result()


def _stored_at(folder: Path, key: SetKey) -> int | None:
    path = folder / SETS / key.file_name
    return path.stat().st_mtime_ns if path.exists() else None


def _begin(num_threads: int) -> None:
    """Ctrl-C reaches every process of the terminal; the processes of the pool end silently."""
    end_with_parent()
    torch.set_num_threads(num_threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _make(config: Path, data_dir: Path | None, changes: Sequence[str], keys: list[SetKey], folder: Path) -> None:
    for _ in make_sets(read_board(config, changes).with_data(data_dir), keys, folder):
        pass
