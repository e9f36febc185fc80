"""Wrong shapes, dtypes, strides and devices: every public kernel names the argument, and none reads or writes other memory."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from skymask_gpu import kernels

SCRIPT = Path(__file__).with_name("hostile_arguments.py")
# Sizes tried of each argument spoilt in each way.
EXAMPLES = 3


def test_hostile_arguments_are_refused_by_name_and_nothing_dies() -> None:
    command = [sys.executable, "-P", str(SCRIPT), str(EXAMPLES)]
    # many small calls: threads would only wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    called = done.stdout.split()
    assert done.returncode == 0, (
        f"{called[-1] if called else 'nothing'} failed or died ({done.returncode}):\n{done.stderr[-3000:]}"
    )
    assert done.stdout.endswith("all refused\n")
    assert set(called[:-2]) == set(public_kernels())


def public_kernels() -> list[str]:
    """Functions of ``kernels/*/__init__.py`` that have a plain twin in ``reference.py``."""
    names = []
    for file in Path(kernels.__file__).parent.glob("*/reference.py"):
        public, twins = (
            {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
            for path in (file.with_name("__init__.py"), file)
        )
        names += [name for name in public if f"{name}_reference" in twins]
    return names
