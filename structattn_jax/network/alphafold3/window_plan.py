"""Flat atoms in windows, as AlphaFold 3's atom transformers see them.

Abramson et al. (2024) Suppl. Alg. 7. The list of real atoms of one structure,
sorted by token, and the windows over it are a `WindowPlan`, built on the host
once per structure, and the conformer of its atoms is a `RefStructure`.
`atom_layout` has upstream's own layouts and gathers.

Shapes: n_token tokens, padding included; n_slot = 24 atom slots per token in
upstream's dense layout; n_atom flat atoms, padding included; n_window windows
of num_queries = 32 query and num_keys = 128 key atoms; n_pair pairs of tokens.
Units: positions in angstrom, charges in elementary charges.

Differs from the paper as the released code does: windows at the ends are
shifted inward to real atoms instead of cut off, and the `ref_space_uid` of
keys is read from the wrong layout (public issue 730; `official_key_space_uid`,
used with `uid_rule='official'`).
Differs from the released code: the flat list is padded to the atoms, not to 24
atoms per token; fewer than num_keys padded atoms are allowed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks
from structattn_jax.components import windows

# Slots per token of upstream's dense layout.
NUM_SLOTS = 24
# Atoms of a window.
NUM_QUERIES, NUM_KEYS = 32, 128
# Sizes per power of two that padded sizes are taken from.
_SIZES_PER_OCTAVE = 16
# The windows of proteins hold fewer pairs of tokens than that.
_PAIRS_PER_ATOM = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RefStructure:
  """Reference conformer of flat atoms; padded rows are zero.

  Field names and meanings are upstream's; here one row per atom of a
  `WindowPlan` instead of [n_token, 24] slots.

  Attributes:
    ref_pos: [n_atom, 3] float, angstrom.
    ref_mask: [n_atom] bool, True where the conformer has the atom.
    ref_element: [n_atom] integer, atomic number, 0 if unknown.
    ref_charge: [n_atom] float, formal charge.
    ref_atom_name_chars: [n_atom, 4] integer, ord(c) - 32, right-padded with 0.
  """

  ref_pos: jax.Array
  ref_mask: jax.Array
  ref_element: jax.Array
  ref_charge: jax.Array
  ref_atom_name_chars: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WindowPlan:
  """Flat atoms of one structure and the windows over them.

  Structures with equal static sizes (n_atom, n_token, n_pair) share one
  compilation: the number of real atoms is data.

  Attributes:
    token_index: [n_atom] int32, non-decreasing; n_token - 1 for padding.
    atom_mask: [n_atom] bool, True for the first `num_atoms` atoms.
    num_atoms: [] int32, number of real atoms.
    key_start: [n_window] int32, first key atom of each window.
    space_uid: [n_atom] int32, which atoms share a reference conformer; 0 for
      padding.
    official_key_space_uid: [n_atom] int32, the same for keys as the released
      code reads it: that of token p // 24 for the atom at position p.
    dense_index: [n_atom] int32, position in the flattened dense layout,
      token * num_slots + slot; 0 for padding.
    pair_index: [n_pair] int32, the pairs of tokens that occur in a window, s t
      as s * n_token + t; None if that is no less than all pairs, or if the plan
      was built without token pairs.
    pair_offset: [n_window] int32; the pair of tokens s, t of a window is row
      pair_offset + pair_stride s + t of the list, or of all pairs.
    pair_stride: [n_window] int32.
    num_tokens: static, n_token.
    num_queries: static, query atoms per window.
    num_keys: static, key atoms per window.
    num_slots: static, slots per token of the dense layout.
    has_pairs: static, whether trunk pair conditioning can be used.
  """

  token_index: jax.Array
  atom_mask: jax.Array
  num_atoms: jax.Array
  key_start: jax.Array
  space_uid: jax.Array
  official_key_space_uid: jax.Array
  dense_index: jax.Array
  pair_index: jax.Array | None
  pair_offset: jax.Array
  pair_stride: jax.Array
  num_tokens: int = dataclasses.field(metadata={'static': True})
  num_queries: int = dataclasses.field(metadata={'static': True})
  num_keys: int = dataclasses.field(metadata={'static': True})
  num_slots: int = dataclasses.field(metadata={'static': True})
  has_pairs: bool = dataclasses.field(metadata={'static': True})

  @property
  def n_atom(self) -> int:
    """Number of atoms, padding included."""
    return self.token_index.shape[-1]

  @property
  def n_window(self) -> int:
    """Number of windows, padding included."""
    return self.key_start.shape[-1]


def build_window_plan(
  token_index: Any,
  token_space_uid: Any,
  atom_mask: Any = None,
  *,
  dense_slot: Any = None,
  num_queries: int = NUM_QUERIES,
  num_keys: int = NUM_KEYS,
  num_slots: int = NUM_SLOTS,
  n_atom: int | None = None,
  n_pair: int | None = None,
  token_pairs: bool = True,
) -> WindowPlan:
  """Plans the windows of one structure, on the host.

    >>> plan = build_window_plan([0, 0, 0, 1, 2, 2], [0, 1, 2])
    >>> plan.n_atom, plan.n_window, int(plan.num_atoms)
    (128, 4, 6)

  Args:
    token_index: [n] integer, token of each atom, non-decreasing.
    token_space_uid: [n_token] integer, `ref_space_uid` of each token: running
      number of (chain, residue), 0 for padded tokens. Its length is the
      (padded) number of tokens.
    atom_mask: [n] bool, True for real atoms, which come first; None: all.
    dense_slot: [n] integer, slot of each atom in upstream's dense layout; None
      counts the atoms of each token.
    num_queries: query atoms per window.
    num_keys: key atoms per window.
    num_slots: slots per token of the dense layout.
    n_atom: padded number of atoms, a multiple of `num_queries` and at least
      `num_keys`; None takes the next size of `padded_size`.
    n_pair: padded length of the list of token pairs; None takes 3 `n_atom`,
      which is enough for proteins, so that they share a compilation if they
      have the same `n_atom`, or the next size of `padded_size`.
    token_pairs: whether to list token pairs, needed for trunk pair
      conditioning. The list grows with the windows (up to 4096 rows each).

  Returns:
    The plan, of NumPy arrays.

  Raises:
    ValueError: on wrong shapes or values; where a size is too small, with the
      number to give.
  """
  check_window_sizes(num_queries, num_keys)
  token_index = np.asarray(token_index)
  token_space_uid = np.asarray(token_space_uid)
  dense_slot = None if dense_slot is None else np.asarray(dense_slot)
  atom_mask = None if atom_mask is None else np.asarray(atom_mask)
  checks.check_shapes(
    token_index=(token_index, 'n'),
    token_space_uid=(token_space_uid, 'n_token'),
    atom_mask=(atom_mask, 'n'),
    dense_slot=(dense_slot, 'n'),
  )
  checks.check_dtypes(
    'integer',
    token_index=token_index,
    token_space_uid=token_space_uid,
    dense_slot=dense_slot,
  )
  num_atoms = _count_real('atom_mask', atom_mask, len(token_index))
  n_token = len(token_space_uid)
  if not n_token:
    raise ValueError('token_space_uid: expected at least one token, got none')
  token_index = token_index[:num_atoms].astype(np.int32)
  checks.validate_sorted(
    token_index, name='token_index', advice='sort the atoms by token'
  )
  checks.validate_segment_ids(
    token_index,
    n_token,
    name='token_index',
    advice=f'token_space_uid has one entry per token, {n_token}',
  )
  if dense_slot is None:
    dense_slot = np.arange(num_atoms) - np.searchsorted(
      token_index, token_index
    )
  dense_slot = np.asarray(dense_slot)[:num_atoms]
  if np.any((dense_slot < 0) | (dense_slot >= num_slots)):
    raise ValueError(
      f'dense_slot: expected slots in [0, {num_slots}), got '
      f'{dense_slot.max()}; give num_slots >= {dense_slot.max() + 1}'
    )
  dense_index = token_index * num_slots + dense_slot.astype(np.int32)
  slots, counts = np.unique(dense_index, return_counts=True)
  if np.any(counts > 1):
    token, slot = divmod(int(slots[np.argmax(counts > 1)]), num_slots)
    raise ValueError(
      f'dense_slot: expected another slot for each atom of a token, got '
      f'{counts.max()} atoms in slot {slot} of token {token}'
    )
  n_atom = padded_atoms(max(num_atoms, 1), n_atom, num_queries, num_keys)
  uid = np.repeat(token_space_uid.astype(np.int32), num_slots)
  return _plan(
    dense_index,
    uid,
    n_atom=n_atom,
    n_token=n_token,
    num_queries=num_queries,
    num_keys=num_keys,
    num_slots=num_slots,
    # Upstream's flat list is longer than n_token * num_slots - 1.
    last_query=n_token * num_slots - 1,
    n_pair=n_pair,
    token_pairs=token_pairs,
  )


class PlanOptions(TypedDict, total=False):
  """Options of `plan_from_batch`; see `build_window_plan`."""

  num_queries: int
  num_keys: int
  n_atom: int | None
  n_pair: int | None
  token_pairs: bool


def plan_from_batch(
  batch: Mapping[str, Any],
  *,
  num_queries: int = NUM_QUERIES,
  num_keys: int = NUM_KEYS,
  n_atom: int | None = None,
  n_pair: int | None = None,
  token_pairs: bool = True,
) -> WindowPlan:
  """Plans the windows of upstream's dense batch, on the host.

  Args:
    batch: at least `pred_dense_atom_mask` [n_token, n_slot] bool and
      `ref_space_uid` [n_token, n_slot] integer. If the gathers of
      `AtomCrossAtt` are there, they set the sizes of the windows.
    num_queries: query atoms per window, without gathers.
    num_keys: key atoms per window, without gathers.
    n_atom: as in `build_window_plan`.
    n_pair: as in `build_window_plan`.
    token_pairs: as in `build_window_plan`.

  Returns:
    The plan, of NumPy arrays.

  Raises:
    ValueError: as `build_window_plan`.
  """
  mask, uid = (
    np.asarray(feature(batch, name))
    for name in ('pred_dense_atom_mask', 'ref_space_uid')
  )
  checks.check_shapes(
    pred_dense_atom_mask=(mask, 'n_token n_slot'),
    ref_space_uid=(uid, 'n_token n_slot'),
  )
  checks.check_dtypes('bool', pred_dense_atom_mask=mask)
  checks.check_dtypes('integer', ref_space_uid=uid)
  check_window_sizes(num_queries, num_keys)
  if not len(mask):
    raise ValueError('pred_dense_atom_mask: expected at least one token')
  last_query = mask.size - 1
  gathers = ('tokens_to_queries:gather_idxs', 'tokens_to_keys:gather_idxs')
  if all(name in batch for name in gathers):
    num_keys = np.shape(batch['tokens_to_keys:gather_idxs'])[-1]
    shape = np.shape(batch['tokens_to_queries:gather_idxs'])
    num_queries = shape[-1]
    last_query = min(last_query, int(np.prod(shape)) - 1)
  dense_index = np.flatnonzero(mask).astype(np.int32)
  return _plan(
    dense_index,
    uid.reshape(-1).astype(np.int32),
    n_atom=padded_atoms(
      max(len(dense_index), 1), n_atom, num_queries, num_keys
    ),
    n_token=mask.shape[0],
    num_queries=num_queries,
    num_keys=num_keys,
    num_slots=mask.shape[1],
    last_query=last_query,
    n_pair=n_pair,
    token_pairs=token_pairs,
  )


def padded_size(size: int, multiple: int = 1) -> int:
  """The next of a fixed ladder of sizes, at most 1/16 larger than needed.

    >>> padded_size(1000), padded_size(1025, 32)
    (1024, 1088)

  Args:
    size: number of rows needed.
    multiple: the sizes are multiples of this.

  Returns:
    The least multiple * k * 2^i >= size with k < 2 * 16.
  """
  blocks = -(-size // multiple)
  step = 1
  while blocks > 2 * _SIZES_PER_OCTAVE * step:
    step *= 2
  return -(-blocks // step) * step * multiple


def key_starts(
  num_atoms: int, n_window: int, num_queries: int, num_keys: int
) -> np.ndarray:
  """First key atom of each window, by upstream's rule.

  A window that would start before atom 0 starts there; one that would end
  after the last real atom ends there. The first test wins. Where num_queries
  + num_keys is odd, upstream rounds the positions around atom 0 towards zero
  and lists one atom twice; here starts are rounded down. With fewer atoms
  than keys the second start is negative, which upstream reads as counted from
  the end of the padded list, so that padding comes first.

  Args:
    num_atoms: number of real atoms.
    n_window: number of windows.
    num_queries: query atoms per window.
    num_keys: key atoms per window.

  Returns:
    [n_window] int32.
  """
  offset = windows.key_offset(num_queries, num_keys)
  start = np.arange(n_window) * num_queries + offset
  shifted = np.where(start + num_keys > num_atoms, num_atoms - num_keys, start)
  return np.where(start < 0, 0, shifted).astype(np.int32)


def atom_windows(plan: WindowPlan, x: jax.Array, *, axis: int = 0) -> jax.Array:
  """Key windows of flat atoms: [..., n_window, num_keys, ...].

  Overlapping slices, with the few shifted windows at both ends put right.

  Args:
    plan: the windows.
    x: [..., n_atom, ...].
    axis: the axis of the atoms.

  Returns:
    `x` with that axis replaced by windows and keys.
  """
  axis %= x.ndim
  n_query, n_key, n_window = plan.num_queries, plan.num_keys, plan.n_window
  inner = windows.key_windows(x, n_query, n_key, axis=axis)
  offset = windows.key_offset(n_query, n_key)
  # Windows that start before the first atom.
  n_head = min(-(offset // n_query) if offset < 0 else 0, n_window)
  # Real windows that would end after the last atom, at most.
  n_tail = min(-(-(n_key + offset) // n_query), n_window)

  def repeat(start: Any, count: int) -> jax.Array:
    window = jax.lax.dynamic_slice_in_dim(x, start, n_key, axis)
    shape = [*x.shape]
    shape[axis : axis + 1] = [count, n_key]
    return jnp.broadcast_to(jnp.expand_dims(window, axis), shape)

  # The tail first: where both apply, the head wins.
  first_tail = jnp.maximum(
    (plan.num_atoms - n_key - offset) // n_query + 1, n_head
  )
  if n_tail:
    # Windows behind the tail are padding: one that is put there is harmless,
    # one that is cut off must not move the others.
    pad = [(0, 0)] * inner.ndim
    pad[axis] = (0, n_tail)
    tail = repeat(jnp.maximum(plan.num_atoms - n_key, 0), n_tail)
    inner = jax.lax.dynamic_update_slice_in_dim(
      jnp.pad(inner, pad), tail, jnp.minimum(first_tail, n_window), axis
    )
    inner = jax.lax.slice_in_dim(inner, 0, n_window, axis=axis)
  if n_head:
    inner = jax.lax.dynamic_update_slice_in_dim(
      inner, repeat(0, n_head), 0, axis
    )
  return inner


def query_blocks(plan: WindowPlan, x: jax.Array) -> jax.Array:
  """[n_atom, ...] -> [n_window, num_queries, ...]."""
  return x.reshape(plan.n_window, plan.num_queries, *x.shape[1:])


def pad_atoms(plan: WindowPlan, x: Any) -> np.ndarray:
  """Pads an array of flat atoms with zeros to the plan's size, on the host.

  Args:
    plan: the plan.
    x: [n, ...], n at most the plan's n_atom.

  Returns:
    [n_atom, ...]; rows behind the real atoms are zero.

  Raises:
    ValueError: if there are more rows than the plan has, or fewer than atoms.
  """
  x = np.asarray(x)
  num_atoms = int(plan.num_atoms)
  if not num_atoms <= len(x) <= plan.n_atom:
    raise ValueError(
      f'x: expected {num_atoms} to {plan.n_atom} rows for this plan, got '
      f'{len(x)}; build the plan with n_atom >= {len(x)}'
    )
  out = np.zeros((plan.n_atom, *x.shape[1:]), x.dtype)
  out[:num_atoms] = x[:num_atoms]
  return out


def feature(batch: Mapping[str, Any], name: str) -> Any:
  """`batch[name]`, or an error that says which feature is missing."""
  if name not in batch:
    raise ValueError(
      f'batch: expected the feature {name!r}, got {sorted(batch)[:20]}'
    )
  return batch[name]


def check_window_sizes(num_queries: int, num_keys: int) -> None:
  """Raises a ValueError for windows without atoms."""
  for name, size in (('num_queries', num_queries), ('num_keys', num_keys)):
    if size < 1:
      raise ValueError(f'{name}: expected at least 1, got {size}')


def _count_real(name: str, mask: Any, n: int) -> int:
  """Number of real rows, which must come first."""
  if mask is None:
    return n
  mask = np.asarray(mask)
  checks.check_dtypes('bool', **{name: mask})
  count = int(mask.sum())
  if not mask[:count].all():
    raise ValueError(
      f'{name}: expected all real atoms before the padding, but atom '
      f'{int(np.argmin(mask))} is padding and {count} atoms are real; remove '
      'the rows in between'
    )
  return count


def padded_atoms(
  num_atoms: int, n_atom: int | None, num_queries: int, num_keys: int
) -> int:
  """The padded number of atoms, `n_atom` if that is given and enough."""
  needed = -(-max(num_atoms, num_keys) // num_queries) * num_queries
  if n_atom is None:
    return padded_size(needed, num_queries)
  if n_atom < needed or n_atom % num_queries:
    raise ValueError(
      f'n_atom: {num_atoms} atoms with {num_queries} queries and {num_keys} '
      f'keys per window need a multiple of {num_queries} and at least '
      f'{needed}, got {n_atom}; give n_atom={needed}'
    )
  return n_atom


def _plan(
  dense_index: np.ndarray,
  dense_uid: np.ndarray,
  *,
  n_atom: int,
  n_token: int,
  num_queries: int,
  num_keys: int,
  num_slots: int,
  last_query: int,
  n_pair: int | None,
  token_pairs: bool,
) -> WindowPlan:
  num_atoms = len(dense_index)
  token_index = np.full(n_atom, n_token - 1, np.int32)
  token_index[:num_atoms] = dense_index // num_slots
  uid = np.zeros(n_atom, np.int32)
  uid[:num_atoms] = dense_uid[dense_index]
  # Upstream uses positions in the flat list as indices into the dense array,
  # clamped as every index under jit; padded keys are its last query.
  position = np.arange(n_atom)
  position[num_atoms:] = last_query
  key_uid = dense_uid[np.minimum(position, dense_uid.size - 1)]

  n_window = n_atom // num_queries
  start = np.maximum(key_starts(num_atoms, n_window, num_queries, num_keys), 0)
  # Windows of padding only: anywhere inside.
  start = np.minimum(start, n_atom - num_keys).astype(np.int32)
  pair_index, offset, stride = None, None, None
  if token_pairs:
    pair_index, offset, stride = _token_pairs(
      token_index, num_atoms, n_token, start, num_queries, num_keys
    )
    size = n_pair
    if size is None:
      size = padded_size(max(len(pair_index), _PAIRS_PER_ATOM * n_atom))
    if size < len(pair_index):
      raise ValueError(
        f'n_pair: the windows hold {len(pair_index)} pairs of tokens, got '
        f'{size}; give n_pair >= {len(pair_index)}'
      )
    if size >= n_token**2:
      pair_index = offset = stride = None
    else:
      pair_index = np.pad(pair_index, (0, size - len(pair_index)))
  if offset is None or stride is None:  # All pairs, row by row.
    offset = np.zeros(n_window, np.int32)
    stride = np.full(n_window, n_token, np.int32)
  padded_dense = np.zeros(n_atom, np.int32)
  padded_dense[:num_atoms] = dense_index
  arrays: dict[str, Any] = {
    'token_index': token_index,
    'atom_mask': np.arange(n_atom) < num_atoms,
    'num_atoms': np.asarray(num_atoms, np.int32),
    'key_start': start,
    'space_uid': uid,
    'official_key_space_uid': key_uid,
    'dense_index': padded_dense,
    'pair_index': pair_index,
    'pair_offset': offset,
    'pair_stride': stride,
  }
  return WindowPlan(
    **arrays,
    num_tokens=n_token,
    num_queries=num_queries,
    num_keys=num_keys,
    num_slots=num_slots,
    has_pairs=token_pairs,
  )


def _token_pairs(
  token_index: np.ndarray,
  num_atoms: int,
  n_token: int,
  start: np.ndarray,
  num_queries: int,
  num_keys: int,
) -> tuple[np.ndarray, ...]:
  """All pairs of a query and a key token of a window, window by window.

  Tokens of a window are a range, as atoms are sorted by token.
  """
  last = max(num_atoms - 1, 0)
  first_query = np.arange(len(start)) * num_queries

  def range_of(first: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    low = token_index[np.minimum(first, last)]
    high = token_index[np.minimum(first + count - 1, last)]
    return low, np.where(first < num_atoms, high - low + 1, 0)

  query, n_query = range_of(first_query, num_queries)
  key, n_key = range_of(start, num_keys)
  n_key = np.where(n_query > 0, n_key, 0)
  size = n_query * n_key
  first = np.cumsum(size) - size
  window = np.repeat(np.arange(len(start)), size)
  rank = np.arange(size.sum()) - first[window]
  own_keys = np.maximum(n_key, 1)
  if n_token**2 > np.iinfo(np.int32).max:
    raise ValueError(
      f'token_pairs: {n_token} tokens have too many pairs; build the plan with '
      'token_pairs=False'
    )
  pair_query = query[window] + rank // own_keys[window]
  pair_key = key[window] + rank % own_keys[window]
  offset = np.where(size > 0, first - query * n_key - key, 0)
  index = pair_query.astype(np.int64) * n_token + pair_key
  return tuple(x.astype(np.int32) for x in (index, offset, n_key))
