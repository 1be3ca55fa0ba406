"""Convolutions: the sums over the summands of a weight gradient, and the convolution whose backward a probe shares."""

from .api import GradSigns, conv2d_grad_signs
from .layer import Handoff, conv2d, gradient_sums, plan

__all__ = ["GradSigns", "Handoff", "conv2d", "conv2d_grad_signs", "gradient_sums", "plan"]
