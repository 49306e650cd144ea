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
  ...
