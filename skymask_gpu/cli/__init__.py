"""The command line, ``skymask-gpu``.

| file | what |
| --- | --- |
| ``entry.py`` | the options of all commands, and what happens after an error |
| ``aggregate.py`` | ``aggregate``: one round from files |
| ``federation.py`` | ``run``, ``sweep``, ``data``: simulated federations |
| ``report.py`` | ``report``: tables, pictures and a page of what folders hold |
| ``export.py`` | ``export``: finished rounds to a tracker |
| ``board.py`` | ``board``: every attack against every rule, on the same honest updates |
| ``arena.py`` | ``arena``: rules against attacks in whole runs, scored by the worst attack |
| ``leak.py`` | ``leak``: how many private images can be reconstructed from gradients |
| ``profile.py`` | ``profile``: where a round's time goes |
| ``bench.py`` | ``bench``: the benchmark |
| ``example.py`` | ``example``: files to try ``aggregate`` on |
| ``info.py`` | ``info``: what can run here, and why not |
| ``console.py`` | printing, JSON answers, warnings and errors, which all commands share |
| ``options.py`` | options that several commands have |
"""

from skymask_gpu.cli.entry import app, main

__all__ = ["app", "main"]
