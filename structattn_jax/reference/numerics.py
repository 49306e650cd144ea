"""Softmax and layer norm in float64, as the seed documents define them."""

import numpy as np


def softmax(logits: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
  """exp(l - max l) / sum exp(l - max l) over `axis`."""
  weights = np.exp(logits - np.max(logits, axis=axis, keepdims=True))
  return weights / np.sum(weights, axis=axis, keepdims=True)


def layer_norm(
  x: np.ndarray,
  scale: np.ndarray | float = 1.0,
  offset: np.ndarray | float = 0.0,
) -> np.ndarray:
  """(x - mean) / sqrt(var + 1e-5) * scale + offset over the last axis."""
  mean = np.mean(x, axis=-1, keepdims=True)
  variance = np.var(x, axis=-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + 1e-5) * scale + offset
