"""Leaf ops: schema, fake, choice of implementation and autograd, one module per family.

This is the only room that knows which implementations exist. Users call what stands above it.
"""
