"""Oracles of token <-> atom cross attention: the seed document's, and AF3's."""

import numpy as np

from structattn_jax.reference import numerics


def token_to_atom(
  atoms: np.ndarray,
  tokens: np.ndarray,
  atom_to_token: np.ndarray,
  w_q: np.ndarray,
  w_k: np.ndarray,
  w_v: np.ndarray,
  w_o: np.ndarray,
  *,
  normalise: str = 'heads',
  atom_mask: np.ndarray | None = None,
) -> np.ndarray:
  """Each atom queries its token; [n_atom, c_atom]."""
  queries = np.einsum('ac,chd->ahd', numerics.layer_norm(atoms), w_q)
  keys = np.einsum('tc,chd->thd', numerics.layer_norm(tokens), w_k)
  values = np.einsum('tc,chd->thd', numerics.layer_norm(tokens), w_v)
  out = np.zeros(atoms.shape, np.float64)
  for a, t in enumerate(atom_to_token):
    if atom_mask is not None and not atom_mask[a]:
      continue
    logits = np.einsum('hd,hd->h', queries[a], keys[t]) / np.sqrt(w_q.shape[-1])
    if normalise == 'heads':
      weights = numerics.softmax(logits, axis=0)
    else:  # One key per atom: its weight is 1 in every head.
      weights = np.ones_like(logits)
    out[a] = np.einsum('h,hd,hdc->c', weights, values[t], w_o)
  return out


def atom_to_token(
  atoms: np.ndarray,
  tokens: np.ndarray,
  atom_to_token: np.ndarray,
  w_q: np.ndarray,
  w_k: np.ndarray,
  w_v: np.ndarray,
  w_o: np.ndarray,
  *,
  atom_mask: np.ndarray | None = None,
) -> np.ndarray:
  """Each token queries its atoms; [n_token, c_token], 0 without atoms."""
  queries = np.einsum('tc,chd->thd', numerics.layer_norm(tokens), w_q)
  keys = np.einsum('ac,chd->ahd', numerics.layer_norm(atoms), w_k)
  values = np.einsum('ac,chd->ahd', numerics.layer_norm(atoms), w_v)
  out = np.zeros(tokens.shape, np.float64)
  for t in range(len(tokens)):
    own = atom_to_token == t
    if atom_mask is not None:
      own = own & atom_mask
    if not own.any():
      continue
    logits = np.einsum('hd,ahd->ah', queries[t], keys[own])
    weights = numerics.softmax(logits / np.sqrt(w_q.shape[-1]), axis=0)
    pooled = np.einsum('ah,ahd->hd', weights, values[own])
    out[t] = np.einsum('hd,hdc->c', pooled, w_o)
  return out


# AlphaFold 3's own encoder and decoder (Abramson et al. 2024, Suppl. Algs. 5-7
# and 24-26, as released), on flat atoms, one window after the other.


def atom_cross_att(
  params: dict[str, dict[str, np.ndarray]],
  atoms: dict[str, np.ndarray],
  n_token: int,
  *,
  prefix: str = 'diffusion',
  num_queries: int = 32,
  num_keys: int = 128,
  padded_keys: str = 'official',
  positions: np.ndarray | None = None,
  trunk_single_cond: np.ndarray | None = None,
  trunk_pair_cond: np.ndarray | None = None,
  token_act: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Token activations, skip connection and, given tokens, position update.

  `atoms` holds n_atom rows, padding included, at least num_keys: `ref_pos`,
  `ref_mask`, `ref_element`, `ref_charge`, `ref_atom_name_chars`, `token_index`,
  `mask`, `query_uid` and `key_uid`.
  """

  def weights(leaf: str) -> np.ndarray:
    return params[f'{prefix}_{leaf}']['weights']

  keep = np.asarray(atoms['mask'], bool)
  token = atoms['token_index']
  single = _atom_features(weights, atoms)
  if trunk_single_cond is not None:
    scale = params[f'{prefix}_lnorm_trunk_single_cond']['scale']
    normalised = numerics.layer_norm(trunk_single_cond, scale)
    single = single + (normalised @ weights('embed_trunk_single_cond'))[token]
  single = single * keep[:, None]
  token_pair = None
  if trunk_pair_cond is not None:
    scale = params[f'{prefix}_lnorm_trunk_pair_cond']['scale']
    normalised = numerics.layer_norm(trunk_pair_cond, scale)
    token_pair = normalised @ weights('embed_trunk_pair_cond')

  # Windows, shifted inward at both ends.
  rows = []
  n_real = int(keep.sum())
  for first in range(0, len(keep), num_queries):
    start = first + (num_queries - num_keys) // 2
    if start < 0 or n_real < num_keys:
      start = 0
    elif start + num_keys > n_real:
      start = n_real - num_keys
    query = np.arange(first, first + num_queries)
    key = np.arange(start, start + num_keys)
    rows.append((query, key))
  pairs = [
    _atom_pairs(weights, atoms, single, token_pair, query, key)
    for query, key in rows
  ]

  def transform(act: np.ndarray, part: str) -> np.ndarray:
    scope = f'{prefix}_atom_transformer_{part}'
    return keep[:, None] * _atom_transformer(
      params, scope, act, single, keep, rows, pairs, padded_keys
    )

  act = single
  if positions is not None:
    noisy = positions @ weights('atom_positions_to_features')
    act = act + noisy * keep[:, None]
  skip = transform(act, 'encoder')
  projected = np.maximum(skip @ weights('project_atom_features_for_aggr'), 0)
  pooled = np.zeros((n_token, projected.shape[1]))
  for t in range(n_token):
    own = keep & (token == t)
    if own.any():
      pooled[t] = projected[own].mean(0)
  found = {'token_act': pooled, 'skip_connection': skip}
  if token_act is not None:
    by_token = token_act @ weights('project_token_features_for_broadcast')
    act = transform((by_token[token] + skip) * keep[:, None], 'decoder')
    scale = params[f'{prefix}_atom_features_layer_norm']['scale']
    update = numerics.layer_norm(act, scale)
    update = update @ weights('atom_features_to_position_update')
    found['position_update'] = update * keep[:, None]
  return found


def _atom_features(weights, atoms: dict[str, np.ndarray]) -> np.ndarray:
  """Line 1 of Alg. 5; [n_atom, c_atom]."""

  def one_hot(index: np.ndarray, size: int) -> np.ndarray:
    return (index[..., None] == np.arange(size)).astype(float)

  mask = np.asarray(atoms['ref_mask'], float)[:, None]
  chars = one_hot(atoms['ref_atom_name_chars'], 64)
  act = atoms['ref_pos'] @ weights('embed_ref_pos')
  act = act + mask @ weights('embed_ref_mask')
  act += one_hot(atoms['ref_element'], 128) @ weights('embed_ref_element')
  act += np.arcsinh(atoms['ref_charge'])[:, None] @ weights('embed_ref_charge')
  act += chars.reshape(len(mask), -1) @ weights('embed_ref_atom_name')
  return act * mask


def _atom_pairs(
  weights,
  atoms: dict[str, np.ndarray],
  single: np.ndarray,
  token_pair: np.ndarray | None,
  query: np.ndarray,
  key: np.ndarray,
) -> np.ndarray:
  """Lines 2-6, 10, 13 and 14 of Alg. 5, one window; [query, key, c_pair]."""
  relu = np.maximum(single, 0)
  pair = (relu[query] @ weights('single_to_pair_cond_row_1'))[:, None]
  pair = pair + relu[key] @ weights('single_to_pair_cond_col_1')
  if token_pair is not None:
    token, keep = atoms['token_index'], atoms['mask']
    both = keep[query][:, None] & keep[key]
    pair += both[..., None] * token_pair[token[query][:, None], token[key]]
  offset = atoms['ref_pos'][query][:, None] - atoms['ref_pos'][key]
  squared = np.sum(offset**2, -1, keepdims=True)
  same = atoms['query_uid'][query][:, None] == atoms['key_uid'][key]
  pair += same[..., None] * (
    offset @ weights('embed_pair_offsets_1')
    + 1 / (1 + squared) @ weights('embed_pair_distances_1')
    + weights('embed_pair_offsets_valid')
  )
  hidden = pair
  for i in (1, 2, 3):
    hidden = np.maximum(hidden, 0) @ weights(f'pair_mlp_{i}')
  return pair + hidden


def _atom_transformer(
  params: dict[str, dict[str, np.ndarray]],
  scope: str,
  act: np.ndarray,
  single: np.ndarray,
  keep: np.ndarray,
  rows: list[tuple[np.ndarray, np.ndarray]],
  pairs: list[np.ndarray],
  padded_keys: str,
) -> np.ndarray:
  """Alg. 7; padding has zero keys and values."""
  scale = params[f'{scope}/pair_input_layer_norm']['scale']
  projection = params[f'{scope}/pair_logits_projection']['weights']
  prefix = f'{scope}/__layer_stack_with_per_layer/{scope}'
  for block in range(projection.shape[1]):
    own = {
      module.removeprefix(prefix): {
        name: array[block] for name, array in arrays.items()
      }
      for module, arrays in params.items()
      if module.startswith(prefix)
    }
    biases = []
    for (_, key), pair in zip(rows, pairs, strict=True):
      bias = numerics.layer_norm(pair, scale) @ projection[:, block]
      if padded_keys == 'masked':
        bias = np.where(keep[key][None, :, None], bias, -1e9)
      biases.append(bias)
    act = _atom_block(own, act, single, keep, rows, biases)
  return act


def _atom_block(
  own: dict[str, dict[str, np.ndarray]],
  act: np.ndarray,
  single: np.ndarray,
  keep: np.ndarray,
  rows: list[tuple[np.ndarray, np.ndarray]],
  biases: list[np.ndarray],
) -> np.ndarray:
  """Algs. 24-26; `biases` are [query, key, n_head] per window."""

  def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

  def linear(x: np.ndarray, leaf: str) -> np.ndarray:
    w = own[leaf]['weights']
    y = x @ w.reshape(w.shape[0], -1)
    return y + own[leaf]['bias'].reshape(-1) if 'bias' in own[leaf] else y

  def adaptive(x: np.ndarray, leaf: str) -> np.ndarray:
    scale = own[f'{leaf}single_cond_layer_norm']['scale']
    cond = numerics.layer_norm(single, scale)
    gain = sigmoid(linear(cond, f'{leaf}single_cond_scale'))
    shift = linear(cond, f'{leaf}single_cond_bias')
    return gain * numerics.layer_norm(x) + shift

  for_queries = adaptive(act, 'q')
  for_keys = adaptive(act, 'k') * keep[:, None]
  n_head, d_key = own['q_projection']['weights'].shape[1:]
  heads = (len(act), n_head, -1)
  q = linear(for_queries, 'q_projection').reshape(heads) * d_key**-0.5
  k = linear(for_keys, 'k_projection').reshape(heads)
  v = linear(for_keys, 'v_projection').reshape(heads)
  out = np.zeros((len(act), v.shape[1] * v.shape[2]))
  for (query, key), bias in zip(rows, biases, strict=True):
    logits = np.einsum('qhc,khc->qkh', q[query], k[key]) + bias
    w = numerics.softmax(logits, axis=1)
    out[query] = np.einsum('qkh,khc->qhc', w, v[key]).reshape(len(query), -1)
  out = out * sigmoid(linear(for_queries, 'gating_query'))
  gate = sigmoid(linear(single, 'adaptive_zero_cond'))
  act = act + gate * linear(out, 'transition2')
  a, b = np.split(linear(adaptive(act, 'ffw_'), 'ffw_transition1'), 2, -1)
  gate = sigmoid(linear(single, 'ffw_adaptive_zero_cond'))
  return act + gate * linear(a * sigmoid(a) * b, 'ffw_transition2')
