"""Every system at toy size, with what each cross-cutting suite must know.

A new system is added here once and is then covered by every test that loops
over `CASES`: oracle parity, gradients, jit, vmap, scan, remat, padding, bf16,
tracing, shape errors and the frozen parameter tree.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from structattn_jax.components import parameters as pm
from structattn_jax.network import pallatom
from structattn_jax.network.alphafold2 import invariant_point_attention as ipa
from structattn_jax.network.alphafold3 import atom_cross_attention as af3
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.network.alphafold3 import cached_atom_attention as aca
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.network.alphafold3 import transformer_parameters as tp
from structattn_jax.network.boltz import atom_attention as boltz_encoders
from structattn_jax.network.boltz import diffusion as boltz_diffusion
from structattn_jax.network.sedd import dual_track as sedd
from structattn_jax.network.seeds import token_atom_attention as taa
from structattn_jax.network.seeds import token_attention_pool as boltz
from structattn_jax.verification import systems


@dataclasses.dataclass(frozen=True)
class Case:
  """A system, inputs, and how padding and permutations act on them."""

  name: str
  system: systems.System
  # The same computation as a Haiku function, for use inside other models.
  haiku_function: Callable[..., Any]
  inputs: Mapping[str, Any]
  # Arguments of `testing.assert_padding_invariant`: one entry per ragged axis.
  paddings: tuple[Mapping[str, Any], ...]
  # Arguments of `testing.assert_permutation_equivariant`, likewise.
  permutations: tuple[Mapping[str, Any], ...] = ()
  # The same system with bfloat16 activations, if that is a matter of config.
  bfloat16_system: systems.System | None = None
  # Outputs that are coordinates, which stay float32.
  coordinates: tuple[str, ...] = ()
  # Modules whose parameters are constants: no gradient reaches them.
  constants: tuple[str, ...] = ()
  # Inputs at the edge of the formula: values and gradients must stay finite.
  degenerate: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )

  def float_inputs(self) -> dict[str, np.ndarray]:
    """The inputs that carry gradients."""
    return {
      name: value
      for name, value in self.inputs.items()
      if np.asarray(value).dtype == np.float32
    }

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    """Parameters without any zero left by an initialiser."""
    init = jax.jit(lambda key, inputs: self.system.init(key, inputs))
    params = init(jax.random.key(0), dict(self.inputs))
    rng = np.random.default_rng(0)
    return jax.tree.map(
      lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32),
      params,
    )

  def apply(self, params: Any, inputs: Mapping[str, Any]) -> Any:
    """The system on a dictionary of inputs, op by op."""
    return self.system.apply(params, inputs)

  @functools.cached_property
  def jitted(self) -> Callable[..., Any]:
    """`apply` compiled once for all tests of this case."""
    return jax.jit(self.apply)

  def loss(self, params: Any, floats: Any, inputs: Mapping[str, Any]) -> Any:
    """A scalar of all outputs with fixed, generic weights."""
    return weighted_sum(self.apply(params, {**inputs, **floats}))

  @functools.cached_property
  def jitted_gradient(self) -> Callable[..., Any]:
    """Gradients of `loss` with respect to parameters and float inputs."""
    return jax.jit(jax.grad(self.loss, argnums=(0, 1)))


def weighted_sum(outputs: Any) -> Any:
  """Sum of all entries of a tree with fixed random weights."""
  rng = np.random.default_rng(7)
  return sum(
    (y * rng.standard_normal(y.shape).astype(y.dtype)).sum()
    for y in jax.tree.leaves(outputs)
  )


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return rng.standard_normal(shape, np.float32)


def random_frames(
  rng: np.random.Generator, n_res: int, spread: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
  """Random rotations and translations in angstrom."""
  rotation, _ = np.linalg.qr(rng.standard_normal((n_res, 3, 3)))
  rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
  return rotation.astype(np.float32), spread * _normal(rng, n_res, 3)


_SEED = {
  'parameterisation': 'seed',
  'head_weights': 'unit',
  'zero_init': False,
}


def _ipa_case(name: str, options: dict[str, Any], with_pair: bool) -> Case:
  rng = np.random.default_rng(1)
  n_res, c_s, c_z = 9, 12, 6
  rotation, translation = random_frames(rng, n_res)
  inputs = {
    'single': _normal(rng, n_res, c_s),
    'pair': _normal(rng, n_res, n_res, c_z),
    'rotation': rotation,
    'translation': translation,
    'mask': np.arange(n_res) % 4 != 2,
  }
  axes = {'single': 0, 'pair': (0, 1), 'rotation': 0, 'translation': 0}
  if not with_pair:
    del inputs['pair'], axes['pair']
    inputs = {**inputs, 'pair': None}
  axes['mask'] = 0
  sizes = {
    'num_head': 3,
    'num_scalar_qk': 5,
    'num_scalar_v': 4,
    'num_point_qk': 2,
    'num_point_v': 3,
  }
  config = ipa.InvariantPointAttentionConfig(**sizes, **options)
  return Case(
    name,
    systems.invariant_point_attention(config),
    lambda **inputs: ipa.InvariantPointAttention(config)(**inputs),
    inputs,
    paddings=(
      {
        'axes': axes,
        'masks': ('mask',),
        'output_axes': 0,
        'fill': {'rotation': np.eye(3)},
      },
    ),
    permutations=({'axes': axes, 'output_axes': 0},),
    degenerate={
      'all_masked': {'mask': np.zeros(n_res, bool)},
      'one_real': {'mask': np.arange(n_res) == 3},
      'coincident_points': {
        'single': np.zeros((n_res, c_s), np.float32),
        'translation': np.zeros((n_res, 3), np.float32),
        'rotation': np.broadcast_to(np.eye(3, dtype=np.float32), (n_res, 3, 3)),
      },
    },
  )


# Unsorted, uneven, token 2 and 6 empty.
_ATOM_TO_TOKEN = np.array([3, 0, 0, 5, 3, 3, 1, 0, 5, 4, 4, 3], np.int32)
_ATOM_MASK = np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], bool)
_N_TOKEN = 7


def _atom_cross_attention_case(name: str, options: dict[str, Any]) -> Case:
  rng = np.random.default_rng(2)
  n_atom, c_atom, c_token = len(_ATOM_TO_TOKEN), 8, 10
  atom_axes = {'atoms': 0, 'atom_to_token': 0, 'atom_mask': 0}
  output = taa.TokenAtomAttentionOutput
  config = taa.TokenAtomAttentionConfig(
    num_head=3, d_head=4, max_atoms_per_token=6, **options
  )
  return Case(
    name,
    systems.token_atom_attention(config),
    lambda **inputs: taa.token_atom_update(config, **inputs),
    {
      'atoms': _normal(rng, n_atom, c_atom),
      'tokens': _normal(rng, _N_TOKEN, c_token),
      'atom_to_token': _ATOM_TO_TOKEN,
      'atom_mask': _ATOM_MASK,
    },
    paddings=(
      {
        'axes': atom_axes,
        'masks': ('atom_mask',),
        'output_axes': output(atoms=0, tokens=None),
      },
      # Tokens need no mask: a padded token is one without atoms.
      {
        'axes': {'tokens': 0},
        'masks': (),
        'output_axes': output(atoms=None, tokens=0),
      },
    ),
    permutations=(
      {'axes': atom_axes, 'output_axes': output(atoms=0, tokens=None)},
      {
        'axes': {'tokens': 0},
        'index_of': ('atom_to_token',),
        'output_axes': output(atoms=None, tokens=0),
      },
    ),
    degenerate={
      'all_masked': {'atom_mask': np.zeros(n_atom, bool)},
      'one_token_has_all': {
        'atom_to_token': np.full(n_atom, 4, np.int32),
        'atom_mask': np.arange(n_atom) < 6,
      },
      'constant_rows': {'atoms': np.ones((n_atom, c_atom), np.float32)},
    },
  )


def _atom_cross_att_case() -> Case:
  # With this seed no input of a relu is near its kink.
  rng = np.random.default_rng(14)
  token = [0, 0, 1, 1, 1, 3, 3, 3, 4, 4, 4]
  n_token, transformer = (
    5,
    tp.CrossAttTransformerConfig(
      num_blocks=2,
      attention=tp.CrossAttentionConfig(num_head=2, key_dim=4, value_dim=6),
    ),
  )
  plan = window_plan.build_window_plan(
    token, [0, 0, 1, 2, 0], num_queries=4, num_keys=8, num_slots=4
  )
  n_atom = plan.n_atom
  config = af3.AtomCrossAttConfig(
    per_token_channels=8,
    per_atom_channels=6,
    per_atom_pair_channels=3,
    atom_transformer=transformer,
    window_chunk=1,
  )
  system = systems.atom_cross_att(config, plan)
  inputs = {
    'ref_pos': _normal(rng, n_atom, 3),
    'ref_mask': np.arange(n_atom) != 3,
    'ref_element': rng.integers(-1, 129, n_atom).astype(np.int32),
    'ref_charge': rng.integers(-1, 2, n_atom).astype(np.float32),
    'ref_atom_name_chars': rng.integers(-1, 65, (n_atom, 4)).astype(np.int32),
    'positions': _normal(rng, n_atom, 3),
    'trunk_single_cond': _normal(rng, n_token, 5),
    'trunk_pair_cond': _normal(rng, n_token, n_token, 4),
    'token_act': _normal(rng, n_token, 8),
  }
  return Case(
    'af3_atom_encoder_decoder',
    system,
    lambda **inputs: aca.atom_cross_att(
      config, 'diffusion', **system.arguments(inputs)
    ),
    inputs,
    # The plan says which atoms are padding: see test_atom_cross_attention.py.
    paddings=(),
    bfloat16_system=systems.atom_cross_att(
      dataclasses.replace(config, bfloat16=True), plan
    ),
    coordinates=('position_update',),
    degenerate={
      'no_conformer': {'ref_mask': np.zeros(n_atom, bool)},
      'coincident_atoms': {'ref_pos': np.zeros((n_atom, 3), np.float32)},
      'constant_tokens': {
        'trunk_single_cond': np.ones((n_token, 5), np.float32)
      },
    },
  )


def _diffusion_head_case(
  name: str, rng: np.random.Generator, **options: bool
) -> Case:
  counts = [2, 3, 0, 3, 1]
  n_token, n_slot = len(counts), 4
  mask = np.arange(n_slot) < np.array(counts)[:, None]
  dense = atom_layout.DenseBatch.from_batch(
    {
      'pred_dense_atom_mask': mask,
      'ref_space_uid': np.repeat([[0], [1], [2], [3], [0]], n_slot, 1),
      'ref_pos': _normal(rng, n_token, n_slot, 3),
      'ref_mask': mask,
      'ref_element': rng.integers(0, 128, mask.shape).astype(np.int32),
      'ref_charge': rng.integers(-1, 2, mask.shape).astype(np.float32),
      'ref_atom_name_chars': rng.integers(0, 64, (*mask.shape, 4)),
    },
    num_queries=4,
    num_keys=8,
  )
  config = dh.DiffusionHeadConfig(
    seq_channel=6,
    pair_channel=4,
    atoms=af3.AtomCrossAttConfig(
      per_token_channels=8,
      per_atom_channels=6,
      per_atom_pair_channels=3,
      atom_transformer=tp.CrossAttTransformerConfig(
        num_blocks=1,
        attention=tp.CrossAttentionConfig(num_head=2, key_dim=4, value_dim=6),
      ),
    ),
    transformer=tp.TransformerConfig(
      attention=tp.SelfAttentionConfig(num_head=2, key_dim=6, value_dim=4),
      num_blocks=2,
      super_block_size=1,
      block_remat=True,
    ),
  )
  system = systems.diffusion_head(config, dense, **options)
  table = dh.diffusion_head_parameters(
    config, single_channels=5, pair_channels=3, target_channels=4
  )
  ids = {
    'token_index': [1, 2, 3, 4, 0],
    'residue_index': [1, 2, 40, 40, 0],
    'asym_id': [1, 1, 2, 2, 0],
    'entity_id': [1, 1, 1, 1, 0],
    'sym_id': [1, 1, 2, 2, 0],
  }
  inputs = {
    'positions_noisy': 10 * _normal(rng, n_token, n_slot, 3),
    'noise_level': np.float32(9),
    **{name: np.array(x, np.int32) for name, x in ids.items()},
    'mask': np.arange(n_token) < 4,
    'single': _normal(rng, n_token, 5),
    'pair': _normal(rng, n_token, n_token, 3),
    'target_feat': _normal(rng, n_token, 4),
  }
  return Case(
    name,
    system,
    lambda **inputs: system.transformed.apply(
      pm.haiku_parameters(table), **inputs
    ),
    inputs,
    # The batch says which atoms are padding: see test_diffusion_head.py.
    paddings=(),
    bfloat16_system=systems.diffusion_head(
      dataclasses.replace(
        config,
        bfloat16=True,
        atoms=dataclasses.replace(config.atoms, bfloat16=True),
      ),
      dense,
      **options,
    ),
    degenerate={
      'all_masked': {'mask': np.zeros(n_token, bool)},
      'one_real': {'mask': np.arange(n_token) == 1},
      'little_noise': {'noise_level': np.float32(1e-3)},
      'coincident_atoms': {
        'positions_noisy': np.zeros((n_token, n_slot, 3), np.float32)
      },
    },
  )


def _token_attention_case() -> Case:
  rng = np.random.default_rng(3)
  n_atom, c_atom = len(_ATOM_TO_TOKEN), 8
  axes = {'atom_features': 0, 'atom_to_token': 0, 'atom_mask': 0}
  config = boltz.TokenAttentionPoolConfig(
    num_head=3, d_head=4, max_atoms_per_token=6
  )
  return Case(
    'boltz_token_attention',
    systems.token_attention_pool(config, _N_TOKEN),
    lambda **inputs: boltz.TokenAttentionPool(config)(
      num_tokens=_N_TOKEN, **inputs
    ),
    {
      'atom_features': _normal(rng, n_atom, c_atom),
      'atom_to_token': _ATOM_TO_TOKEN,
      'atom_mask': _ATOM_MASK,
    },
    paddings=({'axes': axes, 'masks': ('atom_mask',), 'output_axes': None},),
    permutations=({'axes': axes, 'output_axes': None},),
    degenerate={
      'all_masked': {'atom_mask': np.zeros(n_atom, bool)},
      'constant_rows': {'atom_features': np.ones((n_atom, c_atom), np.float32)},
    },
  )


def _boltz_inputs(
  config: boltz_encoders.Config, seed: int
) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  # Runs of tokens, one that comes back, atoms without a token; three windows.
  token = np.array([0, 0, 0, 1, 2, 2, 1, -1, 3, 3, 4, 4], np.int32)
  n_atom, n_token = len(token), _N_BOLTZ_TOKEN
  inputs = {
    'ref_pos': _normal(rng, n_atom, 3),
    'ref_charge': rng.integers(-1, 2, n_atom).astype(np.float32),
    'ref_element': rng.integers(-1, 128, n_atom).astype(np.int32),
    'ref_atom_name_chars': rng.integers(-1, 64, (n_atom, 4)).astype(np.int32),
    'ref_space_uid': np.arange(n_atom, dtype=np.int32) // 5,
    'atom_mask': ~np.isin(np.arange(n_atom), (3, 9)),
    'atom_to_token': token,
    'single': _normal(rng, n_token, config.token_s),
    'pair': _normal(rng, n_token, n_token, config.token_z),
    'positions': _normal(rng, n_atom, 3),
    'token_act': _normal(rng, n_token, 2 * config.token_s),
  }
  if isinstance(config, boltz_encoders.Boltz2AtomAttentionConfig):
    inputs |= {
      'atom_backbone_feat': rng.integers(0, 17, n_atom).astype(np.int32),
      'res_type': rng.integers(0, 33, n_token).astype(np.int32),
      'modified': np.arange(n_token) % 2 == 0,
      'mol_type': rng.integers(0, 4, n_token).astype(np.int32),
    }
  return inputs


_N_BOLTZ_TOKEN = 6
# Axes of the tokens.
_BOLTZ_TOKEN_AXES = {
  'single': 0,
  'single_inputs': 0,
  'pair': (0, 1),
  'relative_position': (0, 1),
  'token_mask': 0,
  'token_act': 0,
  'res_type': 0,
  'modified': 0,
  'mol_type': 0,
}


def _boltz_axes(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
  """Axes of atoms and of tokens."""
  others = ('sigma', *_BOLTZ_TOKEN_AXES)
  atoms = {name: 0 for name in inputs if name not in others}
  tokens = {k: axes for k, axes in _BOLTZ_TOKEN_AXES.items() if k in inputs}
  return atoms, tokens


def _boltz_case(name: str, config: boltz_encoders.Config) -> Case:
  # With this seed no input of a relu is within 1e-4 of its kink.
  inputs = _boltz_inputs(config, 100)
  atom_axes, token_axes = _boltz_axes(inputs)
  n_atom = len(inputs['atom_mask'])
  output = boltz_encoders.BoltzAtomAttentionOutput
  system = systems.boltz_atom_attention(config, _N_BOLTZ_TOKEN)
  return Case(
    name,
    system,
    lambda **inputs: boltz_encoders.atom_attention_outputs(
      config, **system.arguments(inputs)
    ),
    inputs,
    paddings=(
      {
        'axes': atom_axes,
        'masks': ('atom_mask',),
        'output_axes': output(tokens=None, atoms=0, update=0),
        'padding': config.atoms_per_window_queries,
      },
    ),
    permutations=(
      {
        'axes': token_axes,
        'index_of': ('atom_to_token',),
        'output_axes': output(tokens=0, atoms=None, update=None),
      },
    ),
    bfloat16_system=systems.boltz_atom_attention(
      dataclasses.replace(config, bfloat16=True), _N_BOLTZ_TOKEN
    ),
    coordinates=('update',),
    degenerate={
      'all_masked': {'atom_mask': np.zeros(n_atom, bool)},
      'one_window_masked': {'atom_mask': np.arange(n_atom) < 2},
      'coincident_atoms': {'ref_pos': np.zeros((n_atom, 3), np.float32)},
    },
  )


def _boltz_diffusion_case(
  name: str, config: boltz_diffusion.DiffusionConfig, seed: int
) -> Case:
  """The cached form; the published one is the Haiku function.

  With the seeds below no input of a relu is within 1e-4 of its kink.
  """
  inputs = _boltz_inputs(config, seed)
  del inputs['token_act']
  rng = np.random.default_rng(seed)
  n_atom, n_token = len(inputs['atom_mask']), _N_BOLTZ_TOKEN
  inputs |= {
    'token_mask': np.arange(n_token) != 5,
    'single_inputs': _normal(rng, n_token, config.token_s_inputs),
    'relative_position': _normal(rng, n_token, n_token, config.token_z),
    'sigma': np.float32(9.0),
  }
  atom_axes, token_axes = _boltz_axes(inputs)

  system = systems.boltz_diffusion(config, n_token)

  def published(**inputs: Any) -> dict[str, Any]:
    arguments = system.arguments(inputs)
    found = boltz_diffusion.diffusion_outputs(config, **arguments)
    return {'denoised': found.denoised}

  return Case(
    name,
    system,
    published,
    inputs,
    paddings=(
      {
        'axes': atom_axes,
        'masks': ('atom_mask',),
        'output_axes': {'denoised': 0},
        'padding': config.atoms_per_window_queries,
      },
    ),
    permutations=(
      {
        'axes': token_axes,
        'index_of': ('atom_to_token',),
        'output_axes': {'denoised': None},
      },
    ),
    bfloat16_system=systems.boltz_diffusion(
      dataclasses.replace(config, bfloat16=True), n_token
    ),
    coordinates=("['denoised']",),
    constants=('single_conditioner/fourier_embed/proj',),
    degenerate={
      'all_masked': {
        'atom_mask': np.zeros(n_atom, bool),
        'token_mask': np.zeros(n_token, bool),
      },
      'least_noise': {'sigma': np.float32(1e-3)},
      'most_noise': {'sigma': np.float32(2560)},
      'no_noise': {'sigma': np.float32(0)},
    },
  )


_BOLTZ_SIZES = {
  'atom_s': 8,
  'atom_z': 4,
  'token_s': 5,
  'token_z': 3,
  'atoms_per_window_queries': 4,
  'atoms_per_window_keys': 8,
  'atom_encoder_depth': 1,
  'atom_encoder_heads': 2,
  'atom_decoder_depth': 1,
  'atom_decoder_heads': 4,
}
_BOLTZ_DIFFUSION_SIZES = {
  **_BOLTZ_SIZES,
  'atoms_per_window_keys': 4,
  'token_s_inputs': 4,
  'token_transformer_depth': 1,
  'token_transformer_heads': 2,
  'dim_fourier': 6,
}


def _atom_transformer_case() -> Case:
  rng = np.random.default_rng(4)
  tok_idx = np.array([0, 0, 1, 1, 1, 3, 4, 9, 9, 20])
  neighbours, valid = map(np.asarray, pallatom.build_sparse_pairs(tok_idx, 8))
  # A chain break beside the window, and one atom without any live slot.
  valid = valid & ~((tok_idx[:, None] < 2) & (tok_idx[neighbours] >= 2))
  valid[7] = False
  n_atom, c_atom, c_pair = len(tok_idx), 8, 4
  slot_axes = {'p': 1, 'neighbor_idx': 1, 'valid_mask': 1}
  atom_axes = {'q': 0, 'c': 0, 'p': 0, 'neighbor_idx': 0, 'valid_mask': 0}
  config = pallatom.AtomTransformerConfig(num_block=2, num_head=2)
  return Case(
    'pallatom_atom_transformer',
    systems.atom_transformer(config),
    lambda **inputs: pallatom.AtomTransformer(config)(**inputs),
    {
      'q': _normal(rng, n_atom, c_atom),
      'c': _normal(rng, n_atom, c_atom),
      'p': _normal(rng, *neighbours.shape, c_pair),
      'neighbor_idx': neighbours,
      'valid_mask': valid,
    },
    paddings=(
      {'axes': slot_axes, 'masks': ('valid_mask',), 'output_axes': None},
      {'axes': atom_axes, 'masks': ('valid_mask',), 'output_axes': 0},
    ),
    permutations=(
      {'axes': atom_axes, 'index_of': ('neighbor_idx',), 'output_axes': 0},
      {'axes': slot_axes, 'output_axes': None},
    ),
    degenerate={
      'all_masked': {'valid_mask': np.zeros_like(valid)},
      'constant_rows': {
        'q': np.ones((n_atom, c_atom), np.float32),
        'c': np.ones((n_atom, c_atom), np.float32),
        'p': np.zeros((*neighbours.shape, c_pair), np.float32),
      },
    },
  )


def _dual_track_case(name: str, variant: str) -> Case:
  rng = np.random.default_rng(5)
  n_protein, n_ligand = 8, 5
  config = sedd.DualTrackConfig(
    hidden_size=12,
    num_head=3,
    num_block=2,
    cond_dim=6,
    protein_vocab=11,
    ligand_vocab=9,
    variant=variant,
  )
  output = sedd.DualTrackOutput
  return Case(
    name,
    systems.dual_track(config),
    lambda **inputs: sedd.dual_track_states(config, **inputs),
    {
      'protein_tokens': rng.integers(0, 11, n_protein).astype(np.int32),
      'ligand_tokens': rng.integers(0, 9, n_ligand).astype(np.int32),
      'sigma': np.float32(0.7),
      'protein_mask': np.arange(n_protein) < 6,
      'ligand_mask': np.arange(n_ligand) < 4,
    },
    paddings=(
      {
        'axes': {'protein_tokens': 0, 'protein_mask': 0},
        'masks': ('protein_mask',),
        'output_axes': output(protein=0, ligand=None),
      },
      {
        'axes': {'ligand_tokens': 0, 'ligand_mask': 0},
        'masks': ('ligand_mask',),
        'output_axes': output(protein=None, ligand=0),
      },
    ),
    bfloat16_system=systems.dual_track(
      dataclasses.replace(config, bfloat16=True)
    ),
    degenerate={
      'all_masked': {
        'protein_mask': np.zeros(n_protein, bool),
        'ligand_mask': np.zeros(n_ligand, bool),
      },
      'ligand_masked': {'ligand_mask': np.zeros(n_ligand, bool)},
      'no_noise': {'sigma': np.float32(0)},
    },
  )


CASES: dict[str, Case] = {
  case.name: case
  for case in (
    _ipa_case('af2_ipa', _SEED, with_pair=True),
    _ipa_case(
      'af2_ipa_learned_no_pair',
      {**_SEED, 'head_weights': 'learned'},
      with_pair=False,
    ),
    _ipa_case(
      'af2_ipa_monomer',
      {'implementation': 'blocked', 'query_block': 4, 'num_channel': 10},
      with_pair=True,
    ),
    _ipa_case(
      'af2_ipa_multimer',
      {'parameterisation': 'multimer', 'implementation': 'dense'},
      with_pair=True,
    ),
    _atom_cross_attention_case('af3_atom_cross_attention', {}),
    _atom_cross_attention_case(
      'af3_atom_cross_attention_keys', {'normalise': 'keys'}
    ),
    _atom_cross_attention_case(
      'af3_atom_cross_attention_dense', {'implementation': 'dense'}
    ),
    # Windows shifted at both ends; a token without atoms.
    _atom_cross_att_case(),
    _diffusion_head_case(
      'af3_diffusion_head', np.random.default_rng(15), cache_pair_logits=True
    ),
    _diffusion_head_case(
      'af3_diffusion_head_unconditioned',
      np.random.default_rng(17),
      cache_pair_logits=False,
      use_conditioning=False,
    ),
    _token_attention_case(),
    _boltz_case(
      'boltz1_atom_attention',
      boltz_encoders.Boltz1AtomAttentionConfig(
        **_BOLTZ_SIZES, implementation='blocked'
      ),
    ),
    _boltz_case(
      'boltz2_atom_attention',
      boltz_encoders.Boltz2AtomAttentionConfig(
        **_BOLTZ_SIZES,
        implementation='published',
        use_no_atom_char=True,
        use_atom_backbone_feat=True,
        use_residue_feats_atoms=True,
        transformer_post_layer_norm=True,
        token_transformer_depth=1,
        token_transformer_heads=1,
      ),
    ),
    _boltz_diffusion_case(
      'boltz1_diffusion',
      boltz_diffusion.Boltz1DiffusionConfig(
        **_BOLTZ_DIFFUSION_SIZES,
        implementation='blocked',
        conditioning_transition_layers=1,
      ),
      175,
    ),
    _boltz_diffusion_case(
      'boltz2_diffusion',
      boltz_diffusion.Boltz2DiffusionConfig(
        **_BOLTZ_DIFFUSION_SIZES, implementation='published'
      ),
      125,
    ),
    _atom_transformer_case(),
    _dual_track_case('sedd_dual_track', 'published'),
    _dual_track_case('sedd_dual_track_seed', 'seed'),
  )
}
