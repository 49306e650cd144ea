"""Oracle of the protein-ligand dual track of SEDD.

Parameters carry torch's names (weights [out, in]) without prefixes; `variant`
'published' is the repaired public code, 'seed' the seed document's own lines.
"""

from collections.abc import Mapping, Sequence
from math import erf
from typing import Any

import numpy as np

from structattn_jax.reference import numerics

Params = Mapping[str, np.ndarray]


def _norm(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  return numerics.layer_norm(
    x, params[f'{name}.weight'], params[f'{name}.bias']
  )


def _linear(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  y = x @ params[f'{name}.weight'].T
  return y + params[f'{name}.bias'] if f'{name}.bias' in params else y


def _attend(
  q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
  """[n, n_head, d] attending to [m, n_head, d]; 0 without any kept key."""
  if mask is not None:
    k, v = k[mask], v[mask]
  if not len(k):
    return np.zeros(q.shape, np.float64)
  logits = np.einsum('nhd,mhd->hnm', q, k) / np.sqrt(q.shape[-1])
  return np.einsum('hnm,mhd->nhd', numerics.softmax(logits, axis=-1), v)


def timestep_embedding(sigma: float, size: int = 256) -> np.ndarray:
  """[size] = cos and sin of sigma at geometric frequencies, cos first."""
  half = size // 2
  angles = sigma * np.exp(-np.log(10000.0) * np.arange(half) / half)
  return np.concatenate([np.cos(angles), np.sin(angles)])


def timestep_condition(params: Params, sigma: float) -> np.ndarray:
  """[cond_dim] = SiLU of the timestep MLP (`mlp.0`, `mlp.2`)."""

  def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))

  hidden = silu(_linear(params, 'mlp.0', timestep_embedding(sigma)))
  return silu(_linear(params, 'mlp.2', hidden))


def token_embedding(params: Params, tokens: np.ndarray) -> np.ndarray:
  """[n, D] = LN(E[token] sqrt(D)) (`embedding`, `norm`)."""
  table = params['embedding.weight']
  return _norm(params, 'norm', table[tokens] * np.sqrt(table.shape[-1]))


def rotate(x: np.ndarray) -> np.ndarray:
  """Rotary embedding of [n, n_head, d_head], half-split convention."""
  n, _, d_head = x.shape
  frequency = 10000.0 ** (-np.arange(0, d_head, 2) / d_head)
  angle = np.arange(n)[:, None, None] * frequency
  first, second = x[..., : d_head // 2], x[..., d_head // 2 :]
  return np.concatenate(
    [
      first * np.cos(angle) - second * np.sin(angle),
      second * np.cos(angle) + first * np.sin(angle),
    ],
    axis=-1,
  )


def cross_attention(
  params: Params,
  x: np.ndarray,
  context: np.ndarray,
  context_mask: np.ndarray | None,
  *,
  num_head: int,
  variant: str = 'published',
) -> np.ndarray:
  """X plus attention to the context."""

  def heads(y: np.ndarray) -> np.ndarray:
    return y.reshape(len(y), num_head, -1)

  query, key = _norm(params, 'norm_q', x), _norm(params, 'norm_kv', context)
  if variant == 'seed':
    attended = _attend(heads(query), heads(key), heads(context), context_mask)
    return x + attended.reshape(x.shape)
  if context_mask is not None and not context_mask.any():
    return x
  attended = _attend(
    heads(_linear(params, 'q_proj', query)),
    heads(_linear(params, 'k_proj', key)),
    heads(_linear(params, 'v_proj', context)),
    context_mask,
  )
  return x + _linear(params, 'out_proj', attended.reshape(x.shape))


def ddit_block(
  params: Params,
  x: np.ndarray,
  condition: np.ndarray,
  mask: np.ndarray | None = None,
  context: np.ndarray | None = None,
  context_mask: np.ndarray | None = None,
  *,
  num_head: int,
  variant: str = 'published',
) -> np.ndarray:
  """One block: self-attention, cross-attention, MLP, modulated by AdaLN."""
  modulation = _linear(params, 'adaLN_modulation', condition)
  if variant == 'seed':
    shift, scale = np.split(modulation, 2)
    attention_input = x
  else:
    shift1, scale1, shift, scale = np.split(modulation, 4)
    attention_input = _norm(params, 'norm1', x) * (1 + scale1) + shift1
  qkv = _linear(params, 'attn_qkv', attention_input)
  q, k, v = qkv.reshape(len(x), 3, num_head, -1).swapaxes(0, 1)
  attended = _attend(rotate(q), rotate(k), v, mask)
  if mask is None or mask.any():
    x = x + _linear(params, 'attn_out', attended.reshape(x.shape))
  if context is not None:
    own = {
      name.removeprefix('cross_attn.'): value
      for name, value in params.items()
      if name.startswith('cross_attn.')
    }
    x = cross_attention(
      own, x, context, context_mask, num_head=num_head, variant=variant
    )
  mlp_input = x if variant == 'seed' else _norm(params, 'norm2', x)
  hidden = _linear(params, 'mlp.0', mlp_input * (1 + scale) + shift)
  hidden = hidden * 0.5 * (1 + np.vectorize(erf)(hidden / np.sqrt(2)))
  return x + _linear(params, 'mlp.3', hidden)


def dual_track(
  protein_params: Sequence[Params],
  ligand_params: Sequence[Params],
  protein: np.ndarray,
  ligand: np.ndarray,
  condition: np.ndarray,
  protein_mask: np.ndarray | None = None,
  ligand_mask: np.ndarray | None = None,
  *,
  num_head: int,
  variant: str = 'published',
) -> tuple[np.ndarray, np.ndarray]:
  """All layers; both tracks of a layer read the previous layer's states."""
  options = {'num_head': num_head, 'variant': variant}
  for own_protein, own_ligand in zip(
    protein_params, ligand_params, strict=True
  ):
    new_protein = ddit_block(
      own_protein,
      protein,
      condition,
      protein_mask,
      ligand,
      ligand_mask,
      **options,
    )
    new_ligand = ddit_block(
      own_ligand,
      ligand,
      condition,
      ligand_mask,
      protein,
      protein_mask,
      **options,
    )
    protein, ligand = new_protein, new_ligand
  return protein, ligand


def final_layer(
  params: Params, x: np.ndarray, condition: np.ndarray
) -> np.ndarray:
  """[n, V] logits (`adaLN_modulation`, `norm_final`, `linear`)."""
  shift, scale = np.split(_linear(params, 'adaLN_modulation', condition), 2)
  h = _norm(params, 'norm_final', x) * (1 + scale) + shift
  return _linear(params, 'linear', h)


def one_track(
  layers: Sequence[Params],
  x: np.ndarray,
  condition: np.ndarray,
  mask: np.ndarray | None,
  context: np.ndarray | None = None,
  context_mask: np.ndarray | None = None,
  **options: Any,
) -> np.ndarray:
  """One track through `layers`, all reading the same context if any."""
  for layer in layers:
    x = ddit_block(layer, x, condition, mask, context, context_mask, **options)
  return x


def mode_states(
  layers: Mapping[str, Sequence[Params]],
  x: Mapping[str, np.ndarray],
  condition: np.ndarray,
  masks: Mapping[str, np.ndarray | None],
  mode: str,
  **options: Any,
) -> dict[str, np.ndarray]:
  """States of the generated tracks in a mode; dictionaries by track."""
  if mode == 'joint':
    states = dual_track(
      layers['protein'],
      layers['ligand'],
      x['protein'],
      x['ligand'],
      condition,
      masks['protein'],
      masks['ligand'],
      **options,
    )
    return dict(zip(('protein', 'ligand'), states, strict=True))
  target, _, context = mode.partition('_given_')
  target = target.removesuffix('_only')
  read, read_mask = None, None
  if context:
    half = len(layers[context]) // 2
    read_mask = masks[context]
    read = one_track(
      layers[context][:half], x[context], condition, read_mask, **options
    )
  state = one_track(
    layers[target],
    x[target],
    condition,
    masks[target],
    read,
    read_mask,
    **options,
  )
  return {target: state}


def log_score(
  logits: np.ndarray, tokens: np.ndarray, sigma: float
) -> np.ndarray:
  """Logits scaled by sigma, zero at the tokens themselves (absorbing)."""
  score = logits - np.log(np.expm1(sigma)) - np.log(logits.shape[-1] - 1)
  score[np.arange(len(tokens)), tokens] = 0
  return score


def sedd_block(
  params: Params,
  x: np.ndarray,
  condition: np.ndarray,
  mask: np.ndarray | None,
  *,
  num_head: int,
  variant: str,
) -> np.ndarray:
  """One block of the single track: gates, norms without offset."""
  shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
    _linear(params, 'adaLN_modulation', condition), 6
  )
  h = numerics.layer_norm(x, params['norm1.weight'])
  qkv = _linear(params, 'attn_qkv', h * (1 + scale1) + shift1)
  q, k, v = qkv.reshape(len(x), 3, num_head, -1).swapaxes(0, 1)
  attended = _attend(rotate(q), rotate(k), v, mask)
  x = x + gate1 * _linear(params, 'attn_out', attended.reshape(x.shape))
  h = numerics.layer_norm(x, params['norm2.weight'])
  h = _linear(params, 'mlp.0', h * (1 + scale2) + shift2)
  if variant == 'sedd':
    inner = np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)
    h = 0.5 * h * (1 + np.tanh(inner))
  else:
    h = 0.5 * h * (1 + np.vectorize(erf)(h / np.sqrt(2)))
  return x + gate2 * _linear(params, 'mlp.2', h)


def sedd(
  params: Params,
  layers: Sequence[Params],
  tokens: np.ndarray,
  sigma: float,
  mask: np.ndarray | None = None,
  *,
  num_head: int,
  variant: str = 'sedd',
) -> np.ndarray:
  """Logits [n, V] of the single track.

  `params` has `vocab_embed.embedding`, `sigma_map....` and `output_layer....`.
  """

  def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))

  x = params['vocab_embed.embedding'][tokens]
  hidden = _linear(params, 'sigma_map.mlp.0', timestep_embedding(sigma))
  condition = _linear(params, 'sigma_map.mlp.2', silu(hidden))
  if variant == 'sedd':
    condition = silu(condition)
  for layer in layers:
    x = sedd_block(
      layer, x, condition, mask, num_head=num_head, variant=variant
    )
  modulation = _linear(params, 'output_layer.adaLN_modulation', condition)
  shift, scale = np.split(modulation, 2)
  h = numerics.layer_norm(x, params['output_layer.norm_final.weight'])
  return _linear(params, 'output_layer.linear', h * (1 + scale) + shift)
