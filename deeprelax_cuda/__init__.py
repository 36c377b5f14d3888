"""Deep Relaxation optimizers for PyTorch: fused steps with the same bits on every backend."""

from deeprelax_cuda.noise import derive_seed

__all__ = ["derive_seed"]

__version__ = "0.1.0"
