"""Deep Relaxation optimizers for PyTorch: fused steps with the same bits on every backend."""

from deeprelax_cuda import backends, functional
from deeprelax_cuda.batch_norm import recalibrate_batch_norm
from deeprelax_cuda.functional import OuterStep
from deeprelax_cuda.noise import derive_seed
from deeprelax_cuda.optim import SGLD, EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.replicas import ElasticSGD, Parle

__all__ = [
    "SGLD",
    "ElasticSGD",
    "EntropySGD",
    "HamiltonJacobi",
    "HeatSGD",
    "OuterStep",
    "Parle",
    "backends",
    "derive_seed",
    "functional",
    "recalibrate_batch_norm",
]

__version__ = "0.1.0"
