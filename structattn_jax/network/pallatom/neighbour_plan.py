"""Which atoms are neighbours: upstream's lists, and windows made on the host.

Two atoms are neighbours if their residues are less than half a window apart.
`build_sparse_pairs` lists them for every atom (seed document 002).

Atoms sorted by token whose window is a range of tokens have neighbours that are
a range of atoms; so have blocks of consecutive atoms. A plan says where the
blocks and their windows start; `residue_windows` works through it.
"""

import bisect
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks

WINDOW_SIZE = 32

# Query atoms per step: two tokens, within these bounds. On CPU the pair tensor
# of a block then stays in cache; accelerators want more work per step (not
# measured).
_CPU_BLOCK, _ACCELERATOR_BLOCK = (16, 32), (64, 64)


def build_sparse_pairs(
  tok_idx: Any,
  window_size: int = WINDOW_SIZE,
  *,
  max_neighbours: int | None = None,
) -> tuple[Any, Any]:
  """Lists for every atom the atoms in its window of residues.

  m is a neighbour of l if |tok_idx[l] - tok_idx[m]| < window_size // 2. Rows
  ascend in atom index; padding slots hold n_atom - 1 and are masked. Sorting
  and two searches, O(n log n + n k), instead of upstream's n x n comparison.

    >>> neighbours, valid = build_sparse_pairs(np.array([0, 0, 5, 6]), 4)
    >>> neighbours.tolist(), valid.tolist()
    ([[0, 1], [0, 1], [2, 3], [2, 3]], [[True, True], [True, True], \
[True, True], [True, True]])

  Args:
    tok_idx: [n_atom] integer, the residue of each atom; any order, gaps and
      offsets allowed.
    window_size: static span of the window in residues; 0 and 1 give no
      neighbours at all, 2 and 3 the own residue only.
    max_neighbours: static number of slots. None takes the largest number that
      any atom has, which needs concrete `tok_idx`; under jit give
      `required_neighbours(tok_idx, window_size)` or more.

  Returns:
    neighbor_idx [n_atom, n_nbr] and valid_mask [n_atom, n_nbr] bool. Concrete
    `tok_idx`: NumPy arrays, indices int64, exactly upstream's. Traced: JAX
    arrays, indices int32.

  Raises:
    ValueError: if `tok_idx` is not a vector, if `max_neighbours` is missing
      under jit or too small (the message says the number needed), or if
      `window_size` is negative. A compiled function raises `JaxRuntimeError`
      with the same message when it meets an index that needs more.
    TypeError: if `tok_idx` does not hold integers.
  """
  checks.check_shapes(tok_idx=(tok_idx, 'n_atom'))
  checks.check_dtypes('integer', tok_idx=tok_idx)
  if window_size < 0:
    raise ValueError(f'window_size: expected at least 0, got {window_size}')
  concrete = checks.is_concrete(tok_idx)
  if max_neighbours is None and not concrete:
    raise ValueError(
      'max_neighbours: required under jit; compute it on the host with '
      'required_neighbours(tok_idx, window_size)'
    )
  # The same lines on the host and under jit.
  xp: Any = np if concrete else jnp
  tok_idx = xp.asarray(tok_idx)
  n_atom, half = tok_idx.shape[0], window_size // 2
  order = xp.argsort(tok_idx, stable=True)
  ordered = tok_idx[order]
  low = xp.searchsorted(ordered, tok_idx - half, side='right')
  high = xp.searchsorted(ordered, tok_idx + half, side='left')
  needed = xp.maximum(high - low, 0).max(initial=0)
  if concrete:
    max_neighbours = int(needed) if max_neighbours is None else max_neighbours
    _check_neighbours(needed, max_neighbours)
  else:
    jax.lax.cond(
      needed > max_neighbours,
      lambda: jax.debug.callback(_check_neighbours, needed, max_neighbours),
      lambda: None,
    )
  slots = low[:, None] + xp.arange(max_neighbours)
  valid = slots < high[:, None]

  def unsorted_rows():
    # Atoms of a window are contiguous once sorted by residue; sorting the row
    # restores ascending atom indices.
    rows = order[xp.clip(slots, 0, max(n_atom - 1, 0))]
    return xp.sort(xp.where(valid, rows, n_atom), -1).astype(slots.dtype)

  is_sorted = (ordered == tok_idx).all()
  if concrete:
    neighbours = slots if is_sorted else unsorted_rows()
  else:
    neighbours = jax.lax.cond(is_sorted, lambda: slots, unsorted_rows)
  return xp.where(valid, neighbours, n_atom - 1), valid


def _check_neighbours(needed: Any, max_neighbours: Any) -> None:
  if needed > max_neighbours:
    raise ValueError(
      f'max_neighbours: {max_neighbours} is too small, an atom has {needed} '
      f'neighbours; give max_neighbours={needed}'
    )


def required_neighbours(tok_idx: Any, window_size: int = WINDOW_SIZE) -> int:
  """Largest number of neighbours of any atom, computed on the host.

  Args:
    tok_idx: [n_atom] integer, concrete.
    window_size: span of the window in residues.

  Returns:
    The smallest number that `max_neighbours` may be.
  """
  ordered, half = np.sort(np.asarray(tok_idx)), window_size // 2
  low = np.searchsorted(ordered, ordered - half, side='right')
  high = np.searchsorted(ordered, ordered + half, side='left')
  return max(int((high - low).max(initial=0)), 0)


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
  window_size: int = WINDOW_SIZE,
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
    query_block: atoms per block at most; None means twice the largest token
      but 16 to 32 on CPU, and 64 on accelerators.
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
    least, most = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
    largest_token = int(np.unique(tok, return_counts=True)[1].max())
    query_block = min(max(2 * largest_token, least), most)
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
    'row': row_block * sizes.n_query
    + np.arange(n_atom)
    - atom_start[row_block],
  }
  narrow: dict[str, Any] = {
    name: array.astype(np.int32) for name, array in arrays.items()
  }
  return NeighbourPlan(**narrow, sizes=sizes)


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
