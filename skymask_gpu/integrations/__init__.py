"""SkyMask and the other rules within frameworks of federated learning.

| file | what | extra |
| --- | --- | --- |
| ``flower/`` | strategies for a Flower server | ``flower`` |
| ``nvflare.py`` | an aggregator for NVIDIA FLARE | ``nvflare`` |
| ``byzfl.py`` | rules as ByzFL's aggregators; ByzFL's parts for plugins | ``byzfl`` |

Importing this package imports none of the frameworks.
"""
