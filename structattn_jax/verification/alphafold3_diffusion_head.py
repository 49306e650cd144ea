"""AlphaFold 3: the diffusion head, its gradients, and sampling with it.

Denoised positions and gradients are those of `cached_diffusion_head`; the
conditioning is that of the published form.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from structattn_jax import diffusion
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold3 import cached_diffusion as cdh
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification.golden import Comparison, Golden

_SCOPE = 'diffuser/~/diffusion_head/'
# Which sample the gradients are of.
_LEVEL = 1
# Of the largest coordinate, after several steps in float32.
_SAMPLER_FLOOR = 5e-6


def head(golden: Golden) -> Iterator[Comparison]:
  """All outputs and gradients of the head."""
  inputs = golden.part('inputs')
  params, batch, embeddings = arguments(golden)
  levels, positions = inputs['noise_level'], inputs['positions_noisy']
  head = cdh.cached_diffusion_head()

  def run(
    params: Any, embeddings: Any, positions: Any, levels: Any, use: Any
  ) -> jax.Array:
    conditioning = head.precompute(params, batch, embeddings, use)
    return jax.vmap(
      lambda x, t: head.denoise(params, conditioning, x[None], t)[0]
    )(positions, levels)

  def loss(params: Any, embeddings: Any, positions: Any) -> jax.Array:
    denoised = run(
      params, embeddings, positions[None], levels[_LEVEL, None], True
    )
    return jnp.sum(denoised * inputs['loss_w'])

  run_jit = jax.jit(run)
  condition = jax.jit(jax.vmap(dh.conditioning, (None, 0, None, None, None)))
  for name, use in (('conditioned', True), ('unconditioned', False)):
    denoised = run_jit(params, embeddings, positions, levels, use)
    yield golden.value(
      f'{name}/denoised', denoised, floor=golden_lib.GEOMETRY_FLOOR
    )
    single_cond, pair_cond = condition(
      params, levels[:2], batch.tokens, embeddings, use
    )
    yield golden.value(f'{name}/single_cond', single_cond)
    yield golden.value(f'{name}/pair_cond', pair_cond[0])
  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  by_param, by_embedding, by_position = gradient(
    params, embeddings, positions[_LEVEL]
  )
  for output in golden.outputs('grad/'):
    kind, _, path = output.removeprefix('grad/').partition('/')
    module, _, array = path.removeprefix(_SCOPE).rpartition('/')
    if kind == 'params':
      got = by_param[module][array]
    elif module == 'embeddings':
      got = getattr(by_embedding, array)
    else:
      got = by_position
    yield golden.gradient(output, got)


def sampler(golden: Golden) -> Iterator[Comparison]:
  """Samples from their key."""
  params, batch, embeddings = arguments(golden)
  recorded = golden.meta['sample']
  head = cdh.cached_diffusion_head()

  @jax.jit
  def run(params: Any, embeddings: Any, key: jax.Array) -> jax.Array:
    conditioning = head.precompute(params, batch, embeddings)
    return diffusion.sample(
      functools.partial(head.denoise, params, conditioning),
      batch.atoms.pred_dense_atom_mask,
      diffusion.SamplerConfig(steps=recorded['steps']),
      num_samples=recorded['num_samples'],
      key=key,
    ).positions

  key = jax.random.wrap_key_data(jnp.asarray(golden.arrays['inputs/key']))
  found = run(params, embeddings, key)
  # There is no float64 run: errors grow from step to step.
  yield golden.value('atom_positions', found, floor=_SAMPLER_FLOOR)


def arguments(
  golden: Golden,
) -> tuple[dict[str, Any], dh.DiffusionHeadBatch, dh.TrunkEmbeddings]:
  """Parameters, batch and embeddings of a golden."""
  inputs = golden.part('inputs')
  features = {name.removeprefix('token/'): x for name, x in inputs.items()}
  features['seq_mask'] = features.pop('mask')
  embeddings: dict[str, Any] = golden.part('inputs/embeddings')
  params = golden_lib.haiku_params(golden.part('params'))
  return (
    dict(pm.below(params, _SCOPE)),
    dh.DiffusionHeadBatch.from_batch(features),
    dh.TrunkEmbeddings(**embeddings),
  )
