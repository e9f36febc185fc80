"""SkyMask and the other rules within frameworks of federated learning.

| folder | what | extra |
| --- | --- | --- |
| ``flower/`` | strategies for a Flower server | ``flower`` |

Importing this package imports none of the frameworks.
"""
