"""Pallatom: sparse pairs and the atom transformer."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from structattn_jax import systems
from structattn_jax.network import pallatom_atom_transformers as pallatom
from structattn_jax.replay import torch_names
from structattn_jax.replay.golden import Comparison, Golden

_SCOPE = 'atom_transformer'


def sparse_pairs(golden: Golden) -> Iterator[Comparison]:
  """Neighbours of several index vectors; exact."""
  inputs = golden.part('inputs')
  numbers = [re.fullmatch(r'tok_idx_(\d+)', name) for name in inputs]
  numbers = [match[1] for match in numbers if match]

  @jax.jit
  def build():
    # The vectors are constants, as the number of neighbours depends on them.
    return {
      number: pallatom.build_sparse_pairs(
        inputs[f'tok_idx_{number}'], int(inputs[f'window_size_{number}'])
      )
      for number in numbers
    }

  for number, (index, valid) in build().items():
    yield golden.exact(f'neighbor_idx_{number}', index)
    yield golden.exact(f'valid_mask_{number}', valid)


def atom_transformer(golden: Golden) -> Iterator[Comparison]:
  """Values and all gradients, vmapped over the batch."""
  names = golden.meta['config']
  config = pallatom.AtomTransformerConfig(
    num_block=names['n_blocks'], num_head=names['n_heads']
  )
  inputs = golden.part('inputs')
  params = torch_names.haiku_params(golden.part('params'), _SCOPE)
  order = ('q', 'c', 'p', 'neighbor_idx', 'valid_mask')
  unbatched = (2, 2, 3, 2, 2)
  axes = [
    0 if inputs[name].ndim > rank else None
    for name, rank in zip(order, unbatched, strict=True)
  ]
  fn = jax.vmap(
    pallatom.transform_atom_transformer(config).apply, (None, *axes)
  )
  rest = [inputs[name] for name in order[3:]]
  cotangent = golden.part('cotangents').get('q')

  def loss(params, q, c, p):
    out = fn(params, q, c, p, *rest)
    return jnp.sum(out * (0.0 if cotangent is None else cotangent)), out

  @jax.jit
  def run(*arguments):
    return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arguments)

  (_, out), gradients = run(params, *(inputs[name] for name in order[:3]))
  yield golden.value('q', out)
  found = {
    f'grads/params/{name}': value
    for name, value in systems.torch_names(gradients[0], _SCOPE).items()
  }
  for name, value in zip(order[:3], gradients[1:], strict=True):
    found[f'grads/inputs/{name}'] = value
  recorded = [name for name in golden.arrays if name.startswith('grads/')]
  for name in recorded:
    yield golden.gradient(name, found[name])
