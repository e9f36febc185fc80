"""Benchmarks: a speed is printed only where the results agree, and only beside something measured in the same run."""
