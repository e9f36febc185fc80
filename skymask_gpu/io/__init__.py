"""Files that users bring, and files that runs write. Nothing is ever unpickled.

| file | what |
| --- | --- |
| ``files.py`` | files that are whole or not there, locks, tensors, and lines of JSON |
| ``text_tables.py`` | small tables as Markdown and CSV |
| ``user_files.py`` | what users bring to ``aggregate``: a model's class, updates, root data |
| ``torchrun.py`` | the same under ``torchrun``: each rank reads its own columns |
"""
