"""The optimizers: each a plain `torch.optim.Optimizer`, each a short file over `base`, the loop that they share."""

from deeprelax_cuda.optim.entropy_sgd import EntropySGD
from deeprelax_cuda.optim.hamilton_jacobi import HamiltonJacobi
from deeprelax_cuda.optim.heat_sgd import HeatSGD
from deeprelax_cuda.optim.sgld import SGLD

__all__ = ["SGLD", "EntropySGD", "HamiltonJacobi", "HeatSGD"]
