"""AlphaFold 2: quaternions, frames, side chains and FAPE."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import geometry
from structattn_jax.network.alphafold2 import all_atom, fape, residue_constants
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification.golden import Comparison, Golden

_QUATERNIONS = ('rot_to_quat', 'pre_compose_tensor')


def geometry_and_fape(golden: Golden) -> Iterator[Comparison]:
  """Everything in the file that has a public function."""
  inputs = golden.part('inputs')
  meta = golden.meta
  scale, clamp = meta['length_scale'], meta['clamp']
  found = {
    **jax.jit(_frames)(inputs),
    **jax.jit(_side_chains)(inputs),
    **jax.jit(lambda x: _losses(x, scale, clamp, meta['epsilon']))(inputs),
  }
  floor = golden_lib.GEOMETRY_FLOOR
  for name in golden.outputs():
    if name not in found:
      continue  # Left out, which is reported.
    got = found[name]
    if name.startswith('grad_'):
      yield golden.gradient(name, got)
    elif name in _QUATERNIONS:
      truth = golden.truth(name)

      def align(tensor, truth=truth):
        return _align(tensor, truth)

      got = align(np.asarray(got, np.float64))
      yield golden.value(name, got, floor=floor, convert=align)
    else:
      yield golden.value(name, got, floor=floor)


def residue_tables(golden: Golden) -> Iterator[Comparison]:
  """The constants, which must be equal."""
  tables = residue_constants.residue_tables()
  found = {
    'restype_rigid_group_default_frame': tables.default_frame,
    'restype_atom14_to_rigid_group': tables.atom14_group,
    'restype_atom14_rigid_group_positions': tables.atom14_position,
    'restype_atom14_mask': tables.atom14_mask,
    'restype_atom37_mask': tables.atom37_mask,
    'restype_atom37_to_atom14': tables.atom37_to_atom14,
    'restype_atom14_to_atom37': tables.atom14_to_atom37,
    'chi_angles_mask': tables.chi_mask,
    'chi_pi_periodic': tables.chi_pi_periodic,
    'restype_atom14_is_ambiguous': tables.atom14_is_ambiguous,
    # x[renamed] = matrix^T x.
    'renaming_matrices': np.swapaxes(np.eye(14)[tables.atom14_renamed], 1, 2),
  }
  for name, got in found.items():
    yield golden.exact(name, got)


def _frames(inputs: dict[str, Any]) -> dict[str, jax.Array]:
  rigid = geometry.Rigid.from_quaternion(inputs['quat'], inputs['translation'])
  update = inputs['update']
  quaternion = geometry.normalise_quaternion(inputs['quat'])
  monomer = geometry.QuatAffine(quaternion, inputs['translation'])
  monomer = monomer.pre_compose(update)
  multimer = rigid @ geometry.rigid_from_update(update)
  a, b, c = jnp.moveaxis(inputs['three_points'], 1, 0)
  from_points = geometry.Rigid.from_three_points(a, b, c)
  reference = geometry.Rigid.from_n_ca_c(a, b, c, parameterisation='multimer')
  return {
    'rotation': rigid.rotation,
    'apply_points': rigid.apply(inputs['points']),
    'invert_points': rigid.apply_inverse(inputs['points']),
    'rot_to_quat': rigid.to_quaternion7()[:, :4],
    'pre_compose_tensor': monomer.to_tensor(),
    'pre_compose_rotation': monomer.rotation,
    'multimer_update_3x4': multimer.to_3x4(),
    'rigid_from_3_points_flat12': from_points.to_flat12(),
    'multimer_make_transform_from_reference': reference.to_3x4(),
  }


def _side_chains(inputs: dict[str, Any]) -> dict[str, jax.Array]:
  torsions = all_atom.normalise_torsion_angles(inputs['unnormalized_torsions'])
  backbone = geometry.Rigid.from_quaternion(
    inputs['quat'], inputs['translation']
  )
  aatype = inputs['aatype']
  frames = all_atom.torsion_angles_to_frames(backbone, torsions, aatype)
  return {
    'torsions': torsions,
    'frames_flat12': frames.to_flat12(),
    'atom14': all_atom.frames_to_atom14(frames, aatype),
  }


def _losses(
  inputs: dict[str, Any], scale: float, clamp: float, epsilon: float
) -> dict[str, jax.Array]:
  """FAPE; the file mixes normalised and raw quaternions as upstream does."""
  mask = inputs['mask'] > 0
  same_chain = inputs['pair_mask'] > 0

  def tensor(quaternion: str, translation: str) -> jax.Array:
    return jnp.concatenate([inputs[quaternion], inputs[translation]], -1)

  target = geometry.Rigid.from_quaternion(inputs['quat'], inputs['translation'])
  raw_target = geometry.Rigid.from_quaternion7(tensor('quat', 'translation'))
  trajectory = tensor('pred_quat', 'pred_translation')
  predicted = geometry.Rigid.from_quaternion7(trajectory)

  def error(
    frames: geometry.Rigid, length_scale: float = scale, **options: Any
  ) -> jax.Array:
    return fape.frame_aligned_point_error(
      frames,
      target,
      mask,
      frames.translation,
      target.translation,
      mask,
      epsilon=epsilon,
      length_scale=length_scale,
      **options,
    )

  def errors(**options: Any) -> jax.Array:
    return jnp.stack([error(predicted[i], **options) for i in range(n_iter)])

  def loss(trajectory: jax.Array, **options: Any) -> jax.Array:
    return fape.backbone_loss(
      geometry.Rigid.from_quaternion7(trajectory),
      raw_target,
      mask,
      length_scale=scale,
      clamp_distance=clamp,
      **options,
    )

  n_iter = trajectory.shape[0]
  multimer: dict[str, Any] = {'parameterisation': 'multimer'}
  weight = {'clamp_weight': inputs['use_clamped_fape']}
  return {
    'fape_clamped': errors(clamp_distance=clamp),
    'fape_unclamped': errors(clamp_distance=None),
    'fape_identical': error(target, clamp_distance=clamp),
    'multimer_fape_intra': errors(
      pair_mask=same_chain, clamp_distance=clamp, **multimer
    ),
    # Upstream's constants for the interface.
    'multimer_fape_interface': errors(
      pair_mask=~same_chain,
      clamp_distance=1000.0,
      length_scale=20.0,
      **multimer,
    ),
    'backbone_loss': loss(trajectory, **weight),
    'backbone_fape_last': loss(trajectory[-1:], **weight),
    'grad_backbone_loss_traj': jax.grad(loss)(trajectory),
  }


def _align(tensor: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Turns quaternions in front to the sign of the truth: theirs is free."""
  product = np.sum(tensor[..., :4] * truth[..., :4], -1, keepdims=True)
  sign = np.where(product < 0, -1.0, 1.0)
  return np.concatenate([tensor[..., :4] * sign, tensor[..., 4:]], -1)
