"""Oracle of AlphaFold 3's diffusion head, with atoms of `reference.alphafold3`.

Abramson et al. (2024) Suppl. Algs. 3 and 20 to 26, as released.
"""

from typing import Any

import numpy as np

from structattn_jax.reference import alphafold3, numerics

Params = dict[str, dict[str, np.ndarray]]


def diffusion_head(
  params: Params,
  positions: np.ndarray,
  noise_level: float,
  atoms: dict[str, np.ndarray],
  tokens: dict[str, np.ndarray],
  embeddings: dict[str, np.ndarray],
  noise_constants: tuple[np.ndarray, np.ndarray],
  *,
  use_conditioning: bool = True,
  **windows: Any,
) -> np.ndarray:
  """Denoised positions of flat atoms, [n_atom, 3].

  `atoms` and `windows` are those of `alphafold3.atom_cross_att`; `tokens` holds
  `token_index`, `residue_index`, `asym_id`, `entity_id`, `sym_id` and `mask`;
  `embeddings` `single`, `pair` and `target_feat`.
  """
  n_token = len(tokens['mask'])
  single, pair = conditioning(
    params, noise_level, tokens, embeddings, noise_constants, use_conditioning
  )
  keep = np.asarray(atoms['mask'], bool)[:, None]
  positions = np.where(keep, positions, 0)
  variance = noise_level**2 + 16.0**2
  options: dict[str, Any] = {
    'positions': positions / np.sqrt(variance),
    'trunk_single_cond': embeddings['single'],
    'trunk_pair_cond': pair,
    **windows,
  }
  encoded = alphafold3.atom_cross_att(params, atoms, n_token, **options)
  act = encoded['token_act'] + _project(params, 'single_cond_embedding', single)
  act = token_transformer(params, act, single, pair, tokens['mask'])
  act = numerics.layer_norm(act, params['output_norm']['scale'])
  update = alphafold3.atom_cross_att(
    params, atoms, n_token, token_act=act, **options
  )['position_update']
  skip = 16.0**2 / variance * positions
  return (skip + 16.0 * noise_level / np.sqrt(variance) * update) * keep


def conditioning(
  params: Params,
  noise_level: float,
  tokens: dict[str, np.ndarray],
  embeddings: dict[str, np.ndarray],
  noise_constants: tuple[np.ndarray, np.ndarray],
  use_conditioning: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
  """Alg. 21: [n_token, c_s] and [n_token, n_token, c_z]."""
  use = 1.0 if use_conditioning else 0.0
  pair = np.concatenate(
    [use * embeddings['pair'], relative_encoding(tokens)], -1
  )
  pair = _project(params, 'pair_cond_initial', pair)
  single = np.concatenate(
    [use * embeddings['single'], embeddings['target_feat']], -1
  )
  single = _project(params, 'single_cond_initial', single)
  weight, bias = noise_constants
  noise = np.cos(2 * np.pi * (np.log(noise_level / 16) / 4 * weight + bias))
  single = single + _project(params, 'noise_embedding_initial', noise)
  for i in range(2):
    pair = pair + _transition(params, f'pair_transition_{i}', pair)
    single = single + _transition(params, f'single_transition_{i}', single)
  return single, pair


def relative_encoding(tokens: dict[str, np.ndarray]) -> np.ndarray:
  """Alg. 3, before its projection; [n_token, n_token, 139]."""
  n_token = len(tokens['mask'])
  found = np.zeros((n_token, n_token, 66 + 66 + 1 + 6))
  for i in range(n_token):
    for j in range(n_token):

      def same(name: str, i: int = i, j: int = j) -> bool:
        return bool(tokens[name][i] == tokens[name][j])

      def offset(name: str, most: int, i: int = i, j: int = j) -> int:
        difference = int(tokens[name][i]) - int(tokens[name][j])
        return min(max(difference + most, 0), 2 * most)

      residue, token, copy = 65, 65, 5
      if same('asym_id'):
        residue = offset('residue_index', 32)
        if same('residue_index'):
          token = offset('token_index', 32)
      if same('entity_id'):
        copy = offset('sym_id', 2)
        found[i, j, 132] = 1
      for channel in (residue, 66 + token, 133 + copy):
        found[i, j, channel] = 1
  return found


def token_transformer(
  params: Params,
  act: np.ndarray,
  single: np.ndarray,
  pair: np.ndarray,
  mask: np.ndarray,
) -> np.ndarray:
  """Alg. 23 with Algs. 24 to 26; tokens without any key attend to nothing."""
  stack = '__layer_stack_with_per_layer/'
  prefix = f'transformer/{stack}{stack}transformer'
  scale = params['transformer/pair_input_layer_norm']['scale']
  projection = params[f'transformer/{stack}pair_logits_projection']['weights']
  pair = numerics.layer_norm(pair, scale)
  for i in range(projection.shape[0]):
    for j in range(projection.shape[2]):
      own = {
        module.removeprefix(prefix): {k: x[i, j] for k, x in arrays.items()}
        for module, arrays in params.items()
        if module.startswith(prefix)
      }
      bias = np.moveaxis(pair @ projection[i, :, j], -1, 0)
      act = act + _self_attention(own, act, single, bias, mask)
      hidden = _swish_gate(
        _adaptive_norm(own, act, single, 'ffw_')
        @ own['ffw_transition1']['weights']
      )
      gate = _sigmoid(_linear(own, 'ffw_adaptive_zero_cond', single))
      act = act + gate * (hidden @ own['ffw_transition2']['weights'])
  return act


def _self_attention(
  own: Params,
  act: np.ndarray,
  single: np.ndarray,
  bias: np.ndarray,
  mask: np.ndarray,
) -> np.ndarray:
  """Alg. 24; `bias` is [n_head, query, key]."""
  x = _adaptive_norm(own, act, single, '')
  q = np.einsum('qc,chd->hqd', x, own['q_projection']['weights'])
  q = q + own['q_projection']['bias'][:, None]
  k = np.einsum('kc,chd->hkd', x, own['k_projection']['weights'])
  v = np.einsum('kc,chd->hkd', x, own['v_projection']['weights'])
  out = np.zeros((len(act), v.shape[0], v.shape[2]))
  if mask.any():
    logits = np.einsum('hqd,hkd->hqk', q, k) / np.sqrt(q.shape[-1]) + bias
    weights = numerics.softmax(logits[..., mask], axis=-1)
    out = np.einsum('hqk,hkd->qhd', weights, v[:, mask])
  out = out.reshape(len(act), -1)
  out = out * _sigmoid(x @ own['gating_query']['weights'])
  gate = _sigmoid(_linear(own, 'adaptive_zero_cond', single))
  return gate * (out @ own['transition2']['weights'])


def _adaptive_norm(
  own: Params, act: np.ndarray, single: np.ndarray, prefix: str
) -> np.ndarray:
  """Alg. 26."""
  scale = own[f'{prefix}single_cond_layer_norm']['scale']
  cond = numerics.layer_norm(single, scale)
  gain = _sigmoid(_linear(own, f'{prefix}single_cond_scale', cond))
  shift = _linear(own, f'{prefix}single_cond_bias', cond)
  return gain * numerics.layer_norm(act) + shift


def _transition(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  """A transition without conditioning, with a factor of 2."""
  x = numerics.layer_norm(x, **params[f'{name}ffw_layer_norm'])
  hidden = _swish_gate(x @ params[f'{name}ffw_transition1']['weights'])
  return hidden @ params[f'{name}ffw_transition2']['weights']


def _project(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  x = numerics.layer_norm(x, params[f'{name}_norm']['scale'])
  return x @ params[f'{name}_projection']['weights']


def _linear(own: Params, name: str, x: np.ndarray) -> np.ndarray:
  y = x @ own[name]['weights']
  return y + own[name]['bias'] if 'bias' in own[name] else y


def _swish_gate(x: np.ndarray) -> np.ndarray:
  a, b = np.split(x, 2, -1)
  return a * _sigmoid(a) * b


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))
