"""Oracle of AF2's structure module, its losses, and IPA as released.

Parameters are {scope: {name: array}} with upstream's names, scopes relative to
the module of each function. `tables` holds upstream's residue constants under
upstream's names (restype_rigid_group_default_frame, ...). Positions in
angstrom. Masks are bool and exact: masked residues attend to nothing, where
upstream adds -1e5; rows of real residues agree.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from structattn_jax.reference import numerics

Params = Mapping[str, Mapping[str, np.ndarray]]
Tables = Mapping[str, np.ndarray]


def _below(params: Params, scope: str) -> dict[str, Any]:
  """Parameters of a submodule, scopes relative to it; '' is its own."""
  found = {}
  for name, values in params.items():
    if name == scope:
      found[''] = values
    elif name.startswith(f'{scope}/'):
      found[name.removeprefix(f'{scope}/')] = values
  return found


def _linear(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  y = np.tensordot(x, params[name]['weights'], axes=1)
  return y + params[name]['bias'] if 'bias' in params[name] else y


def _norm(params: Params, name: str, x: np.ndarray) -> np.ndarray:
  return numerics.layer_norm(x, params[name]['scale'], params[name]['offset'])


def quaternion_to_rotation(quaternion: np.ndarray) -> np.ndarray:
  """[..., 4] (w, x, y, z) to [..., 3, 3], without normalisation."""
  w, x, y, z = np.moveaxis(quaternion, -1, 0)
  rows = [
    [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
    [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
    [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
  ]
  return np.stack([np.stack(row, -1) for row in rows], -2)


def multiply_quaternions(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Hamilton product (v, u)(v', u') = (vv' - u.u', vu' + v'u + u x u')."""
  real = a[..., :1] * b[..., :1] - np.sum(
    a[..., 1:] * b[..., 1:], -1, keepdims=True
  )
  imaginary = (
    a[..., :1] * b[..., 1:]
    + b[..., :1] * a[..., 1:]
    + np.cross(a[..., 1:], b[..., 1:])
  )
  return np.concatenate([real, imaginary], -1)


def backbone_update_monomer(
  quaternion: np.ndarray, translation: np.ndarray, update: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Alg. 23 on quaternions: normalise(q (1, b, c, d)), t + R(q) t_update."""
  one = np.ones((*update.shape[:-1], 1))
  moved = multiply_quaternions(
    quaternion, np.concatenate([one, update[..., :3]], -1)
  )
  shift = np.einsum(
    '...xy,...y->...x', quaternion_to_rotation(quaternion), update[..., 3:]
  )
  norm = np.linalg.norm(moved, axis=-1, keepdims=True)
  return moved / norm, translation + shift


def backbone_update_multimer(
  rotation: np.ndarray, translation: np.ndarray, update: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Alg. 23 on matrices: R R(1, b, c, d), t + R t_update."""
  one = np.ones((*update.shape[:-1], 1))
  quaternion = np.concatenate([one, update[..., :3]], -1)
  squared = np.sum(quaternion**2, -1, keepdims=True)
  turn = quaternion_to_rotation(quaternion / np.sqrt(np.maximum(1e-6, squared)))
  shift = np.einsum('...xy,...y->...x', rotation, update[..., 3:])
  return rotation @ turn, translation + shift


def invariant_point_attention(
  params: Params,
  single: np.ndarray,
  pair: np.ndarray,
  rotation: np.ndarray,
  translation: np.ndarray,
  mask: np.ndarray,
  *,
  sizes: Mapping[str, int],
) -> np.ndarray:
  """Alg. 22 with upstream's parameters, monomer or multimer by their names.

  `sizes` needs num_head, num_scalar_qk, num_point_qk. Translations in units of
  the position scale. Rows of masked residues are zero.
  """
  n_res, n_head = len(single), sizes['num_head']
  n_qk, p_qk = sizes['num_scalar_qk'], sizes['num_point_qk']
  multimer = 'q_scalar_projection' in params
  if multimer:
    q, k, v = (_linear(params, f'{x}_scalar_projection', single) for x in 'qkv')

    def points(x: str) -> np.ndarray:
      local = _linear(params, f'{x}_point_projection/point_projection', single)
      return np.swapaxes(local.reshape(n_res, n_head, 3, -1), -1, -2)

    q_local, k_local, v_local = (points(x) for x in 'qkv')
  else:
    q = _linear(params, 'q_scalar', single).reshape(n_res, n_head, n_qk)
    kv = _linear(params, 'kv_scalar', single).reshape(n_res, n_head, -1)
    k, v = kv[..., :n_qk], kv[..., n_qk:]

    def points(name: str) -> np.ndarray:
      local = _linear(params, name, single).reshape(n_res, 3, n_head, -1)
      return np.moveaxis(local, 1, -1)

    q_local, kv_local = points('q_point_local'), points('kv_point_local')
    k_local, v_local = kv_local[:, :, :p_qk], kv_local[:, :, p_qk:]

  def to_global(local: np.ndarray) -> np.ndarray:
    turned = np.einsum('nxy,nhpy->nhpx', rotation, local)
    return turned + translation[:, None, None]

  q_global, k_global, v_global = map(to_global, (q_local, k_local, v_local))
  head_weights = np.log1p(np.exp(params['']['trainable_point_weights']))
  point_weight = np.sqrt(1 / (3 * p_qk * 9 / 2)) * head_weights
  features = []
  for i in range(n_res):
    squared = np.sum((q_global[i] - k_global) ** 2, (-1, -2))
    logits = np.sqrt(1 / (3 * n_qk)) * np.einsum('hc,jhc->jh', q[i], k)
    logits += -0.5 * point_weight * squared
    logits += np.sqrt(1 / 3) * _linear(params, 'attention_2d', pair[i])
    weights = np.zeros_like(logits)
    if mask[i]:
      weights[mask] = numerics.softmax(logits[mask], axis=0)
    result_global = np.einsum('jh,jhpx->hpx', weights, v_global)
    result_local = (result_global - translation[i]) @ rotation[i]
    squared = np.sum(result_local**2, -1)
    norm = np.sqrt(np.maximum(squared, 1e-16) if multimer else squared + 1e-8)
    features.append(
      np.concatenate(
        [
          np.einsum('jh,jhc->hc', weights, v).ravel(),
          *(result_local[..., x].ravel() for x in range(3)),
          norm.ravel(),
          np.einsum('jh,jc->hc', weights, pair[i]).ravel(),
        ]
      )
    )
  output = _linear(params, 'output_projection', np.stack(features))
  return np.where(mask[:, None], output, 0)


def fold_iteration(
  params: Params,
  act: np.ndarray,
  pair: np.ndarray,
  rotation: np.ndarray,
  translation: np.ndarray,
  mask: np.ndarray,
  *,
  sizes: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
  """Alg. 20 lines 6 to 10: the next `act` and [n_res, 6] frame updates."""
  act = act + invariant_point_attention(
    _below(params, 'invariant_point_attention'),
    act,
    pair,
    rotation,
    translation,
    mask,
    sizes=sizes,
  )
  act = _norm(params, 'attention_layer_norm', act)
  hidden = _linear(params, 'transition', act)
  layer = 1
  while f'transition_{layer}' in params:
    hidden = _linear(params, f'transition_{layer}', np.maximum(hidden, 0))
    layer += 1
  act = _norm(params, 'transition_layer_norm', act + hidden)
  name = 'affine_update' if 'affine_update' in params else 'quat_rigid/rigid'
  return act, _linear(params, name, act)


def torsion_angles(
  params: Params, act: np.ndarray, initial_act: np.ndarray
) -> np.ndarray:
  """[n_res, 7, 2] unnormalised (sin, cos), parameters of `rigid_sidechain`."""

  def layer(name: str, x: np.ndarray) -> np.ndarray:
    return _linear(params, name, np.maximum(x, 0))

  hidden = layer('input_projection', act)
  hidden = hidden + layer('input_projection_1', initial_act)
  num_block = sum(name.startswith('resblock1') for name in params)
  for end in ['', *(f'_{block}' for block in range(1, num_block))]:
    inner = layer(f'resblock1{end}', hidden)
    hidden = hidden + layer(f'resblock2{end}', inner)
  return layer('unnormalized_angles', hidden).reshape(len(act), 7, 2)


def torsion_angles_to_frames(
  rotation: np.ndarray,
  translation: np.ndarray,
  angles: np.ndarray,
  aatype: np.ndarray,
  tables: Tables,
) -> np.ndarray:
  """[n_res, 8, 4, 4] frames of all groups, Alg. 24."""
  n_res = len(aatype)
  frames = np.zeros((n_res, 8, 4, 4))
  for i in range(n_res):
    backbone = np.eye(4)
    backbone[:3, :3], backbone[:3, 3] = rotation[i], translation[i]
    groups = []
    for group in range(8):
      turn = np.eye(4)
      if group:
        sin, cos = angles[i, group - 1]
        turn[1:3, 1:3] = [[cos, -sin], [sin, cos]]
      default = np.eye(4)
      default[:3] = tables['restype_rigid_group_default_frame'][
        aatype[i], group, :3
      ]
      groups.append(default @ turn)
    for group in (5, 6, 7):
      groups[group] = groups[group - 1] @ groups[group]
    frames[i] = [backbone @ group for group in groups]
  return frames


def frames_to_atom14(
  frames: np.ndarray, aatype: np.ndarray, tables: Tables
) -> np.ndarray:
  """[n_res, 14, 3] positions from [n_res, 8, 4, 4] frames."""
  positions = np.zeros((len(aatype), 14, 3))
  for i, residue in enumerate(aatype):
    for atom in np.flatnonzero(tables['restype_atom14_mask'][residue]):
      group = tables['restype_atom14_to_rigid_group'][residue, atom]
      local = tables['restype_atom14_rigid_group_positions'][residue, atom]
      frame = frames[i, group]
      positions[i, atom] = frame[:3, :3] @ local + frame[:3, 3]
  return positions


def structure_module(
  params: Params,
  single: np.ndarray,
  pair: np.ndarray,
  aatype: np.ndarray,
  mask: np.ndarray,
  tables: Tables,
  *,
  sizes: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Alg. 20: all outputs of upstream, shapes as there.

  `sizes` needs num_layer, position_scale, and what IPA needs.
  """
  single = _norm(params, 'single_layer_norm', single)
  act = _linear(params, 'initial_projection', single)
  pair = _norm(params, 'pair_layer_norm', pair)
  own = _below(params, 'fold_iteration')
  monomer = 'affine_update' in own
  n_res, scale = len(aatype), sizes['position_scale']
  quaternion = np.tile([1.0, 0.0, 0.0, 0.0], (n_res, 1))
  rotation = np.tile(np.eye(3), (n_res, 1, 1))
  translation = np.zeros((n_res, 3))
  steps = []
  for _ in range(sizes['num_layer']):
    act, update = fold_iteration(
      own, act, pair, rotation, translation, mask, sizes=sizes
    )
    if monomer:
      quaternion, translation = backbone_update_monomer(
        quaternion, translation, update
      )
      rotation = quaternion_to_rotation(quaternion)
      traj = np.concatenate([quaternion, scale * translation], -1)
    else:
      rotation, translation = backbone_update_multimer(
        rotation, translation, update
      )
      traj = np.concatenate([rotation, scale * translation[..., None]], -1)
    raw = torsion_angles(_below(own, 'rigid_sidechain'), act, single)
    length = np.sqrt(np.maximum(np.sum(raw**2, -1, keepdims=True), 1e-12))
    frames = torsion_angles_to_frames(
      rotation, scale * translation, raw / length, aatype, tables
    )
    flat = np.concatenate(
      [frames[..., :3, :3].reshape(n_res, 8, 9), frames[..., :3, 3]], -1
    )
    steps.append(
      {
        'traj': traj,
        'angles_sin_cos': raw / length,
        'unnormalized_angles_sin_cos': raw,
        'frames': flat if monomer else frames[..., :3, :],
        'atom_pos': frames_to_atom14(frames, aatype, tables),
      }
    )
  outputs = {name: np.stack([s[name] for s in steps]) for name in steps[0]}
  last = outputs['atom_pos'][-1]
  mask37 = tables['restype_atom37_mask'][aatype] * mask[:, None]
  slot = tables['restype_atom37_to_atom14'][aatype]
  return {
    **outputs,
    'act': act,
    'final_atom14_positions': last,
    'final_atom14_mask': tables['restype_atom14_mask'][aatype] * mask[:, None],
    'final_atom_positions': last[np.arange(n_res)[:, None], slot]
    * mask37[..., None],
    'final_atom_mask': mask37,
  }


def frame_aligned_point_error(
  predicted_rotation: np.ndarray,
  predicted_translation: np.ndarray,
  target_rotation: np.ndarray,
  target_translation: np.ndarray,
  frame_mask: np.ndarray,
  predicted_points: np.ndarray,
  target_points: np.ndarray,
  point_mask: np.ndarray,
  *,
  pair_mask: np.ndarray | None = None,
  length_scale: float = 10.0,
  clamp_distance: float | None = 10.0,
  clamp_weight: float = 1.0,
  parameterisation: str = 'monomer',
) -> float:
  """Alg. 28, one frame at a time."""
  total, count = 0.0, 0.0
  for f in range(len(frame_mask)):
    local = (predicted_points - predicted_translation[f]) @ predicted_rotation[
      f
    ]
    local_target = (target_points - target_translation[f]) @ target_rotation[f]
    squared = np.sum((local - local_target) ** 2, -1)
    if parameterisation == 'monomer':
      error = np.sqrt(squared + 1e-4)
    else:
      error = np.sqrt(np.maximum(squared, 1e-8))
    if clamp_distance is not None:
      clamped = np.minimum(error, clamp_distance)
      error = clamp_weight * clamped + (1 - clamp_weight) * error
    keep = frame_mask[f] & point_mask
    if pair_mask is not None:
      keep = keep & pair_mask[f]
    total += np.sum(error[keep]) / length_scale
    count += np.sum(keep)
  return float(total / (count + 1e-4))


def torsion_angle_loss(
  angles_sin_cos: np.ndarray,
  unnormalized_angles_sin_cos: np.ndarray,
  chi_angles: np.ndarray,
  chi_mask: np.ndarray,
  aatype: np.ndarray,
  mask: np.ndarray,
  tables: Tables,
) -> tuple[float, float]:
  """Alg. 27 as upstream's `supervised_chi_loss`: chi and angle norm terms."""
  chi, norm = [], []
  for angles, raw in zip(
    angles_sin_cos, unnormalized_angles_sin_cos, strict=True
  ):
    for i, residue in enumerate(aatype):
      for c in np.flatnonzero(chi_mask[i]):
        targets = [chi_angles[i, c]]
        if tables['chi_pi_periodic'][residue, c]:
          targets.append(chi_angles[i, c] + np.pi)
        chi.append(
          min(
            np.sum((angles[i, 3 + c] - [np.sin(x), np.cos(x)]) ** 2)
            for x in targets
          )
        )
      if mask[i]:
        length = np.sqrt(np.sum(raw[i] ** 2, -1) + 1e-6)
        norm.extend(np.abs(length - 1))
  return float(np.mean(chi)), float(np.mean(norm))
