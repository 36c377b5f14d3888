"""The preprocessing of natural images: each image to one contrast, then neighbouring pixels decorrelated."""

from __future__ import annotations

import torch
from torch import Tensor

#: In grey levels of 256: an image with less contrast is flat, and what is left in it is rounding.
LEAST_CONTRAST = 1.0
#: Added to the eigenvalues of the covariance. Source: pylearn2's ``ZCA(filter_bias=0.1)`` after contrast normalisation to norm
#: 55, about sqrt(3072), which is a standard deviation of 1: the CIFAR-10 of Goodfellow et al., "Maxout networks", ICML 2013,
#: whose preprocessing Springenberg et al., "Striving for simplicity", 2014, took over for All-CNN.
REGULARIZATION = 0.1
#: Images at a time, which bounds the memory beside the result.
CHUNK = 10_000


def contrast_normalized(pixels: Tensor) -> Tensor:
    """Return images of mean 0 and standard deviation 1 each, float32 of shape (images, numbers in one).

    Args:
        pixels: uint8, of shape (images, ...).
    """
    images = pixels.flatten(1).float()
    images -= images.mean(dim=1, keepdim=True)
    images /= images.square().mean(dim=1, keepdim=True).sqrt().clamp(min=LEAST_CONTRAST)
    return images


class Zca:
    """Zero-phase whitening: W = V diag(l + `REGULARIZATION`)^(-1/2) V^T for eigenvectors V, eigenvalues l of the covariance.

    Of all whitening transforms this one leaves the images closest to what they were.
    """

    def __init__(self, images: Tensor) -> None:
        """Take mean and covariance from ``images``, float32 of shape (images, numbers in one)."""
        self.mean = images.mean(dim=0)
        covariance = torch.zeros(images.shape[1], images.shape[1])
        for chunk in torch.split(images, CHUNK):
            centred = chunk - self.mean
            covariance.addmm_(centred.T, centred, alpha=1 / len(images))
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        self.matrix = (eigenvectors * (eigenvalues.clamp(min=0) + REGULARIZATION).rsqrt()) @ eigenvectors.T

    def whiten_(self, images: Tensor) -> Tensor:
        """Whiten ``images``, of the shape and type of those it was made of, in place."""
        for chunk in torch.split(images, CHUNK):
            chunk.copy_((chunk - self.mean) @ self.matrix)
        return images
