"""Losses of the structure module: FAPE and torsion angles.

Jumper et al. (2021) Suppl. Algs. 27 (torsionAngleLoss) and 28 (computeFAPE);
Evans et al. (2021) for chains. Mirrors alphafold model/all_atom.py, model/
all_atom_multimer.py and the losses of model/folding.py and
model/folding_multimer.py @ c77e5d2.

Shapes: n_iter iterations, n_res residues, n_frame frames, n_point points.
Units: positions, clamp distances and length scales in angstrom; angles in
radians.

Numerics. FAPE compares every point in every frame, and must resolve errors of
0.01 angstrom between points 100 angstrom apart: squared distances are never
expanded, coordinates never pass through matrix units. Frames are taken in
chunks whose intermediates are computed again for the gradient, so memory grows
with the number of points, not with frames times points.
"""

import dataclasses

import jax
import jax.numpy as jnp

from structattn_jax import geometry
from structattn_jax.common import checks, numerics
from structattn_jax.geometry.rotation import Parameterisation
from structattn_jax.network.alphafold2 import residue_constants

# Added to the number of pairs, so that no pair at all gives zero.
_COUNT_EPSILON = 1e-4
_MULTIMER_EPSILON = 1e-8
# Pairs whose coordinates live at one time, unless asked otherwise: some
# megabytes, and enough work for an accelerator.
_PAIRS_PER_CHUNK = 2**18


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultimerBackboneLoss:
  """Backbone FAPE of a complex, unweighted.

  Attributes:
    intra_chain: [] float, frames and points of the same chain.
    interface: [] float, frames and points of different chains.
  """

  intra_chain: jax.Array
  interface: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TorsionAngleLoss:
  """Loss of torsion angles, unweighted (AF2 takes 0.5 and 0.01).

  Attributes:
    chi: [] float, mean squared distance on the unit circle.
    angle_norm: [] float, mean | |u| - 1 | of unnormalised predictions.
  """

  chi: jax.Array
  angle_norm: jax.Array


def frame_aligned_point_error(
  predicted_frames: geometry.Rigid,
  target_frames: geometry.Rigid,
  frame_mask: jax.Array,
  predicted_points: jax.Array,
  target_points: jax.Array,
  point_mask: jax.Array,
  *,
  pair_mask: jax.Array | None = None,
  length_scale: float = 10.0,
  clamp_distance: float | None = 10.0,
  clamp_weight: jax.typing.ArrayLike | None = None,
  parameterisation: Parameterisation = 'monomer',
  epsilon: float = 1e-4,
  chunk_size: int | None = None,
) -> jax.Array:
  """Frame aligned point error, Alg. 28.

    d_fq = | R_f^T (x_q - t_f) - R*_f^T (x*_q - t*_f) |
    monomer:   e = min(sqrt(d² + epsilon), clamp),  n = (sum_f m_f)(sum_q m_q)
    multimer:  e = min(sqrt(max(d², 1e-8)), clamp), n = sum_fq m_f m_q m_fq
    loss = sum_fq m_f m_q m_fq e / length_scale / (n + 1e-4)

  Invariant to a rotation and translation of all predictions, and of all
  targets. Equal structures give sqrt(epsilon) / length_scale, not zero.

  Args:
    predicted_frames: frames [n_frame], angstrom.
    target_frames: frames [n_frame], angstrom; rotations orthonormal, or
      multiples of that.
    frame_mask: [n_frame] bool.
    predicted_points: [n_point, 3] float, angstrom.
    target_points: [n_point, 3] float, angstrom.
    point_mask: [n_point] bool.
    pair_mask: [n_frame, n_point] bool; None keeps all pairs. The monomer form
      does not count pairs and takes none.
    length_scale: Z, angstrom.
    clamp_distance: largest error that counts, angstrom; None and 0 mean no
      clamp, as in AF2.
    clamp_weight: [] float w in [0, 1] gives w clamped + (1 - w) unclamped
      errors (AF2's `use_clamped_fape`); None means 1.
    parameterisation: 'monomer' or 'multimer', the two forms above.
    epsilon: monomer only, square angstrom.
    chunk_size: frames compared at a time; None chooses by the number of
      points. It changes memory and rounding only.

  Returns:
    [] float, at least float32; zero if no pair is kept.

  Raises:
    ValueError: on a wrong shape, a pair mask in the monomer form, or a length
      that is not positive.
    TypeError: on a wrong dtype.
  """
  for name, frames in (
    ('predicted_frames', predicted_frames),
    ('target_frames', target_frames),
  ):
    if not isinstance(frames, geometry.Rigid):
      raise TypeError(
        f'{name}: expected a geometry.Rigid, got {type(frames).__name__}'
      )
  dims = checks.check_shapes(
    **{
      'predicted_frames.rotation': (predicted_frames.rotation, 'n_frame 3 3'),
      'predicted_frames.translation': (
        predicted_frames.translation,
        'n_frame 3',
      ),
      'target_frames.rotation': (target_frames.rotation, 'n_frame 3 3'),
      'target_frames.translation': (target_frames.translation, 'n_frame 3'),
    },
    frame_mask=(frame_mask, 'n_frame'),
    predicted_points=(predicted_points, 'n_point 3'),
    target_points=(target_points, 'n_point 3'),
    point_mask=(point_mask, 'n_point'),
    pair_mask=(pair_mask, 'n_frame n_point'),
    clamp_weight=(clamp_weight, ''),
  )
  checks.check_dtypes(
    'floating',
    predicted_points=predicted_points,
    target_points=target_points,
  )
  checks.check_dtypes(
    'bool', frame_mask=frame_mask, point_mask=point_mask, pair_mask=pair_mask
  )
  _check_parameterisation(parameterisation)
  if not length_scale > 0:
    raise ValueError(
      f'length_scale: expected a positive length, got {length_scale}'
    )
  if clamp_distance is not None and not clamp_distance >= 0:
    raise ValueError(
      'clamp_distance: expected a positive length, or 0 or None for no clamp, '
      f'got {clamp_distance}'
    )
  if parameterisation == 'monomer' and pair_mask is not None:
    raise ValueError(
      "pair_mask: parameterisation='monomer' takes none; use 'multimer'"
    )
  if chunk_size is None:
    chunk_size = max(8, _PAIRS_PER_CHUNK // max(dims['n_point'], 1))
  elif chunk_size < 1:
    raise ValueError(f'chunk_size: expected at least 1, got {chunk_size}')

  # What is masked may hold anything, NaN included, and must not reach
  # gradients either.
  predicted_frames = _masked(predicted_frames, frame_mask)
  target_frames = _masked(target_frames, frame_mask)
  predicted_points = _masked(predicted_points, point_mask).T
  target_points = _masked(target_points, point_mask).T

  def frame_error(inputs):
    """Sum of the errors of all points in one frame."""
    predicted, target, own_pair_mask = inputs
    squared = _squared_differences(
      predicted, target, predicted_points, target_points
    )
    if parameterisation == 'monomer':
      error = jnp.sqrt(squared + epsilon)
    else:
      error = jnp.sqrt(jnp.maximum(squared, _MULTIMER_EPSILON))
    if clamp_distance:
      clamped = jnp.minimum(error, clamp_distance)
      if clamp_weight is None:
        error = clamped
      else:
        error = clamp_weight * clamped + (1 - clamp_weight) * error
    keep = point_mask if own_pair_mask is None else point_mask & own_pair_mask
    return jnp.sum(jnp.where(keep, error, 0))

  errors = jax.lax.map(
    # Inside a loop XLA cannot merge the second computation with the first.
    jax.checkpoint(frame_error, prevent_cse=False),
    (predicted_frames, target_frames, pair_mask),
    batch_size=max(1, min(chunk_size, dims['n_frame'])),
  )
  dtype = errors.dtype
  total = jnp.sum(jnp.where(frame_mask, errors, 0)) / length_scale
  num_frame = jnp.sum(frame_mask, dtype=dtype)
  if pair_mask is None:
    count = num_frame * jnp.sum(point_mask, dtype=dtype)
  else:
    by_frame = jnp.sum(pair_mask & point_mask, 1)
    count = jnp.sum(jnp.where(frame_mask, by_frame, 0), dtype=dtype)
  return total / (count + _COUNT_EPSILON)


def backbone_loss(
  predicted_frames: geometry.Rigid,
  target_frames: geometry.Rigid,
  mask: jax.Array,
  *,
  pair_mask: jax.Array | None = None,
  length_scale: float = 10.0,
  clamp_distance: float | None = 10.0,
  clamp_weight: jax.typing.ArrayLike | None = None,
  parameterisation: Parameterisation = 'monomer',
  chunk_size: int | None = None,
) -> jax.Array:
  """FAPE of backbone frames and their origins, mean over iterations.

  Args:
    predicted_frames: frames [n_iter, n_res], angstrom: the structure module's
      `backbone_frames`.
    target_frames: frames [n_res], angstrom.
    mask: [n_res] bool, residues whose target is known.
    pair_mask: [n_res, n_res] bool, frame first; as in
      `frame_aligned_point_error`, like all further arguments.
    length_scale: angstrom.
    clamp_distance: angstrom or None.
    clamp_weight: [] float or None.
    parameterisation: 'monomer' or 'multimer'.
    chunk_size: frames compared at a time or None.

  Returns:
    [] float, at least float32.

  Raises:
    ValueError: on a wrong shape, naming the argument.
  """
  checks.check_shapes(
    **{
      'predicted_frames.rotation': (
        predicted_frames.rotation,
        'n_iter n_res 3 3',
      ),
      'predicted_frames.translation': (
        predicted_frames.translation,
        'n_iter n_res 3',
      ),
      'target_frames.rotation': (target_frames.rotation, 'n_res 3 3'),
    },
    mask=(mask, 'n_res'),
    pair_mask=(pair_mask, 'n_res n_res'),
  )

  def loss(frames: geometry.Rigid) -> jax.Array:
    return frame_aligned_point_error(
      frames,
      target_frames,
      mask,
      frames.translation,
      target_frames.translation,
      mask,
      pair_mask=pair_mask,
      length_scale=length_scale,
      clamp_distance=clamp_distance,
      clamp_weight=clamp_weight,
      parameterisation=parameterisation,
      chunk_size=chunk_size,
    )

  # A loop, as vmap would hold the pairs of all iterations at once.
  return jnp.mean(jax.lax.map(loss, predicted_frames))


def multimer_backbone_loss(
  predicted_frames: geometry.Rigid,
  target_frames: geometry.Rigid,
  mask: jax.Array,
  asym_id: jax.Array,
  *,
  chunk_size: int | None = None,
) -> MultimerBackboneLoss:
  """Backbone FAPE within chains and between them, as AF2-multimer.

  Within a chain errors are clamped at 10 angstrom and divided by 10; between
  chains they are clamped at 1000 and divided by 20, so that chains far off
  still feel where they belong.

  Args:
    predicted_frames: frames [n_iter, n_res], angstrom.
    target_frames: frames [n_res], angstrom.
    mask: [n_res] bool, residues whose target is known.
    asym_id: [n_res] int, the chain of each residue.
    chunk_size: frames compared at a time or None.

  Returns:
    Both losses, each the mean over iterations.

  Raises:
    ValueError: on a wrong shape, naming the argument.
  """
  checks.check_shapes(mask=(mask, 'n_res'), asym_id=(asym_id, 'n_res'))
  checks.check_dtypes('integer', asym_id=asym_id)
  asym_id = jnp.asarray(asym_id)
  same_chain = asym_id[:, None] == asym_id

  def loss(pair_mask, clamp_distance, length_scale):
    return backbone_loss(
      predicted_frames,
      target_frames,
      mask,
      pair_mask=pair_mask,
      clamp_distance=clamp_distance,
      length_scale=length_scale,
      parameterisation='multimer',
      chunk_size=chunk_size,
    )

  return MultimerBackboneLoss(
    intra_chain=loss(same_chain, 10.0, 10.0),
    interface=loss(~same_chain, 1000.0, 20.0),
  )


def sidechain_loss(
  predicted_frames: geometry.Rigid,
  target_frames: geometry.Rigid,
  frame_mask: jax.Array,
  predicted_atom14: jax.Array,
  target_atom14: jax.Array,
  atom14_mask: jax.Array,
  *,
  length_scale: float = 10.0,
  clamp_distance: float | None = 10.0,
  parameterisation: Parameterisation = 'monomer',
  chunk_size: int | None = None,
) -> jax.Array:
  """FAPE of all atoms in the frames of all rigid groups, last iteration.

  Where atoms have interchangeable names, the caller chooses the naming of the
  target that is closer to the prediction (Alg. 26) for frames and atoms.

  Args:
    predicted_frames: frames [n_res, 8], angstrom: the structure module's
      `group_frames[-1]`.
    target_frames: frames [n_res, 8], angstrom.
    frame_mask: [n_res, 8] bool.
    predicted_atom14: [n_res, 14, 3] float, angstrom.
    target_atom14: [n_res, 14, 3] float, angstrom.
    atom14_mask: [n_res, 14] bool.
    length_scale: angstrom.
    clamp_distance: angstrom or None.
    parameterisation: 'monomer' or 'multimer'.
    chunk_size: frames compared at a time or None.

  Returns:
    [] float, at least float32.

  Raises:
    ValueError: on a wrong shape, naming the argument.
  """
  checks.check_shapes(
    predicted_atom14=(predicted_atom14, 'n_res 14 3'),
    target_atom14=(target_atom14, 'n_res 14 3'),
    atom14_mask=(atom14_mask, 'n_res 14'),
    frame_mask=(frame_mask, 'n_res 8'),
    **{
      'predicted_frames.rotation': (predicted_frames.rotation, 'n_res 8 3 3'),
      'target_frames.rotation': (target_frames.rotation, 'n_res 8 3 3'),
    },
  )

  def flat(frames: geometry.Rigid) -> geometry.Rigid:
    return geometry.Rigid(
      frames.rotation.reshape(-1, 3, 3), frames.translation.reshape(-1, 3)
    )

  return frame_aligned_point_error(
    flat(predicted_frames),
    flat(target_frames),
    frame_mask.reshape(-1),
    predicted_atom14.reshape(-1, 3),
    target_atom14.reshape(-1, 3),
    atom14_mask.reshape(-1),
    length_scale=length_scale,
    clamp_distance=clamp_distance,
    parameterisation=parameterisation,
    chunk_size=chunk_size,
  )


def torsion_angle_loss(
  angles_sin_cos: jax.Array,
  unnormalized_angles_sin_cos: jax.Array,
  chi_angles: jax.Array,
  chi_mask: jax.Array,
  aatype: jax.Array,
  mask: jax.Array,
) -> TorsionAngleLoss:
  """Supervision of chi angles and of the length of raw angles, Alg. 27.

  A chi angle whose half turn only exchanges interchangeable atoms is compared
  with the closer of target and target + π. As AF2's `supervised_chi_loss`,
  and unlike Alg. 27, this leaves the backbone torsions to FAPE.

  Args:
    angles_sin_cos: [n_iter, n_res, 7, 2] float, (sin, cos) of norm one.
    unnormalized_angles_sin_cos: [n_iter, n_res, 7, 2] float.
    chi_angles: [n_res, 4] float, target chi1 to chi4, radians.
    chi_mask: [n_res, 4] bool, chi angles whose target is known.
    aatype: [n_res] int in [0, 20].
    mask: [n_res] bool, real residues.

  Returns:
    Both terms, each the mean over iterations and what the masks keep.

  Raises:
    ValueError: on a wrong shape, naming the argument.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(
    angles_sin_cos=(angles_sin_cos, 'n_iter n_res 7 2'),
    unnormalized_angles_sin_cos=(
      unnormalized_angles_sin_cos,
      'n_iter n_res 7 2',
    ),
    chi_angles=(chi_angles, 'n_res 4'),
    chi_mask=(chi_mask, 'n_res 4'),
    aatype=(aatype, 'n_res'),
    mask=(mask, 'n_res'),
  )
  checks.check_dtypes('integer', aatype=aatype)
  checks.check_dtypes('bool', chi_mask=chi_mask, mask=mask)
  tables = residue_constants.residue_tables()
  periodic = jnp.asarray(tables.chi_pi_periodic)[aatype]
  chi_angles = _masked(chi_angles, chi_mask)
  target = jnp.stack([jnp.sin(chi_angles), jnp.cos(chi_angles)], -1)
  predicted = numerics.at_least_float32(angles_sin_cos)[:, :, 3:]
  squared = jnp.sum(jnp.square(predicted - target), -1)
  # Half a turn changes the sign of sine and cosine.
  turned = jnp.sum(jnp.square(predicted + target), -1)
  squared = jnp.where(periodic, jnp.minimum(squared, turned), squared)
  length = numerics.safe_norm(unnormalized_angles_sin_cos, epsilon=1e-6)
  return TorsionAngleLoss(
    chi=_masked_mean(squared, chi_mask),
    angle_norm=_masked_mean(jnp.abs(length - 1), mask[:, None]),
  )


def _squared_differences(
  predicted: geometry.Rigid,
  target: geometry.Rigid,
  predicted_points: jax.Array,
  target_points: jax.Array,
) -> jax.Array:
  """Squared distances [n_point] in one frame, from points [3, n_point].

  | R^T (x - t) - R*^T (x* - t*) | = | R* R^T (x - t) - (x* - t*) | takes one
  product per pair if R* is orthonormal. AF2 does not normalise the quaternions
  it comes from, so R* is a multiple s of that, which moves to the other side.
  Coordinates come first because an axis of three last would leave vector units
  three quarters empty.
  """
  squared_size = jnp.sum(jnp.square(target.rotation)) / 3
  # Masked frames are zero.
  size = jnp.sqrt(jnp.where(squared_size > 0, squared_size, 1))
  turn = geometry.compose_rotations(
    target.rotation / size, jnp.swapaxes(predicted.rotation, -1, -2)
  )
  x, y, z = (predicted_points[i] - predicted.translation[i] for i in range(3))
  squared = jnp.zeros_like(x)
  for i in range(3):
    wanted = size * (target_points[i] - target.translation[i])
    moved = turn[i, 0] * x + turn[i, 1] * y + turn[i, 2] * z
    squared += jnp.square(moved - wanted)
  return squared


def _check_parameterisation(parameterisation: str) -> None:
  if parameterisation not in ('monomer', 'multimer'):
    raise ValueError(
      "parameterisation: expected 'monomer' or 'multimer', got "
      f'{parameterisation!r}'
    )


def _masked(tree, mask: jax.Array):
  """Zero where the leading axes are masked, at least float32."""

  def zero(x: jax.Array) -> jax.Array:
    x = numerics.at_least_float32(x)
    own = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(own, x, 0)

  return jax.tree.map(zero, tree)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  mask = jnp.broadcast_to(mask, values.shape)
  count = jnp.sum(mask, dtype=values.dtype)
  return jnp.sum(jnp.where(mask, values, 0)) / (count + 1e-10)
