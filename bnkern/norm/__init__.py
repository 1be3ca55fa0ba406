"""Batch norm as an operation: its public functions, autograd, torch's operator, vmap, and several ranks."""

from .api import Moments, add_act, batch_norm, channel_moments, explain
from .ranks import ranks_of
from .sync import sync_batch_norm

__all__ = ["Moments", "add_act", "batch_norm", "channel_moments", "explain", "ranks_of", "sync_batch_norm"]
