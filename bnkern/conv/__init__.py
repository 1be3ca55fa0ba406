"""Convolutions as an operation: the signs of a gradient's summands, and a Conv2d that a probe can watch."""

from .api import GradSigns, conv2d_grad_signs
from .layer import Handoff, conv2d, gradient_sums, takes_gradient

__all__ = ["GradSigns", "Handoff", "conv2d", "conv2d_grad_signs", "gradient_sums", "takes_gradient"]
