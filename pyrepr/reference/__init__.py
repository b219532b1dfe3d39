"""The truth: every family in plain PyTorch, readable, differentiable and right in float64. No cleverness."""
