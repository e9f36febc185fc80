"""The command line, ``skymask-gpu``.

| file | what |
| --- | --- |
| ``entry.py`` | options of all commands, and what becomes of an error |
| ``aggregate.py`` | ``aggregate``: one round from files |
| ``federation.py`` | ``run``, ``sweep``, ``report``, ``data``: simulated federations |
| ``profile.py`` | ``profile``: where a round's time goes |
| ``bench.py`` | ``bench``: the benchmark |
| ``example.py`` | ``example``: files to try ``aggregate`` on |
| ``info.py`` | ``info``: what can run here |
| ``console.py`` | what all commands share |
"""

from skymask_gpu.cli.entry import app, main

__all__ = ["app", "main"]
