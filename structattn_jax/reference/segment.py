"""Segment operations by plain loops."""

import numpy as np

from structattn_jax.reference import numerics


def _members(
  segment_ids: np.ndarray, mask: np.ndarray | None, segment: int
) -> np.ndarray:
  chosen = segment_ids == segment
  return chosen if mask is None else chosen & mask


def segment_sum(
  values: np.ndarray,
  segment_ids: np.ndarray,
  num_segments: int,
  mask: np.ndarray | None = None,
) -> np.ndarray:
  """Sum of the kept rows of each segment."""
  out = np.zeros((num_segments, *values.shape[1:]), np.float64)
  for t in range(num_segments):
    out[t] = values[_members(segment_ids, mask, t)].sum(0)
  return out


def segment_mean(
  values: np.ndarray,
  segment_ids: np.ndarray,
  num_segments: int,
  mask: np.ndarray | None = None,
) -> np.ndarray:
  """Mean of the kept rows of each segment, 0 if there are none."""
  out = segment_sum(values, segment_ids, num_segments, mask)
  for t in range(num_segments):
    out[t] /= max(_members(segment_ids, mask, t).sum(), 1)
  return out


def segment_max(
  values: np.ndarray,
  segment_ids: np.ndarray,
  num_segments: int,
  mask: np.ndarray | None = None,
) -> np.ndarray:
  """Largest kept value of each segment, 0 if there are none."""
  out = np.zeros((num_segments, *values.shape[1:]), np.float64)
  for t in range(num_segments):
    rows = values[_members(segment_ids, mask, t)]
    if len(rows):
      out[t] = rows.max(0)
  return out


def segment_softmax(
  logits: np.ndarray,
  segment_ids: np.ndarray,
  num_segments: int,
  mask: np.ndarray | None = None,
) -> np.ndarray:
  """Softmax over the kept rows of each segment, 0 for masked rows."""
  out = np.zeros(logits.shape, np.float64)
  for t in range(num_segments):
    chosen = _members(segment_ids, mask, t)
    if chosen.any():
      out[chosen] = numerics.softmax(logits[chosen], axis=0)
  return out


def segment_attention(
  query: np.ndarray,
  key: np.ndarray,
  value: np.ndarray,
  segment_ids: np.ndarray,
  mask: np.ndarray | None = None,
) -> np.ndarray:
  """Attention of each segment's query over the kept rows of that segment."""
  n_segment, n_head, d_head = query.shape
  out = np.zeros((n_segment, n_head, value.shape[-1]), np.float64)
  for t in range(n_segment):
    chosen = _members(segment_ids, mask, t)
    if chosen.any():
      logits = np.einsum('hd,nhd->nh', query[t], key[chosen]) / np.sqrt(d_head)
      weights = numerics.softmax(logits, axis=0)
      out[t] = np.einsum('nh,nhd->hd', weights, value[chosen])
  return out
