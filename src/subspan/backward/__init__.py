"""Backward-side layers: linear layers whose backward pass makes the low-rank gradient and nothing larger."""

from subspan.backward.install import Handle, project_backward

__all__ = ["Handle", "project_backward"]
