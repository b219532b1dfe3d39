"""Triton kernels, installed as ``pyrepr.kernels``: one module per family, reached through ``pyrepr.ops`` only."""
