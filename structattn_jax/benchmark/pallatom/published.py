"""Pallatom's encoder and decoder as published: gathered keys and pairs.

The behaviour of github.com/tmatteso/diffusion @ 39c8d25a, written from its
description once for two array libraries, JAX and PyTorch: z is gathered,
normalised and projected for every pair of atoms, every block gathers its own
keys and values, [B, N, K, H, D].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Parameters by module, without the outer scope: {'to_q': {'weights': ...}}.
State = Mapping[str, Mapping[str, Any]]


class Library(NamedTuple):
  """The few operations whose names differ."""

  layer_norm: Callable[[Any, Any, Any], Any]
  relu: Callable[[Any], Any]
  softmax: Callable[[Any, int], Any]
  masked: Callable[[Any, Any, float], Any]
  concatenate: Callable[[list[Any]], Any]
  einsum: Callable[..., Any]
  token_mean: Callable[[Any, Any, int], Any]


def encoder(
  lib: Library,
  state: State,
  inputs: Mapping[str, Any],
  tok: Any,
  pairs: tuple[Any, Any],
  num_block: int,
  num_head: int,
) -> tuple[Any, ...]:
  """Returns s_i, q_skip, c_skip, c_l of a batch."""
  linear, norm = _modules(lib, state)
  neighbours, window = pairs
  x, uid = inputs['ref_pos'], inputs['ref_space_uid']
  n_batch, n_atom = x.shape[:2]
  n_token = inputs['s_input'].shape[1]
  groups = n_atom // (n_atom // n_token)
  features = lib.concatenate(
    [y.reshape(n_batch, groups, -1) for y in (x, inputs['ref_element'])]
  )
  same = uid[:, :, None] == uid[:, neighbours]
  live = same & window
  c = c_skip = linear('proj_fref_c', features[:, tok])
  d = x[:, :, None] - x[:, neighbours]
  v = lib.masked(d[..., :1] * 0 + 1, same[..., None], 0.0)
  p = linear('proj_d_vec', d) * v
  p = p + linear('proj_inv_sq', 1 / (1 + (d * d).sum(-1)[..., None])) * v
  p = p + linear('proj_v', v) * v
  hidden = lib.relu(c)
  p = p + linear('proj_cl_pair', hidden)[:, :, None]
  p = p + linear('proj_cm_pair', hidden)[:, neighbours]
  p = lib.masked(p, live[..., None], 0.0)
  q = c + linear('proj_r_scaled', inputs['r_scaled'])
  single = norm('norm_s_init', inputs['s_input'][:, tok])
  c = c + linear('proj_s_init', single)
  z = inputs['z_input'][:, tok[:, None], tok[neighbours]]
  p = p + linear('proj_z_init', norm('norm_z_init', z))
  p = p + _mlp(lib, state, p)
  q = _transformer(lib, state, q, c, p, neighbours, live, num_block, num_head)
  pooled = lib.relu(linear('proj_agg', q))
  return lib.token_mean(pooled, tok, n_token), q, c_skip, c


def decoder(
  lib: Library,
  state: State,
  inputs: Mapping[str, Any],
  tok: Any,
  pairs: tuple[Any, Any],
  num_block: int,
  num_head: int,
) -> tuple[Any, ...]:
  """Returns q, r_update, c_out of a batch."""
  linear, norm = _modules(lib, state)
  neighbours, window = pairs
  live = window[None]
  s, z = inputs['s'], inputs['z']
  q = linear('proj_s_q', norm('norm_s_q', s[:, tok])) + inputs['q_skip']
  z = z[:, tok[:, None], tok[neighbours]]
  p = linear('proj_z', norm('norm_z', z)) + inputs['p_skip']
  p = lib.masked(p + _mlp(lib, state, p), live[..., None], 0.0)
  q = _transformer(
    lib, state, q, inputs['c'], p, neighbours, live, num_block, num_head
  )
  r_update = linear('proj_r', norm('norm_q_out', q))
  c_out = linear('proj_s_c', norm('norm_s_c', s[:, tok])) + inputs['c_skip']
  return q, r_update, c_out


def _modules(lib: Library, state: State) -> tuple[Any, Any]:
  def linear(name: str, x: Any) -> Any:
    return x @ state[name]['weights']

  def norm(name: str, x: Any) -> Any:
    return lib.layer_norm(x, state[name]['scale'], state[name]['offset'])

  return linear, norm


def _mlp(lib: Library, state: State, p: Any) -> Any:
  linear, _ = _modules(lib, state)
  for layer in (0, 2, 4, 6):
    p = linear(f'mlp_p_{layer}', lib.relu(p) if layer else p)
  return p


def _transformer(
  lib: Library,
  state: State,
  q: Any,
  c: Any,
  p: Any,
  neighbours: Any,
  live: Any,
  num_block: int,
  num_head: int,
) -> Any:
  linear, norm = _modules(lib, state)
  shape = (*q.shape[:2], num_head, -1)
  for block in range(num_block):
    name = f'transformer/blocks_{block}/'
    query = linear(f'{name}to_q', norm(f'{name}norm_q', q)).reshape(shape)
    context = norm(f'{name}norm_c', c)
    key = linear(f'{name}to_k', context).reshape(shape)[:, neighbours]
    value = linear(f'{name}to_v', context).reshape(shape)[:, neighbours]
    logits = lib.einsum('blhd,blkhd->blkh', query, key)
    logits = logits / (q.shape[-1] // num_head) ** 0.5
    logits = logits + linear(f'{name}pair_bias', norm(f'{name}norm_pair', p))
    logits = lib.masked(logits, live[..., None], float('-inf'))
    weights = lib.softmax(logits, 2)
    attended = lib.einsum('blkh,blkhd->blhd', weights, value)
    q = q + linear(f'{name}to_out', attended.reshape(q.shape))
    hidden = lib.relu(linear(f'{name}ff1', norm(f'{name}norm_ff', q)))
    q = q + linear(f'{name}ff2', hidden)
  return q


def jax_library() -> Library:
  """A straightforward port."""

  def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weight + bias

  def token_mean(x: Any, tok: Any, n_token: int) -> Any:
    def sums(y: Any) -> Any:
      return jax.ops.segment_sum(y, tok, n_token)

    count = jnp.maximum(sums(jnp.ones(len(tok))), 1)
    return jax.vmap(sums)(x) / count[:, None]

  return Library(
    layer_norm,
    jax.nn.relu,
    jax.nn.softmax,
    lambda x, mask, value: jnp.where(mask, x, value),
    lambda xs: jnp.concatenate(xs, -1),
    jnp.einsum,
    token_mean,
  )


def torch_library(torch: Any) -> Library:
  """The same with torch's own kernels."""

  def token_mean(x: Any, tok: Any, n_token: int) -> Any:
    sums = x.new_zeros(x.shape[0], n_token, x.shape[2]).index_add(1, tok, x)
    count = torch.bincount(tok, minlength=n_token).clamp(min=1)
    return sums / count[:, None]

  def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)

  return Library(
    layer_norm,
    torch.relu,
    torch.softmax,
    lambda x, mask, value: x.masked_fill(~mask, value),
    lambda xs: torch.cat(xs, -1),
    torch.einsum,
    token_mean,
  )


def torch_pairs(torch: Any, tok: Any, window_size: int) -> tuple[Any, Any]:
  """The n x n comparison of `build_sparse_pairs`, one n x n sort and all."""
  n_atom = len(tok)
  near = (tok[:, None] - tok).abs() < window_size // 2
  atoms = torch.arange(n_atom).expand(n_atom, n_atom)
  ordered, _ = torch.where(near, atoms, n_atom).sort(1)
  ordered = ordered[:, : int(near.sum(1).max())]
  valid = ordered < n_atom
  return torch.where(valid, ordered, n_atom - 1), valid
