"""Pallatom: ours and the published form, in JAX and PyTorch."""
