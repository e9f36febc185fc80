"""What the kernels share; each file is for one of the compilers, or for all.

| file | what |
| --- | --- |
| ``checks.py`` | checks of tensors and numbers, before compiled code reads their memory |
| ``triton.py`` | Triton: the training step, how kernels are decorated, launched and listed |
| ``nvrtc.py`` | CUDA C++: compile, load and launch |
| ``cpu.py`` | Numba: compiler options, tensors as flat arrays |
| ``threads.py`` | Numba: columns shared among torch's threads |
| ``vectors.py`` | Numba: code written in LLVM's vectors |
| ``cpu_step.py`` | Numba: the training step, 64 columns at a time |
"""
