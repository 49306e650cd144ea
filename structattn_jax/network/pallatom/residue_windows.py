"""All blocks of an atom transformer for one block of query atoms at a time.

The 'blocked' implementation of `atom_blocks`. Atoms are sorted by token, so the
neighbours of a block of consecutive query atoms are one contiguous
window of key atoms: no index lists and no gathers. Keys and values do not
depend on the queries, so one loop step can build the pair tensor of its block,
derive the attention biases of all transformer blocks from it, run them, and
drop it: nothing of size n_atom x n_nbr is ever held. The backward pass
recomputes each step.

  p_lm = [m, l of one space] (u_l + w_m + inv_lm w_inv) + LN(z_{t(l), t(m)}) W_z
  p_lm = p_lm + MLP(p_lm)
  bias = LN(p_lm) A,  all blocks and heads at once

Pair tensors are [n_query, d, n_key], so that small matrices multiply long rows;
LayerNorms are folded into the matrices after them. Reverse mode only, as the
products have their own backward pass.

Shapes: n_atom atoms, n_token tokens; n_block query blocks of n_query rows with
n_key window slots, inside n_query_token x n_key_token rectangles of the token
pair z; T transformer blocks, H heads of D channels; c atom, d pair channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from structattn_jax.common import numerics
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.pallatom.neighbour_plan import NeighbourPlan

# Layers of the MLP of pairs; upstream's numbers count the ReLUs between them.
MLP = ('mlp_p_0', 'mlp_p_2', 'mlp_p_4', 'mlp_p_6')
_DEAD = -1e30  # Logit of a slot that is no neighbour; its weight is exactly 0.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairSkip:
  """The encoder's p_skip in factors, without a tensor over neighbours.

    p_skip_lm = query_l + key_m + inverse_square / (1 + |x_l - x_m|^2)

  if both atoms are real and in one space, else 0. Leading batch axes are
  allowed on all but `inverse_square`.

  Attributes:
    query: [n_atom, c_pair] float.
    key: [n_atom, c_pair] float.
    position: [n_atom, 3] float, in angstrom.
    space_uid: [n_atom] integer.
    inverse_square: [c_pair] float.
    atom_mask: [n_atom] bool, or None if all atoms are real.
  """

  query: jax.Array
  key: jax.Array
  position: jax.Array
  space_uid: jax.Array
  inverse_square: jax.Array
  atom_mask: jax.Array | None = None

  def dense(self, neighbor_idx: Any, valid_mask: Any) -> jax.Array:
    """Upstream's p_skip for the neighbours of `build_sparse_pairs`.

    Args:
      neighbor_idx: [n_atom, n_nbr] integer.
      valid_mask: [n_atom, n_nbr] bool.

    Returns:
      [n_atom, n_nbr, c_pair], zero on padding and between spaces.
    """
    differences = (
      self.position[..., :, None, :] - self.position[..., neighbor_idx, :]
    )
    near = 1 / (1 + jnp.sum(jnp.square(differences), -1, keepdims=True))
    p = self.query[..., :, None, :] + self.key[..., neighbor_idx, :]
    p += near * self.inverse_square
    live = valid_mask & (
      self.space_uid[..., :, None] == self.space_uid[..., neighbor_idx]
    )
    if self.atom_mask is not None:
      live &= self.atom_mask[..., :, None] & self.atom_mask[..., neighbor_idx]
    return jnp.where(live[..., None], p, 0)


def transform(
  plan: NeighbourPlan,
  params: Params,
  names: tuple[str, str],
  q: jax.Array,
  context: jax.Array,
  skip: PairSkip | jax.Array,
  z: jax.Array,
  *,
  num_block: int,
  num_head: int,
  context_idx: Any = None,
  atom_mask: jax.Array | None = None,
  within_space: bool = False,
  return_pair: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs the pair stage and all transformer blocks of one complex.

  Computes in float32 (float64 for such inputs).

  Args:
    plan: windows of the atoms.
    params: of the encoder or the decoder.
    names: in it, of the LayerNorm of z and of its projection.
    q: [n_atom, c] float, atom queries.
    context: [n, c] float, source of keys and values: atoms, or rows that
      `context_idx` assigns to atoms.
    skip: the separable p_skip, or [n_atom, n_nbr, d] float with the slots of
      `build_sparse_pairs`.
    z: [n_token, n_token, c_z] float.
    num_block: transformer blocks.
    num_head: heads.
    context_idx: [n_atom] integer, rows of `context`; None if they are atoms.
    atom_mask: [n_atom] bool, False = no key and no pair; None means all real.
    within_space: whether attention stays within `skip.space_uid`; for a
      separable p_skip.
    return_pair: whether to return the pair tensor.

  Returns:
    [n_atom, c] in the dtype of `q`, and [n_atom, n_nbr, d], zero on padding, or
    None.

  Raises:
    ValueError: if `z` or `skip` is smaller than the plan needs.
  """
  sizes, dtype = plan.sizes, q.dtype
  blocks = [
    pm.below(params, f'transformer/blocks_{i}/') for i in range(num_block)
  ]
  n_token = max(sizes.n_query_token, sizes.n_key_token)
  if z.shape[0] < n_token:
    raise ValueError(
      f'z: the plan needs at least {n_token} tokens, got {z.shape[0]}'
    )
  n_nbr = sizes.n_nbr
  if not isinstance(skip, PairSkip):
    if skip.shape[1] < n_nbr:
      raise ValueError(
        f'p_skip: the plan needs n_nbr={n_nbr} neighbour slots or more, got '
        f'{skip.shape[1]}'
      )
    skip, n_nbr = numerics.at_least_float32(skip), skip.shape[1]
    if not n_nbr:  # Something to take from.
      skip = jnp.pad(skip, ((0, 0), (0, 1), (0, 0)))
  q, context, z = map(numerics.at_least_float32, (q, context, z))
  keys, values = _keys_and_values(blocks, context, num_head)
  if context_idx is not None:
    keys = jnp.take(keys, context_idx, axis=-1, mode='clip')
    values = jnp.take(values, context_idx, axis=-2, mode='clip')
  layers = [_layer(block, num_head) for block in blocks]
  norm, projection = params[names[0]], params[names[1]]['weights']
  mlp = [params[name]['weights'] for name in MLP]
  stage = _pair_stage(blocks, mlp, sizes.n_query, centred=not return_pair)
  # Atoms last: windows are slices of long rows.
  skip_key: Any = None
  position: Any = None
  if isinstance(skip, PairSkip):
    skip_key, position = skip.key.T, skip.position.T

  def step(block: NeighbourPlan) -> tuple[jax.Array, jax.Array | None]:
    def rows(x: jax.Array, axis: int = 0) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(
        x, block.atom_start, sizes.n_query, axis
      )

    def window(x: jax.Array, axis: int = 0) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, block.key_start, sizes.n_key, axis)

    slot = jnp.arange(sizes.n_key) - block.low[:, None]
    live = (slot >= 0) & (slot < (block.high - block.low)[:, None])
    if atom_mask is not None:
      live &= rows(atom_mask)[:, None] & window(atom_mask)

    # p_skip, [n_query, d, n_key].
    within = live
    if isinstance(skip, PairSkip):
      same = rows(skip.space_uid)[:, None] == window(skip.space_uid)
      if skip.atom_mask is not None:
        same &= rows(skip.atom_mask)[:, None] & window(skip.atom_mask)
      p = _separable_pair(
        rows(skip.query),
        window(skip_key, 1),
        rows(position, 1),
        window(position, 1),
        same,
        skip.inverse_square,
      )
      within = live & same if within_space else live
    else:
      taken = jnp.clip(slot, 0, skip.shape[1] - 1)[:, None]
      p = jnp.take_along_axis(jnp.swapaxes(rows(skip), 1, 2), taken, 2)
      p = jnp.where(live[:, None], p, 0)

    p += _token_pair(norm, projection, z, block)
    p, numerator, rstd = _biases(stage, p, centred=not return_pair)
    x = _run_layers(
      layers,
      rows(q),
      window(keys, 1).reshape(len(layers), num_head, -1, sizes.n_key),
      window(values, 2),
      numerator.reshape(sizes.n_query, len(layers), num_head, sizes.n_key),
      rstd,
      within,
    )
    if not return_pair:
      return x, None
    if not n_nbr:
      return x, jnp.zeros((sizes.n_query, 0, p.shape[1]), p.dtype)
    # From slots of the window to those of `build_sparse_pairs`.
    taken = block.low[:, None] + jnp.arange(n_nbr)
    taken = jnp.clip(taken, 0, sizes.n_key - 1)
    p = jnp.swapaxes(jnp.take_along_axis(p, taken[:, None], 2), 1, 2)
    kept = jnp.arange(n_nbr) < (block.high - block.low)[:, None]
    kept &= jnp.take_along_axis(live, taken, 1)
    return x, jnp.where(kept[..., None], p, 0)

  per_block = dataclasses.replace(plan, row=None)
  x, p = jax.lax.map(jax.checkpoint(step), per_block)

  def to_atoms(by_block: jax.Array) -> jax.Array:
    n_row = sizes.n_block * sizes.n_query
    return by_block.reshape(n_row, *by_block.shape[2:])[plan.row]

  return to_atoms(x).astype(dtype), None if p is None else to_atoms(p)


def _separable_pair(
  own: jax.Array,
  other: jax.Array,
  own_position: jax.Array,
  other_position: jax.Array,
  same: jax.Array,
  inverse_square: jax.Array,
) -> jax.Array:
  """p_skip of a block, [n_query, d, n_key].

  Args:
    own: [n_query, d] factor of the rows.
    other: [d, n_key] factor of the window.
    own_position: [3, n_query].
    other_position: [3, n_key].
    same: [n_query, n_key] bool, where it is not zero.
    inverse_square: [d].
  """
  squared = sum(
    jnp.square(own_position[x][:, None] - other_position[x]) for x in range(3)
  )
  near = jnp.where(same, 1 / (1 + squared), 0)[:, None]
  p = jnp.where(same[:, None], own[:, :, None] + other, 0)
  return p + near * inverse_square[:, None]


def _token_pair(
  norm: Mapping[str, jax.Array],
  projection: jax.Array,
  z: jax.Array,
  block: NeighbourPlan,
) -> jax.Array:
  """Projected z of a block, [n_query, d, n_key].

  Normalised and projected once per pair of tokens. A product with a one-hot
  matrix expands the keys: unlike a gather it has a fast transpose.
  """
  sizes = block.sizes
  rectangle = jax.lax.dynamic_slice(
    z,
    (block.query_token_start, block.key_token_start, jnp.int32(0)),
    (sizes.n_query_token, sizes.n_key_token, z.shape[-1]),
  )
  projected = numerics.layer_norm(rectangle) @ _scaled(norm, projection)
  projected += norm['offset'] @ projection
  tokens = jnp.arange(sizes.n_key_token)[:, None]
  one_hot = (tokens == block.key_token).astype(projected.dtype)
  return jnp.einsum('qtd,tk->qdk', projected, one_hot)[block.query_token]


def _scaled(norm: Mapping[str, jax.Array], weights: jax.Array) -> jax.Array:
  """A matrix [in, out] with the scale of the LayerNorm before it."""
  return norm['scale'][:, None] * weights


class _Matrix(NamedTuple):
  """A matrix, and its transpose for the backward pass.

  CPU products with a transposed operand transpose it first: once for all steps
  instead of in each.
  """

  value: jax.Array
  transposed: jax.Array


class _PairStage(NamedTuple):
  """Matrices of the pair stage, repeated for each row of a block."""

  first: _Matrix  # [2d, d], the residual path and layer 0
  middle: tuple[_Matrix, ...]  # [d, d]
  last: _Matrix  # [d, d]
  bias: _Matrix  # [T H, d], all biases of all blocks


def _pair_stage(
  blocks: Sequence[Params],
  mlp: Sequence[jax.Array],
  n_query: int,
  *,
  centred: bool,
) -> _PairStage:
  """Prepares the matrices.

  Only the centred p enters the LayerNorms. Unless p itself is wanted, the
  matrices on the residual path and at the end centre it, which costs nothing.
  `norm_pair.offset` adds the same to all logits of a row and is left out.
  """
  first, *middle, last = (w.T for w in mlp)
  residual = jnp.eye(len(first), dtype=first.dtype)
  if centred:
    residual -= jnp.mean(residual, 0)
    last = last - jnp.mean(last, 0)
  biases = [
    _scaled(own['norm_pair'], own['pair_bias']['weights']).T for own in blocks
  ]

  def matrix(values: jax.Array) -> _Matrix:
    repeated = jnp.broadcast_to(values, (n_query, *values.shape))
    transposed = jax.lax.stop_gradient(jnp.swapaxes(repeated, 1, 2))
    return _Matrix(repeated, transposed)

  return _PairStage(
    matrix(jnp.concatenate([residual, first])),
    tuple(map(matrix, middle)),
    matrix(last),
    matrix(jnp.concatenate(biases)),
  )


def _biases(
  stage: _PairStage, p: jax.Array, *, centred: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The pair after the MLP and the biases of all transformer blocks.

  Rows lead, so that no product needs a reshape over rows and window, and p is
  read once: by the first product, which also carries the residual path.

  Args:
    stage: prepared matrices.
    p: [n_query, d, n_key].
    centred: whether the matrices centre the result.

  Returns:
    p [n_query, d, n_key], centred if so; [n_query, T H, n_key] biases up to
    the factor [n_query, n_key].
  """
  d = p.shape[1]
  hidden = _row_product(stage.first, p)
  residual, hidden = hidden[:, :d], hidden[:, d:]
  for matrix in (*stage.middle, stage.last):
    hidden = _row_product(matrix, jax.nn.relu(hidden))
  p = residual + hidden
  deviation = p if centred else p - jnp.mean(p, 1, keepdims=True)
  variance = jnp.mean(jnp.square(deviation), 1)
  rstd = jax.lax.rsqrt(variance + numerics.LAYER_NORM_EPSILON)
  return p, _row_product(stage.bias, deviation), rstd


class _Layer(NamedTuple):
  """A transformer block with its LayerNorms folded in."""

  to_q: _Matrix  # [c, c], with the scale of the logits
  q_bias: jax.Array  # [c]
  to_out: _Matrix  # [c, c]
  ff1: _Matrix  # [c, 4c]
  ff1_bias: jax.Array  # [4c]
  ff2: _Matrix  # [4c, c]


def _layer(block: Params, num_head: int) -> _Layer:
  def matrix(values: jax.Array) -> _Matrix:
    return _Matrix(values, jax.lax.stop_gradient(values.T))

  norm_q, norm_ff = block['norm_q'], block['norm_ff']
  to_q, to_out, ff1, ff2 = (
    block[name]['weights'] for name in ('to_q', 'to_out', 'ff1', 'ff2')
  )
  to_q = to_q * (to_q.shape[1] // num_head) ** -0.5
  return _Layer(
    matrix(_scaled(norm_q, to_q)),
    norm_q['offset'] @ to_q,
    matrix(to_out),
    matrix(_scaled(norm_ff, ff1)),
    norm_ff['offset'] @ ff1,
    matrix(ff2),
  )


def _keys_and_values(
  blocks: Sequence[Params], context: jax.Array, num_head: int
) -> tuple[jax.Array, jax.Array]:
  """Keys [T H D, n] and values [T, H, n, D] of all blocks in two products."""
  context = numerics.layer_norm(context)

  def fold(name: str) -> tuple[jax.Array, jax.Array]:
    pairs = [(own['norm_c'], own[name]['weights']) for own in blocks]
    weights = [_scaled(norm, w) for norm, w in pairs]
    biases = [norm['offset'] @ w for norm, w in pairs]
    return jnp.concatenate(weights, 1), jnp.concatenate(biases)

  weights, bias = fold('to_k')
  keys = weights.T @ context.T + bias[:, None]
  weights, bias = fold('to_v')
  values = context @ weights + bias
  values = values.reshape(len(context), len(blocks), num_head, -1)
  return keys, jnp.transpose(values, (1, 2, 0, 3))


def _run_layers(
  layers: Sequence[_Layer],
  x: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  numerator: jax.Array,
  rstd: jax.Array,
  live: jax.Array,
) -> jax.Array:
  """All transformer blocks on the rows of one query block.

  Args:
    layers: T prepared blocks.
    x: [n_query, c].
    keys: [T, H, D, n_key].
    values: [T, H, n_key, D].
    numerator: [n_query, T, H, n_key], pair biases up to `rstd`.
    rstd: [n_query, n_key].
    live: [n_query, n_key] bool.

  Returns:
    [n_query, c].
  """
  n_query, c_atom = x.shape
  num_head = keys.shape[1]
  for t, layer in enumerate(layers):
    query = _product(layer.to_q, numerics.layer_norm(x)) + layer.q_bias
    query = jnp.swapaxes(query.reshape(n_query, num_head, -1), 0, 1)
    logits = jnp.einsum('hqd,hdk->hqk', query, keys[t])
    logits += jnp.swapaxes(numerator[:, t], 0, 1) * rstd
    logits = jnp.where(live, logits, _DEAD)
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    weights = jnp.exp(logits - largest)
    # Normalising the results costs less than normalising the weights. Rows
    # without any live slot get zeros.
    total = jnp.sum(weights, -1, keepdims=True)
    factor = jnp.where(largest > _DEAD, 1 / total, 0)
    attended = jnp.einsum('hqk,hkd->hqd', weights, values[t]) * factor
    attended = jnp.swapaxes(attended, 0, 1).reshape(n_query, c_atom)
    x += _product(layer.to_out, attended)
    hidden = _product(layer.ff1, numerics.layer_norm(x)) + layer.ff1_bias
    x += _product(layer.ff2, jax.nn.relu(hidden))
  return x


@jax.custom_vjp
def _product(matrix: _Matrix, x: jax.Array) -> jax.Array:
  """[n, i] times [i, o]."""
  return x @ matrix.value


def _product_forward(matrix: _Matrix, x: jax.Array) -> Any:
  return _product(matrix, x), (matrix, x)


@numerics.standard_promotion()
def _product_backward(residuals: Any, gradient: jax.Array) -> Any:
  matrix, x = residuals
  unused = jnp.zeros_like(matrix.transposed)
  return _Matrix(x.T @ gradient, unused), gradient @ matrix.transposed


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _row_product(matrix: _Matrix, x: jax.Array) -> jax.Array:
  """[n_query, o, i] times [n_query, i, n_key], row by row."""
  return jnp.einsum('qoi,qik->qok', matrix.value, x)


def _row_product_forward(matrix: _Matrix, x: jax.Array) -> Any:
  return _row_product(matrix, x), (matrix, x)


@numerics.standard_promotion()
def _row_product_backward(residuals: Any, gradient: jax.Array) -> Any:
  matrix, x = residuals
  own = jnp.einsum('qok,qik->qoi', gradient, x)
  unused = jnp.zeros_like(matrix.transposed)
  return _Matrix(own, unused), jnp.einsum(
    'qio,qok->qik', matrix.transposed, gradient
  )


_row_product.defvjp(_row_product_forward, _row_product_backward)
