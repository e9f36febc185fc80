"""SkyMask in Flower: 20 clients learn digits, some of them attack, and some send nonsense.

| file | what |
| --- | --- |
| ``task.py`` | the model, each client's data, and local training |
| ``client.py`` | what honest, malicious and malformed clients send |
| ``server.py`` | the strategy, and a table of verdicts per round |
"""
