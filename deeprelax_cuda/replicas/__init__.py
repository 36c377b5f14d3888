"""Replicas: Elastic-SGD and Parle, with all replicas in one process or one on each rank of a process group."""

from deeprelax_cuda.replicas.elastic_sgd import ElasticSGD
from deeprelax_cuda.replicas.parle import Parle

__all__ = ["ElasticSGD", "Parle"]
