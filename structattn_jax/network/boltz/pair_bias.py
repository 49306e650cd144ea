"""The atom pair of Boltz and its attention biases, window by window.

Abramson et al. (2024) Suppl. Alg. 5, the lines that make the pair, as in Boltz'
atom encoder, and what the attention (Alg. 24) of all layers makes of it:

   2-6  p_ij  = v_ij (d W_pos + w_dist / (1 + |d|^2) + w_same),
        d = position_j - position_i
    10  p_ij += LN(z[token_i, token_j]) W_z
    13  p_ij += row_i + column_j
    14  p    += MLP(p)
        bias  = LN(p) W + offset

with v_ij = 1 for atoms of the same reference conformer.

`pair_act` and `published_biases` are the definition, all windows at once.
`blocked_biases` gives the same biases and has its own backward pass: a window
at a time, channels first, so that the pair stays in cache and is never stored,
and only rows of z that some window needs are read: those of its pairs of runs,
a run being consecutive atoms of one token. Memory and time grow with atoms.

Shapes: n_atom atoms; n_window windows of n_query and n_key atoms, the keys of
`components.windows`; n_token tokens; c_pair channels; c_z channels of z.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics
from structattn_jax.components import windows

# Blocks of runs: a window of a protein has 4 to 9 runs of queries and 17 to 30
# of keys.
_QUERY_RUNS, _KEY_RUNS = 8, 32


class Weights(NamedTuple):
  """Parameters of the pair; scales of layer norms are in what follows them."""

  geometry: jax.Array  # [5, c_pair]: d, inverse distance, same conformer
  mlp: tuple[jax.Array, ...]  # three times [c_pair, c_pair]
  bias: jax.Array  # [c_pair, n_bias]
  bias_offset: jax.Array  # [n_bias]


class Atoms(NamedTuple):
  """What the pair takes from atoms."""

  row: jax.Array  # [n_atom, c_pair], added for query atoms
  column: jax.Array  # [n_atom, c_pair], added for key atoms
  position: jax.Array  # [n_atom, 3] of the reference conformer
  uid: jax.Array  # [n_atom] integer, the reference conformer
  mask: jax.Array  # [n_atom] bool


class Tokens(NamedTuple):
  """What the pair takes from pairs of tokens."""

  pair: jax.Array  # [n_token, n_token, c_z]
  weights: jax.Array  # [c_z, c_pair]
  offset: jax.Array  # [c_pair]
  index: jax.Array  # [n_atom] integer, token of each atom; negative: none


class Sizes(NamedTuple):
  """Static sizes."""

  n_query: int
  n_key: int
  heads: tuple[int, ...]  # of each layer
  masked: float  # the bias of masked keys


# All windows at once.


def pair_act(
  sizes: Sizes, weights: Weights, atoms: Atoms, tokens: Tokens | None
) -> jax.Array:
  """The pair, [n_window, n_query, n_key, c_pair]."""

  def queries(x: jax.Array) -> jax.Array:
    x = x.reshape(-1, sizes.n_query, *x.shape[1:])
    return jnp.expand_dims(x, 2)

  def keys(x: jax.Array) -> jax.Array:
    return windows.key_windows(x, sizes.n_query, sizes.n_key)[:, None]

  difference = keys(atoms.position) - queries(atoms.position)
  squared = jnp.sum(jnp.square(difference), -1, keepdims=True)
  same = queries(atoms.uid) == keys(atoms.uid)
  same &= queries(atoms.mask) & keys(atoms.mask)
  features = jnp.concatenate(
    [difference, 1 / (1 + squared), jnp.ones_like(squared)], -1
  )
  # Coordinates must not pass through TF32 or bfloat16 matrix units.
  geometry = jnp.matmul(features, weights.geometry, precision='highest')
  pair = jnp.where(same[..., None], geometry, 0)
  if tokens is not None:
    projected = (
      numerics.layer_norm(tokens.pair) @ tokens.weights + tokens.offset
    )
    n_token = projected.shape[0]
    rows, columns = queries(tokens.index), keys(tokens.index + 1) - 1
    kept = (rows >= 0) & (columns >= 0)
    at = jnp.where(kept, n_token * rows + columns, 0)
    projected = projected.reshape(n_token**2, -1)[at]
    pair += jnp.where(kept[..., None], projected, 0)
  pair += queries(atoms.row) + keys(atoms.column)
  hidden = pair
  for matrix in weights.mlp:
    hidden = jax.nn.relu(hidden) @ matrix
  return pair + hidden


def published_biases(
  sizes: Sizes, weights: Weights, atoms: Atoms, tokens: Tokens | None
) -> tuple[jax.Array, ...]:
  """Of each layer, [n_window, n_head, n_query, n_key]; masked keys too."""
  pair = numerics.layer_norm(pair_act(sizes, weights, atoms, tokens))
  biases = jnp.moveaxis(pair @ weights.bias + weights.bias_offset, -1, 1)
  is_key = windows.key_windows(atoms.mask, sizes.n_query, sizes.n_key)
  biases = jnp.where(is_key[:, None, None], biases, sizes.masked)
  return tuple(_split(biases, sizes.heads, 1))


def _split(
  x: jax.Array, heads: Sequence[int], axis: int = 0
) -> list[jax.Array]:
  return jnp.split(x, np.cumsum(heads)[:-1].tolist(), axis)


# A window at a time, channels first.


class _Window(NamedTuple):
  """What one window takes from atoms; channels first."""

  row: jax.Array  # [c_pair, n_query]
  column: jax.Array  # [c_pair, n_key]
  query_position: jax.Array  # [3, n_query]
  key_position: jax.Array  # [3, n_key]


class _Match(NamedTuple):
  """Which pairs share a conformer (1 or 0), and which keys are atoms."""

  same: jax.Array  # [n_query, n_key] float
  is_key: jax.Array  # [n_key] bool


class _Padded(NamedTuple):
  """Arrays over atoms of which windows are slices, the last axis."""

  row: jax.Array  # [c_pair, n_atom]
  column: jax.Array  # [c_pair, n_padded]
  position: jax.Array  # [3, n_atom]
  key_position: jax.Array  # [3, n_padded]
  query_uid: jax.Array  # [n_atom]
  key_uid: jax.Array  # [n_padded], another number than any query for padding
  is_key: jax.Array  # [n_padded] bool


def blocked_biases(
  sizes: Sizes, weights: Weights, atoms: Atoms, tokens: Tokens | None
) -> tuple[jax.Array, ...]:
  """`published_biases` in memory that grows with atoms times layers."""
  # Weights, which are small, have the dtype that the computation has.
  of_pair = () if tokens is None else (tokens.pair, tokens.weights)
  floats = (weights, atoms.row, atoms.column, atoms.position, of_pair)
  dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(floats))
  weights = jax.tree.map(lambda x: x.astype(dtype), weights)
  if tokens is not None:
    tokens = tokens._replace(
      weights=tokens.weights.astype(dtype), offset=tokens.offset.astype(dtype)
    )
  return _blocked_biases(sizes, weights, atoms, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked_biases(
  sizes: Sizes, weights: Weights, atoms: Atoms, tokens: Tokens | None
) -> tuple[jax.Array, ...]:
  return _forward(sizes, weights, atoms, tokens)[0]


def _forward(sizes, weights, atoms, tokens) -> tuple[Any, Any]:
  padded = _pad(sizes, atoms)
  runs = None if tokens is None else _token_runs(sizes, tokens.index)

  def step(window: jax.Array) -> tuple[jax.Array, ...]:
    own, match = _take(sizes, padded, window)
    added = None
    if tokens is not None and runs is not None:
      added = _token_pair(sizes, tokens, runs, window)
    return _window_biases(sizes, weights, own, match, added)

  n_window = atoms.row.shape[0] // sizes.n_query
  biases = jax.lax.map(step, jnp.arange(n_window))
  return biases, (weights, atoms, tokens)


@numerics.standard_promotion()
def _backward(sizes, residuals, gradient) -> tuple[Any, Any, Any]:
  weights, atoms, tokens = residuals
  padded = _pad(sizes, atoms)
  runs = None if tokens is None else _token_runs(sizes, tokens.index)

  def step(carry: Any, scheduled: Any) -> tuple[Any, _Window]:
    window, own_gradient = scheduled
    own, match = _take(sizes, padded, window)
    added = None
    if tokens is not None and runs is not None:
      added = _token_pair(sizes, tokens, runs, window)
    d_weights, d_own, d_pair = _window_backward(
      weights, own, match, added, jnp.concatenate(own_gradient)
    )
    total, d_tokens = carry
    total = jax.tree.map(jnp.add, total, numerics.cast_like(d_weights, total))
    if tokens is not None and runs is not None:
      d_tokens = _token_pair_backward(
        sizes, tokens, runs, window, d_pair, d_tokens
      )
    return (total, d_tokens), d_own

  zeros = jax.tree.map(jnp.zeros_like, weights)
  d_tokens = None
  if tokens is not None:
    d_tokens = [jnp.zeros_like(x) for x in tokens[:3]]
  n_window = atoms.row.shape[0] // sizes.n_query
  (d_weights, d_tokens), by_window = jax.lax.scan(
    step, (zeros, d_tokens), (jnp.arange(n_window), gradient)
  )
  # Of the weights without their mean over channels.
  d_bias = d_weights.bias - jnp.mean(d_weights.bias, 0)
  d_weights = d_weights._replace(bias=d_bias)
  d_atoms = Atoms(
    _from_queries(by_window.row),
    _from_keys(sizes, by_window.column),
    _from_queries(by_window.query_position)
    + _from_keys(sizes, by_window.key_position),
    _none(atoms.uid),
    _none(atoms.mask),
  )
  d_atoms = numerics.cast_like(d_atoms, atoms)
  if tokens is None or d_tokens is None:
    return d_weights, d_atoms, None
  return d_weights, d_atoms, Tokens(*d_tokens, _none(tokens.index))


_blocked_biases.defvjp(_forward, _backward)


def _window_biases(
  sizes: Sizes,
  weights: Weights,
  own: _Window,
  match: _Match,
  added: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """The biases of each layer, [n_head, n_query, n_key]."""
  *_, pair = _window_pair(weights, own, match.same, added)
  _, scale = _statistics(pair)
  # LN(p) W = scale p (W without its mean over channels).
  biases = _mix(_centred(weights.bias), pair) * scale
  biases += weights.bias_offset[:, None, None]
  biases = jnp.where(match.is_key, biases, sizes.masked)
  return tuple(_split(biases, sizes.heads))


def _window_pair(
  weights: Weights, own: _Window, same: jax.Array, added: jax.Array | None
) -> list[jax.Array]:
  """The pair before its MLP, what its three layers give, and the pair."""
  pair = _mix(weights.geometry, _features(own, same))
  pair += own.row[:, :, None] + own.column[:, None]
  if added is not None:
    pair += added
  steps = [pair]
  for matrix in weights.mlp:
    steps.append(_mix(matrix, jax.nn.relu(steps[-1])))
  return [*steps, pair + steps[-1]]


def _features(own: _Window, same: jax.Array) -> jax.Array:
  """Geometry of pairs of one conformer, [5, n_query, n_key]."""
  # Three axes throughout: flattening them would cost a division per entry.
  difference = own.key_position[:, None] - own.query_position[:, :, None]
  x, y, z = difference
  closeness = 1 / (1 + (x * x + y * y + z * z))
  return jnp.stack([x * same, y * same, z * same, closeness * same, same])


def _statistics(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean over channels and 1 / sqrt(variance + epsilon)."""
  mean = _sum(pair) / len(pair)
  variance = _sum(jnp.square(pair - mean)) / len(pair)
  return mean, jax.lax.rsqrt(variance + numerics.LAYER_NORM_EPSILON)


def _sum(x: jax.Array) -> jax.Array:
  """Sum over the first axis, as a product with ones.

  A reduction over the first axis does not vectorise on CPU; a chain of
  additions is computed again for every channel it is combined with.
  """
  return _mix(jnp.ones((len(x), 1), x.dtype), x)[0]


def _centred(weights: jax.Array) -> jax.Array:
  return weights - jnp.mean(weights, 0)


def _window_backward(
  weights: Weights,
  own: _Window,
  match: _Match,
  added: jax.Array | None,
  gradient: jax.Array,
) -> tuple[Weights, _Window, jax.Array]:
  """Gradients of `_window_biases`; that of the weights before centring.

  Args:
    weights: as there.
    own: as there.
    match: as there.
    added: as there.
    gradient: [n_bias, n_query, n_key] of all layers' biases.

  Returns:
    Those of weights, of the window, and of the pair before its MLP.
  """
  gradient = jnp.where(match.is_key, gradient, 0)
  *steps, _, pair = _window_pair(weights, own, match.same, added)
  mean, scale = _statistics(pair)
  d_bias = _outer(pair, gradient * scale)
  # Layer norm: scale (t - n mean(n t)), n the normalised pair, mean(t) = 0.
  t = _mix(_centred(weights.bias).T, gradient)
  normalised = (pair - mean) * scale
  d_pair = scale * (t - normalised * (_sum(normalised * t) / len(t)))

  d_hidden, d_mlp = d_pair, []
  for matrix, step in zip(weights.mlp[::-1], steps[::-1], strict=True):
    d_mlp.append(_outer(jax.nn.relu(step), d_hidden))
    d_hidden = jnp.where(step > 0, _mix(matrix.T, d_hidden), 0)
  d_pair += d_hidden

  features, transpose = jax.vjp(lambda own: _features(own, match.same), own)
  d_features = _mix(weights.geometry.T, d_pair).astype(features.dtype)
  (d_own,) = transpose(d_features)
  d_own = d_own._replace(row=jnp.sum(d_pair, 2), column=jnp.sum(d_pair, 1))
  d_weights = Weights(
    _outer(features, d_pair),
    tuple(d_mlp[::-1]),
    d_bias,
    jnp.sum(gradient, (1, 2)),
  )
  return d_weights, d_own, d_pair


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
  """[c, n_query, n_key], [d, n_query, n_key] -> [c, d]."""
  # Two contracted axes would not become a matrix product on CPU.
  return x.reshape(len(x), -1) @ y.reshape(len(y), -1).T


def _mix(matrix: jax.Array, x: jax.Array) -> jax.Array:
  """[c, d], [c, n_query, n_key] -> [d, n_query, n_key]."""
  return jnp.einsum('cd,cqk->dqk', matrix, x)


def _pad(sizes: Sizes, atoms: Atoms) -> _Padded:
  margin = (sizes.n_key - sizes.n_query) // 2
  columns = ((0, 0), (margin, margin))
  nobody = jnp.iinfo(atoms.uid.dtype).min
  key_uid = jnp.where(atoms.mask, atoms.uid, nobody + 1)
  return _Padded(
    atoms.row.T,
    jnp.pad(atoms.column.T, columns),
    atoms.position.T,
    jnp.pad(atoms.position.T, columns),
    jnp.where(atoms.mask, atoms.uid, nobody),
    jnp.pad(key_uid, margin, constant_values=nobody + 1),
    jnp.pad(atoms.mask, margin),
  )


def _take(
  sizes: Sizes, padded: _Padded, window: jax.Array
) -> tuple[_Window, _Match]:
  """What one window takes from all atoms."""
  start = window * sizes.n_query

  def queries(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, sizes.n_query, -1)

  def keys(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, sizes.n_key, -1)

  same = queries(padded.query_uid)[:, None] == keys(padded.key_uid)
  own = _Window(
    queries(padded.row),
    keys(padded.column),
    queries(padded.position),
    keys(padded.key_position),
  )
  return own, _Match(same.astype(padded.row.dtype), keys(padded.is_key))


def _from_queries(by_window: jax.Array) -> jax.Array:
  """[n_window, c, n_query] -> [n_atom, c]."""
  by_atom = jnp.swapaxes(by_window, 1, 2)
  return by_atom.reshape(-1, by_atom.shape[-1])


def _from_keys(sizes: Sizes, by_window: jax.Array) -> jax.Array:
  """Sum over windows: [n_window, c, n_key] -> [n_atom, c]."""
  n_window, channels, n_key = by_window.shape
  by_key = jnp.swapaxes(by_window, 1, 2)
  margin = (n_key - sizes.n_query) // 2
  n_atom = n_window * sizes.n_query
  total = jnp.zeros((n_atom + 2 * margin, channels), by_window.dtype)
  for first in range(0, n_key, sizes.n_query):
    block = by_key[:, first : first + sizes.n_query]
    length = n_window * sizes.n_query
    total = total.at[first : first + length].add(block.reshape(-1, channels))
  return total[margin : margin + n_atom]


def _none(x: jax.Array) -> Any:
  """The gradient of integers."""
  return np.zeros(x.shape, jax.dtypes.float0)


# Pairs of tokens.


class _Runs(NamedTuple):
  """Runs of consecutive atoms of one token, in the padded atoms."""

  index: jax.Array  # [n_padded], run of each atom
  token: jax.Array  # [n_padded + ...], token of each run; -1: none


def _token_runs(sizes: Sizes, token: jax.Array) -> _Runs:
  margin = (sizes.n_key - sizes.n_query) // 2
  padded = jnp.pad(jnp.maximum(token, -1), margin, constant_values=-1)
  index = jnp.cumsum(jnp.diff(padded, prepend=padded[:1]) != 0)
  index = index.astype(jnp.int32)
  # Blocks of runs may reach over the last one.
  room = _QUERY_RUNS + _KEY_RUNS + sizes.n_key
  tokens = jnp.full(padded.shape[0] + room, -1, padded.dtype)
  return _Runs(index, tokens.at[index].set(padded))


def _blocks(
  sizes: Sizes, runs: _Runs, window: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
  """Numbers of blocks of query and of key runs, and what a block has."""
  start = window * sizes.n_query
  margin = (sizes.n_key - sizes.n_query) // 2
  key_run = jax.lax.dynamic_slice_in_dim(runs.index, start, sizes.n_key)
  query_run = jax.lax.dynamic_slice_in_dim(
    runs.index, start + margin, sizes.n_query
  )

  def count(own: jax.Array, block: int) -> jax.Array:
    return (own[-1] - own[0]) // block + 1

  def take(own: jax.Array, number: jax.Array, block: int) -> Any:
    """Tokens of a block of runs, and which atoms are in which of them."""
    first = own[0] + number * block
    tokens = jax.lax.dynamic_slice_in_dim(runs.token, first, block)
    return tokens, own == first + jnp.arange(block, dtype=own.dtype)[:, None]

  return (
    count(query_run, _QUERY_RUNS),
    count(key_run, _KEY_RUNS),
    lambda i, j: (
      take(query_run, i, _QUERY_RUNS),
      take(key_run, j, _KEY_RUNS),
    ),
  )


def _rows(
  tokens: Tokens, query_token: jax.Array, key_token: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rows of z for pairs of tokens: index, whether there is one, values."""
  n_token, _, c_z = tokens.pair.shape
  kept = ((query_token >= 0)[:, None] & (key_token >= 0)).reshape(-1)
  at = (n_token * query_token[:, None] + key_token).reshape(-1)
  at = jnp.where(kept, at, 0)
  flat = tokens.pair.reshape(n_token**2, c_z)
  return at, kept[:, None], flat.at[at].get(mode='promise_in_bounds')


def _token_pair(
  sizes: Sizes, tokens: Tokens, runs: _Runs, window: jax.Array
) -> jax.Array:
  """What pairs of tokens add to a window, [c_pair, n_query, n_key]."""
  n_query_block, n_key_block, block = _blocks(sizes, runs, window)
  dtype, channels = tokens.weights.dtype, tokens.weights.shape[1]

  def by_query(i: jax.Array, total: jax.Array) -> jax.Array:
    def by_key(j: jax.Array, total: jax.Array) -> jax.Array:
      (query_token, _), (key_token, key_is) = block(i, j)
      _, kept, rows = _rows(tokens, query_token, key_token)
      values = numerics.layer_norm(rows) @ tokens.weights + tokens.offset
      values = jnp.where(kept, values, 0).T
      values = values.reshape(channels, _QUERY_RUNS, _KEY_RUNS)
      # Spread by a product with ones and zeros: exact, and no gather.
      return total + jnp.einsum('cab,bk->cak', values, key_is.astype(dtype))

    spread = jnp.zeros((channels, _QUERY_RUNS, sizes.n_key), dtype)
    spread = jax.lax.fori_loop(0, n_key_block, by_key, spread)
    (_, query_is), _ = block(i, 0)
    query_is = jnp.broadcast_to(
      query_is.astype(dtype), (channels, *query_is.shape)
    )
    return total + jnp.einsum('caq,cak->cqk', query_is, spread)

  total = jnp.zeros((channels, sizes.n_query, sizes.n_key), dtype)
  return jax.lax.fori_loop(0, n_query_block, by_query, total)


def _token_pair_backward(
  sizes: Sizes,
  tokens: Tokens,
  runs: _Runs,
  window: jax.Array,
  gradient: jax.Array,
  carry: Sequence[jax.Array],
) -> Any:
  """Adds the gradient of `_token_pair` to those of pair, weights, offset."""
  n_query_block, n_key_block, block = _blocks(sizes, runs, window)
  dtype, channels = tokens.weights.dtype, tokens.weights.shape[1]
  n_token, _, c_z = tokens.pair.shape

  def by_query(i: jax.Array, carry: Any) -> Any:
    (_, query_is), _ = block(i, 0)
    spread = jnp.einsum('aq,cqk->cak', query_is.astype(dtype), gradient)

    def by_key(j: jax.Array, carry: Any) -> Any:
      d_pair, d_weights, d_offset = carry
      (query_token, _), (key_token, key_is) = block(i, j)
      at, kept, rows = _rows(tokens, query_token, key_token)
      d_values = jnp.einsum('cak,bk->cab', spread, key_is.astype(dtype))
      d_values = jnp.where(kept, d_values.reshape(channels, -1).T, 0)

      def project(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return numerics.layer_norm(rows) @ weights

      _, transpose = jax.vjp(project, rows, tokens.weights)
      d_rows, own_weights = transpose(d_values)
      d_pair = d_pair.at[at].add(
        jnp.where(kept, d_rows, 0), mode='promise_in_bounds'
      )
      return d_pair, d_weights + own_weights, d_offset + jnp.sum(d_values, 0)

    return jax.lax.fori_loop(0, n_key_block, by_key, carry)

  d_pair, d_weights, d_offset = carry
  carry = (d_pair.reshape(n_token**2, c_z), d_weights, d_offset)
  d_pair, *rest = jax.lax.fori_loop(0, n_query_block, by_query, carry)
  return [d_pair.reshape(tokens.pair.shape), *rest]
