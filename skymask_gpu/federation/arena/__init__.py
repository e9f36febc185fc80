"""The arena: rules against attacks in whole runs, where a rule is as good as its worst attack.

Everything is played as cells of a sweep (:mod:`skymask_gpu.federation.sweep`). First come the
warm-ups, which make the models that trained runs start from, and then the runs with attackers and
without.

| file | what |
| --- | --- |
| ``config.py`` | ``Arena``: what a file asks for, and the run of each of its cells |
| ``scoring.py`` | the score of a run, of an attack over seeds, and of a rule: its worst attack |
| ``page.py`` | ``write_arena``: JSON, Markdown and the page, whose rows sort and filter |
"""
