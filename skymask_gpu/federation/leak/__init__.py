"""The privacy audit: how often a private image comes back from the gradient of one client.

*Random Gradient Masking as a Defensive Measure to Deep Leakage in Federated Learning* (Kim and
Park, arXiv 2408.08430) asks how strongly a gradient must be obfuscated until nothing leaks. The
answer depends on the attacker: who knows the obfuscation needs more of it. Victims, strengths and
restarts are the rows of one batch.

| file | what |
| --- | --- |
| ``config.py`` | ``Audit``: the TOML file |
| ``obfuscation.py`` | what a client does to its gradient before it sends it |
| ``victims.py`` | ``Victims``: private images, their gradients, and the images they are told from |
| ``attacking.py`` | ``batches``, ``attacked``: from obfuscated gradients to images, and how alike these are |
| ``judging.py`` | ``lines``: shares of images that leaked, with intervals |
| ``thresholds.py`` | the weakest strength without a leak, and its search; the bound from counting |
| ``recording.py`` | ``attack_all``: the file of results, and how a stopped audit goes on |
| ``tables.py``, ``pictures.py``, ``page.py`` | the results for people |
"""
