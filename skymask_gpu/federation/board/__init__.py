"""The board: every attack on the same honest updates, judged by every rule, in one table.

The honest clients of each recipe and seed are trained once. In each of the board's rounds, every
attack replaces the malicious clients' updates, and what SkyMask's rules need to judge the result is
stored: a mask set. Stored sets can be judged again without training.

| file | what |
| --- | --- |
| ``config.py`` | ``Board``: the TOML file, its recipes, attacks and rules |
| ``mask_set.py`` | ``MaskSet``: what is stored, one file per recipe, seed, attack and round |
| ``making.py`` | ``make_sets``: train, attack, train masks, store |
| ``judging.py`` | ``judge_sets``: from stored sets to the lines of the table |
| ``page.py`` | the table as CSV, Markdown and an HTML page with heat maps |
"""
