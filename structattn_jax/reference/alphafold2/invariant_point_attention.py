"""Oracle of AF2 Alg. 22: released monomer and multimer, and the seed's form."""

from collections.abc import Mapping

import numpy as np

from structattn_jax.reference import numerics

Params = Mapping[str, Mapping[str, np.ndarray]]


def _linear(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  y = np.tensordot(x, params[name]['weights'], axes=1)
  return y + params[name].get('bias', 0)


def project(
  params: Params,
  single: np.ndarray,
  *,
  parameterisation: str,
  num_head: int,
  num_scalar_qk: int,
  num_point_qk: int,
) -> tuple[np.ndarray, ...]:
  """q, k, v [n_res, n_head, c] and local points [n_res, n_head, p, 3]."""
  n_res = len(single)

  def heads(name: str) -> np.ndarray:
    return _linear(params, name, single).reshape(n_res, num_head, -1)

  def split(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    return x[:, :, :size], x[:, :, size:]

  if parameterisation == 'multimer':
    q, k, v = (heads(f'{x}_scalar_projection') for x in 'qkv')

    def points(x: str) -> np.ndarray:  # Per head all x, all y, all z.
      flat = heads(f'{x}_point_projection/point_projection')
      return np.moveaxis(flat.reshape(n_res, num_head, 3, -1), 2, -1)

    return q, k, v, points('q'), points('k'), points('v')

  if parameterisation == 'monomer':
    k, v = split(heads('kv_scalar'), num_scalar_qk)

    def local(name: str) -> np.ndarray:  # All x, all y, all z.
      flat = _linear(params, name, single)
      return np.moveaxis(flat.reshape(n_res, 3, num_head, -1), 1, -1)

  else:  # The seed.
    k, v = heads('k_scalar'), heads('v_scalar')

    def local(name: str) -> np.ndarray:  # Point by point x, y, z.
      return heads(name).reshape(n_res, num_head, -1, 3)

  k_point, v_point = split(local('kv_point_local'), num_point_qk)
  return heads('q_scalar'), k, v, local('q_point_local'), k_point, v_point


def invariant_point_attention(
  params: Params,
  single: np.ndarray,
  pair: np.ndarray | None,
  rotation: np.ndarray,
  translation: np.ndarray,
  mask: np.ndarray,
  *,
  head_weights: np.ndarray,
  parameterisation: str,
  num_head: int,
  num_scalar_qk: int,
  num_point_qk: int,
) -> np.ndarray:
  """IPA of every real residue; rows of masked residues are zero.

  `params` holds {module: {name: array}} below the module; `head_weights`
  [n_head] multiply the point term (AF2: softplus of a parameter, the seed: 1).
  """
  n_res = len(single)
  q, k, v, *local_points = project(
    params,
    single,
    parameterisation=parameterisation,
    num_head=num_head,
    num_scalar_qk=num_scalar_qk,
    num_point_qk=num_point_qk,
  )
  q_global, k_global, v_global = (
    np.einsum('nij,nhpj->nhpi', rotation, x) + translation[:, None, None]
    for x in local_points
  )
  scalar_weight = np.sqrt(1 / (3 * num_scalar_qk))
  point_weight = np.sqrt(1 / (3 * num_point_qk * 9 / 2))
  features = []
  for i in range(n_res):
    logits = scalar_weight * np.einsum('hc,khc->hk', q[i], k)
    squared = np.sum((q_global[i] - k_global) ** 2, (-1, -2)).T
    logits = logits - 0.5 * point_weight * head_weights[:, None] * squared
    if pair is not None:
      bias = _linear(params, 'attention_2d', pair[i])
      logits = logits + np.sqrt(1 / 3) * bias.T
    weights = np.zeros_like(logits)
    if mask[i]:
      weights[:, mask] = numerics.softmax(logits[:, mask], axis=-1)
    result_point = np.einsum('hk,khpx->hpx', weights, v_global)
    local = (result_point - translation[i]) @ rotation[i]
    squared_norm = np.sum(local**2, -1)
    if parameterisation == 'multimer':
      norm = np.sqrt(np.maximum(squared_norm, 1e-16))
    else:
      norm = np.sqrt(squared_norm + 1e-8)
    if parameterisation != 'seed':
      local = np.moveaxis(local, -1, 0)  # Blocks of x, y and z.
    row = [np.einsum('hk,khc->hc', weights, v), local, norm]
    if pair is not None:
      row.append(weights @ pair[i])
    features.append(np.concatenate([x.ravel() for x in row]))
  output = _linear(params, 'output_projection', np.stack(features))
  return np.where(mask[:, None], output, 0)
