"""The board: every attack on the same honest updates, judged by every rule, in one table.

The honest clients of each recipe and seed are trained once. In each of the board's rounds, every
attack replaces the malicious clients' updates, and what SkyMask's rules need to judge the result is
stored: a mask set. Stored sets can be judged again without training.

| file | what |
| --- | --- |
| ``config.py`` | ``Board``: the TOML file, its recipes, attacks and rules |
| ``mask_set.py`` | ``MaskSet``: what is stored, one file per recipe, seed, attack and round |
| ``making.py`` | ``make_sets``: train, attack, train masks, store |
| ``side_by_side.py`` | several recipes and seeds at the same time, in processes of their own |
| ``judging.py`` | ``judge_sets``: from stored sets to the lines of the table |
| ``trajectories.py`` | whole runs under each attack with each rule, and how they ended |
| ``page.py`` | the tables as CSV, Markdown and an HTML page with heat maps |
"""
