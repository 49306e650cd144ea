"""Invariant point attention: attention between residues in 3D.

Jumper et al. (2021) Suppl. Alg. 22, in the form of seed document 003. Mirrors
alphafold `model/folding.py` `InvariantPointAttention` @ c77e5d2 in structure.

Shapes: n_res residues; n_head heads; c_s single and c_z pair channels; n_qk
and n_v scalar channels and p_qk and p_v points per head.
Units: translations in angstrom (no position scale); frames map local to global
coordinates, x_global = R x_local + t.

Differs from released AF2 as the seed does: no biases; separate scalar key and
value projections; points stored point-major (x, y, z of a point together);
head weights 1 unless learned. Differs from the seed: weights are parameters;
rows of masked residues are zero (the seed lets them attend to everything).

Numerics. The point term is computed in the split-frame form
  -w/2 sum_p |t_i + q'_p - t_j - k'_p|^2,   q' = R_i q_local, k' = R_j k_local
  = row constant + w [q'.k' + Q'.t_j + t_i.K' - t_j.K' - sum_p |k'_p|^2 / 2]
    - w P/2 |t_i - t_j|^2,                  Q' = sum_p q'_p, K' = sum_p k'_p
with frames centred first: one matmul for all logits, no [.., P] distances, and
an accuracy that does not depend on the distance from the origin.
"""

import dataclasses
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm

# softplus of this is 1: learned head weights start like the seed's.
_UNIT_POINT_WEIGHT = float(np.log(np.e - 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantPointAttentionConfig(base_config.BaseConfig):
  """Sizes and choices of IPA.

  Attributes:
    num_head: number of heads.
    num_scalar_qk: scalar query and key channels per head.
    num_scalar_v: scalar value channels per head.
    num_point_qk: query and key points per head.
    num_point_v: value points per head.
    head_weights: factor of the point term in each head: 'unit' is the seed's
      constant 1; 'learned' is AF2's softplus of `trainable_point_weights`.
  """

  num_head: int = 12
  num_scalar_qk: int = 16
  num_scalar_v: int = 16
  num_point_qk: int = 4
  num_point_v: int = 8
  head_weights: Literal['unit', 'learned'] = 'unit'

  def __post_init__(self) -> None:
    super().__post_init__()
    for field in ('num_head', 'num_scalar_qk', 'num_point_qk', 'num_point_v'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'{type(self).__name__}.{field}: expected at least 1, got '
          f'{getattr(self, field)}'
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InvariantPointAttentionOutput:
  """Result with intermediates, returned for `return_attention=True`.

  Attributes:
    single: [n_res, c_s] update of the single representation.
    attention: [n_head, n_res, n_res] float32 weights, query then key.
  """

  single: jax.Array
  attention: jax.Array


class InvariantPointAttention(hk.Module):
  """Invariant point attention, Alg. 22.

    l_hij = sqrt(1/(3 n_qk)) q_ih . k_jh
          - w_h/2 sum_p |R_i q_ihp + t_i - R_j k_jhp - t_j|^2
          + sqrt(1/3) (z_ij W_b)_h,       w_h = sqrt(2/(27 p_qk)) head weight
    a     = softmax over real j of l
    out_i = concat(sum_j a v_jh, o_ihp, |o_ihp|, sum_j a z_ij) W_out
    o_ihp = R_i^T (sum_j a (R_j v_jhp + t_j) - t_i)

  The output is invariant to one rotation and translation of all frames.

  Parameters: `weights` of `q_scalar`, `k_scalar`, `v_scalar` [c_s, n_head *
  channels], `q_point_local` [c_s, n_head * p_qk * 3], `kv_point_local` [c_s,
  n_head * (p_qk + p_v) * 3] (key points first), `attention_2d` [c_z, n_head],
  `output_projection` [n_head * (n_v + 4 p_v + c_z), c_s]; and
  `trainable_point_weights` [n_head] if the head weights are learned.
  """

  def __init__(
    self,
    config: InvariantPointAttentionConfig,
    *,
    name: str = 'invariant_point_attention',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    single: jax.Array,
    pair: jax.Array | None,
    rotation: jax.Array,
    translation: jax.Array,
    mask: jax.Array | None = None,
    *,
    return_attention: bool = False,
  ) -> jax.Array | InvariantPointAttentionOutput:
    """Returns the update of the single representation.

    Args:
      single: [n_res, c_s] float.
      pair: [n_res, n_res, c_z] float, query residue first; None leaves out the
        pair bias and the pair values.
      rotation: [n_res, 3, 3] float, orthonormal, acting on column vectors.
      translation: [n_res, 3] float, angstrom.
      mask: [n_res] bool, True = real residue; None means all real.
      return_attention: whether to return the attention weights too.

    Returns:
      [n_res, c_s] in the dtype of `single`, zero for masked residues; or an
      `InvariantPointAttentionOutput`.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    dims = checks.check_shapes(
      single=(single, 'n_res c_s'),
      pair=(pair, 'n_res n_res c_z'),
      rotation=(rotation, 'n_res 3 3'),
      translation=(translation, 'n_res 3'),
      mask=(mask, 'n_res'),
    )
    checks.check_dtypes(
      'floating',
      single=single,
      pair=pair,
      rotation=rotation,
      translation=translation,
    )
    checks.check_dtypes('bool', mask=mask)
    config, n_res = self.config, dims['n_res']
    n_head, p_qk = config.num_head, config.num_point_qk
    if mask is None:
      mask = jnp.ones(n_res, bool)
    rotation = numerics.at_least_float32(rotation)
    translation = _centre(numerics.at_least_float32(translation), mask)

    # Lines 1-3: scalar and point queries, keys and values.
    def project(name: str, *shape: int, **options) -> jax.Array:
      linear = hm.Linear(
        n_head * int(np.prod(shape)), use_bias=False, name=name, **options
      )
      y = linear(single).reshape(n_res, n_head, *shape)
      return numerics.at_least_float32(y)

    q = project('q_scalar', config.num_scalar_qk)
    k = project('k_scalar', config.num_scalar_qk)
    v = project('v_scalar', config.num_scalar_v)
    # Coordinates must not pass through TF32 or bfloat16 matrix units.
    q_point = project('q_point_local', p_qk, 3, precision='highest')
    kv_point = project(
      'kv_point_local', p_qk + config.num_point_v, 3, precision='highest'
    )
    q_point = _rotate(rotation, q_point)
    kv_point = _rotate(rotation, kv_point)
    k_point, v_point = kv_point[:, :, :p_qk], kv_point[:, :, p_qk:]
    v_point = v_point + translation[:, None, None]

    # Lines 7-8: logits and attention weights.
    logits = self._logits(q, k, q_point, k_point, translation)
    if pair is not None:
      bias = hm.Linear(n_head, use_bias=False, name='attention_2d')(pair)
      bias = numerics.at_least_float32(jnp.moveaxis(bias, -1, 0))
      logits += np.sqrt(1 / 3) * bias
    attention = numerics.masked_softmax(logits, mask[:, None] & mask)

    # Lines 9-10: scalars and points in one product.
    values = jnp.concatenate([v, v_point.reshape(n_res, n_head, -1)], -1)
    result = jnp.einsum('hqk,khc->qhc', attention, values, precision='highest')
    result_scalar = result[..., : config.num_scalar_v]
    result_point = result[..., config.num_scalar_v :]
    result_point = result_point.reshape(n_res, n_head, -1, 3)
    result_point = _rotate(
      jnp.swapaxes(rotation, -1, -2),
      result_point - translation[:, None, None],
    )
    features = [
      result_scalar,
      result_point,
      numerics.safe_norm(result_point),  # Line 11.
    ]
    if pair is not None:
      features.append(
        jnp.einsum('hqk,qkc->qhc', attention.astype(pair.dtype), pair)
      )
    features = jnp.concatenate(
      [x.reshape(n_res, -1).astype(single.dtype) for x in features], -1
    )
    output = hm.Linear(dims['c_s'], use_bias=False, name='output_projection')(
      features
    )
    output = jnp.where(mask[:, None], output, 0)
    if return_attention:
      return InvariantPointAttentionOutput(output, attention)
    return output

  def _logits(
    self,
    q: jax.Array,
    k: jax.Array,
    q_point: jax.Array,
    k_point: jax.Array,
    translation: jax.Array,
  ) -> jax.Array:
    """Scalar and point logits [n_head, n_res, n_res], up to row constants."""
    config = self.config
    n_res, n_head, p_qk, _ = q_point.shape
    # Each scalar product of unit normals has variance n_qk, each squared
    # distance of unit-normal points 9/2 per point: both become 1/3.
    scalar_weight = np.sqrt(1 / (3 * config.num_scalar_qk))
    point_weight = np.sqrt(1 / (3 * p_qk * 9 / 2)) * self._head_weights(q)

    def per_head(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x[:, None], (n_res, n_head, x.shape[-1]))

    weight = point_weight[:, None]
    k_sum = jnp.sum(k_point, 2)
    k_constant = -0.5 * jnp.sum(jnp.square(k_point), (-1, -2), keepdims=True)
    k_constant = k_constant[..., 0] - jnp.sum(
      translation[:, None] * k_sum, -1, keepdims=True
    )
    queries = jnp.concatenate(
      [
        scalar_weight * q,
        weight * q_point.reshape(n_res, n_head, -1),
        weight * jnp.sum(q_point, 2),
        weight * per_head(translation),
        weight * jnp.ones((n_res, n_head, 1), q.dtype),
      ],
      -1,
    )
    keys = jnp.concatenate(
      [
        k,
        k_point.reshape(n_res, n_head, -1),
        per_head(translation),
        k_sum,
        k_constant,
      ],
      -1,
    )
    difference = translation[:, None] - translation
    squared = jnp.sum(jnp.square(difference), -1)
    logits = jnp.einsum('qhc,khc->hqk', queries, keys, precision='highest')
    return logits - 0.5 * p_qk * point_weight[:, None, None] * squared

  def _head_weights(self, q: jax.Array) -> jax.Array:
    n_head = self.config.num_head
    if self.config.head_weights == 'unit':
      return jnp.ones(n_head, q.dtype)
    return jax.nn.softplus(
      hk.get_parameter(
        'trainable_point_weights',
        (n_head,),
        q.dtype,
        hk.initializers.Constant(_UNIT_POINT_WEIGHT),
      )
    )


def transform_ipa(
  config: InvariantPointAttentionConfig | None = None,
) -> hk.Transformed:
  """Pure functions of invariant point attention.

    >>> init, apply = transform_ipa()
    >>> single, pair = jnp.ones((4, 16)), jnp.ones((4, 4, 8))
    >>> rotation = jnp.broadcast_to(jnp.eye(3), (4, 3, 3))
    >>> translation = jnp.zeros((4, 3))
    >>> params = init(jax.random.key(0), single, pair, rotation, translation)
    >>> jax.jit(apply)(params, single, pair, rotation, translation).shape
    (4, 16)

  Many poses of one sequence share everything that does not depend on frames:

    >>> poses = jax.vmap(apply, in_axes=(None, None, None, 0, 0))

  Args:
    config: sizes; None takes AF2's with the seed's unit head weights.

  Returns:
    `init(key, single, pair, rotation, translation, mask=None)` and
    `apply(params, ...)` with the same arguments and `return_attention=False`;
    shapes as in `InvariantPointAttention`.
  """
  config = config or InvariantPointAttentionConfig()

  def forward(
    single, pair, rotation, translation, mask=None, return_attention=False
  ):
    return InvariantPointAttention(config)(
      single,
      pair,
      rotation,
      translation,
      mask,
      return_attention=return_attention,
    )

  return hk.without_apply_rng(hk.transform(forward))


def _centre(translation: jax.Array, mask: jax.Array) -> jax.Array:
  """Moves the real residues' centroid near the origin; zero where masked.

  The centroid is rounded to 12 bits. IPA does not care which point is
  subtracted, but it must be the same number everywhere: XLA may contract
  `t - sum / n` into different fused multiply-adds in different fusions, and
  t_i - t_j would then be off by the float32 spacing at the offset.
  """
  kept = jnp.where(mask[:, None], translation, 0)
  centroid = jnp.sum(kept, 0) / jnp.maximum(jnp.sum(mask), 1)
  centroid = jax.lax.reduce_precision(centroid, 8, 12)
  centroid = jax.lax.stop_gradient(centroid)
  return jnp.where(mask[:, None], translation - centroid, 0)


def _rotate(rotation: jax.Array, points: jax.Array) -> jax.Array:
  """Rotates [n_res, n_head, p, 3] by [n_res, 3, 3], without matrix units."""
  return jnp.sum(rotation[:, None, None] * points[..., None, :], -1)
