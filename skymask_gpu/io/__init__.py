"""Files: what users bring and what runs write; never a pickle.

| file | what |
| --- | --- |
| ``files.py`` | whole files or none, locks, tensors and lines of JSON |
| ``user_files.py`` | a model's class, state dicts, updates and root data of ``skymask-gpu aggregate`` |
| ``torchrun.py`` | the same under ``torchrun``: each rank reads its own columns |
"""
