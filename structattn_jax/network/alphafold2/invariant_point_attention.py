"""Invariant point attention: attention between residues in 3D.

Jumper et al. (2021) Suppl. Alg. 22. Mirrors alphafold `model/folding.py` and
`model/folding_multimer.py` `InvariantPointAttention` @ c77e5d2; parameters have
upstream's names and shapes, so AF2 checkpoints load without renaming.

Shapes: n_res residues; n_head heads; c_s single and c_z pair channels; n_qk
and n_v scalar channels and p_qk and p_v points per head; rank of a low-rank
pair. Arrays over pairs are stored query, head, key: [n_res, n_head, n_res].
Units: translations in any one length unit (released AF2: units of
`position_scale`, 10 A for the monomer and 20 A for the multimer; the seed: A).
Frames map local to global coordinates, x_global = R x_local + t.

Differs from released AF2: masks are exact. AF2 adds -1e5 to the logits of
masked pairs, so masked queries attend to everything; here their rows are zero.
Rows of real residues agree. The seed's form (document 003) is a configuration.

Numerics. The point term is computed in the split-frame form
  -w/2 sum_p |t_i + q'_p - t_j - k'_p|^2,   q' = R_i q_local, k' = R_j k_local
  = row constant + w [q'.k' + Q'.t_j + t_i.K' - t_j.K' - sum_p |k'_p|^2 / 2]
    - w P/2 |t_i - t_j|^2,                  Q' = sum_p q'_p, K' = sum_p k'_p
with frames centred first: one matmul for all logits, no [.., P] distances, and
an accuracy that does not depend on the distance from the origin.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold2 import blocked_attention as kernel

Implementation = Literal['dense', 'blocked']

# softplus of this is 1, so that learned head weights start at 1.
_UNIT_POINT_WEIGHT = float(np.log(np.e - 1.0))

# Query rows per step of 'blocked'. On CPU a step should stay in cache. Forward,
# its rows of the pair are most of it: as many as have 2 MB, but 2 to 16 (with
# 2048 residues 2 rows take 0.6 times as long as 16). Backward, every step also
# updates the gradients of all keys and values: 8 rows, which measured best or
# as good from 256 to 2048 residues. Accelerators want more work per step.
_CPU_LEAST_BLOCK, _CPU_BLOCK, _CPU_BACKWARD_BLOCK = 2, 16, 8
_CPU_PAIR_ENTRIES = 2 * 2**20 // 4
_ACCELERATOR_BLOCK = 128
# Above this many residues accelerators trade speed for memory. Not measured.
_ACCELERATOR_DENSE_LIMIT = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantPointAttentionConfig(base_config.BaseConfig):
  """Sizes and choices of IPA; the defaults are AF2's monomer.

  Attributes:
    parameterisation: which parameters, biases and feature order: 'monomer' and
      'multimer' as released, 'seed' as in seed document 003.
    num_head: number of heads.
    num_scalar_qk: scalar query and key channels per head.
    num_scalar_v: scalar value channels per head.
    num_point_qk: query and key points per head.
    num_point_v: value points per head.
    num_channel: output channels; None means those of the input.
    head_weights: factor of the point term in each head: 'learned' is AF2's
      softplus of `trainable_point_weights`; 'unit' is the seed's constant 1.
    zero_init: whether a fresh module returns zeros, as AF2's does.
    implementation: 'dense' holds all logits [n_res, n_head, n_res]; 'blocked'
      holds those of `query_block` queries at a time and recomputes them in the
      backward pass (reverse mode only). None chooses: 'blocked' on CPU, where
      it is as fast at 64 residues and faster from 256 on, and for more than
      1024 residues on accelerators, else 'dense'. The choice changes rounding
      only.
    query_block: queries per step of 'blocked'; None means 128 on accelerators
      and on CPU 8 in the backward pass and, forward, as many as have 2 MB of
      the pair, 2 to 16. Need not divide the number of residues.
  """

  parameterisation: Literal['monomer', 'multimer', 'seed'] = 'monomer'
  num_head: int = 12
  num_scalar_qk: int = 16
  num_scalar_v: int = 16
  num_point_qk: int = 4
  num_point_v: int = 8
  num_channel: int | None = None
  head_weights: Literal['learned', 'unit'] = 'learned'
  zero_init: bool = True
  implementation: Implementation | None = None
  query_block: int | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    sizes = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
    self.check_at_least(1, *(x for x in sizes if type(sizes[x]) is int))

  @classmethod
  def seed(cls, **options: Any) -> Self:
    """The seed document's form: no biases, unit head weights."""
    chosen: dict[str, Any] = {
      'parameterisation': 'seed',
      'head_weights': 'unit',
      'zero_init': False,
    }
    return cls(**{**chosen, **options})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankPair:
  """A pair representation in factors: z_ijc = sum_r query_irc key_jrc.

  FlashIPA's idea: nothing of size n_res x n_res x c_z is needed.

  Attributes:
    query: [n_res, rank, c_z] float.
    key: [n_res, rank, c_z] float.
  """

  query: jax.Array
  key: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPair:
  """A pair representation prepared for several calls, from `share_pair`.

  Attributes:
    pair: [n_res, n_res, c_z] float, before the layer norm, if there is one.
    bias: [n_res, n_head, n_res] float32, its term of the logits.
    has_slots: static; whether calls leave the gradient of the pair in their
      `pair_gradient` instead of sending it to `pair`.
    inverse_deviation: [n_res, n_res] 1 / sqrt(variance + epsilon) over the
      channels of `pair`, if its layer norm is meant; None: the pair as it is.
    layer_norm: scale and offset of that layer norm, each [c_z].
  """

  pair: jax.Array
  bias: jax.Array
  has_slots: bool = dataclasses.field(metadata={'static': True})
  inverse_deviation: jax.Array | None = None
  layer_norm: tuple[jax.Array, jax.Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InvariantPointAttentionOutput:
  """Result with intermediates, returned for `return_attention=True`.

  Attributes:
    single: [n_res, num_channel] update of the single representation.
    attention: [n_head, n_res, n_res] float32 weights, query then key.
    features: [n_res, n_head * (n_v + 4 p_v + c_z)] input of the output
      projection.
  """

  single: jax.Array
  attention: jax.Array
  features: jax.Array


class InvariantPointAttention(hk.Module):
  """Invariant point attention, Alg. 22.

    l_hij = sqrt(1/(3 n_qk)) q_ih . k_jh
          - w_h/2 sum_p |R_i q_ihp + t_i - R_j k_jhp - t_j|^2
          + sqrt(1/3) (z_ij W_b)_h,       w_h = sqrt(2/(27 p_qk)) head weight
    a     = softmax over real j of l
    out_i = concat(sum_j a v_jh, o_ihp, |o_ihp|, sum_j a z_ij) W_out + b_out
    o_ihp = R_i^T (sum_j a (R_j v_jhp + t_j) - t_i)

  The output is invariant to one rotation and translation of all frames.

  Parameters (`weights` and `bias` unless noted):
    monomer: `q_scalar`, `kv_scalar` (per head keys then values),
      `q_point_local`, `kv_point_local` (all x, then y, then z).
    multimer: `q_scalar_projection`, `k_scalar_projection`,
      `v_scalar_projection` (no bias), `q_point_projection/point_projection` and
      likewise k and v (per head all x, then y, then z).
    seed: `q_scalar`, `k_scalar`, `v_scalar`, `q_point_local`, `kv_point_local`
      (per head points then x, y, z), no biases anywhere.
    all: `attention_2d` [c_z, n_head], whose bias adds the same to all keys and
      so has no effect; `output_projection`; `trainable_point_weights` [n_head]
      if the head weights are learned.
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
    pair: jax.Array | LowRankPair | SharedPair | None,
    rotation: jax.Array,
    translation: jax.Array,
    mask: jax.Array | None = None,
    *,
    pair_bias: jax.Array | None = None,
    pair_gradient: kernel.PairGradientSlots | None = None,
    return_attention: bool = False,
  ) -> jax.Array | InvariantPointAttentionOutput:
    """Returns the update of the single representation.

    Args:
      single: [n_res, c_s] float.
      pair: [n_res, n_res, c_z] float, query residue first, or `LowRankPair`, or
        `SharedPair`; None leaves out the pair bias and the pair values.
      rotation: [n_res, 3, 3] float, orthonormal, acting on column vectors.
      translation: [n_res, 3] float, any length unit.
      mask: [n_res] bool, True = real residue; None means all real. The rows of
        masked residues may hold anything in all arguments, NaN included.
      pair_bias: [n_res, n_head, n_res] from the method `pair_bias`, to be used
        instead of projecting `pair` again. A `SharedPair` has its own.
      pair_gradient: of this call, from `share_pair`, with its `SharedPair`.
      return_attention: whether to return intermediates too (dense); not with
        `pair_gradient`, which only the blocks fill.

    Returns:
      [n_res, num_channel] in the dtype of `single`, zero for masked residues;
      or an `InvariantPointAttentionOutput`.

    Raises:
      ValueError: on a wrong shape, no residues, or if only one of a
        `SharedPair` with slots and its `pair_gradient` is given: the gradient
        of the pair would be lost.
      TypeError: on a wrong dtype.
    """
    config = self.config
    _check_pair_gradient(pair, pair_gradient, return_attention)
    shared = None
    if isinstance(pair, SharedPair):
      shared, pair, pair_bias = pair, pair.pair, pair.bias
    if isinstance(pair, LowRankPair):
      full_pair, factors = None, (pair.query, pair.key)
    else:
      full_pair, factors = pair, (None, None)
    n_res = checks.check_shapes(
      {'n_head': config.num_head},
      single=(single, 'n_res c_s'),
      pair=(full_pair, 'n_res n_res c_z'),
      **{
        'pair.query': (factors[0], 'n_res rank c_z'),
        'pair.key': (factors[1], 'n_res rank c_z'),
      },
      rotation=(rotation, 'n_res 3 3'),
      translation=(translation, 'n_res 3'),
      mask=(mask, 'n_res'),
      pair_bias=(pair_bias, 'n_res n_head n_res'),
    )['n_res']
    checks.check_dtypes(
      'floating',
      single=single,
      pair=full_pair,
      **{'pair.query': factors[0], 'pair.key': factors[1]},
      rotation=rotation,
      translation=translation,
      pair_bias=pair_bias,
    )
    checks.check_dtypes('bool', mask=mask)
    if not n_res:
      raise ValueError(
        f'single: expected at least one residue, got shape {single.shape}'
      )
    mask = jnp.ones(n_res, bool) if mask is None else jnp.asarray(mask)
    # What is masked may hold anything. The kernel does the same for the pair.
    single = jnp.where(mask[:, None], single, 0)
    rotation = numerics.at_least_float32(rotation)
    rotation = jnp.where(
      mask[:, None, None], rotation, jnp.eye(3, dtype=rotation.dtype)
    )
    translation = _centre(numerics.at_least_float32(translation), mask)
    if isinstance(pair, LowRankPair):
      pair = jax.tree.map(lambda x: jnp.where(mask[:, None, None], x, 0), pair)

    # Lines 1-3: scalar and point queries, keys and values.
    scalars, points = self._project(single)
    q_point, k_point, v_point = (_rotate(rotation, p) for p in points)
    v_point = v_point + translation[:, None, None]

    # Lines 4-6: what the logits are made of.
    rows, context = self._queries_and_keys(
      scalars, (q_point, k_point, v_point), translation, mask
    )
    rows, context = self._add_pair(rows, context, pair, pair_bias)
    if shared is not None:
      rows = rows._replace(pair_inverse_deviation=shared.inverse_deviation)
    rows = rows._replace(pair_gradient=pair_gradient)
    # Lines 7-10: attention over whole rows of keys.
    if return_attention:
      result, weights = kernel.attend(rows, context)
    else:
      result, weights = _attention(config, rows)(rows, context), None
    result_point = result.values[..., config.num_scalar_v :]
    result_point = result_point.reshape(n_res, config.num_head, -1, 3)
    result_point = _rotate(
      jnp.swapaxes(rotation, -1, -2),
      result_point - translation[:, None, None],
    )

    # Line 11.
    features = self._features(
      result.values[..., : config.num_scalar_v], result_point
    )
    if isinstance(pair, LowRankPair) and result.pair is not None:
      shape = (n_res, config.num_head, *pair.query.shape[1:])
      by_rank = result.pair.reshape(shape)
      features.append(jnp.einsum('ihrc,irc->ihc', by_rank, pair.query))
    elif result.pair is not None:
      by_pair = result.pair
      if shared is not None and shared.layer_norm is not None:
        scale, offset = shared.layer_norm
        by_pair = by_pair * scale + offset  # Weights sum to one.
      features.append(by_pair)
    features = jnp.concatenate(
      [x.reshape(n_res, -1).astype(single.dtype) for x in features], -1
    )
    output = hm.Linear(
      config.num_channel or single.shape[-1],
      initializer='zeros' if config.zero_init else 'linear',
      use_bias=config.parameterisation != 'seed',
      name='output_projection',
    )(features)
    output = jnp.where(mask[:, None], output, 0)
    if weights is not None:
      features = jnp.where(mask[:, None], features, 0)
      return InvariantPointAttentionOutput(
        output, jnp.swapaxes(weights, 0, 1), features
      )
    return output

  @hk.name_like('__call__')
  def pair_bias(self, pair: jax.Array | LowRankPair) -> jax.Array:
    """Pair term of the logits, to be shared by calls with the same pair.

    Args:
      pair: [n_res, n_res, c_z] float, or `LowRankPair`.

    Returns:
      [n_res, n_head, n_res] float32: query residue, head, key residue.

    Raises:
      ValueError: on a wrong shape.
    """
    if isinstance(pair, LowRankPair):
      checks.check_shapes(
        **{
          'pair.query': (pair.query, 'n_res rank c_z'),
          'pair.key': (pair.key, 'n_res rank c_z'),
        }
      )
      queries, keys = self._low_rank_queries(pair)
      return kernel.pair_logits(queries, keys)
    checks.check_shapes(pair=(pair, 'n_res n_res c_z'))
    return kernel.pair_logits(
      self._pair_weights(pair.shape[-1], pair.dtype), pair
    )

  @hk.name_like('__call__')
  def share_pair(
    self,
    pair: jax.Array,
    num_calls: int | None,
    layer_norm: tuple[jax.Array, jax.Array] | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> tuple[SharedPair, kernel.PairGradientSlots | None]:
    """Lets several calls share the logits and the gradient of one pair.

    Args:
      pair: [n_res, n_res, c_z] float.
      num_calls: calls that will be made; None where their number is not known
        or they return their attention: only the logits are shared then.
      layer_norm: scale and offset, [c_z], of a layer norm of the pair, which
        the calls then see without it ever being stored; None: the pair itself.
      mask: [n_res] bool of the calls; None means all real.

    Returns:
      The pair for these calls, and their `pair_gradient` along a new first
      axis, None where there is none.

    Raises:
      TypeError: if `pair` is no array: a `LowRankPair` has `pair_bias` alone.
      ValueError: on a wrong shape.
    """
    if isinstance(pair, LowRankPair | SharedPair):
      raise TypeError(
        f'pair: expected an array, got {type(pair).__name__}; a LowRankPair '
        'shares its logits by pair_bias'
      )
    n_res = checks.check_shapes(
      pair=(pair, 'n_res n_res c_z'), mask=(mask, 'n_res')
    )['n_res']
    checks.check_dtypes('bool', mask=mask)
    mask = jnp.ones(n_res, bool) if mask is None else jnp.asarray(mask)
    weights = self._pair_weights(pair.shape[-1], pair.dtype)
    blocks = _blocks(self.config, n_res, pair.shape[-1])
    if blocks is None or num_calls is None:
      pair = kernel.mask_pair(pair, mask, mask)
      if layer_norm is not None:
        scale, offset = layer_norm
        pair = numerics.layer_norm(numerics.at_least_float32(pair))
        pair = pair * scale + offset
      bias = kernel.pair_logits(weights, pair)
      return SharedPair(pair, bias, has_slots=False), None
    if layer_norm is not None:
      # The offset adds the same to the logits of all keys.
      weights = weights * layer_norm[0]
    found = kernel.share_pair(
      blocks, num_calls, layer_norm is not None, pair, weights, mask
    )
    # Their gradients are the affair of the slots.
    pair, inverse_deviation = jax.lax.stop_gradient(
      (pair, found.inverse_deviation)
    )
    shared = SharedPair(pair, found.bias, True, inverse_deviation, layer_norm)
    return shared, found.slots

  @hk.transparent
  def _project(self, single: jax.Array) -> tuple[tuple, tuple]:
    """Queries, keys, values: [n_res, n_head, c] and [n_res, n_head, p, 3]."""
    config = self.config
    n_res, n_head = single.shape[0], config.num_head
    n_qk, n_v = config.num_scalar_qk, config.num_scalar_v
    p_qk, p_v = config.num_point_qk, config.num_point_v

    def linear(name: str, *shape: int, **options: Any) -> jax.Array:
      y = hm.Linear(shape, name=name, **options)(single)
      return numerics.at_least_float32(y)

    def points(name: str, *shape: int, use_bias: bool = True) -> jax.Array:
      # Coordinates must not pass through TF32 or bfloat16 matrix units.
      wide = numerics.at_least_float32(single)
      return hm.Linear(
        shape, use_bias=use_bias, precision='highest', name=name
      )(wide)

    if config.parameterisation == 'monomer':
      q = linear('q_scalar', n_head * n_qk).reshape(n_res, n_head, n_qk)
      kv = linear('kv_scalar', n_head * (n_qk + n_v))
      k, v = jnp.split(kv.reshape(n_res, n_head, -1), [n_qk], -1)

      def by_coordinate(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(n_res, 3, n_head, -1), 1, -1)

      q_point = by_coordinate(points('q_point_local', n_head * 3 * p_qk))
      kv_point = points('kv_point_local', n_head * 3 * (p_qk + p_v))
      k_point, v_point = jnp.split(by_coordinate(kv_point), [p_qk], 2)
    elif config.parameterisation == 'multimer':
      q, k, v = (
        linear(f'{x}_scalar_projection', n_head, size, use_bias=False)
        for x, size in (('q', n_qk), ('k', n_qk), ('v', n_v))
      )
      q_point, k_point, v_point = (
        _PointProjection(n_head, size, name=f'{x}_point_projection')(single)
        for x, size in (('q', p_qk), ('k', p_qk), ('v', p_v))
      )
    else:
      q, k, v = (
        linear(f'{x}_scalar', n_head * size, use_bias=False).reshape(
          n_res, n_head, size
        )
        for x, size in (('q', n_qk), ('k', n_qk), ('v', n_v))
      )
      q_point, kv_point = (
        points(name, n_head * size * 3, use_bias=False).reshape(
          n_res, n_head, size, 3
        )
        for name, size in (
          ('q_point_local', p_qk),
          ('kv_point_local', p_qk + p_v),
        )
      )
      k_point, v_point = jnp.split(kv_point, [p_qk], 2)
    return (q, k, v), (q_point, k_point, v_point)

  def _queries_and_keys(
    self, scalars: tuple, points: tuple, translation: jax.Array, mask: jax.Array
  ) -> tuple[kernel.Rows, kernel.Context]:
    """Features whose products are the logits, up to row constants."""
    q, k, v = scalars
    q_point, k_point, v_point = points
    n_res, n_head, p_qk, _ = q_point.shape
    # A scalar product of unit normals has variance n_qk, half a squared
    # distance of unit-normal points 9/2 per point: both become 1/3.
    scalar_weight = (3 * self.config.num_scalar_qk) ** -0.5
    point_weight = (3 * p_qk * 9 / 2) ** -0.5 * self._head_weights(q.dtype)

    def per_head(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x[:, None], (n_res, n_head, x.shape[-1]))

    weight = point_weight[:, None]
    k_sum = jnp.sum(k_point, 2)
    k_constant = -0.5 * jnp.sum(jnp.square(k_point), (-1, -2))
    k_constant -= jnp.sum(translation[:, None] * k_sum, -1)
    queries = [
      scalar_weight * q,
      weight * q_point.reshape(n_res, n_head, -1),
      weight * jnp.sum(q_point, 2),
      weight * per_head(translation),
      weight * jnp.ones((n_res, n_head, 1), q.dtype),
    ]
    keys = [
      k,
      k_point.reshape(n_res, n_head, -1),
      per_head(translation),
      k_sum,
      k_constant[..., None],
    ]
    values = [v, v_point.reshape(n_res, n_head, -1)]
    return (
      kernel.Rows(jnp.concatenate(queries, -1), translation, mask),
      kernel.Context(
        jnp.transpose(jnp.concatenate(keys, -1), (1, 2, 0)),
        jnp.transpose(jnp.concatenate(values, -1), (1, 0, 2)),
        translation,
        mask,
        0.5 * p_qk * point_weight,
      ),
    )

  @hk.transparent
  def _add_pair(
    self,
    rows: kernel.Rows,
    context: kernel.Context,
    pair: jax.Array | LowRankPair | None,
    pair_bias: jax.Array | None,
  ) -> tuple[kernel.Rows, kernel.Context]:
    """Adds what the pair contributes to logits and values."""
    if pair_bias is not None:
      rows = rows._replace(bias=pair_bias)
    if isinstance(pair, LowRankPair):
      queries, keys = self._low_rank_queries(pair)
      if pair_bias is None:
        rows = rows._replace(pair_queries=queries)
      return rows, context._replace(shared_pair=keys)
    if pair is not None:
      weights = self._pair_weights(pair.shape[-1], pair.dtype)
      if pair_bias is None:
        context = context._replace(shared_pair_queries=weights)
      rows = rows._replace(pair=pair)
    return rows, context

  @hk.transparent
  def _low_rank_queries(self, pair: LowRankPair) -> tuple[jax.Array, jax.Array]:
    """[n_res, n_head, rank c_z] and [n_res, rank c_z]; products are logits."""
    n_res, rank, c_z = pair.key.shape
    weights = self._pair_weights(c_z, pair.query.dtype)
    queries = jnp.einsum('irc,hc->ihrc', pair.query, weights)
    queries = queries.reshape(n_res, self.config.num_head, rank * c_z)
    return queries, pair.key.reshape(n_res, rank * c_z)

  @hk.transparent
  def _pair_weights(self, c_z: int, dtype: Any) -> jax.Array:
    """`attention_2d` with the factor of the logits: [n_head, c_z]."""
    n_head = self.config.num_head
    wide = jnp.promote_types(dtype, jnp.float32)
    module = _Parameters(
      (c_z, n_head),
      wide,
      use_bias=self.config.parameterisation != 'seed',
      name='attention_2d',
    )
    return (3**-0.5 * module().T).astype(dtype)

  def _head_weights(self, dtype: Any) -> jax.Array:
    n_head = self.config.num_head
    if self.config.head_weights == 'unit':
      return jnp.ones(n_head, dtype)
    return jax.nn.softplus(
      hk.get_parameter(
        'trainable_point_weights',
        (n_head,),
        dtype,
        hk.initializers.Constant(_UNIT_POINT_WEIGHT),
      )
    )

  def _features(self, scalar: jax.Array, point: jax.Array) -> list[jax.Array]:
    """Scalars, local points and their norms in the order of the weights."""
    if self.config.parameterisation == 'multimer':
      squared = jnp.sum(jnp.square(point), -1)
      norm = jnp.sqrt(jnp.maximum(squared, 1e-16))
    else:
      norm = numerics.safe_norm(point, epsilon=1e-8)
    if self.config.parameterisation == 'seed':
      return [scalar, point, norm]
    return [scalar, *jnp.moveaxis(point, -1, 0), norm]


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

  Each has a gradient of the pair then, added up at the end. With many poses of
  a large structure take `jax.lax.map`, or in a Haiku module of your own the
  method `share_pair`, which holds factors of it instead.

  Args:
    config: sizes; None takes AF2's monomer.

  Returns:
    `init(key, single, pair, rotation, translation, mask=None)` and
    `apply(params, ...)` with the same arguments and `pair_bias=None,
    return_attention=False`; shapes as in `InvariantPointAttention`.
  """
  config = config or InvariantPointAttentionConfig()

  def forward(
    single,
    pair,
    rotation,
    translation,
    mask=None,
    pair_bias=None,
    return_attention=False,
  ):
    return InvariantPointAttention(config)(
      single,
      pair,
      rotation,
      translation,
      mask,
      pair_bias=pair_bias,
      return_attention=return_attention,
    )

  return pm.transform(forward)


class CachedIpa(NamedTuple):
  """Functions of one config.

  Attributes:
    init: that of `transform_ipa`.
    precompute: `precompute(params, pair)` -> [n_res, n_head, n_res] float32,
      the pair's term of the logits; `pair` is [n_res, n_res, c_z] float or a
      `LowRankPair`.
    apply: that of `transform_ipa`, whose argument `pair_bias` takes it.
  """

  init: Callable[..., Any]
  precompute: Callable[..., jax.Array]
  apply: Callable[..., Any]


def cached_ipa(
  config: InvariantPointAttentionConfig | None = None,
) -> CachedIpa:
  """Pure functions of IPA that share the pair's logits over many calls.

    >>> init, precompute, apply = cached_ipa()
    >>> single, pair = jnp.ones((4, 16)), jnp.ones((4, 4, 8))
    >>> frames = jnp.broadcast_to(jnp.eye(3), (4, 3, 3)), jnp.zeros((4, 3))
    >>> params = init(jax.random.key(0), single, pair, *frames)
    >>> bias = precompute(params, pair)
    >>> apply(params, single, pair, *frames, pair_bias=bias).shape
    (4, 16)

  Args:
    config: as in `transform_ipa`.

  Returns:
    The functions.
  """
  config = config or InvariantPointAttentionConfig()

  def pair_bias(pair):
    return InvariantPointAttention(config).pair_bias(pair)

  init, apply = transform_ipa(config)
  precompute = pm.transform(pair_bias).apply
  return CachedIpa(init, precompute, apply)


class _PointProjection(hk.Module):
  """The multimer's points: [n_res, n_head, num_points, 3], per head x, y, z."""

  def __init__(self, n_head: int, num_points: int, *, name: str):
    super().__init__(name=name)
    self.shape = (n_head, 3 * num_points)

  def __call__(self, single: jax.Array) -> jax.Array:
    points = hm.Linear(
      self.shape, precision='highest', name='point_projection'
    )(numerics.at_least_float32(single))
    points = points.reshape(*points.shape[:2], 3, -1)
    return jnp.swapaxes(points, -1, -2)


class _Parameters(hk.Module):
  """The parameters of a `Linear` whose product is formed elsewhere."""

  def __init__(
    self, shape: tuple[int, int], dtype: Any, *, use_bias: bool, name: str
  ):
    super().__init__(name=name)
    self.shape, self.dtype, self.use_bias = shape, dtype, use_bias

  def __call__(self) -> jax.Array:
    if self.use_bias:  # Part of every checkpoint, though without effect.
      hk.get_parameter('bias', self.shape[1:], self.dtype, jnp.zeros)
    init = hm.initializer('linear', self.shape[0])
    return hk.get_parameter('weights', self.shape, self.dtype, init)


def _centre(translation: jax.Array, mask: jax.Array) -> jax.Array:
  """Moves the real residues' centroid near the origin; zero where masked.

  The centroid is rounded to 12 bits. IPA does not care which point is
  subtracted, but it must be the same number everywhere: XLA may contract
  `t - sum / n` into different fused multiply-adds in different fusions, and
  t_i - t_j would then be off by the float32 spacing at the offset.
  """
  kept = jnp.where(mask[:, None], translation, 0)
  count = jnp.maximum(jnp.sum(mask), 1).astype(kept.dtype)
  centroid = jnp.sum(kept, 0, keepdims=True) / count
  centroid = jax.lax.reduce_precision(centroid, 8, 12)
  centroid = jax.lax.stop_gradient(centroid)
  return jnp.where(mask[:, None], translation - centroid, 0)


def _rotate(rotation: jax.Array, points: jax.Array) -> jax.Array:
  """Rotates [n_res, n_head, p, 3] by [n_res, 3, 3], without matrix units.

  Written out: a sum over a last axis of three does not vectorise on CPU.
  """
  x, y, z = jnp.moveaxis(points, -1, 0)
  r = rotation[:, None, None]
  return jnp.stack(
    [r[..., i, 0] * x + r[..., i, 1] * y + r[..., i, 2] * z for i in range(3)],
    -1,
  )


def _check_pair_gradient(
  pair: jax.Array | LowRankPair | SharedPair | None,
  pair_gradient: kernel.PairGradientSlots | None,
  return_attention: bool,
) -> None:
  """Raises an error where the gradient of a shared pair would be lost."""
  has_slots = isinstance(pair, SharedPair) and pair.has_slots
  if has_slots and return_attention:
    raise ValueError(
      'return_attention: expected False, as pair is a SharedPair with slots; '
      'give share_pair num_calls=None'
    )
  if has_slots and pair_gradient is None:
    raise ValueError(
      'pair_gradient: expected that of this call from share_pair, as pair is a '
      'SharedPair with slots; got None'
    )
  if pair_gradient is not None and not has_slots:
    raise ValueError(
      'pair: expected the SharedPair that share_pair returned with '
      f'pair_gradient, got {type(pair).__name__}'
    )


def _attention(
  config: InvariantPointAttentionConfig, rows: kernel.Rows
) -> Callable[[kernel.Rows, kernel.Context], kernel.Result]:
  """The implementation that the config or the device asks for."""
  c_z = 0 if rows.pair is None else rows.pair.shape[-1]
  blocks = _blocks(config, rows.mask.shape[0], c_z)
  if blocks is None:
    return lambda rows, context: kernel.attend(rows, context)[0]
  return functools.partial(kernel.blocked_attend, blocks)


def _blocks(
  config: InvariantPointAttentionConfig, n_res: int, c_z: int
) -> kernel.Blocks | None:
  """Rows at a time where each has a pair [n_res, c_z]; None if dense."""
  on_cpu = jax.default_backend() == 'cpu'
  chosen = config.implementation
  if chosen is None:
    small = not on_cpu and n_res <= _ACCELERATOR_DENSE_LIMIT
    chosen = 'dense' if small else 'blocked'
  if chosen == 'dense':
    return None
  if config.query_block is not None:
    blocks = kernel.Blocks(config.query_block, config.query_block)
  elif on_cpu:
    fitting = _CPU_PAIR_ENTRIES // max(1, n_res * c_z)
    forward = max(_CPU_LEAST_BLOCK, min(_CPU_BLOCK, fitting))
    blocks = kernel.Blocks(forward, _CPU_BACKWARD_BLOCK)
  else:
    blocks = kernel.Blocks(_ACCELERATOR_BLOCK, _ACCELERATOR_BLOCK)
  return kernel.Blocks(*(min(x, n_res) for x in blocks))
