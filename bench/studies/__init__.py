"""Studies: each makes one table of the docs.

Run one with ``python -m skymask_gpu.bench.studies.NAME``.

| file | table |
| --- | --- |
| ``accuracy`` | docs/collapsed.md: which bits the collapsed solver gets wrong |
| ``many_clients`` | docs/collapsed.md: the learning rate and the number of clients |
| ``large`` | docs/performance.md: many clients, and large models, from disk |
| ``frozen_base`` | README.md: memory of two rounds with a frozen base of one GiB |
| ``costs`` | the constants by which ``solver="auto"`` chooses |
| ``few_clients`` | docs/verdict.md: 4 to 20 clients, one of them attacking |
| ``sign_flips`` | docs/verdict.md: a fifth of 10 to 100 clients flip the sign |
| ``flower`` | docs/flower.md: a Flower strategy beside the judgement itself |
| ``inversion`` | docs/privacy.md: images per CPU second, in one batch or one by one |
| ``privacy`` | docs/privacy.md: accuracy by strength, and whom SkyMask rejects |
| ``local_training`` | docs/federation.md: clients side by side or one by one |
| ``real_updates`` | no table: the attacked MNIST updates that the first two rest on |
"""
