"""Parle and Elastic-SGD as the tests of all methods make them: of one replica, from its parameters alone."""

from __future__ import annotations

import inspect
from typing import Any

from deeprelax_cuda.replicas import ElasticSGD, Parle


class LoneParle(Parle):
    """Parle of a single replica, with noise, which is coupled to itself: its consensus is its own average."""

    def __init__(self, params: Any, lr: Any = 0.1, **options: Any) -> None:
        super().__init__(lr=lr, replicas=[params], **options)


class LoneElasticSGD(ElasticSGD):
    """Elastic-SGD of a single replica, which is its own mean."""

    def __init__(self, params: Any, lr: Any = 0.1, **options: Any) -> None:
        super().__init__(lr=lr, replicas=[params], **options)


for lone in (LoneParle, LoneElasticSGD):
    named = inspect.signature(lone.__base__).parameters
    of_one = [p for name, p in named.items() if name not in ("replicas", "group")]
    lone.__signature__ = inspect.Signature(of_one)
