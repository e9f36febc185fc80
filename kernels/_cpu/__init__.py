"""CPU implementations in Numba; imported only from inside the public functions."""
