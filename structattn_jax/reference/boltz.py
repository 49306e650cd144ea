"""Oracles of Boltz's atom attention: the seed document's and the released."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from structattn_jax.reference import numerics

Params = Mapping[str, Mapping[str, Any]]


def token_attention_pool(
  atom_features: np.ndarray,
  atom_to_token: np.ndarray,
  num_tokens: int,
  w_q: np.ndarray,
  w_k: np.ndarray,
  w_v: np.ndarray,
  *,
  atom_mask: np.ndarray | None = None,
) -> np.ndarray:
  """Self-attention among the atoms of a token, then their mean."""
  x = numerics.layer_norm(atom_features)
  q = np.einsum('ac,chd->ahd', x, w_q)
  k = np.einsum('ac,chd->ahd', x, w_k)
  v = np.einsum('ac,chd->ahd', x, w_v)
  n_head, d_head = w_q.shape[1:]
  out = np.zeros((num_tokens, n_head, d_head), np.float64)
  for t in range(num_tokens):
    own = atom_to_token == t
    if atom_mask is not None:
      own = own & atom_mask
    if not own.any():
      continue
    logits = np.einsum('ahd,bhd->abh', q[own], k[own]) / np.sqrt(d_head)
    weights = numerics.softmax(logits, axis=1)
    out[t] = np.einsum('abh,bhd->ahd', weights, v[own]).mean(0)
  return out.reshape(num_tokens, n_head * d_head)


# Boltz's own encoder and decoder. Parameters are ours: {module: {name: array}},
# linear layers [in, out].


def atom_attention(
  params: Params,
  inputs: Mapping[str, Any],
  *,
  version: int,
  n_query: int,
  n_key: int,
  encoder: tuple[int, int],
  decoder: tuple[int, int] | None,
  num_tokens: int,
  use_no_atom_char: bool = False,
  use_atom_backbone_feat: bool = False,
  use_residue_feats_atoms: bool = False,
) -> dict[str, np.ndarray]:
  """Encoder and, with positions, decoder of one complex, as published.

  Args:
    params: of either version; see `network.boltz.atom_attention`.
    inputs: the fields of `BoltzAtomFeatures`; with the structure `single`,
      `pair`, `positions` and what is decoded, `token_act`, too; a function
      gets the encoder's tokens and returns it.
    version: 1 or 2.
    n_query: query atoms per window.
    n_key: key atoms per window.
    encoder: depth and heads.
    decoder: depth and heads, or None.
    num_tokens: number of tokens.
    use_no_atom_char: as Boltz-2's.
    use_atom_backbone_feat: as Boltz-2's.
    use_residue_feats_atoms: as Boltz-2's.

  Returns:
    `tokens`, `atoms`, the pair `p`, and `update` of positions.
  """
  mask = inputs['atom_mask']
  token = np.where(mask, inputs['atom_to_token'], -1)
  structure = 'single' in inputs
  own = params
  if version == 1:
    own = below(params, 'atom_attention_encoder/')
  elif structure:
    own = below(params, 'diffusion_conditioning/atom_encoder/')
  else:
    own = below(params, 'atom_encoder/')

  # Alg. 5, line 1.
  features = [inputs['ref_pos'], inputs['ref_charge'][:, None]]
  if version == 1:
    features.append(mask[:, None])
  features.append(_one_hot(inputs['ref_element'], 128))
  if not use_no_atom_char:
    chars = _one_hot(inputs['ref_atom_name_chars'], 64)
    features.append(chars.reshape(len(mask), 256))
  if use_atom_backbone_feat:
    features.append(_one_hot(inputs['atom_backbone_feat'], 17))
  if use_residue_feats_atoms:
    of_tokens = [
      _one_hot(inputs['res_type'], 33),
      inputs['modified'][:, None],
      _one_hot(inputs['mol_type'], 4),
    ]
    features.append(_of_token(np.concatenate(of_tokens, 1), token))
  c = linear(own, 'embed_atom_features', np.concatenate(features, 1))
  q = c
  if structure:
    trunk = numerics.layer_norm(inputs['single'], **own['s_to_c_trans_0'])
    c = c + _of_token(linear(own, 's_to_c_trans_1', trunk), token)

  # Lines 2-6, 10, 13 and 14, pair by pair.
  n_window = len(mask) // n_query
  keys = _keys(n_window, n_query, n_key)
  z = None
  if structure:
    z = numerics.layer_norm(inputs['pair'], **own['z_to_p_trans_0'])
    z = linear(own, 'z_to_p_trans_1', z)
  row = linear(own, 'c_to_p_trans_q_1', np.maximum(c, 0))
  column = linear(own, 'c_to_p_trans_k_1', np.maximum(c, 0))
  p = np.zeros((n_window, n_query, n_key, row.shape[1]), np.float64)
  for at in np.ndindex(*p.shape[:3]):
    i, j = at[0] * n_query + at[1], keys[at[0], at[2]]
    p[at] = row[i]
    if j < 0:
      continue
    p[at] += column[j]
    uid = inputs['ref_space_uid']
    if mask[i] and mask[j] and uid[i] == uid[j]:
      d = inputs['ref_pos'][j] - inputs['ref_pos'][i]
      p[at] += (
        d @ own['embed_atompair_ref_pos']['weights']
        + own['embed_atompair_ref_dist']['weights'][0] / (1 + d @ d)
        + own['embed_atompair_mask']['weights'][0]
      )
    if z is not None and token[i] >= 0 and token[j] >= 0:
      p[at] += z[token[i], token[j]]
  hidden = p
  for i in (1, 3, 5):
    hidden = linear(own, f'p_mlp_{i}', np.maximum(hidden, 0))
  p = p + hidden

  def biases(part: str, depth: int) -> list[np.ndarray]:
    scope = f'atom_attention_{part}/atom_{part}/diffusion_transformer'
    short = {'encoder': 'atom_enc_proj_z', 'decoder': 'atom_dec_proj_z'}[part]
    if version == 2 and not structure:
      return np.split(_pair_bias(params, short, p), depth, -1)
    names = [f'diffusion_conditioning/{short}_{i}' for i in range(depth)]
    if version == 1:
      names = [
        f'{scope}/layers_{i}/pair_bias_attn/proj_z' for i in range(depth)
      ]
    return [_pair_bias(params, name, p) for name in names]

  def transformer(part: str, depth: int, heads: int, q: np.ndarray):
    scope = f'atom_attention_{part}/atom_{part}/diffusion_transformer/layers_'
    for i, bias in enumerate(biases(part, depth)):
      own = below(params, f'{scope}{i}/')
      q = layer(own, q, c, bias, mask, keys, heads)
    return q

  # Lines 11, 15 and 16.
  if structure:
    q = q + linear(
      params, 'atom_attention_encoder/r_to_q_trans', inputs['positions']
    )
  q = transformer('encoder', *encoder, q)
  act = linear(params, 'atom_attention_encoder/atom_to_token_trans_0', q)
  act = np.maximum(act, 0)
  tokens = np.zeros((num_tokens, act.shape[1]), np.float64)
  for t in range(num_tokens):
    tokens[t] = act[token == t].sum(0) / ((token == t).sum() + 1e-6)
  found = {'tokens': tokens, 'atoms': q, 'p': p}
  if decoder is None:
    return found

  # Alg. 6.
  scope = 'atom_attention_decoder/'
  act = inputs['token_act']
  act = act(tokens) if callable(act) else act
  act = linear(params, f'{scope}a_to_q_trans', act)
  q = transformer('decoder', *decoder, q + _of_token(act, token))
  name = f'{scope}atom_feat_to_atom_pos_update'
  if name not in params:
    q, name = numerics.layer_norm(q, **params[f'{name}_0']), f'{name}_1'
  found['update'] = linear(params, name, q)
  return found


def layer(
  params: Params,
  a: np.ndarray,
  c: np.ndarray,
  bias: np.ndarray,
  mask: np.ndarray,
  keys: np.ndarray,
  heads: int,
) -> np.ndarray:
  """One layer of Alg. 23, a window after the other."""
  n_window, n_query, _, _ = bias.shape
  b = _ada_ln(below(params, 'adaln/'), a, c)
  own = below(params, 'pair_bias_attn/')
  q, k, v = (
    linear(own, f'proj_{x}', b).reshape(len(a), heads, -1) for x in 'qkv'
  )
  out = np.zeros(q.shape, np.float64)
  for w in range(n_window):
    rows = slice(w * n_query, (w + 1) * n_query)
    kept = (keys[w] >= 0) & mask[np.maximum(keys[w], 0)]
    if not kept.any():
      continue
    own_keys = keys[w][kept]
    logits = np.einsum('ihd,jhd->ijh', q[rows], k[own_keys])
    logits = logits / np.sqrt(q.shape[-1]) + bias[w][:, kept]
    weights = numerics.softmax(logits, 1)
    out[rows] = np.einsum('ijh,jhd->ihd', weights, v[own_keys])
  gate = _sigmoid(linear(own, 'proj_g', b))
  out = linear(own, 'proj_o', gate * out.reshape(a.shape))
  a = a + _sigmoid(linear(params, 'output_projection_linear', c)) * out
  own = below(params, 'transition/')
  b = _ada_ln(below(own, 'adaln/'), a, c)
  x1, x2 = np.split(linear(own, 'swish_gate_0', b), 2, -1)
  hidden = x2 * _sigmoid(x2) * x1 * linear(own, 'a_to_b', b)
  gate = _sigmoid(linear(own, 'output_projection_0', c))
  a = a + gate * linear(own, 'b_to_a', hidden)
  if 'post_lnorm' in params:
    a = numerics.layer_norm(a, **params['post_lnorm'])
  return a


def _ada_ln(params: Params, a: np.ndarray, c: np.ndarray) -> np.ndarray:
  c = numerics.layer_norm(c, **params['s_norm'])
  scale = _sigmoid(linear(params, 's_scale', c))
  return scale * numerics.layer_norm(a) + linear(params, 's_bias', c)


def _pair_bias(params: Params, name: str, p: np.ndarray) -> np.ndarray:
  p = numerics.layer_norm(p, **params[f'{name}_0'])
  return linear(params, f'{name}_1', p)


def _keys(n_window: int, n_query: int, n_key: int) -> np.ndarray:
  """Key atoms of each window; -1 outside."""
  first = n_query * np.arange(n_window) - (n_key - n_query) // 2
  keys = first[:, None] + np.arange(n_key)
  return np.where((keys < 0) | (keys >= n_window * n_query), -1, keys)


def linear(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  """X @ weights and, where there is one, + bias."""
  return x @ params[name]['weights'] + params[name].get('bias', 0.0)


def _of_token(tokens: np.ndarray, token: np.ndarray) -> np.ndarray:
  return np.where((token >= 0)[:, None], tokens[np.maximum(token, 0)], 0.0)


def _one_hot(index: np.ndarray, size: int) -> np.ndarray:
  return (index[..., None] == np.arange(size)).astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def below(params: Params, scope: str) -> dict[str, Any]:
  """The modules whose path starts with `scope`, without it."""
  return {
    module.removeprefix(scope): arrays
    for module, arrays in params.items()
    if module.startswith(scope)
  }


def relative_position(
  weights: np.ndarray,
  asym_id: np.ndarray,
  residue_index: np.ndarray,
  entity_id: np.ndarray,
  token_index: np.ndarray,
  sym_id: np.ndarray,
  cyclic_period: np.ndarray | None = None,
  *,
  r_max: int = 32,
  s_max: int = 2,
  same_chain_rule: str = 'chain',
) -> np.ndarray:
  """Relative positions of tokens, Alg. 3, pair by pair, with one-hot rows."""
  n = len(asym_id)
  n_bin, n_chain = 2 * r_max + 2, 2 * s_max + 2
  out = np.zeros((n, n, weights.shape[1]), np.float64)
  for i, j in np.ndindex(n, n):
    d = int(residue_index[i]) - int(residue_index[j])
    if cyclic_period is not None and (cyclic_period > 0).any():
      period = int(cyclic_period[j]) if cyclic_period[j] > 0 else 10000
      d = int(d - period * np.round(d / period))
    chain = asym_id[i] == asym_id[j]
    entity = entity_id[i] == entity_id[j]
    residue = chain and residue_index[i] == residue_index[j]
    copies = entity if same_chain_rule == 'entity' else not chain
    token = int(token_index[i]) - int(token_index[j])
    copy = int(sym_id[i]) - int(sym_id[j])
    one_hot = np.zeros(len(weights), np.float64)
    one_hot[_bin(d, r_max, chain)] = 1
    one_hot[n_bin + _bin(token, r_max, residue)] = 1
    one_hot[2 * n_bin] = entity
    one_hot[len(weights) - n_chain + _bin(copy, s_max, copies)] = 1
    out[i, j] = one_hot @ weights
  return out


def _bin(d: int, largest: int, defined: bool) -> int:
  return min(max(d + largest, 0), 2 * largest) if defined else 2 * largest + 1
