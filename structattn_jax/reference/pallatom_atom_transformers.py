"""Oracle of Pallatom's sparse pairs and atom transformer."""

from collections.abc import Mapping

import numpy as np

from structattn_jax.reference import numerics

Params = Mapping[str, np.ndarray]


def build_sparse_pairs(
  tok_idx: np.ndarray, window_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
  """All atoms within the residue window of each atom, padded with N - 1."""
  n_atom, half = len(tok_idx), window_size // 2
  neighbours = [
    [m for m in range(n_atom) if abs(tok_idx[a] - tok_idx[m]) < half]
    for a in range(n_atom)
  ]
  n_nbr = max(map(len, neighbours), default=0)
  index = np.full((n_atom, n_nbr), n_atom - 1, np.int64)
  valid = np.zeros((n_atom, n_nbr), bool)
  for a, own in enumerate(neighbours):
    index[a, : len(own)] = own
    valid[a, : len(own)] = True
  return index, valid


def atom_transformer_block(
  params: Params,
  q: np.ndarray,
  c: np.ndarray,
  p: np.ndarray,
  neighbor_idx: np.ndarray,
  valid_mask: np.ndarray,
  num_head: int,
) -> np.ndarray:
  """One block; `params` has torch's names, weights stored [out, in]."""

  def norm(name: str, x: np.ndarray) -> np.ndarray:
    return numerics.layer_norm(
      x, params[f'{name}.weight'], params[f'{name}.bias']
    )

  def linear(name: str, x: np.ndarray) -> np.ndarray:
    return x @ params[f'{name}.weight'].T

  n_atom, c_atom = q.shape
  heads = (n_atom, num_head, c_atom // num_head)
  query = linear('to_q', norm('norm_q', q)).reshape(heads)
  key = linear('to_k', norm('norm_c', c)).reshape(heads)
  value = linear('to_v', norm('norm_c', c)).reshape(heads)
  bias = linear('pair_bias', norm('norm_pair', p))
  attended = np.zeros(heads, np.float64)
  for a in range(n_atom):
    live = valid_mask[a]
    if not live.any():
      continue
    own = neighbor_idx[a, live]
    logits = np.einsum('hd,khd->kh', query[a], key[own])
    logits = logits / np.sqrt(heads[-1]) + bias[a, live]
    weights = numerics.softmax(logits, axis=0)
    attended[a] = np.einsum('kh,khd->hd', weights, value[own])
  q = q + linear('to_out', attended.reshape(n_atom, c_atom))
  hidden = np.maximum(linear('ff1', norm('norm_ff', q)), 0)
  return q + linear('ff2', hidden)


def atom_transformer(
  params: Params,
  q: np.ndarray,
  c: np.ndarray,
  p: np.ndarray,
  neighbor_idx: np.ndarray,
  valid_mask: np.ndarray,
  *,
  num_block: int,
  num_head: int,
) -> np.ndarray:
  """`num_block` blocks with the same c, p and neighbours."""
  for block in range(num_block):
    prefix = f'blocks.{block}.'
    own = {
      name.removeprefix(prefix): value
      for name, value in params.items()
      if name.startswith(prefix)
    }
    q = atom_transformer_block(own, q, c, p, neighbor_idx, valid_mask, num_head)
  return q
