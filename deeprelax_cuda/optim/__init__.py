"""The optimizers: each a plain `torch.optim.Optimizer`, each a short file over `base`, the loop that they share."""

from deeprelax_cuda.optim.entropy_sgd import EntropySGD

__all__ = ["EntropySGD"]
