"""The five systems behind one interface: pure functions and their oracle.

`structattn run` and the test suites loop over these records. Each pairs the
transformed functions with the float64 oracle of the same formula, so that

  system.apply(params, inputs) ~= system.oracle(params, inputs)
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.network import pallatom
from structattn_jax.network.alphafold2 import invariant_point_attention as ipa
from structattn_jax.network.alphafold3 import atom_cross_attention as af3
from structattn_jax.network.alphafold3 import atom_layout
from structattn_jax.network.alphafold3 import cached_atom_attention as aca
from structattn_jax.network.alphafold3 import cached_diffusion as cdh
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.network.alphafold3 import window_plan as wp
from structattn_jax.network.boltz import atom_attention as boltz
from structattn_jax.network.boltz import diffusion as boltz_diffusion_module
from structattn_jax.network.sedd import dual_track as sedd_dual_track
from structattn_jax.network.seeds import token_atom_attention as taa
from structattn_jax.network.seeds import (
  token_attention_pool as boltz_token_attention,
)
from structattn_jax.reference import alphafold3 as aca_reference
from structattn_jax.reference import (
  alphafold3_diffusion_head as head_reference,
)
from structattn_jax.reference import boltz as boltz_reference
from structattn_jax.reference import (
  boltz_diffusion as boltz_diffusion_reference,
)
from structattn_jax.reference import pallatom as pallatom_reference
from structattn_jax.reference import sedd as sedd_reference
from structattn_jax.reference.alphafold2 import (
  invariant_point_attention as ipa_reference,
)

Inputs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class System:
  """One attention system, ready to initialise and run.

  Attributes:
    name: short identifier.
    title: what it is, for people.
    algorithm: where the formula stands.
    transformed: `init(key, ...)` and `apply(params, ...)`, the public form.
    oracle: `oracle(params, inputs)`, the same output tree in NumPy float64.
    shapes: dimension names of every array input, as in the docstrings.
    arguments: `arguments(inputs)`, those of `transformed` by name; for systems
      that take some of the arrays in one typed argument.
  """

  name: str
  title: str
  algorithm: str
  transformed: hk.Transformed
  oracle: Callable[[hk.Params, Inputs], Any]
  shapes: Mapping[str, str]
  arguments: Callable[[Inputs], dict[str, Any]] = dict

  def init(self, key: jax.Array, inputs: Inputs) -> Any:
    """Parameters for `inputs`, arrays by name."""
    return self.transformed.init(key, **self.arguments(inputs))

  def apply(self, params: hk.Params, inputs: Inputs) -> Any:
    """The output for `inputs`, arrays by name."""
    return self.transformed.apply(params, **self.arguments(inputs))


def invariant_point_attention(
  config: ipa.InvariantPointAttentionConfig,
) -> System:
  """AF2's invariant point attention."""

  def oracle(params: hk.Params, inputs: Inputs) -> np.ndarray:
    scope = 'invariant_point_attention'
    own = {
      path.removeprefix(scope).removeprefix('/'): float64(values)
      for path, values in params.items()
    }
    if config.head_weights == 'unit':
      head_weights = np.ones(config.num_head)
    else:
      head_weights = np.logaddexp(own['']['trainable_point_weights'], 0)
    values = float64(inputs)
    mask = values.get('mask')
    return ipa_reference.invariant_point_attention(
      own,
      values['single'],
      values.get('pair'),
      values['rotation'],
      values['translation'],
      np.ones(len(values['single']), bool) if mask is None else mask,
      head_weights=head_weights,
      parameterisation=config.parameterisation,
      num_head=config.num_head,
      num_scalar_qk=config.num_scalar_qk,
      num_point_qk=config.num_point_qk,
    )

  return System(
    'af2_ipa',
    'AlphaFold 2 invariant point attention',
    'Jumper et al. 2021, Suppl. Alg. 22 (seed 003)',
    ipa.transform_ipa(config),
    oracle,
    {
      'single': 'n_res c_s',
      'pair': 'n_res n_res c_z',
      'rotation': 'n_res 3 3',
      'translation': 'n_res 3',
      'mask': 'n_res',
    },
  )


def token_atom_attention(
  config: taa.TokenAtomAttentionConfig,
) -> System:
  """AF3's token <-> atom attention in the seed's form."""

  def oracle(params: hk.Params, inputs: Inputs) -> taa.TokenAtomAttentionOutput:
    values = float64(inputs)
    arguments = (values['atoms'], values['tokens'], values['atom_to_token'])
    mask = values.get('atom_mask')

    def weights(scope: str) -> dict[str, np.ndarray]:
      return {
        name.lower(): value for name, value in float64(params[scope]).items()
      }

    to_atoms = weights('to_atoms')
    if config.normalise == 'keys':  # Queries and keys cancel out.
      heads = (config.num_head, config.d_head)
      to_atoms['w_q'] = np.zeros((arguments[0].shape[1], *heads))
      to_atoms['w_k'] = np.zeros((arguments[1].shape[1], *heads))
    atoms: Any = aca_reference.token_to_atom(
      *arguments, **to_atoms, normalise=config.normalise, atom_mask=mask
    )
    tokens: Any = aca_reference.atom_to_token(
      *arguments, **weights('to_tokens'), atom_mask=mask
    )
    return taa.TokenAtomAttentionOutput(atoms=atoms, tokens=tokens)

  return System(
    'af3_atom_cross_attention',
    'AlphaFold 3 token-atom cross attention',
    'Abramson et al. 2024, Suppl. Algs. 5-6, simplified (seed 000)',
    taa.transform_token_atom_attention(config),
    oracle,
    {
      'atoms': 'n_atom c_atom',
      'tokens': 'n_token c_token',
      'atom_to_token': 'n_atom',
      'atom_mask': 'n_atom',
    },
  )


def atom_cross_att(
  config: af3.AtomCrossAttConfig, plan: wp.WindowPlan
) -> System:
  """AF3's own atom encoder and decoder over the windows of a plan."""
  conformer = [field.name for field in dataclasses.fields(wp.RefStructure)]

  def arguments(inputs: Inputs) -> dict[str, Any]:
    rest = {k: x for k, x in inputs.items() if k not in conformer}
    ref = wp.RefStructure(**{k: inputs[k] for k in conformer})
    return {'plan': plan, 'ref': ref, **rest}

  def oracle(params: hk.Params, inputs: Inputs) -> aca.AtomCrossAttHeadOutput:
    values = float64(inputs)
    names = ('positions', 'trunk_single_cond', 'trunk_pair_cond', 'token_act')
    options = {name: values.pop(name, None) for name in names}
    found: dict[str, Any] = aca_reference.atom_cross_att(
      {module: float64(arrays) for module, arrays in params.items()},
      {**values, **_plan_atoms(config, plan)},
      plan.num_tokens,
      num_queries=plan.num_queries,
      num_keys=plan.num_keys,
      padded_keys=config.padded_keys,
      **options,
    )
    found.setdefault('position_update', None)
    return aca.AtomCrossAttHeadOutput(**found)

  return System(
    'af3_atom_encoder_decoder',
    'AlphaFold 3 atom cross attention encoder and decoder',
    'Abramson et al. 2024, Suppl. Algs. 5-7 and 24-26',
    aca.transform_atom_cross_att(config),
    oracle,
    {
      'ref_pos': 'n_atom 3',
      'ref_mask': 'n_atom',
      'ref_element': 'n_atom',
      'ref_charge': 'n_atom',
      'ref_atom_name_chars': 'n_atom 4',
      'positions': 'n_atom 3',
      'trunk_single_cond': 'n_token c_s',
      'trunk_pair_cond': 'n_token n_token c_z',
      'token_act': 'n_token c_token',
    },
    arguments,
  )


def diffusion_head(
  config: dh.DiffusionHeadConfig,
  batch: atom_layout.DenseBatch,
  *,
  cache_pair_logits: bool | None = None,
  use_conditioning: bool = True,
) -> System:
  """AF3's diffusion head, what is constant computed once; one sample."""
  plan = batch.plan
  head = cdh.cached_diffusion_head(config, cache_pair_logits=cache_pair_logits)
  embeddings = ('single', 'pair', 'target_feat')

  def split(
    inputs: dict[str, Any],
  ) -> tuple[dh.DiffusionHeadBatch, dh.TrunkEmbeddings]:
    ids = {field.name: inputs[field.name] for field in _TOKEN_IDS}
    given = {name: inputs[name] for name in embeddings}
    # Conformers are constants here, in the precision of the inputs.
    ref = jax.tree.map(
      lambda x: (
        jnp.asarray(x, jnp.promote_types(given['single'].dtype, x.dtype))
        if x.dtype.kind == 'f'
        else x
      ),
      batch.ref,
    )
    own = dataclasses.replace(batch, ref=ref)
    return (
      dh.DiffusionHeadBatch(own, dh.TokenIds(**ids)),
      dh.TrunkEmbeddings(**given),
    )

  def run(params: hk.Params, **inputs: Any) -> jax.Array:
    conditioning = head.precompute(params, *split(inputs), use_conditioning)
    positions = jnp.asarray(inputs['positions_noisy'])
    denoised = head.denoise(
      params, conditioning, positions[None], inputs['noise_level']
    )[0]
    return denoised.astype(jnp.bfloat16) if config.bfloat16 else denoised

  def init(key: jax.Array, **inputs: Any) -> Any:
    params = head.init(key, *split(inputs))
    jax.eval_shape(run, params, **inputs)  # For its checks.
    return params

  def oracle(params: hk.Params, inputs: Inputs) -> np.ndarray:
    values = float64(inputs)
    real = np.asarray(plan.atom_mask)
    index = np.asarray(plan.dense_index)[real]

    def flat(x: Any) -> np.ndarray:
      x = np.asarray(x)
      rows = np.zeros((plan.n_atom, *x.shape[2:]), x.dtype)
      rows[real] = x.reshape(-1, *x.shape[2:])[index]
      return rows

    positions = values['positions_noisy']
    ref = {
      field.name: flat(getattr(batch.ref, field.name))
      for field in dataclasses.fields(batch.ref)
    }
    found = head_reference.diffusion_head(
      {module: float64(arrays) for module, arrays in params.items()},
      flat(positions),
      float(values['noise_level']),
      {**float64(ref), **_plan_atoms(config.atoms, plan)},
      {field.name: values[field.name] for field in _TOKEN_IDS},
      {name: values[name] for name in embeddings},
      dh.noise_constants(),
      use_conditioning=use_conditioning,
      num_queries=plan.num_queries,
      num_keys=plan.num_keys,
      padded_keys=config.atoms.padded_keys,
    )
    dense = np.zeros((plan.num_tokens * plan.num_slots, 3))
    dense[index] = found[real]
    return dense.reshape(positions.shape)

  return System(
    'af3_diffusion_head',
    'AlphaFold 3 diffusion head',
    'Abramson et al. 2024, Suppl. Algs. 3, 5-7 and 20-26',
    hk.Transformed(init, run),
    oracle,
    {
      'positions_noisy': 'n_token n_slot 3',
      'noise_level': '',
      **{field.name: 'n_token' for field in _TOKEN_IDS},
      'single': 'n_token c_single',
      'pair': 'n_token n_token c_pair',
      'target_feat': 'n_token c_target',
    },
  )


_TOKEN_IDS = dataclasses.fields(dh.TokenIds)


def _plan_atoms(
  config: af3.AtomCrossAttConfig, plan: wp.WindowPlan
) -> dict[str, np.ndarray]:
  """What the oracle of the atoms needs of a plan."""
  key_uid = plan.official_key_space_uid
  if config.uid_rule == 'corrected':
    key_uid = plan.space_uid
  return {
    'token_index': np.asarray(plan.token_index),
    'mask': np.asarray(plan.atom_mask),
    'query_uid': np.asarray(plan.space_uid),
    'key_uid': np.asarray(key_uid),
  }


def token_attention_pool(
  config: boltz_token_attention.TokenAttentionPoolConfig, num_tokens: int
) -> System:
  """Boltz's atom attention encoder in the seed's form."""

  def oracle(params: hk.Params, inputs: Inputs) -> np.ndarray:
    values = float64(inputs)
    return boltz_reference.token_attention_pool(
      values['atom_features'],
      values['atom_to_token'],
      num_tokens,
      **float64(params['token_attention_pool']),
      atom_mask=values.get('atom_mask'),
    )

  return System(
    'boltz_token_attention',
    'Boltz atom attention within tokens',
    'Boltz AtomAttentionEncoder, simplified (seed 001)',
    boltz_token_attention.transform_token_attention_pool(
      config, num_tokens=num_tokens
    ),
    oracle,
    {
      'atom_features': 'n_atom c_atom',
      'atom_to_token': 'n_atom',
      'atom_mask': 'n_atom',
    },
  )


_BOLTZ_SHAPES = {
  'ref_pos': 'n_atom 3',
  'ref_charge': 'n_atom',
  'ref_element': 'n_atom',
  'ref_atom_name_chars': 'n_atom 4',
  'ref_space_uid': 'n_atom',
  'atom_mask': 'n_atom',
  'atom_to_token': 'n_atom',
}
_BOLTZ2_SHAPES = {
  'atom_backbone_feat': 'n_atom',
  'res_type': 'n_token',
  'modified': 'n_token',
  'mol_type': 'n_token',
}


def boltz_atom_attention(config: boltz.Config, num_tokens: int) -> System:
  """Boltz's atom attention encoder and decoder of either version."""
  is_second = isinstance(config, boltz.Boltz2AtomAttentionConfig)

  def oracle(
    params: hk.Params, inputs: Inputs
  ) -> boltz.BoltzAtomAttentionOutput:
    decoder = (config.atom_decoder_depth, config.atom_decoder_heads)
    found: Any = boltz_reference.atom_attention(
      {module: float64(arrays) for module, arrays in params.items()},
      float64(inputs),
      **_boltz_options(config),
      decoder=decoder if 'token_act' in inputs else None,
      num_tokens=num_tokens,
    )
    return boltz.BoltzAtomAttentionOutput(
      found['tokens'], found['atoms'], found.get('update')
    )

  return System(
    'boltz_atom_attention',
    'Boltz atom attention encoder and decoder',
    'Boltz AtomAttentionEncoder, AtomAttentionDecoder; Abramson et al. 2024, '
    'Suppl. Algs. 5-7',
    boltz.transform_atom_attention(config),
    oracle,
    {
      **_BOLTZ_SHAPES,
      **(_BOLTZ2_SHAPES if is_second else {}),
      'single': 'n_token token_s',
      'pair': 'n_token n_token token_z',
      'positions': 'n_atom 3',
      'token_act': 'n_token twice_token_s',
    },
    functools.partial(_boltz_arguments, num_tokens),
  )


def boltz_diffusion(
  config: boltz_diffusion_module.DiffusionConfig, num_tokens: int
) -> System:
  """Boltz's diffusion module of either version, cached."""
  functions = boltz_diffusion_module.cached_diffusion(config)

  def run(
    params: hk.Params, positions: jax.Array, sigma: jax.Array, **embeddings: Any
  ) -> dict[str, jax.Array]:
    context = functions.precompute(params, **embeddings)
    denoised = functions.denoise(params, context, positions[None], sigma)
    return {'denoised': denoised[0]}

  def init(key: jax.Array, **arguments: Any) -> Any:
    params = functions.init(key)
    jax.eval_shape(run, params, **arguments)  # For its checks.
    return params

  def oracle(params: hk.Params, inputs: Inputs) -> dict[str, np.ndarray]:
    denoised, _ = boltz_diffusion_reference.denoise(
      {module: float64(arrays) for module, arrays in params.items()},
      float64(inputs),
      **_boltz_options(config),
      decoder=(config.atom_decoder_depth, config.atom_decoder_heads),
      transformer=(
        config.token_transformer_depth,
        config.token_transformer_heads,
      ),
      sigma_data=config.sigma_data,
    )
    return {'denoised': denoised}

  is_second = isinstance(config, boltz.Boltz2AtomAttentionConfig)
  return System(
    'boltz_diffusion',
    'Boltz diffusion module',
    'Boltz DiffusionModule; Abramson et al. 2024, Suppl. Algs. 20-21',
    hk.Transformed(init, run),
    oracle,
    {
      **_BOLTZ_SHAPES,
      **(_BOLTZ2_SHAPES if is_second else {}),
      'token_mask': 'n_token',
      'single_inputs': 'n_token token_s_inputs',
      'single': 'n_token token_s',
      'pair': 'n_token n_token token_z',
      'relative_position': 'n_token n_token token_z',
      'positions': 'n_atom 3',
      'sigma': '',
    },
    functools.partial(_boltz_arguments, num_tokens),
  )


def _boltz_arguments(num_tokens: int, inputs: Inputs) -> dict[str, Any]:
  """The features of atoms as one argument, the rest by name."""
  own = {
    name: x
    for name, x in inputs.items()
    if name in _BOLTZ_SHAPES or name in _BOLTZ2_SHAPES
  }
  features = boltz.BoltzAtomFeatures(**own, num_tokens=num_tokens)
  rest = {name: x for name, x in inputs.items() if name not in own}
  return {'features': features, **rest}


def _boltz_options(config: boltz.Config) -> dict[str, Any]:
  """What both oracles of Boltz take from a configuration."""
  options: dict[str, Any] = {
    'version': 1,
    'n_query': config.atoms_per_window_queries,
    'n_key': config.atoms_per_window_keys,
    'encoder': (config.atom_encoder_depth, config.atom_encoder_heads),
  }
  if isinstance(config, boltz.Boltz2AtomAttentionConfig):
    options |= {
      'version': 2,
      'use_no_atom_char': config.use_no_atom_char,
      'use_atom_backbone_feat': config.use_atom_backbone_feat,
      'use_residue_feats_atoms': config.use_residue_feats_atoms,
    }
  return options


def atom_transformer(config: pallatom.AtomTransformerConfig) -> System:
  """Pallatom's sparse atom transformer."""

  def oracle(params: hk.Params, inputs: Inputs) -> np.ndarray:
    return pallatom_reference.atom_transformer(
      torch_names(params, 'atom_transformer'),
      **float64(inputs),
      num_block=config.num_block,
      num_head=config.num_head,
    )

  return System(
    'pallatom_atom_transformer',
    'Pallatom sparse atom transformer',
    'pallatom.architecture.atom_transformers (seed 002)',
    pallatom.transform_atom_transformer(config),
    oracle,
    {
      'q': 'n_atom c_atom',
      'c': 'n_atom c_atom',
      'p': 'n_atom n_nbr c_pair',
      'neighbor_idx': 'n_atom n_nbr',
      'valid_mask': 'n_atom n_nbr',
    },
  )


def dual_track(config: sedd_dual_track.DualTrackConfig) -> System:
  """SEDD's protein-ligand dual track."""

  def oracle(
    params: hk.Params, inputs: Inputs
  ) -> sedd_dual_track.DualTrackOutput:
    values = float64(inputs)
    stack = 'dual_track/__layer_stack_no_per_layer/'

    def layers(track: str) -> list[dict[str, np.ndarray]]:
      scope = f'{stack}blocks_{track}'
      stacked = {
        path: values for path, values in params.items() if scope in path
      }
      return [
        torch_names(jax.tree.map(operator.itemgetter(i), stacked), scope)
        for i in range(config.num_block)
      ]

    condition = sedd_reference.timestep_condition(
      torch_names(params, 'sigma_map'), float(values['sigma'])
    )
    states: Any = sedd_reference.dual_track(
      layers('prot'),
      layers('lig'),
      sedd_reference.token_embedding(
        torch_names(params, 'protein_embed'), values['protein_tokens']
      ),
      sedd_reference.token_embedding(
        torch_names(params, 'ligand_embed'), values['ligand_tokens']
      ),
      condition,
      values.get('protein_mask'),
      values.get('ligand_mask'),
      num_head=config.num_head,
      variant=config.variant,
    )
    return sedd_dual_track.DualTrackOutput(*states)

  return System(
    'sedd_dual_track',
    'SEDD protein-ligand dual track',
    'SEDD protein-ligand architecture (seed 004)',
    sedd_dual_track.transform_dual_track(config),
    oracle,
    {
      'protein_tokens': 'n_protein',
      'ligand_tokens': 'n_ligand',
      'sigma': '',
      'protein_mask': 'n_protein',
      'ligand_mask': 'n_ligand',
    },
  )


def float64(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Host copies: floats as float64, the rest as it is, None left out."""

  def convert(x: Any) -> np.ndarray:
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
      return np.asarray(x).astype(np.float64)
    return np.asarray(x)

  return {name: convert(x) for name, x in tree.items() if x is not None}


def torch_names(params: hk.Params, scope: str) -> dict[str, np.ndarray]:
  """Parameters below `scope` under torch's names and orientation.

  'blocks_0/to_q' `weights` [in, out] becomes 'blocks.0.to_q.weight' [out, in].
  """
  names = {
    'weights': 'weight',
    'scale': 'weight',
    'offset': 'bias',
    'bias': 'bias',
    'embedding': 'embedding.weight',
  }
  out = {}
  for path, values in params.items():
    if path != scope and not path.startswith(f'{scope}/'):
      continue
    local = path.removeprefix(scope).removeprefix('/').replace('/', '.')
    local = re.sub(r'(blocks|mlp|mlp_p)_(\d+)', r'\1.\2', local)
    for name, value in float64(values).items():
      key = f'{local}.{names[name]}' if local else names[name]
      out[key] = value.T if name == 'weights' else value
  return out
