"""Oracle of AF2 Alg. 22 as the seed document states it."""

import numpy as np

from structattn_jax.reference import numerics


def invariant_point_attention(
  single: np.ndarray,
  pair: np.ndarray | None,
  rotation: np.ndarray,
  translation: np.ndarray,
  mask: np.ndarray,
  *,
  q_scalar: np.ndarray,
  k_scalar: np.ndarray,
  v_scalar: np.ndarray,
  q_point: np.ndarray,
  kv_point: np.ndarray,
  attention_2d: np.ndarray | None,
  output_projection: np.ndarray,
  head_weights: np.ndarray,
  num_point_qk: int,
) -> np.ndarray:
  """IPA of every real residue; rows of masked residues are zero.

  Weights are flat as in the seed: [c_s, n_head * ...]; `head_weights` [n_head]
  multiply the point term (the seed uses ones).
  """
  n_res = len(single)
  n_head = len(head_weights)

  def split(weights: np.ndarray, *shape: int) -> np.ndarray:
    return (single @ weights).reshape(n_res, n_head, -1, *shape)

  q, k, v = split(q_scalar), split(k_scalar), split(v_scalar)
  q_local = split(q_point).reshape(n_res, n_head, -1, 3)
  kv_local = split(kv_point).reshape(n_res, n_head, -1, 3)

  def to_global(points: np.ndarray) -> np.ndarray:
    rotated = np.einsum('nij,nhpj->nhpi', rotation, points)
    return rotated + translation[:, None, None]

  q_global = to_global(q_local)
  k_global = to_global(kv_local[:, :, :num_point_qk])
  v_global = to_global(kv_local[:, :, num_point_qk:])

  scalar_weight = np.sqrt(1 / (3 * q.shape[-1]))
  point_weight = np.sqrt(1 / (3 * num_point_qk * 9 / 2))
  features = []
  for i in range(n_res):
    logits = scalar_weight * np.einsum('hc,khc->hk', q[i], k)
    squared = np.sum((q_global[i] - k_global) ** 2, (-1, -2)).T
    logits = logits - 0.5 * point_weight * head_weights[:, None] * squared
    if pair is not None and attention_2d is not None:
      logits = logits + np.sqrt(1 / 3) * (pair[i] @ attention_2d).T
    weights = np.zeros_like(logits)
    if mask[i]:
      weights[:, mask] = numerics.softmax(logits[:, mask], axis=-1)
    result_point = np.einsum('hk,khpx->hpx', weights, v_global)
    local = (result_point - translation[i]) @ rotation[i]
    row = [
      np.einsum('hk,khc->hc', weights, v).ravel(),
      local.ravel(),
      np.sqrt(np.sum(local**2, -1) + 1e-8).ravel(),
    ]
    if pair is not None:
      row.append((weights @ pair[i]).ravel())
    features.append(np.concatenate(row))
  return np.where(mask[:, None], np.stack(features) @ output_projection, 0)
