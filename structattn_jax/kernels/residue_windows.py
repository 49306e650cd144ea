"""All blocks of an atom transformer for one block of query atoms at a time.

The core of `network/pallatom_atom_transformers.py`. Atoms are sorted by token,
so the neighbours of a block of consecutive query atoms are one contiguous
window of key atoms: no index lists and no gathers. Keys and values do not
depend on the queries, so one loop step can build the pair tensor of its block,
derive the attention biases of all transformer blocks from it, run them, and
drop it: nothing of size n_atom x n_nbr is ever held. The backward pass
recomputes each step.

  p_lm = [m, l of one space] (u_l + w_m + inv_lm w_inv) + LN(z_{t(l), t(m)}) W_z
  p_lm = p_lm + MLP(p_lm)
  bias = LN(p_lm) A,  all blocks and heads at once

Pair tensors have their channels first, [d, n_query, n_key], for products of
small matrices with long rows; LayerNorms are folded into the matrices after
them.

Shapes: n_atom atoms, n_token tokens; n_block query blocks of n_query rows with
n_key window slots, inside n_query_token x n_key_token rectangles of the token
pair z; T transformer blocks, H heads of D channels; c atom, d pair channels.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks, numerics

_EPSILON = 1e-5  # Of all LayerNorms.
_DEAD = -1e30  # Logit of a slot that is no neighbour; its weight is exactly 0.

# Query atoms per step. On CPU the pair tensor of a block then stays in cache;
# accelerators want more work per step (not measured).
_CPU_BLOCK, _ACCELERATOR_BLOCK = 16, 64


class PlanSizes(NamedTuple):
  """The static sizes of a `NeighbourPlan`.

  Attributes:
    n_block: query blocks.
    n_query: atoms per query block.
    n_key: atoms of a window.
    n_query_token: tokens that a query block spans.
    n_key_token: tokens that a window spans.
    n_nbr: largest number of neighbours of an atom.
  """

  n_block: int
  n_query: int
  n_key: int
  n_query_token: int
  n_key_token: int
  n_nbr: int

  def union(self, *others: 'PlanSizes') -> 'PlanSizes':
    """The smallest sizes that hold all of these plans."""
    return PlanSizes(*map(max, zip(self, *others, strict=True)))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'atom_start',
    'key_start',
    'query_token_start',
    'key_token_start',
    'query_token',
    'key_token',
    'low',
    'high',
    'row',
  ],
  meta_fields=['sizes'],
)
@dataclasses.dataclass(frozen=True)
class NeighbourPlan:
  """Windows of neighbours for blocks of query atoms, from `plan_neighbours`.

  Only `sizes` is static: index vectors of the same length whose plans have the
  same sizes share one compilation.

  Attributes:
    atom_start: [n_block] int32, first atom of each block.
    key_start: [n_block] int32, first atom of its window.
    query_token_start: [n_block] int32, first token of the block.
    key_token_start: [n_block] int32, first token of the window.
    query_token: [n_block, n_query] int32, tokens of the rows, from the first.
    key_token: [n_block, n_key] int32, tokens of the slots, from the first.
    low: [n_block, n_query] int32, first slot of each row's neighbours.
    high: [n_block, n_query] int32, the slot after the last.
    row: [n_atom] int32, where each atom is among all rows.
    sizes: the static sizes.
  """

  atom_start: jax.Array
  key_start: jax.Array
  query_token_start: jax.Array
  key_token_start: jax.Array
  query_token: jax.Array
  key_token: jax.Array
  low: jax.Array
  high: jax.Array
  row: jax.Array
  sizes: PlanSizes


def plan_neighbours(
  tok_idx: Any,
  window_size: int = 32,
  *,
  query_block: int | None = None,
  sizes: PlanSizes | None = None,
) -> NeighbourPlan:
  """Plans the windows of atoms sorted by token, on the host.

  Blocks consist of whole tokens where these are small enough, so that no token
  pair is read twice.

    >>> plan = plan_neighbours(np.repeat(np.arange(40), 5), window_size=8)
    >>> plan.sizes.n_query, plan.sizes.n_key, plan.sizes.n_nbr
    (15, 45, 35)

  For several proteins with one compilation, pad `tok_idx` to one length (with
  an `atom_mask`) and give all plans the same sizes:

    >>> tokens = [np.repeat(np.arange(20), 5), np.arange(100) // 6]
    >>> first, *others = [plan_neighbours(t, 8).sizes for t in tokens]
    >>> sizes = first.union(*others)
    >>> plans = [plan_neighbours(t, 8, sizes=sizes) for t in tokens]

  Args:
    tok_idx: [n_atom] integer, concrete, never decreasing; gaps are allowed.
    window_size: span of the window in residues, as in `build_sparse_pairs`.
    query_block: atoms per block at most; None means 16 on CPU and 64 on
      accelerators.
    sizes: sizes to pad to; None takes the smallest.

  Returns:
    The plan.

  Raises:
    ValueError: if `tok_idx` is traced, not a vector, empty or not sorted, or if
      `sizes` are too small; the message says the number needed.
    TypeError: if `tok_idx` does not hold integers.
  """
  checks.check_shapes(tok_idx=(tok_idx, 'n_atom'))
  checks.check_dtypes('integer', tok_idx=tok_idx)
  if not checks.is_concrete(tok_idx):
    raise ValueError('tok_idx: plan_neighbours runs on the host, got a tracer')
  tok = np.asarray(tok_idx).astype(np.int64)
  n_atom = len(tok)
  if not n_atom:
    raise ValueError('tok_idx: expected at least one atom, got none')
  if window_size < 0:
    raise ValueError(f'window_size: expected at least 0, got {window_size}')
  checks.validate_sorted(tok, name='tok_idx')
  if query_block is None:
    on_cpu = jax.default_backend() == 'cpu'
    query_block = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
  if query_block < 1:
    raise ValueError(f'query_block: expected at least 1, got {query_block}')

  half = window_size // 2
  low = np.searchsorted(tok, tok - half, side='right')
  high = np.maximum(np.searchsorted(tok, tok + half, side='left'), low)
  starts = _block_starts(tok, query_block)
  ends = np.append(starts[1:], n_atom)
  key_starts, key_ends = low[starts], high[ends - 1]

  def span(first: np.ndarray, last: np.ndarray) -> int:
    return int((tok[last] - tok[first]).max()) + 1

  needed = PlanSizes(
    n_block=len(starts),
    n_query=int((ends - starts).max()),
    n_key=max(int((key_ends - key_starts).max()), 1),
    n_query_token=span(starts, ends - 1),
    n_key_token=span(key_starts.clip(max=n_atom - 1), (key_ends - 1).clip(0)),
    n_nbr=int((high - low).max()),
  )
  sizes = needed if sizes is None else sizes
  for name, need, given in zip(sizes._fields, needed, sizes, strict=True):
    if given < need:
      raise ValueError(
        f'sizes: {name}={given} is too small; give {name}={need} or more'
      )
  if max(sizes.n_query, sizes.n_key) > n_atom:
    raise ValueError(
      f'sizes: n_query={sizes.n_query} and n_key={sizes.n_key} must not exceed '
      f'n_atom={n_atom}; pad tok_idx'
    )

  # Padding blocks repeat the last one and own no row.
  row_block = np.repeat(np.arange(len(starts)), ends - starts)
  starts = np.pad(starts, (0, sizes.n_block - len(starts)), mode='edge')
  # Slices that would reach beyond the end start earlier.
  atom_start = np.minimum(starts, n_atom - sizes.n_query)
  key_start = np.minimum(low[starts], n_atom - sizes.n_key)
  rows = atom_start[:, None] + np.arange(sizes.n_query)
  slots = key_start[:, None] + np.arange(sizes.n_key)

  def rectangle(first: np.ndarray, atoms: np.ndarray, n_token: int) -> Any:
    start = np.minimum(tok[first], max(int(tok[-1]) + 1 - n_token, 0))
    return start, np.clip(tok[atoms] - start[:, None], 0, n_token - 1)

  query_token_start, query_token = rectangle(starts, rows, sizes.n_query_token)
  first_keys = low[starts].clip(max=n_atom - 1)
  key_token_start, key_token = rectangle(first_keys, slots, sizes.n_key_token)
  arrays = {
    'atom_start': atom_start,
    'key_start': key_start,
    'query_token_start': query_token_start,
    'key_token_start': key_token_start,
    'query_token': query_token,
    'key_token': key_token,
    'low': low[rows] - key_start[:, None],
    'high': high[rows] - key_start[:, None],
    'row': row_block * sizes.n_query + np.arange(n_atom) - atom_start[row_block],
  }
  return NeighbourPlan(
    **{name: array.astype(np.int32) for name, array in arrays.items()},
    sizes=sizes,
  )


def _block_starts(tok: np.ndarray, query_block: int) -> np.ndarray:
  """First atoms of blocks of whole tokens, or of parts of a large token."""
  n_atom = len(tok)
  token_ends = [*(np.flatnonzero(np.diff(tok)) + 1).tolist(), n_atom]
  tokens = tok.tolist()
  starts, start = [], 0
  while start < n_atom:
    starts.append(start)
    # Neither more atoms nor, where numbers are left out, a wider span.
    limit = bisect.bisect_left(tokens, tokens[start] + query_block, start)
    limit = min(limit, start + query_block)
    end = token_ends[max(bisect.bisect_right(token_ends, limit) - 1, 0)]
    start = end if start < end <= limit else limit
  return np.asarray(starts)


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


class Norm(NamedTuple):
  """Parameters of a LayerNorm, [c] each."""

  scale: jax.Array
  offset: jax.Array


class BlockWeights(NamedTuple):
  """Parameters of one transformer block, matrices [in, out]."""

  norm_q: Norm
  norm_c: Norm
  norm_pair: Norm
  norm_ff: Norm
  to_q: jax.Array
  to_k: jax.Array
  to_v: jax.Array
  to_out: jax.Array
  pair_bias: jax.Array
  ff1: jax.Array
  ff2: jax.Array


class PairWeights(NamedTuple):
  """Parameters that make the pair tensor, matrices [in, out]."""

  norm_z: Norm
  proj_z: jax.Array
  mlp: Sequence[jax.Array]


class _Stack(NamedTuple):
  """Block parameters with norms folded in, one leading axis of blocks."""

  to_q: jax.Array  # [T, c, c], with the scale of the logits
  q_bias: jax.Array  # [T, c]
  to_out: jax.Array  # [T, c, c]
  ff1: jax.Array  # [T, c, 4c]
  ff1_bias: jax.Array  # [T, 4c]
  ff2: jax.Array  # [T, 4c, c]


class _Pair(NamedTuple):
  """What makes the pair tensor of a block and its attention biases."""

  proj_z: jax.Array  # [d, c_z]
  z_bias: jax.Array  # [d]
  mlp: tuple[jax.Array, ...]  # [d, d] each, [out, in]
  bias: jax.Array  # [T H, d]
  inverse_square: jax.Array | None  # [d]


class _Atoms(NamedTuple):
  """Arrays over atoms of which a step reads a window, atoms last but for p."""

  keys: jax.Array  # [T, H, D, n_atom]
  values: jax.Array  # [T, H, n_atom, D]
  skip_key: jax.Array | None  # [d, n_atom]
  position: jax.Array | None  # [3, n_atom]
  space: jax.Array | None  # [n_atom]
  mask: jax.Array | None  # [n_atom]


def transform(
  plan: NeighbourPlan,
  blocks: Sequence[BlockWeights],
  pair: PairWeights,
  q: jax.Array,
  context: jax.Array,
  skip: PairSkip | jax.Array,
  z: jax.Array,
  *,
  num_head: int,
  context_idx: jax.Array | None = None,
  atom_mask: jax.Array | None = None,
  within_space: bool = False,
  return_pair: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Runs the pair stage and all transformer blocks of one complex.

  Args:
    plan: windows of the atoms.
    blocks: parameters of the transformer blocks.
    pair: parameters of the pair stage.
    q: [n_atom, c] float, atom queries.
    context: [n, c] float, source of keys and values: atoms, or rows that
      `context_idx` assigns to atoms.
    skip: the separable p_skip, or [n_atom, n_nbr, d] with the slots of
      `build_sparse_pairs`.
    z: [n_token, n_token, c_z] float, at least as many tokens as the plan needs.
    num_head: heads.
    context_idx: [n_atom] integer, rows of `context`; None if they are atoms.
    atom_mask: [n_atom] bool, True = a key for others; None means all.
    within_space: whether attention stays within `skip.space_uid`.
    return_pair: whether to return the pair tensor.

  Returns:
    q [n_atom, c] in its dtype, and the pair tensor [n_atom, n_nbr, d], zero on
    padding, or None.
  """
  sizes, dtype = plan.sizes, q.dtype
  q, context, z = map(numerics.at_least_float32, (q, context, z))
  stack, w_kv, b_kv = _fold(blocks, num_head)
  keys, values = _keys_values(context, w_kv, b_kv, len(blocks), num_head)
  if context_idx is not None:
    keys = jnp.take(keys, context_idx, axis=-1, mode='clip')
    values = jnp.take(values, context_idx, axis=-2, mode='clip')
  separable = isinstance(skip, PairSkip)
  scale, offset = pair.norm_z
  weights = _Pair(
    proj_z=(pair.proj_z * scale[:, None]).T,
    z_bias=offset @ pair.proj_z,
    mlp=tuple(w.T for w in pair.mlp),
    bias=jnp.concatenate(
      [(b.pair_bias * b.norm_pair.scale[:, None]).T for b in blocks]
    ),
    inverse_square=skip.inverse_square if separable else None,
  )
  n_key = sizes.n_key
  slot = jnp.arange(n_key)
  if separable:
    skip_key, position = skip.key.T, skip.position.T
    uid = skip.space_uid
  centre = jnp.eye(weights.mlp[0].shape[0], dtype=weights.mlp[0].dtype)
  if not return_pair: centre -= centre.mean(0)
  first = jnp.concatenate([centre, weights.mlp[0]])
  matrices = (first, *weights.mlp[1:3], centre @ weights.mlp[3], weights.bias)
  matrices = [jnp.broadcast_to(m, (sizes.n_query, *m.shape)) for m in matrices]

  def step(block):
    cut = lambda x, start, size, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    rows = lambda x, axis=0: cut(x, block.atom_start, sizes.n_query, axis)
    window = lambda x, axis=0: cut(x, block.key_start, n_key, axis)
    zs = jax.lax.dynamic_slice(z, (block.query_token_start, block.key_token_start, 0), (sizes.n_query_token, sizes.n_key_token, z.shape[-1]))
    zp = numerics.layer_norm(zs) @ weights.proj_z.T + weights.z_bias
    onehot = (jnp.arange(sizes.n_key_token)[:, None] == block.key_token).astype(zp.dtype)
    zp = jnp.einsum('qkd,kw->qdw', zp, onehot)
    zp = zp[block.query_token]
    live = (slot >= block.low[:, None]) & (slot < block.high[:, None])
    if separable:
      xq, xk = rows(position, 1), window(position, 1)
      dist = sum(jnp.square(xq[i][:, None] - xk[i]) for i in range(3))
      same = rows(uid)[:, None] == window(uid)
      inv = jnp.where(same, 1 / (1 + dist), 0)
      u, w = rows(skip.query), window(skip_key, 1)
      p = jnp.where(same[:, None], u[:, :, None] + w, 0) + inv[:, None] * weights.inverse_square[:, None]
      if within_space: live &= same
    else:
      n_nbr = skip.shape[1]
      slots = jnp.clip(slot - block.low[:, None], 0, n_nbr - 1)
      p = jnp.swapaxes(rows(skip), -1, -2)
      p = jnp.take_along_axis(p, slots[:, None], 2)
    p = p + zp
    d = p.shape[1]
    mm = lambda m, x: jnp.einsum('qoi,qik->qok', m, x)
    h = mm(matrices[0], p)
    residual, h = h[:, :d], h[:, d:]
    for w in matrices[1:4]:
      h = mm(w, jax.nn.relu(h))
    p = residual + h
    pc = p - p.mean(1, keepdims=True) if return_pair else p
    bias = mm(matrices[4], pc) * jax.lax.rsqrt(jnp.mean(jnp.square(pc), 1, keepdims=True) + _EPSILON)
    bias = bias.reshape(sizes.n_query, len(blocks), num_head, n_key)
    if atom_mask is not None: live &= window(atom_mask)
    bias = jnp.transpose(jnp.where(live[:, None, None], bias, _DEAD), (1, 2, 0, 3))
    k = window(keys, 1).reshape(len(blocks), num_head, -1, n_key)
    v = window(values, 2)
    x = rows(q)
    for t in range(len(blocks)):
      qh = numerics.layer_norm(x) @ stack.to_q[t] + stack.q_bias[t]
      qh = jnp.swapaxes(qh.reshape(sizes.n_query, num_head, -1), 0, 1)
      logits = jnp.einsum('hqd,hdk->hqk', qh, k[t]) + bias[t]
      top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
      w = jnp.exp(logits - top)
      o = jnp.einsum('hqk,hkd->hqd', w, v[t]) * jnp.where(top > _DEAD / 2, 1 / w.sum(-1, keepdims=True), 0)
      o = jnp.swapaxes(o, 0, 1).reshape(sizes.n_query, -1)
      x = x + o @ stack.to_out[t]
      x = x + jax.nn.relu(numerics.layer_norm(x) @ stack.ff1[t] + stack.ff1_bias[t]) @ stack.ff2[t]
    if not return_pair: return x, None
    n_nbr = sizes.n_nbr if separable else skip.shape[1]
    at = block.low[:, None] + jnp.arange(n_nbr)
    real = (jnp.arange(n_nbr) < (block.high - block.low)[:, None])
    p = jnp.take_along_axis(p, jnp.clip(at, 0, n_key - 1)[:, None], 2)
    return x, jnp.swapaxes(jnp.where(real[:, None], p, 0), -1, -2)

  per_block = dataclasses.replace(plan, row=None)
  x, p = jax.lax.map(jax.checkpoint(step), per_block)
  gather = lambda y: y.reshape(-1, *y.shape[2:])[plan.row]
  return gather(x).astype(dtype), None if p is None else gather(p)


def _fold(blocks, num_head):
  def norm_into(norm, *ws):
    w = jnp.concatenate(ws, 1) if len(ws) > 1 else ws[0]
    return w * norm.scale[:, None], norm.offset @ w
  d = (blocks[0].to_q.shape[1] // num_head) ** -0.5
  qs = [norm_into(b.norm_q, b.to_q * d) for b in blocks]
  kvs = [norm_into(b.norm_c, b.to_k) for b in blocks] + [norm_into(b.norm_c, b.to_v) for b in blocks]
  f1 = [norm_into(b.norm_ff, b.ff1) for b in blocks]
  st = tuple
  return (_Stack(st(a for a, _ in qs), st(b for _, b in qs), st(b.to_out for b in blocks), st(a for a, _ in f1), st(b for _, b in f1), st(b.ff2 for b in blocks)),
    jnp.concatenate([a for a, _ in kvs], 1), jnp.concatenate([b for _, b in kvs]))


def _keys_values(context, w, b, T, H):
  x = numerics.layer_norm(context)
  half = w.shape[1] // 2
  k = w[:, :half].T @ x.T + b[:half, None]
  v = (x @ w[:, half:] + b[half:]).reshape(len(x), T, H, -1)
  return k, jnp.transpose(v, (1, 2, 0, 3))
