"""SEDD protein-ligand: the parts of the dual track.

Not replayed: `final`, the output layer, which the library does not have yet.
"""

from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import numpy as np

from structattn_jax.network import sedd_dual_track as sedd
from structattn_jax.replay import torch_names
from structattn_jax.replay.golden import Comparison, Golden

_BLOCKS = {
  'block/plain': (),
  'block/cross': ('context', 'context_mask'),
  'block/cross_selfmask': ('self_mask', 'context', 'context_mask'),
}


def dual_components(golden: Golden) -> Iterator[Comparison]:
  """Timestep, embedding, rotary tables, cross-attention and blocks."""
  model = golden.meta['config']['model']
  inputs, params = golden.part('inputs'), golden.part('params')
  embedding = params['transformer.protein_embed.embedding.weight']
  config = sedd.DualTrackConfig(
    hidden_size=model['hidden_size'],
    num_head=model['n_heads'],
    num_block=1,
    cond_dim=model['cond_dim'],
    protein_vocab=len(embedding),
  )
  recorded = set(golden.outputs())

  def run(scope: str, path: str, make: Callable[[], Any], *arguments: Any):
    """A module with the golden's parameters, vmapped over the batch."""
    prefix = f'transformer.{path}.'
    own = {
      name.removeprefix(prefix): value
      for name, value in params.items()
      if name.startswith(prefix)
    }
    apply = hk.without_apply_rng(hk.transform(lambda *xs: make()(*xs))).apply
    batched = jax.vmap(apply, (None, *[0] * len(arguments)))
    return jax.jit(batched)(torch_names.haiku_params(own, scope), *arguments)

  if 'timestep/embedding' in recorded:
    got = jax.jit(jax.vmap(sedd.timestep_embedding))(inputs['sigma'])
    yield golden.value('timestep/embedding', got)
  if 'timestep/mlp' in recorded:
    got = run(
      'sigma_map',
      'sigma_map',
      lambda: sedd.TimestepEmbedder(config.cond_dim),
      inputs['sigma'],
    )
    # Upstream applies the last SiLU outside of the module.
    yield golden.value('timestep/mlp', got, convert=_silu)
  if 'embed' in recorded:
    got = run(
      'protein_embed',
      'protein_embed',
      lambda: sedd.TokenEmbedding(*embedding.shape, name='protein_embed'),
      inputs['indices'],
    )
    yield golden.value('embed', got)
  yield from _rotary(golden, recorded)

  block = 'blocks_prot.0'
  for name, masked in (('nomask', False), ('mask', True)):
    if f'cross_attn/{name}' in recorded:
      arguments = [inputs['x'], inputs['context']]
      arguments += [inputs['context_mask']] * masked
      got = run(
        'cross_attn',
        f'{block}.cross_attn',
        lambda: sedd.CrossAttention(config),
        *arguments,
      )
      # Upstream's module adds the residual itself.
      yield golden.value(f'cross_attn/{name}', inputs['x'] + np.asarray(got))
  for name, masks in _BLOCKS.items():
    if name in recorded:

      def make(masks=masks):
        module = sedd.DDiTBlock(config, name='block')

        def call(x, condition, *rest):
          given = {
            key.removeprefix('self_'): value
            for key, value in zip(masks, rest, strict=True)
          }
          return module(x, condition, **given)

        return call

      arguments = (inputs[key] for key in ('x', 'cond', *masks))
      got = run('block', block, make, *arguments)
      yield golden.value(name, got)


def _rotary(golden: Golden, recorded: set[str]) -> Iterator[Comparison]:
  rotate = jax.jit(jax.vmap(sedd.rotate_half))
  if 'rotary/qkv_out' in recorded:
    # [batch, n, 3, n_head, d_head]: queries, keys and values.
    qkv = golden.part('outputs')['rotary/qkv_in']
    got = [rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]]
    yield golden.value('rotary/qkv_out', np.stack(got, axis=2))
  for name in ('rotary/cos', 'rotary/sin'):
    if name in recorded:
      # Rotating (1, 0) shows the tables themselves, which occur twice.
      _, n, _, d_head = golden.arrays[f'outputs/{name}'].shape
      unit = np.zeros((1, n, 1, d_head), np.float32)
      unit[..., : d_head // 2] = 1
      cos, sin = np.split(np.asarray(rotate(unit)), 2, -1)
      table = cos if name == 'rotary/cos' else sin
      yield golden.value(name, np.concatenate([table, table], -1))


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))
