"""Benchmarks: a speed is printed only where its result was checked, beside what ran with it.

| file | what |
| --- | --- |
| ``cases`` | models, root samples and updates of any number of clients |
| ``providers``, ``rules``, ``solvers`` | what is timed, and how its result is checked |
| ``points``, ``run``, ``measure``, ``ratio`` | the runner: order and limits, checks, times, intervals |
| ``table``, ``summary``, ``plots`` | rows and their CSV file, Markdown, PNG |
| ``against`` | two revisions side by side |
| ``gpu``, ``gpu_figures`` | what the owner of a GPU runs |
| ``studies/`` | a command per table of the docs |
"""
