"""Oracle of Pallatom's sparse pairs, atom transformer, encoder and decoder."""

from collections.abc import Mapping
from typing import Any

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
    own = _below(params, f'blocks.{block}.')
    q = atom_transformer_block(own, q, c, p, neighbor_idx, valid_mask, num_head)
  return q


def atom_feature_encoder(
  params: Params,
  ref_pos: np.ndarray,
  ref_element: np.ndarray,
  ref_space_uid: np.ndarray,
  s_input: np.ndarray,
  z_input: np.ndarray,
  r_scaled: np.ndarray,
  tok_idx: np.ndarray,
  atom_mask: np.ndarray | None = None,
  *,
  num_block: int,
  num_head: int,
  window_size: int = 32,
) -> tuple[np.ndarray, ...]:
  """Steps 1 to 17 for one item; returns s_i, q_skip, c_skip, p_skip, c_l."""
  linear, norm = _modules(params)
  n_atom, n_token = len(tok_idx), len(s_input)
  real = np.ones(n_atom, bool) if atom_mask is None else atom_mask
  ref_pos = np.where(real[:, None], ref_pos, 0)
  ref_element = np.where(real[:, None], ref_element, 0)
  r_scaled = np.where(real[:, None], r_scaled, 0)
  neighbours, window = build_sparse_pairs(tok_idx, window_size)
  same = ref_space_uid[:, None] == ref_space_uid[neighbours]
  live = window & same & real[:, None] & real[neighbours]

  group = n_atom // n_token
  features = np.concatenate(
    [x.reshape(n_atom // group, -1)[tok_idx] for x in (ref_pos, ref_element)],
    1,
  )
  c = c_skip = linear('proj_fref_c', features)  # Steps 1, 2, 4.
  d = ref_pos[:, None] - ref_pos[neighbours]  # Step 5.
  v = same[..., None].astype(np.float64)  # Step 6.
  p = linear('proj_d_vec', d) * v  # Step 7.
  squared = np.sum(d * d, -1, keepdims=True)
  p = p + linear('proj_inv_sq', 1 / (1 + squared)) * v  # Step 8.
  p = p + linear('proj_v', v) * v  # Step 9.
  hidden = np.maximum(c, 0)  # Step 10.
  p = p + linear('proj_cl_pair', hidden)[:, None]
  p = p + linear('proj_cm_pair', hidden)[neighbours]
  p = p_skip = p * live[..., None]  # Step 11.
  q = c + linear('proj_r_scaled', r_scaled)  # Step 12.
  c = c + linear('proj_s_init', norm('norm_s_init', s_input)[tok_idx])
  z = z_input[tok_idx[:, None], tok_idx[neighbours]]  # Step 14.
  p = p + linear('proj_z_init', norm('norm_z_init', z))
  p = p + _pair_mlp(params, p)  # Step 15.
  q = atom_transformer(  # Step 16.
    _below(params, 'transformer.'),
    q,
    c,
    p,
    neighbours,
    live,
    num_block=num_block,
    num_head=num_head,
  )
  q = np.where(real[:, None], q, 0)
  pooled = np.maximum(linear('proj_agg', q), 0)  # Step 17.
  s_i = np.zeros((n_token, pooled.shape[1]))
  for token in range(n_token):
    own = real & (tok_idx == token)
    s_i[token] = pooled[own].sum(0) / max(own.sum(), 1)
  return s_i, q, c_skip, p_skip, c


def atom_attention_decoder(
  params: Params,
  q_skip: np.ndarray,
  p_skip: np.ndarray,
  c_skip: np.ndarray,
  c: np.ndarray,
  s: np.ndarray,
  z: np.ndarray,
  tok_idx: np.ndarray,
  atom_mask: np.ndarray | None = None,
  *,
  num_block: int,
  num_head: int,
  window_size: int = 32,
) -> tuple[np.ndarray, ...]:
  """Steps 1 to 6 for one item; returns q, p, r_update, c_out."""
  linear, norm = _modules(params)
  real = np.ones(len(tok_idx), bool) if atom_mask is None else atom_mask
  neighbours, live = build_sparse_pairs(tok_idx, window_size)
  live = live & real[:, None] & real[neighbours]
  q = linear('proj_s_q', norm('norm_s_q', s[tok_idx])) + q_skip  # Step 1.
  pairs = z[tok_idx[:, None], tok_idx[neighbours]]
  p = linear('proj_z', norm('norm_z', pairs)) + p_skip  # Step 2.
  p = (p + _pair_mlp(params, p)) * live[..., None]  # Step 3.
  q = atom_transformer(  # Step 4.
    _below(params, 'transformer.'),
    q,
    c,
    p,
    neighbours,
    live,
    num_block=num_block,
    num_head=num_head,
  )
  q = np.where(real[:, None], q, 0)
  r_update = linear('proj_r', norm('norm_q_out', q))  # Step 5.
  r_update = np.where(real[:, None], r_update, 0)
  c_out = linear('proj_s_c', norm('norm_s_c', s[tok_idx])) + c_skip  # Step 6.
  return q, p, r_update, c_out


def _modules(params: Params) -> tuple[Any, Any]:
  """Linear and LayerNorm by name."""

  def linear(name: str, x: np.ndarray) -> np.ndarray:
    return x @ params[f'{name}.weight'].T

  def norm(name: str, x: np.ndarray) -> np.ndarray:
    return numerics.layer_norm(
      x, params[f'{name}.weight'], params[f'{name}.bias']
    )

  return linear, norm


def _pair_mlp(params: Params, p: np.ndarray) -> np.ndarray:
  """Four layers, ReLUs in between, none before the first."""
  linear, _ = _modules(params)
  for layer in (0, 2, 4, 6):
    p = linear(f'mlp_p.{layer}', np.maximum(p, 0) if layer else p)
  return p


def _below(params: Params, prefix: str) -> Params:
  return {
    name.removeprefix(prefix): value
    for name, value in params.items()
    if name.startswith(prefix)
  }
