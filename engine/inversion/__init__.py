"""Gradient inversion: from a gradient that a client sent back to the sample it was computed on.

Many victims, strengths of obfuscation and restarts are one batch: a row each, with its own
gradient, curvature and stop. *Random Gradient Masking as a Defensive Measure to Deep Leakage in
Federated Learning* (Kim and Park, arXiv 2408.08430) attacks by iDLG. What an attacker knows about
an obfuscated entry is in ``objectives.py``.

| file | what |
| --- | --- |
| ``rows.py`` | ``RowGradients``: each row's gradient, differentiable once more |
| ``chain.py`` | the same by hand for layers that follow each other, which is several times as fast |
| ``objectives.py`` | ``Known``, ``Matching``: what an attacker knows, and how far a candidate is from it |
| ``lbfgs.py``, ``adam.py`` | minimisers of many rows: L-BFGS; Adam on the gradient's sign |
| ``curvature.py`` | what the last steps of L-BFGS taught each row about its curvature |
| ``labels.py``, ``rank_one.py`` | what needs no search: a sample's label; the input of a linear layer |
"""

from skymask_gpu.engine.inversion.adam import minimise_by_sign
from skymask_gpu.engine.inversion.labels import labels_from_gradients
from skymask_gpu.engine.inversion.lbfgs import Minimised, minimise
from skymask_gpu.engine.inversion.objectives import SCALE, Known, Matching, total_variation
from skymask_gpu.engine.inversion.rank_one import input_from_linear_layer
from skymask_gpu.engine.inversion.rows import RowGradients

__all__ = [
    "SCALE",
    "Known",
    "Matching",
    "Minimised",
    "RowGradients",
    "input_from_linear_layer",
    "labels_from_gradients",
    "minimise",
    "minimise_by_sign",
    "total_variation",
]
