"""Oracle of Boltz's diffusion module, versions 1 and 2, one sample at a time.

Parameters are ours, {module: {name: array}}; see `network.boltz.diffusion`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from structattn_jax.reference import boltz, numerics
from structattn_jax.reference.boltz import Params, below, linear


def denoise(
  params: Params,
  inputs: Mapping[str, Any],
  *,
  version: int,
  n_query: int,
  n_key: int,
  encoder: tuple[int, int],
  decoder: tuple[int, int],
  transformer: tuple[int, int],
  sigma_data: float = 16.0,
  **choices: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Denoised positions [n_atom, 3] and the tokens behind them, Alg. 20.

  Args:
    params: of either version.
    inputs: the fields of `BoltzAtomFeatures`, `token_mask`, `single_inputs`,
      `single`, `pair`, `relative_position`, `positions` and `sigma`.
    version: 1 or 2.
    n_query: query atoms per window.
    n_key: key atoms per window.
    encoder: depth and heads.
    decoder: depth and heads.
    transformer: depth and heads of the token transformer.
    sigma_data: standard deviation of the data.
    **choices: Boltz-2's, of its atom features.
  """
  x, sigma = inputs['positions'], float(inputs['sigma'])
  time = np.log(max(sigma / sigma_data, 1e-20)) / 4
  # Line 1, Alg. 21.
  second = 'diffusion_conditioning/' if version == 2 else ''
  own = below(params, f'{second}pairwise_conditioner/')
  z = np.concatenate([inputs['pair'], inputs['relative_position']], -1)
  z = transitions(own, norm_linear(own, 'dim_pairwise_init_proj', z))
  own = below(params, 'single_conditioner/')
  s = np.concatenate([inputs['single'], inputs['single_inputs']], -1)
  s = numerics.layer_norm(s, **own['norm_single'])
  s = linear(own, 'single_embed', s)
  fourier = own['fourier_embed/proj']
  n = np.cos(2 * np.pi * (time * fourier['weights'][0] + fourier['bias']))
  n = numerics.layer_norm(n, **own['norm_fourier'])
  s = transitions(own, s + linear(own, 'fourier_to_single', n))
  # Lines 4 to 6.
  found = {}

  def tokens(a: np.ndarray) -> np.ndarray:
    a = a + norm_linear(params, 's_to_a_linear', s)
    for i in range(transformer[0]):
      scope = f'token_transformer/layers_{i}/'
      name = f'{scope}pair_bias_attn/proj_z'
      if version == 2:
        name = f'diffusion_conditioning/token_trans_proj_z_{i}'
      layer = below(params, scope)
      bias = norm_linear(params, name, z)
      a = token_layer(layer, a, s, bias, inputs['token_mask'], transformer[1])
    found['token_act'] = numerics.layer_norm(a, **params['a_norm'])
    return found['token_act']

  # Lines 2, 3, 7 and 8.
  variance = sigma**2 + sigma_data**2
  atoms = {
    **inputs,
    'pair': z,
    'positions': x / np.sqrt(variance),
    'token_act': tokens,
  }
  update = boltz.atom_attention(
    params,
    atoms,
    version=version,
    n_query=n_query,
    n_key=n_key,
    encoder=encoder,
    decoder=decoder,
    num_tokens=len(s),
    **choices,
  )['update']
  c_out = sigma * sigma_data / np.sqrt(variance)
  return sigma_data**2 / variance * x + c_out * update, found['token_act']


def token_layer(
  params: Params,
  a: np.ndarray,
  s: np.ndarray,
  bias: np.ndarray,
  mask: np.ndarray,
  heads: int,
) -> np.ndarray:
  """One layer of Alg. 23 over all tokens: one window of all of them."""
  keys = np.arange(len(a))[None]
  return boltz.layer(params, a, s, bias[None], mask, keys, heads)


def transitions(params: Params, x: np.ndarray) -> np.ndarray:
  """All of a conditioner's, x += fc3(silu(fc1 y) fc2 y), y = LN(x)."""
  i = 0
  while f'transitions_{i}/norm' in params:
    own = below(params, f'transitions_{i}/')
    y = numerics.layer_norm(x, **own['norm'])
    gate = linear(own, 'fc1', y)
    hidden = gate / (1 + np.exp(-gate)) * linear(own, 'fc2', y)
    x = x + linear(own, 'fc3', hidden)
    i += 1
  return x


def norm_linear(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  """A layer norm called name_0 and a linear layer called name_1."""
  return linear(
    params, f'{name}_1', numerics.layer_norm(x, **params[f'{name}_0'])
  )
