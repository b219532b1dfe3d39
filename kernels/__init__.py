"""Triton kernels, installed as ``pyrepr.kernels``: one folder per family, reached through ``pyrepr.ops`` only."""
