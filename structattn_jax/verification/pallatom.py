"""Pallatom: sparse pairs, the atom transformer, encoder and decoders."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.network import pallatom
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification import systems, torch_names
from structattn_jax.verification.golden import Comparison, Golden

_SCOPE = 'atom_transformer'
_ENCODER, _DECODER = 'atom_feature_encoder', 'atom_attention_decoder'


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


def feature_encoder(golden: Golden) -> Iterator[Comparison]:
  """Values and all gradients of the encoder, p_skip as upstream's tensor."""
  config = _encoder_config(golden.meta['config'], 'm', 'd', 'c', 'n_blocks')
  apply = pallatom.transform_atom_feature_encoder(config).apply
  inputs = golden.part('inputs')
  tok_idx = inputs.pop('tok_idx')
  pairs = _pairs(tok_idx, config.window_size)

  def run(params, floats):
    out = apply(params['encoder'], **inputs | floats, tok_idx=tok_idx)
    return out._replace(p_skip=_dense(out.p_skip, pairs))._asdict()

  yield from _compare(golden, run, inputs, {'encoder': (_ENCODER, '')})


def attention_decoder(golden: Golden) -> Iterator[Comparison]:
  """Values and all gradients of the decoder."""
  names = golden.meta['config']
  config = _decoder_config(names, 'n_blocks')
  apply = pallatom.transform_atom_attention_decoder(config).apply
  inputs = golden.part('inputs')
  tok_idx = inputs.pop('tok_idx')

  def run(params, floats):
    out = apply(params['decoder'], **inputs | floats, tok_idx=tok_idx)
    return out._asdict()

  yield from _compare(golden, run, inputs, {'decoder': (_DECODER, '')})


def encoder_and_decoders(golden: Golden) -> Iterator[Comparison]:
  """Values and all gradients of an encoder with its chain of decoders."""
  names = golden.meta['config']
  config = _encoder_config(
    names, 'c_atom', 'c_atompair', 'c_res', 'encoder_blocks'
  )
  encode = pallatom.transform_atom_feature_encoder(config).apply
  decode = pallatom.transform_atom_attention_decoder(
    _decoder_config(names, 'decoder_blocks')
  ).apply
  inputs = golden.part('inputs')
  tok_idx = inputs.pop('tok_idx')
  pairs = _pairs(tok_idx, config.window_size)
  units = [f'decoder_{unit}' for unit in range(names['K_unit'])]

  def run(params, floats):
    features = encode(params['encoder'], **inputs | floats, tok_idx=tok_idx)
    context, updates, out = features.c_l, [], None
    for unit in units:
      out = decode(
        params[unit],
        q_skip=features.q_skip,
        p_skip=features.p_skip,
        c_skip=features.c_skip,
        c=context,
        s=features.s_i,
        z=floats['z_input'],
        tok_idx=tok_idx,
        return_pair=unit == units[-1],
      )
      context = out.c_out
      updates.append(out.r_update)
    return {
      **features._asdict(),
      'p_skip': _dense(features.p_skip, pairs),
      **({} if out is None else out._asdict()),
      'r_sum': sum(updates),
    }

  prefixes = {'encoder': (_ENCODER, 'atom_encoder.')}
  for number, unit in enumerate(units):
    prefixes[unit] = (_DECODER, f'atom_decoders.{number}.')
  yield from _compare(golden, run, inputs, prefixes)


def _encoder_config(
  names: Mapping[str, Any], c_atom: str, c_pair: str, c_out: str, blocks: str
) -> pallatom.AtomFeatureEncoderConfig:
  return pallatom.AtomFeatureEncoderConfig(
    c_atom=names[c_atom],
    c_pair=names[c_pair],
    c_out=names[c_out],
    num_block=names[blocks],
    num_head=names['n_heads'],
    window_size=names['window_size'],
  )


def _decoder_config(
  names: Mapping[str, Any], blocks: str
) -> pallatom.AtomAttentionDecoderConfig:
  return pallatom.AtomAttentionDecoderConfig(
    num_block=names[blocks],
    num_head=names['n_heads'],
    window_size=names['window_size'],
  )


def _pairs(tok_idx: np.ndarray, window_size: int) -> tuple[Any, Any]:
  """Neighbours of the first item, as published."""
  shared = tok_idx[0] if tok_idx.ndim == 2 else tok_idx
  return pallatom.build_sparse_pairs(shared, window_size)


def _dense(skip: Any, pairs: tuple[Any, Any]) -> Any:
  return skip.dense(*pairs) if hasattr(skip, 'dense') else skip


def _compare(
  golden: Golden,
  fn: Callable[[Any, Any], dict[str, Any]],
  inputs: Mapping[str, np.ndarray],
  modules: Mapping[str, tuple[str, str]],
) -> Iterator[Comparison]:
  """Outputs and gradients of `fn(params, floats)`.

  Args:
    golden: the file.
    fn: returns outputs under upstream's names.
    inputs: those of them that are floats carry gradients.
    modules: name in `params` to scope of its parameters and upstream's prefix.
  """
  state = golden.part('params')
  params = {
    module: torch_names.haiku_params(
      {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix)
      },
      scope,
    )
    for module, (scope, prefix) in modules.items()
  }
  floats = {
    name: value for name, value in inputs.items() if value.dtype.kind == 'f'
  }
  cotangents = golden.part('cotangents')

  def loss(params, floats):
    out = fn(params, floats)
    terms = [jnp.sum(out[name] * value) for name, value in cotangents.items()]
    return sum(terms, jnp.zeros(())), out

  @jax.jit
  def run(params, floats):
    if not cotangents:
      return fn(params, floats), None
    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(params, floats)
    return out, gradients

  # Two channels make LayerNorm of the pair nearly a sign.
  names = golden.meta['config']
  is_sign = names.get('c_atompair', names.get('d')) == 2
  most = 5e-6 if is_sign else golden_lib.MOST
  out, gradients = run(params, floats)
  for name in golden.outputs():
    yield golden.value(name, out[name], most=most)
  if gradients is None:
    return
  found = {f'grads/inputs/{name}': x for name, x in gradients[1].items()}
  for module, (scope, prefix) in modules.items():
    own = systems.torch_names(gradients[0][module], scope)
    found |= {f'grads/params/{prefix}{name}': x for name, x in own.items()}
  # Upstream's own float32 loses 3e-6 of the largest value of a gradient, and
  # ten times that with coordinates of 40 angstrom.
  reach = np.abs(inputs.get('ref_pos', np.zeros(1))).max(initial=0)
  floor = golden_lib.GRADIENT_FLOOR * float(np.clip(reach / 3, 1, 10))
  floor = 1e-3 if is_sign else floor
  for name in golden.arrays:
    if name.startswith('grads/'):
      compared = golden.gradient(name, found[name])
      yield dataclasses.replace(compared, floor=floor)
