"""Structure module: from single and pair representations to atoms.

Jumper et al. (2021) Suppl. Algs. 20 (StructureModule) and 23 (BackboneUpdate);
Evans et al. (2021) for the multimer. Mirrors alphafold model/folding.py and
model/folding_multimer.py @ c77e5d2; parameters have upstream's names and
shapes, so checkpoints load after removing the prefix
`alphafold/alphafold_iteration/`. Atoms are built in `all_atom.py`; losses are
in `fape.py`.

Shapes: n_res residues; n_iter = num_layer iterations; c channels inside, c_s
single and c_z pair channels; 14 atom slots of a residue's own type, 37 atom
names; 8 rigid groups, 7 torsion angles (omega, phi, psi, chi1 to chi4).
Units: all outputs in angstrom; frames are kept in units of `position_scale`
between iterations.

Differs from released AF2: masked residues receive no update from attention (AF2
lets them attend to everything), so their rows, which nobody should read,
differ. The pair is projected to logits once instead of in each iteration, its
layer norm is never stored, iterations are a scan whose pair gradient is one
product at the end, and side chains are built for all iterations together; none
of this changes an output.
"""

import dataclasses
from typing import Any, Literal, Self, cast

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax import geometry
from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold2 import all_atom, residue_constants
from structattn_jax.network.alphafold2 import (
  invariant_point_attention as ipa_lib,
)

Frames = geometry.QuatAffine | geometry.Rigid


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideChainConfig(base_config.BaseConfig):
  """Sizes of the network that predicts torsion angles.

  Attributes:
    num_channel: hidden channels.
    num_residual_block: residual blocks of two layers.
  """

  num_channel: int = 128
  num_residual_block: int = 2

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'num_channel')
    self.check_at_least(0, 'num_residual_block')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructureModuleConfig(base_config.BaseConfig):
  """Sizes and choices of the structure module; the defaults are AF2's monomer.

  Attributes:
    parameterisation: 'monomer' keeps quaternions, 'multimer' rotation matrices;
      they also differ in the names of parameters, see
      `InvariantPointAttentionConfig`.
    num_layer: iterations, all with the same parameters.
    num_layer_in_transition: layers of the transition.
    num_channel: channels inside.
    dropout: rate after attention and transition, if a key is given.
    position_scale: angstrom per unit of length inside.
    sidechain: sizes of the torsion angle network.
    num_head: attention heads.
    num_scalar_qk: scalar query and key channels per head.
    num_scalar_v: scalar value channels per head.
    num_point_qk: query and key points per head.
    num_point_v: value points per head.
    zero_init: whether a fresh module leaves all residues at the origin.
    sidechain_iterations: iterations whose side chains are built. 'last' is for
      inference and leaves a first axis of one in these outputs.
    implementation: of the attention, see `InvariantPointAttentionConfig`.
    query_block: likewise.
  """

  parameterisation: Literal['monomer', 'multimer'] = 'monomer'
  num_layer: int = 8
  num_layer_in_transition: int = 3
  num_channel: int = 384
  dropout: float = 0.1
  position_scale: float = 10.0
  sidechain: SideChainConfig = SideChainConfig()
  num_head: int = 12
  num_scalar_qk: int = 16
  num_scalar_v: int = 16
  num_point_qk: int = 4
  num_point_v: int = 8
  zero_init: bool = True
  sidechain_iterations: Literal['all', 'last'] = 'all'
  implementation: ipa_lib.Implementation | None = None
  query_block: int | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'num_layer', 'num_layer_in_transition')
    self.check_at_least(1, 'num_channel')
    if not self.position_scale > 0:
      raise ValueError(
        f'{type(self).__name__}.position_scale: expected a positive length, '
        f'got {self.position_scale}'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f'{type(self).__name__}.dropout: expected a rate in [0, 1), got '
        f'{self.dropout}'
      )
    _ = self.attention  # Checks the sizes that are its own.

  @classmethod
  def multimer(cls, **options: Any) -> Self:
    """AF2-multimer's form and position scale of 20 angstrom."""
    chosen: dict[str, Any] = {
      'parameterisation': 'multimer',
      'position_scale': 20.0,
    }
    return cls(**{**chosen, **options})

  @property
  def attention(self) -> ipa_lib.InvariantPointAttentionConfig:
    """The config of the attention inside."""
    names = (
      'parameterisation',
      'num_head',
      'num_scalar_qk',
      'num_scalar_v',
      'num_point_qk',
      'num_point_v',
      'num_channel',
      'zero_init',
      'implementation',
      'query_block',
    )
    return ipa_lib.InvariantPointAttentionConfig(
      **{name: getattr(self, name) for name in names}
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StructureModuleOutput:
  """Structure and intermediates; n_side is n_iter, or 1 for side chains 'last'.

  Attributes:
    act: [n_res, c] single representation after the last iteration.
    traj: backbone frames of each iteration, [n_iter, n_res, 7] quaternion
      (w, x, y, z) and translation (monomer), [n_iter, n_res, 3, 4] (multimer).
    angles_sin_cos: [n_side, n_res, 7, 2] (sin, cos) of norm one.
    unnormalized_angles_sin_cos: [n_side, n_res, 7, 2] before normalisation.
    atom_pos: [n_side, n_res, 14, 3], zero in slots without an atom.
    frames: frames of the rigid groups, [n_side, n_res, 8, 12] rotation by rows
      then translation (monomer), [n_side, n_res, 8, 3, 4] (multimer). Groups
      that a residue type lacks have the zero matrix for a rotation.
    final_atom14_positions: [n_res, 14, 3] `atom_pos` of the last iteration.
    final_atom14_mask: [n_res, 14] bool, atoms of real residues.
    final_atom_positions: [n_res, 37, 3], zero where masked.
    final_atom_mask: [n_res, 37] bool, atoms of real residues.
  """

  act: jax.Array
  traj: jax.Array
  angles_sin_cos: jax.Array
  unnormalized_angles_sin_cos: jax.Array
  atom_pos: jax.Array
  frames: jax.Array
  final_atom14_positions: jax.Array
  final_atom14_mask: jax.Array
  final_atom_positions: jax.Array
  final_atom_mask: jax.Array

  @property
  def backbone_frames(self) -> geometry.Rigid:
    """`traj` as frames [n_iter, n_res]; quaternions are not normalised."""
    if self.traj.shape[-1] == 7:
      return geometry.Rigid.from_quaternion7(self.traj)
    return geometry.Rigid.from_3x4(self.traj)

  @property
  def group_frames(self) -> geometry.Rigid:
    """`frames` as frames [n_side, n_res, 8]."""
    if self.frames.shape[-1] == 12:
      return geometry.Rigid.from_flat12(self.frames)
    return geometry.Rigid.from_3x4(self.frames)


class StructureModule(hk.Module):
  """Alg. 20 without its losses.

  Parameters: `single_layer_norm`, `initial_projection`, `pair_layer_norm`, and
  those of `FoldIteration` below `fold_iteration`.
  """

  def __init__(
    self, config: StructureModuleConfig, *, name: str = 'structure_module'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    single: jax.Array,
    pair: jax.Array,
    aatype: jax.Array,
    mask: jax.Array | None = None,
    *,
    atom14_mask: jax.Array | None = None,
    atom37_mask: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> StructureModuleOutput:
    """Returns the structure, computed in float32 (float64 for such inputs).

    Gradients do not flow through the rotations from one iteration to the next,
    as published; they do flow through the translations.

    Args:
      single: [n_res, c_s] float.
      pair: [n_res, n_res, c_z] float, query residue first.
      aatype: [n_res] int in [0, 20], 20 = unknown; the order is
        `residue_constants.RESTYPES`.
      mask: [n_res] bool, True = real residue; None means all real.
      atom14_mask: [n_res, 14] bool, becomes `final_atom14_mask`; None takes the
        atoms of each real residue's type.
      atom37_mask: [n_res, 37] bool, becomes `final_atom_mask`; likewise.
      dropout_key: PRNG key; None means no dropout.

    Returns:
      A `StructureModuleOutput`.

    Raises:
      ValueError: on a wrong shape, naming the argument, or no residues.
      TypeError: on a wrong dtype.
    """
    config = self.config
    n_res = checks.check_shapes(
      single=(single, 'n_res c_s'),
      pair=(pair, 'n_res n_res c_z'),
      aatype=(aatype, 'n_res'),
      mask=(mask, 'n_res'),
      atom14_mask=(atom14_mask, 'n_res 14'),
      atom37_mask=(atom37_mask, 'n_res 37'),
    )['n_res']
    checks.check_dtypes('floating', single=single, pair=pair)
    checks.check_dtypes('integer', aatype=aatype)
    checks.check_dtypes(
      'bool', mask=mask, atom14_mask=atom14_mask, atom37_mask=atom37_mask
    )
    aatype = jnp.asarray(aatype)
    mask = jnp.ones(n_res, bool) if mask is None else jnp.asarray(mask)
    if not n_res:
      raise ValueError(
        f'single: expected at least one residue, got shape {single.shape}'
      )
    # What is masked may hold anything, NaN included.
    single = jnp.where(mask[:, None], numerics.at_least_float32(single), 0)
    pair = numerics.at_least_float32(pair)

    single = hm.LayerNorm(name='single_layer_norm')(single)
    act = hm.Linear(config.num_channel, name='initial_projection')(single)
    layer_norm = hm.LayerNorm(name='pair_layer_norm').parameters(pair)
    fold_iteration = FoldIteration(config)
    shared_pair, pair_gradients = fold_iteration.share_pair(
      pair, layer_norm, mask
    )

    if config.parameterisation == 'monomer':
      frames = geometry.QuatAffine.identity((n_res,), act.dtype)
    else:
      frames = geometry.Rigid.identity((n_res,), act.dtype)
    keys = None
    if dropout_key is not None:
      keys = jax.random.split(dropout_key, config.num_layer)

    def iterate(carry, scanned):
      key, pair_gradient = scanned
      act, frames = fold_iteration(
        *carry,
        shared_pair,
        mask,
        pair_gradient=pair_gradient,
        dropout_key=key,
      )
      emitted = frames, act if config.sidechain_iterations == 'all' else None
      return (act, _stop_rotation_gradient(frames)), emitted

    (act, _), (trajectory, acts) = hk.scan(
      iterate,
      (act, frames),
      (keys, pair_gradients),
      length=config.num_layer,
    )
    trajectory = _scale_translation(trajectory, config.position_scale)
    if acts is None:
      acts, backbone = act[None], jax.tree.map(lambda x: x[-1:], trajectory)
    else:
      backbone = trajectory

    unnormalized = fold_iteration.torsion_angles(acts, single)
    angles = all_atom.normalise_torsion_angles(unnormalized)
    groups = all_atom.torsion_angles_to_frames(
      geometry.Rigid(backbone.rotation, backbone.translation), angles, aatype
    )
    atom_pos = all_atom.frames_to_atom14(groups, aatype)

    tables = residue_constants.residue_tables()
    if atom14_mask is None:
      atom14_mask = jnp.asarray(tables.atom14_mask)[aatype] & mask[:, None]
    if atom37_mask is None:
      atom37_mask = jnp.asarray(tables.atom37_mask)[aatype] & mask[:, None]
    atom37 = all_atom.atom14_to_atom37(atom_pos[-1], aatype)
    monomer = config.parameterisation == 'monomer'
    return StructureModuleOutput(
      act=act,
      traj=(
        trajectory.to_tensor()
        if isinstance(trajectory, geometry.QuatAffine)
        else trajectory.to_3x4()
      ),
      angles_sin_cos=angles,
      unnormalized_angles_sin_cos=unnormalized,
      atom_pos=atom_pos,
      frames=groups.to_flat12() if monomer else groups.to_3x4(),
      final_atom14_positions=atom_pos[-1],
      final_atom14_mask=jnp.asarray(atom14_mask),
      final_atom_positions=jnp.where(atom37_mask[..., None], atom37, 0),
      final_atom_mask=jnp.asarray(atom37_mask),
    )


class FoldIteration(hk.Module):
  """One iteration of Alg. 20, lines 6 to 10, and its torsion angles.

  Parameters: `invariant_point_attention`, `attention_layer_norm`, `transition`,
  `transition_1`..., `transition_layer_norm`, `affine_update` (monomer) or
  `quat_rigid/rigid` (multimer), and below `rigid_sidechain` those of
  `RigidSidechain`.
  """

  def __init__(
    self, config: StructureModuleConfig, *, name: str = 'fold_iteration'
  ):
    super().__init__(name=name)
    self.config = config
    self._final_init: hm.Initializer = 'zeros' if config.zero_init else 'linear'

  def __call__(
    self,
    act: jax.Array,
    frames: Frames,
    pair: jax.Array | ipa_lib.SharedPair,
    mask: jax.Array,
    *,
    pair_gradient: Any = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, Frames]:
    """Returns the next single representation and the next frames.

    Args:
      act: [n_res, c] float.
      frames: [n_res] frames, `QuatAffine` (monomer) or `Rigid` (multimer), in
        units of `position_scale`.
      pair: [n_res, n_res, c_z] float, already normalised, or from `share_pair`.
      mask: [n_res] bool.
      pair_gradient: of this iteration, from the method `share_pair`.
      dropout_key: PRNG key; None means no dropout.

    Returns:
      [n_res, c] and frames of the same kind.
    """
    config = self.config
    keys = (None, None)
    if dropout_key is not None:
      keys = jax.random.split(dropout_key)

    # Lines 6-7.
    update = self._attention()(
      act,
      pair,
      frames.rotation,
      frames.translation,
      mask,
      pair_gradient=pair_gradient,
    )
    act += cast(jax.Array, update)
    act = functional.dropout(keys[0], config.dropout, act)
    act = hm.LayerNorm(name='attention_layer_norm')(act)

    # Lines 8-9.
    hidden = act
    for layer in range(config.num_layer_in_transition):
      is_last = layer == config.num_layer_in_transition - 1
      hidden = hm.Linear(
        config.num_channel,
        initializer=self._final_init if is_last else 'relu',
        name=_numbered('transition', layer),
      )(hidden)
      if not is_last:
        hidden = jax.nn.relu(hidden)
    act = functional.dropout(keys[1], config.dropout, act + hidden)
    act = hm.LayerNorm(name='transition_layer_norm')(act)

    # Line 10.
    return act, backbone_update(frames, self._frame_update(act))

  @hk.name_like('__call__')
  def share_pair(
    self,
    pair: jax.Array,
    layer_norm: tuple[jax.Array, jax.Array],
    mask: jax.Array | None = None,
  ) -> tuple[ipa_lib.SharedPair, Any]:
    """What all iterations need of the pair, and its gradient, computed once.

    Args:
      pair: [n_res, n_res, c_z] float, not yet normalised.
      layer_norm: scale and offset of its layer norm, [c_z].
      mask: [n_res] bool; None means all real.

    Returns:
      The pair for all iterations, and their `pair_gradient` to be scanned over.
    """
    return self._attention().share_pair(
      pair, self.config.num_layer, layer_norm, mask=mask
    )

  @hk.name_like('__call__')
  def torsion_angles(self, act: jax.Array, initial_act: jax.Array) -> jax.Array:
    """Unnormalised torsion angles, Alg. 20, lines 11 to 14.

    Args:
      act: [..., n_res, c] float, after an iteration.
      initial_act: [n_res, c_s] float, the normalised single representation.

    Returns:
      [..., n_res, 7, 2] (sin, cos) of any length.
    """
    return RigidSidechain(self.config)(act, initial_act)

  @hk.transparent
  def _frame_update(self, act: jax.Array) -> jax.Array:
    # Coordinates must not pass through TF32 or bfloat16 matrix units.
    options: dict[str, Any] = {
      'initializer': self._final_init,
      'precision': 'highest',
    }
    if self.config.parameterisation == 'monomer':
      return hm.Linear(6, name='affine_update', **options)(act)
    with hk.name_scope('quat_rigid'):
      return hm.Linear(6, name='rigid', **options)(act)

  @hk.transparent
  def _attention(self) -> ipa_lib.InvariantPointAttention:
    return ipa_lib.InvariantPointAttention(self.config.attention)


class RigidSidechain(hk.Module):
  """The network of torsion angles, Alg. 20, lines 11 to 14.

  Parameters (`weights`, `bias`): `input_projection`, `input_projection_1`,
  `resblock1`, `resblock2`, `resblock1_1`, `resblock2_1`...,
  `unnormalized_angles`.
  """

  def __init__(
    self, config: StructureModuleConfig, *, name: str = 'rigid_sidechain'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(self, act: jax.Array, initial_act: jax.Array) -> jax.Array:
    """Maps [..., n_res, c] and [n_res, c_s] to [..., n_res, 7, 2]."""
    sizes = self.config.sidechain
    final_init = 'zeros' if self.config.zero_init else 'linear'

    def layer(name: str, x: jax.Array, init: hm.Initializer) -> jax.Array:
      linear = hm.Linear(sizes.num_channel, initializer=init, name=name)
      return linear(jax.nn.relu(x))

    hidden = layer('input_projection', act, 'linear')
    hidden += layer('input_projection_1', initial_act, 'linear')
    for block in range(sizes.num_residual_block):
      inner = layer(_numbered('resblock1', block), hidden, 'relu')
      hidden += layer(_numbered('resblock2', block), inner, final_init)
    angles = hm.Linear(14, name='unnormalized_angles')(jax.nn.relu(hidden))
    return angles.reshape(*angles.shape[:-1], 7, 2)


def backbone_update(frames: Frames, update: jax.Array) -> Frames:
  """Moves frames by (b, c, d, tx, ty, tz) in their own coordinates, Alg. 23.

  Args:
    frames: [n_res] frames, `QuatAffine` (monomer) or `Rigid` (multimer).
    update: [n_res, 6] float.

  Returns:
    Frames of the same kind.
  """
  if isinstance(frames, geometry.QuatAffine):
    return frames.pre_compose(update)
  return frames @ geometry.rigid_from_update(update)


def transform_structure_module(
  config: StructureModuleConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the structure module.

    >>> config = StructureModuleConfig(num_layer=2, num_channel=16)
    >>> init, apply = transform_structure_module(config)
    >>> single, pair = jnp.ones((4, 16)), jnp.ones((4, 4, 8))
    >>> aatype = residue_constants.sequence_to_aatype('GAVX')
    >>> params = init(jax.random.key(0), single, pair, aatype)
    >>> jax.jit(apply)(params, single, pair, aatype).final_atom_positions.shape
    (4, 37, 3)

  Args:
    config: sizes; None takes AF2's monomer.

  Returns:
    `init(key, single, pair, aatype, mask=None)` and `apply(params, ...)` with
    the same arguments and `atom14_mask=None, atom37_mask=None,
    dropout_key=None`; shapes as in `StructureModule`.
  """
  config = config or StructureModuleConfig()

  def forward(
    single,
    pair,
    aatype,
    mask=None,
    atom14_mask=None,
    atom37_mask=None,
    dropout_key=None,
  ):
    return StructureModule(config)(
      single,
      pair,
      aatype,
      mask,
      atom14_mask=atom14_mask,
      atom37_mask=atom37_mask,
      dropout_key=dropout_key,
    )

  return pm.transform(forward)


def _stop_rotation_gradient(frames: Frames) -> Frames:
  if isinstance(frames, geometry.QuatAffine):
    return frames.stop_rotation_gradient()
  return geometry.Rigid(
    jax.lax.stop_gradient(frames.rotation), frames.translation
  )


def _scale_translation(frames: Frames, scale: float) -> Frames:
  return dataclasses.replace(frames, translation=frames.translation * scale)


def _numbered(name: str, index: int) -> str:
  """Upstream's names of repeated layers: `name`, `name_1`, `name_2`."""
  return f'{name}_{index}' if index else name
