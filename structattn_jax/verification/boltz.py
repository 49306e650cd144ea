"""Boltz: atom encoders and decoders of both versions, conditioning."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.components import parameters as pm
from structattn_jax.components import windows
from structattn_jax.network.boltz import atom_attention as boltz
from structattn_jax.network.boltz import conditioning
from structattn_jax.network.boltz import parameters as boltz_parameters
from structattn_jax.network.boltz import transformers as bt
from structattn_jax.verification.golden import Comparison, Golden

# Modules that our parameters start with; a checkpoint has a prefix before them.
_ROOTS = re.compile(
  r'(diffusion_conditioning|atom_attention_encoder|atom_attention_decoder|'
  r'atom_encoder|atom_enc_proj_z|single_conditioner_no_times|'
  r'single_conditioner|pairwise_conditioner|rel_pos|s_to_a_linear|'
  r'token_transformer|a_norm)\..*'
)
# A second name of `output_projection_linear`.
_COPY = re.compile(r'layers\.\d+\.output_projection\.0\.')
_STRIDED = re.compile(r'(.*)__s(\d+)x(\d+)')
# Upstream's features; the other inputs are arguments.
FLOATS = (
  's_trunk',
  'z',
  'z_trunk',
  'relative_position_encoding',
  'r',
  'a_dec',
)
_FLAGS = (
  'use_no_atom_char',
  'use_atom_backbone_feat',
  'use_residue_feats_atoms',
  'transformer_post_layer_norm',
)


def encoder_decoder(golden: Golden) -> Iterator[Comparison]:
  """Encoder and, where there is one, decoder, and all gradients."""
  config = config_of(golden)
  params = haiku_params(golden.part('params'))
  inputs = golden.part('inputs')
  features = stacked_features(inputs)
  floats = {name: inputs[name] for name in FLOATS if name in inputs}
  cotangents = {
    name.removeprefix('cotangent_'): value
    for name, value in inputs.items()
    if name.startswith('cotangent_')
  }

  def loss(
    params: Any, floats: Any, features: Any
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    found = outputs(config, params, features, floats)
    terms = [jnp.sum(found[name] * x) for name, x in cotangents.items()]
    return sum(terms, jnp.zeros(())), found

  gradients: Any = None
  if cotangents:
    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, found), gradients = run(params, floats, features)
  else:
    _, found = jax.jit(loss)(params, floats, features)
  found = {**found, **pairs(config, params, features, floats)}
  if 'keys_probe' in inputs:
    probe = jax.vmap(windows.key_windows, (0, None, None))(
      jnp.asarray(inputs['keys_probe']),
      config.atoms_per_window_queries,
      config.atoms_per_window_keys,
    )
    found['keys_probe'] = probe
  is_atom = np.asarray(features.atom_mask)
  for name in golden.outputs():
    strided = _STRIDED.fullmatch(name)
    got = found.get(strided[1] if strided else name)
    if got is None:
      continue  # `verify` says that it was not replayed.
    if strided:
      got = got[:, :, :: int(strided[2]), :: int(strided[3])]
    if name == 'keys_probe':
      yield golden.exact(name, got)
      continue
    rows = None
    if name in ('q', 'r_update'):
      # Upstream attends to padding where there is nothing else.
      rows = _select(np.repeat(is_atom, len(got) // len(is_atom), 0))
    yield golden.value(name, got, rows=rows)
  for name in golden.arrays:
    if name.startswith('grads/params/'):
      value = torch_array(gradients[0], name.removeprefix('grads/params/'))
      width = golden.arrays[name].shape[-1]
      if name.endswith('r_to_q_trans.weight'):
        # Boltz-1's has columns that only ever meet zeros.
        value = np.pad(value, ((0, 0), (0, width - value.shape[-1])))
      yield golden.gradient(name, value)
    elif name.startswith('grads/inputs/'):
      yield golden.gradient(
        name, gradients[1][name.removeprefix('grads/inputs/')]
      )


def outputs(
  config: boltz.Config,
  params: Any,
  features: boltz.BoltzAtomFeatures,
  floats: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """Upstream's outputs for a batch of complexes, by the cached form.

  Args:
    config: of either version.
    params: with upstream's prefixes removed.
    features: with a leading axis of complexes.
    floats: the other inputs; positions and what is decoded have one row for
      each sample of each complex.

  Returns:
    The outputs that the goldens have, except for the atom pair.
  """
  _, precompute, encode, decode = boltz.cached_atom_attention(config)
  batch = len(features.ref_pos)
  found = {}
  pair = floats.get('z')
  if 'z_trunk' in floats:
    own = pm.below(params, 'diffusion_conditioning/')
    token_layers = [x for x in own if re.fullmatch(r'token_trans.*_0', x)]
    pair = conditioning.pairwise_conditioning(
      pm.below(own, 'pairwise_conditioner/'),
      floats['z_trunk'],
      floats['relative_position_encoding'],
    )
    found['z_cond'] = pair
    token_bias = [
      bt.pair_bias(own, f'token_trans_proj_z_{i}', pair)
      for i in range(len(token_layers))
    ]
    found['token_trans_bias'] = jnp.concatenate(token_bias, -1)
  context = jax.vmap(precompute, (None, 0, 0, 0))(
    params, features, floats.get('s_trunk'), pair
  )
  samples = 1

  def flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])

  def by_complex(x: jax.Array) -> jax.Array:
    return x.reshape(batch, -1, *x.shape[1:])

  if 'r' in floats:
    positions = by_complex(floats['r'])
    samples = positions.shape[1]
    encoded = jax.vmap(jax.vmap(encode, (None, None, 0)), (None, 0, 0))(
      params, context, positions
    )
    encoded = jax.tree.map(flat, encoded)
  else:
    encoded = jax.vmap(encode, (None, 0))(params, context)
  found |= {'a': encoded.tokens, 'q': encoded.atoms}
  if 'a_dec' in floats:
    updates = jax.vmap(jax.vmap(decode, (None, None, 0, 0)), (None, 0, 0, 0))
    token_act, atoms = by_complex(floats['a_dec']), by_complex(encoded.atoms)
    found['r_update'] = flat(updates(params, context, token_act, atoms))
  found['q0'], found['c0'] = context.queries, context.conditioning
  found['c'] = jnp.repeat(context.conditioning, samples, 0)
  return found


def pairs(
  config: boltz.Config,
  params: Any,
  features: boltz.BoltzAtomFeatures,
  floats: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """The atom pair and Boltz-2's biases, which the cached form never holds."""
  own = boltz_parameters.embedding_parameters(config, params)

  @jax.jit
  def pair(features: Any, single: Any, z: Any) -> jax.Array:
    if 'z_trunk' in floats:
      z = conditioning.pairwise_conditioning(
        pm.below(params, 'diffusion_conditioning/pairwise_conditioner/'),
        floats['z_trunk'],
        floats['relative_position_encoding'],
      )

    def one(features: Any, single: Any, z: Any) -> jax.Array:
      _, c = boltz.atom_conditioning(own, config, features, single)
      return boltz.atom_pair(own, config, features, c, z)

    return jax.vmap(one)(features, single, z)

  p = pair(features, floats.get('s_trunk'), floats.get('z'))
  found = {'p': p}
  if isinstance(config, boltz.Boltz2AtomAttentionConfig):
    for part in ('enc', 'dec'):
      layers = [
        bt.pair_bias(params, name, p)
        for name in boltz_parameters.bias_projections(config)
        if f'atom_{part}_proj_z' in name
      ]
      if layers:
        found[f'atom_{part}_bias'] = jnp.concatenate(layers, -1)
  return found


def blocks(golden: Golden) -> Iterator[Comparison]:
  """Fourier embedding, conditioning of single and pair, relative positions."""
  params, inputs = golden.part('params'), golden.part('inputs')
  own = {
    version: haiku_params(
      {
        name.removeprefix(f'boltz{version}.'): value
        for name, value in params.items()
        if name.startswith(f'boltz{version}.')
      }
    )
    for version in (1, 2)
  }
  found: dict[str, Any] = {}
  single = jax.jit(jax.vmap(conditioning.single_conditioning, (None, 0, 0, 0)))
  pairwise = jax.jit(conditioning.pairwise_conditioning)
  for version, scope in ((1, ''), (2, 'diffusion_conditioning/')):
    scoped = pm.below(own[version], 'single_conditioner/')
    s, fourier = single(
      scoped,
      inputs['s_trunk'],
      inputs[f's_inputs_v{version}'],
      inputs['times'],
    )
    found |= {f'v{version}_s': s, f'v{version}_fourier_normed': fourier}
    found[f'v{version}_z'] = pairwise(
      pm.below(own[version], f'{scope}pairwise_conditioner/'),
      inputs['z_trunk'],
      inputs['rel_pos_feats'],
    )
  found['v2_s_no_times'], _ = single(
    pm.below(own[2], 'single_conditioner_no_times/'),
    inputs['s_trunk'],
    inputs['s_inputs_v2'],
    None,
  )
  found['fourier'] = conditioning.fourier_embedding(
    pm.below(own[1], 'single_conditioner/fourier_embed/'),
    jnp.asarray(inputs['times']),
  )
  config = golden.meta['config']
  for name, version, row, rule, cyclic in (
    ('v1_relpos_cyclic', 1, 0, 'chain', True),
    ('v1_relpos_linear', 1, 1, 'chain', False),
    ('v2_relpos_fixsym_cyclic', 2, 0, 'entity', True),
    ('v2_relpos_plain', 2, 0, 'chain', False),
  ):
    own_config = conditioning.RelativePositionConfig(
      token_z=config['token_z'],
      r_max=config['r_max'],
      s_max=config['s_max'],
      same_chain_rule=rule,
      cyclic=cyclic,
    )
    arguments = [
      inputs[key][row]
      for key in (
        'asym_id',
        'residue_index',
        'entity_id',
        'token_index',
        'sym_id',
        'cyclic_period',
      )
    ]
    found[name] = conditioning.relative_position_encoding(
      pm.below(own[version], 'rel_pos/'), own_config, *arguments
    )[None]
  for name in golden.outputs():
    if name in found:
      yield golden.value(name, found[name])


def haiku_params(
  state: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
  """A state dict of either version as our parameters, without prefix."""
  params: dict[str, dict[str, Any]] = {}
  for name, value in state.items():
    if _COPY.search(name):
      continue
    module, kind = _locate(name, state)
    if kind == 'weights':
      value = value.T
    if module.endswith('r_to_q_trans'):
      value = value[:3]
    params.setdefault(module, {})[kind] = value
  return params


def torch_array(params: pm.Params, name: str) -> np.ndarray:
  """One of our arrays under torch's name and in its orientation."""
  module, kind = _local(name)
  own = params[module]
  if 'scale' in own:
    kind = {'weight': 'scale', 'bias': 'offset'}[kind]
  elif kind == 'weight':
    return np.asarray(own['weights']).T
  return np.asarray(own[kind])


def _locate(name: str, state: Mapping[str, np.ndarray]) -> tuple[str, str]:
  """Module and name of ours; layer norms are those with a vector of weights."""
  module, kind = _local(name)
  weight = state[f'{name.rpartition(".")[0]}.weight']
  if weight.ndim == 1:
    return module, {'weight': 'scale', 'bias': 'offset'}[kind]
  return module, {'weight': 'weights', 'bias': 'bias'}[kind]


def _local(name: str) -> tuple[str, str]:
  """'prefix.a.0.b.weight' -> ('a_0/b', 'weight')."""
  match = _ROOTS.search(name)
  if match is None:
    raise ValueError(f'params: unknown name {name!r}')
  local, _, kind = match[0].rpartition('.')
  return re.sub(r'\.(\d+)', r'_\1', local).replace('.', '/'), kind


def stacked_features(inputs: Mapping[str, Any]) -> boltz.BoltzAtomFeatures:
  """Upstream's features of a batch, with a leading axis."""
  batch = len(inputs['ref_pos'])
  names = (
    'ref_pos',
    'ref_charge',
    'ref_element',
    'ref_atom_name_chars',
    'ref_space_uid',
    'atom_pad_mask',
    'atom_to_token',
    'atom_backbone_feat',
    'res_type',
    'modified',
    'mol_type',
  )
  items = [
    boltz.BoltzAtomFeatures.from_upstream(
      {name: inputs[name][i] for name in names if name in inputs}
    )
    for i in range(batch)
  ]
  return jax.tree.map(lambda *x: np.stack(x), *items)


def config_of(golden: Golden) -> boltz.Config:
  """The configuration, with what parameters say better."""
  meta = golden.meta['config']
  names = [name for name in golden.arrays if name.startswith('params/')]

  def depth(pattern: str) -> int:
    found = [re.search(pattern, name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)

  options: dict[str, Any] = {
    'atom_s': meta['atom_s'],
    'atom_z': meta['atom_z'],
    'token_s': meta['token_s'],
    'token_z': meta['token_z'],
    'atoms_per_window_queries': meta['W'],
    'atoms_per_window_keys': meta['H'],
    'atom_encoder_depth': depth(r'\.atom_encoder\..*layers\.(\d+)\.'),
    'atom_decoder_depth': depth(r'\.atom_decoder\..*layers\.(\d+)\.'),
    'atom_encoder_heads': meta['heads'],
    'atom_decoder_heads': meta['heads'],
    'structure_prediction': meta['structure_prediction'],
  }
  if golden.meta['model'] == 'boltz1':
    return boltz.Boltz1AtomAttentionConfig(**options)
  return boltz.Boltz2AtomAttentionConfig(
    **options,
    **{name: meta[name] for name in _FLAGS if name in meta},
    decoder_post_layer_norm=any(
      'atom_decoder' in name and 'post_lnorm' in name for name in names
    ),
    token_transformer_depth=max(depth(r'token_trans_proj_z\.(\d+)\.'), 1),
    token_transformer_heads=meta['heads'],
  )


def _select(mask: np.ndarray) -> Any:
  return lambda array: array[mask]
