"""Benchmarks of the kernels; run from a clone, or as `python -m deeprelax_cuda.bench.cpu_step`."""
