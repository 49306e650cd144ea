"""AlphaFold 2: invariant point attention and the structure module."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config
from structattn_jax.network.alphafold2 import invariant_point_attention as ipa
from structattn_jax.network.alphafold2 import structure_module
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification.golden import Comparison, Golden

# Arguments that have gradients, under upstream's names.
_ARGUMENTS = ('inputs_1d', 'inputs_2d', 'rotation', 'translation')


# Outputs of the structure module whose residues are the second axis.
_PER_ITERATION = (
  'angles_sin_cos',
  'atom_pos',
  'frames',
  'traj',
  'unnormalized_angles_sin_cos',
)
# Of the structure module, for each iteration; see `golden.py`.
_FACTOR = 6.0
_MOST, _MOST_GRADIENT = 6e-6, 1.6e-5
_VARIANTS = {'mono': 'monomer', 'multi': 'multimer'}

_Config = TypeVar('_Config', bound=base_config.BaseConfig)


def attention(golden: Golden) -> Iterator[Comparison]:
  """Output, attention weights, features and all gradients."""
  variant = _VARIANTS[golden.meta['kind'].rpartition('_')[2]]
  config = _config(ipa.InvariantPointAttentionConfig, golden, variant)
  apply = ipa.transform_ipa(config).apply
  inputs = golden.part('inputs')
  mask = inputs['mask'].reshape(-1) > 0
  params = golden_lib.haiku_params(golden.part('params'))
  arrays = [inputs.get(name) for name in _ARGUMENTS]

  @jax.jit
  def intermediates(params, *arrays):
    return apply(params, *arrays, mask, return_attention=True)

  cotangent = inputs.get('cotangent', 0.0)

  def loss(params, *arrays):
    out = apply(params, *arrays, mask)
    return jnp.sum(out * cotangent), out

  @jax.jit
  def run(params, *arrays):
    # The path that users get, which need not be the one with intermediates.
    numbers = tuple(range(1 + len(arrays)))
    return jax.value_and_grad(loss, numbers, has_aux=True)(params, *arrays)

  # Far from the origin upstream loses some times the relative spacing of
  # float32 there. Centring avoids nearly all of it: a tenth is accepted.
  far = 0.1 * float(
    np.finfo(np.float32).eps * np.abs(inputs['translation']).max()
  )
  most = max(golden_lib.MOST, far)
  (_, out), gradients = run(params, *arrays)
  recorded = golden.outputs()
  if 'out' in recorded:
    yield golden.value('out', out, rows=_rows(mask), most=most)
  if {'attn', 'features'} & set(recorded):
    found = intermediates(params, *arrays)
    weights = found.attention
    # Upstream's layouts: [n_head, query, key] and [query, key, n_head].
    query = 0 if variant == 'multimer' else 1
    if variant == 'multimer':
      weights = jnp.moveaxis(weights, 0, -1)
    if 'attn' in recorded:
      rows = _rows(mask, query)
      yield golden.value('attn', weights, rows=rows, most=most)
    if 'features' in recorded:
      yield golden.value(
        'features', found.features, rows=_rows(mask), most=most
      )
  if 'cotangent' in inputs:
    named = dict(zip(_ARGUMENTS, gradients[1:], strict=True))
    most = max(golden_lib.MOST_GRADIENT, far)
    yield from _gradients(golden, named, gradients[0], most=most)


def structure(golden: Golden) -> Iterator[Comparison]:
  """All outputs and gradients of the structure module."""
  variant = _VARIANTS[golden.meta['kind'].rpartition('_')[2]]
  config = _config(structure_module.StructureModuleConfig, golden, variant)
  apply = structure_module.transform_structure_module(config).apply
  inputs = golden.part('inputs')
  mask = inputs['seq_mask'] > 0
  scope = _outer_scope(golden)
  params = golden_lib.haiku_params(golden.part(f'params/{scope}'.rstrip('/')))
  # The multimer takes these from its tables.
  atom_masks = {
    f'atom{n}_mask': inputs[f'atom{n}_atom_exists'] > 0
    for n in (14, 37)
    if f'atom{n}_atom_exists' in inputs
  }
  cotangents = {
    name.removeprefix('cotangent_'): value
    for name, value in inputs.items()
    if name.startswith('cotangent_')
  }

  def loss(params, single, pair):
    found = apply(params, single, pair, inputs['aatype'], mask, **atom_masks)
    terms = [
      jnp.sum(getattr(found, name) * value)
      for name, value in cotangents.items()
    ]
    return sum(terms, jnp.zeros(())), found

  @jax.jit
  def run(*arguments):
    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arguments)

  (_, found), gradients = run(params, inputs['single'], inputs['pair'])
  for name in golden.outputs():
    if hasattr(found, name):
      got = getattr(found, name)
      rows = _rows(mask, 1 if name in _PER_ITERATION else 0)
      if name.endswith('_mask'):
        yield golden.exact(name, got, rows=rows)
      else:
        most = _MOST * config.num_layer
        yield golden.value(name, got, rows=rows, most=most, factor=_FACTOR)
  if cotangents:
    named = {'single': gradients[1], 'pair': gradients[2]}
    options = {'most': _MOST_GRADIENT * config.num_layer, 'factor': _FACTOR}
    yield from _gradients(golden, named, gradients[0], scope, **options)


def _config(cls: type[_Config], golden: Golden, variant: str) -> _Config:
  """The config, without what upstream has in its own beside the sizes."""

  def known(cls: type[base_config.BaseConfig], given: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: x for name, x in given.items() if name in names}

  values = known(cls, golden.meta['config'])
  if 'sidechain' in values:
    own = known(structure_module.SideChainConfig, values['sidechain'])
    values['sidechain'] = own
  return cls.from_dict({**values, 'parameterisation': variant})


def _outer_scope(golden: Golden) -> str:
  """The part of the parameters' scope in front of ours."""
  name = next(name for name in golden.arrays if name.startswith('params/'))
  outer = name.removeprefix('params/').partition('structure_module')[0]
  return outer.rstrip('/')


def _gradients(
  golden: Golden,
  inputs: dict[str, Any],
  params: Any,
  scope: str = '',
  **options: float,
) -> Iterator[Comparison]:
  """Recorded gradients, `grad_<input>` and `grad_params/<module>//<name>`."""
  for name in golden.outputs('grad_'):
    module, _, parameter = name.partition('/')[2].rpartition('//')
    if name.startswith('grad_params/'):
      got = params[module.removeprefix(f'{scope}/')][parameter]
    else:
      got = inputs.get(name.removeprefix('grad_'))
    if got is not None:
      yield golden.gradient(name, got, **options)


def _rows(
  mask: np.ndarray, axis: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
  """Real residues: upstream's float32 is only good to 1e-3 in the others."""
  return lambda array: np.compress(mask, array, axis)
