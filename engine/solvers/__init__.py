"""The solvers: ways to train masks, each in a file of its own that registers it.

| file | what |
| --- | --- |
| ``reference.py`` | the definition in plain PyTorch; every other solver is checked against it |
| ``fused.py`` | exact; one pass over updates and logits per step, by kernels |
| ``collapsed.py`` | approximate; B bins per column instead of R rows: a step costs the same for any R |
| ``vmap.py`` | exact; all rows at once by ``torch.func.vmap``, without kernels |
| ``solver.py`` | ``Solver``, the registry ``SOLVERS``, and the decorator ``@solver`` |
| ``solution.py`` | what a solver returns, and what ``fused`` and ``collapsed`` share |

Which one runs, and what ``auto`` means, is in ``engine/choice.py``.
"""

# Importing a solver registers it. This order is that of errors, of ``skymask-gpu info`` and of the
# benchmark, which checks every solver against those before it.
# isort: off
from skymask_gpu.engine.solvers import reference, fused, collapsed, vmap  # noqa: F401
from skymask_gpu.engine.solvers.solver import COST_SOURCES, SOLVERS, Solver, solver

__all__ = ["COST_SOURCES", "SOLVERS", "Solver", "solver"]
