"""``python -m skymask_gpu``."""

from skymask_gpu.cli import main

main()
