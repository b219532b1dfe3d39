"""Benchmarks, installed as ``pyrepr.benchmarks``: ``pyrepr bench`` and ``pytest benchmarks`` run the same workloads."""
