"""AlphaFold 3's layouts of atoms and the gathers between them.

Abramson et al. (2024) Suppl. Algs. 5-7. Mirrors alphafold3
`model/atom_layout/atom_layout.py` (`GatherInfo`, `convert`) and
`model/features.py` (`AtomCrossAtt`) @ c0f97ed. They are there to read beside
the published code and to talk to it; `window_plan` has our own layout.

Shapes and units: see `window_plan`.

Differs from the released code: fewer than num_keys padded atoms are allowed;
arrays carry names of layouts, so that a wrong layout is an error under jit too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks
from structattn_jax.network.alphafold3 import window_plan
from structattn_jax.network.alphafold3.window_plan import (
  NUM_KEYS,
  NUM_QUERIES,
  PlanOptions,
  RefStructure,
  WindowPlan,
)

Layout = Literal['token_atoms', 'tokens', 'queries', 'keys']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GatherInfo:
  """How to get from one of upstream's layouts to another.

  Attributes:
    gather_idxs: integer, the shape of the target layout; index into the
      flattened source layout.
    gather_mask: bool, the same shape, True where there is a source.
    input_shape: static, shape of the source layout.
    source: static, name of the source layout.
    target: static, name of the target layout.
  """

  gather_idxs: jax.Array
  gather_mask: jax.Array
  input_shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  source: Layout = dataclasses.field(metadata={'static': True})
  target: Layout = dataclasses.field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Arranged:
  """An array in one of upstream's layouts.

  Attributes:
    values: [*layout, ...].
    layout: static, name of the layout.
  """

  values: jax.Array
  layout: Layout = dataclasses.field(metadata={'static': True})


def convert(gather: GatherInfo, x: Arranged) -> Arranged:
  """Rearranges an array; positions without a source are zero or False.

  Args:
    gather: from the layout of `x` to the wanted one.
    x: [*gather.input_shape, ...] values and their layout.

  Returns:
    [*gather.gather_idxs.shape, ...] in the layout `gather.target`.

  Raises:
    ValueError: if `x` has another layout or shape, also under jit.
  """
  if x.layout != gather.source:
    raise ValueError(
      f'x: expected the layout {gather.source!r} (to get {gather.target!r}), '
      f'got {x.layout!r}'
    )
  n_axis = len(gather.input_shape)
  if x.values.shape[:n_axis] != gather.input_shape:
    raise ValueError(
      f'x: expected shape {gather.input_shape} of the layout '
      f'{gather.source!r}, got {x.values.shape[:n_axis]}'
    )
  rows = x.values.reshape(-1, *x.values.shape[n_axis:])[gather.gather_idxs]
  return Arranged(_mask_rows(rows, gather.gather_mask), gather.target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomCrossAtt:
  """Upstream's five gathers, the fields of its class of this name."""

  token_atoms_to_queries: GatherInfo
  tokens_to_queries: GatherInfo
  tokens_to_keys: GatherInfo
  queries_to_keys: GatherInfo
  queries_to_token_atoms: GatherInfo

  @classmethod
  def build(
    cls,
    pred_dense_atom_mask: Any,
    *,
    num_real_tokens: int | None = None,
    padded_num_atoms: int | None = None,
    num_queries: int = NUM_QUERIES,
    num_keys: int = NUM_KEYS,
  ) -> 'AtomCrossAtt':
    """Makes the gathers as upstream's featurisation does, on the host.

    Args:
      pred_dense_atom_mask: [n_token, n_slot] bool, slots that hold an atom.
      num_real_tokens: tokens that are not padding; None takes those up to the
        last one with an atom.
      padded_num_atoms: length of the padded flat list; None takes what
        upstream does, n_token * n_slot rounded up to `num_queries`, at least
        `num_keys` (where upstream fails).
      num_queries: query atoms per window.
      num_keys: key atoms per window.

    Returns:
      The gathers, of NumPy arrays.

    Raises:
      ValueError: if `padded_num_atoms` is too small or no multiple of
        `num_queries`, or `num_real_tokens` leaves out atoms.
    """
    window_plan.check_window_sizes(num_queries, num_keys)
    mask = np.asarray(pred_dense_atom_mask)
    checks.check_shapes(pred_dense_atom_mask=(mask, 'n_token n_slot'))
    checks.check_dtypes('bool', pred_dense_atom_mask=mask)
    n_token, n_slot = mask.shape
    dense_index = np.flatnonzero(mask)
    num_atoms = len(dense_index)
    least = int(dense_index[-1]) // n_slot + 1 if num_atoms else 0
    if num_real_tokens is None:
      num_real_tokens = least
    elif not least <= num_real_tokens <= n_token:
      raise ValueError(
        f'num_real_tokens: expected {least} to {n_token}, as token {least - 1} '
        f'is the last with an atom of {n_token}, got {num_real_tokens}'
      )
    if padded_num_atoms is None:
      padded_num_atoms = -(-max(mask.size, num_keys) // num_queries)
      padded_num_atoms *= num_queries
    n_flat = window_plan.padded_atoms(
      num_atoms, padded_num_atoms, num_queries, num_keys
    )
    has_padded_tokens = num_real_tokens < n_token
    has_padded_atoms = num_atoms < n_flat

    # What padding finds: the last padded element of the source, else nothing.
    flat_from_dense = np.full(n_flat, mask.size - 1 if has_padded_tokens else 0)
    flat_from_dense[:num_atoms] = dense_index
    is_atom = np.arange(n_flat) < num_atoms
    flat_from_token = np.full(n_flat, n_token - 1 if has_padded_tokens else 0)
    flat_from_token[:num_atoms] = dense_index // n_slot
    starts = window_plan.key_starts(
      num_atoms, n_flat // num_queries, num_queries, num_keys
    )
    keys = (starts[:, None] + np.arange(num_keys)) % n_flat
    key_is_atom = is_atom[keys]
    dense_from_flat = np.zeros(mask.size, int)
    dense_from_flat[dense_index] = np.arange(num_atoms)
    dense_mask = mask.reshape(-1).copy()
    if has_padded_atoms:
      dense_from_flat[num_real_tokens * n_slot :] = n_flat - 1
      dense_mask[num_real_tokens * n_slot :] = True

    queries, dense = (n_flat // num_queries, num_queries), mask.shape

    def gather(source, target, index, mask, source_shape, shape) -> GatherInfo:
      return GatherInfo(
        index.reshape(shape).astype(np.int32),
        mask.reshape(shape),
        source_shape,
        source,
        target,
      )

    return cls(
      token_atoms_to_queries=gather(
        'token_atoms',
        'queries',
        flat_from_dense,
        is_atom | has_padded_tokens,
        dense,
        queries,
      ),
      tokens_to_queries=gather(
        'tokens', 'queries', flat_from_token, is_atom, (n_token,), queries
      ),
      tokens_to_keys=gather(
        'tokens',
        'keys',
        flat_from_token[keys],
        key_is_atom,
        (n_token,),
        keys.shape,
      ),
      queries_to_keys=gather(
        'queries',
        'keys',
        np.where(key_is_atom, keys, n_flat - 1),
        key_is_atom | has_padded_atoms,
        queries,
        keys.shape,
      ),
      queries_to_token_atoms=gather(
        'queries', 'token_atoms', dense_from_flat, dense_mask, queries, dense
      ),
    )

  @classmethod
  def from_batch(cls, batch: Mapping[str, Any]) -> 'AtomCrossAtt':
    """Reads upstream's keys `<name>:gather_idxs|gather_mask|input_shape`."""
    gathers = {}
    for field in dataclasses.fields(cls):
      source, _, target = field.name.partition('_to_')
      shape = np.asarray(batch[f'{field.name}:input_shape'])
      gathers[field.name] = GatherInfo(
        batch[f'{field.name}:gather_idxs'],
        batch[f'{field.name}:gather_mask'],
        tuple(shape.tolist()),
        source,  # ty: ignore[invalid-argument-type]
        target,  # ty: ignore[invalid-argument-type]
      )
    return cls(**gathers)

  def to_batch(self) -> dict[str, Any]:
    """Upstream's keys `<name>:gather_idxs|gather_mask|input_shape`."""
    batch = {}
    for field in dataclasses.fields(self):
      gather = getattr(self, field.name)
      batch[f'{field.name}:gather_idxs'] = gather.gather_idxs
      batch[f'{field.name}:gather_mask'] = gather.gather_mask
      shape = np.asarray(gather.input_shape, np.int32)
      batch[f'{field.name}:input_shape'] = shape
    return batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseBatch:
  """Upstream's features, with static shapes, and our plan of the same atoms.

  Attributes:
    ref: reference conformer, [n_token, n_slot] instead of flat atoms.
    ref_space_uid: [n_token, n_slot] integer.
    pred_dense_atom_mask: [n_token, n_slot] bool, slots that hold an atom.
    atom_cross_att: upstream's gathers.
    plan: the windows over flat atoms.
  """

  ref: RefStructure
  ref_space_uid: jax.Array
  pred_dense_atom_mask: jax.Array
  atom_cross_att: AtomCrossAtt
  plan: WindowPlan

  @classmethod
  def from_batch(
    cls, batch: Mapping[str, Any], **options: Unpack[PlanOptions]
  ) -> 'DenseBatch':
    """Reads upstream's dense batch, on the host.

    Args:
      batch: upstream's features; gathers that are missing are made.
      **options: as in `plan_from_batch`.

    Returns:
      The typed batch.

    Raises:
      ValueError: if a feature is missing or has a wrong shape, and as
        `build_window_plan`.
      TypeError: on a wrong dtype.
    """
    plan = window_plan.plan_from_batch(batch, **options)
    mask = np.asarray(batch['pred_dense_atom_mask'])
    fields = [field.name for field in dataclasses.fields(AtomCrossAtt)]
    if all(f'{name}:gather_idxs' in batch for name in fields):
      gathers = AtomCrossAtt.from_batch(batch)
    else:
      gathers = AtomCrossAtt.build(
        mask, num_queries=plan.num_queries, num_keys=plan.num_keys
      )
    names = [field.name for field in dataclasses.fields(RefStructure)]
    ref = {name: window_plan.feature(batch, name) for name in names}
    lead = {'n_token': mask.shape[0], 'n_slot': mask.shape[1]}
    checks.check_shapes(
      {k: (v, "'pred_dense_atom_mask'") for k, v in lead.items()},
      **{name: (x, 'n_token n_slot ...') for name, x in ref.items()},
    )
    return cls(
      ref=RefStructure(**ref),
      ref_space_uid=batch['ref_space_uid'],
      pred_dense_atom_mask=batch['pred_dense_atom_mask'],
      atom_cross_att=gathers,
      plan=plan,
    )

  def to_batch(self) -> dict[str, Any]:
    """Upstream's dense batch dictionary."""
    names = [field.name for field in dataclasses.fields(RefStructure)]
    return {
      **{name: getattr(self.ref, name) for name in names},
      'ref_space_uid': self.ref_space_uid,
      'pred_dense_atom_mask': self.pred_dense_atom_mask,
      **self.atom_cross_att.to_batch(),
    }


def atoms_from_dense(plan: WindowPlan, x: jax.Array) -> jax.Array:
  """Dense [n_token, n_slot, ...] -> flat [n_atom, ...], zero for padding."""
  checks.check_shapes(
    {'n_token': plan.num_tokens, 'n_slot': plan.num_slots},
    x=(x, 'n_token n_slot ...'),
  )
  x = jnp.asarray(x)
  rows = x.reshape(-1, *x.shape[2:])[plan.dense_index]
  return _mask_rows(rows, plan.atom_mask)


def atoms_to_dense(plan: WindowPlan, x: jax.Array) -> jax.Array:
  """Flat [n_atom, ...] -> dense [n_token, n_slot, ...], zero where empty."""
  checks.check_shapes({'n_atom': plan.n_atom}, x=(x, 'n_atom ...'))
  n_dense = plan.num_tokens * plan.num_slots
  # Padding goes to a row that is cut off.
  index = jnp.where(plan.atom_mask, plan.dense_index, n_dense)
  dense = jnp.zeros((n_dense, *x.shape[1:]), x.dtype)
  dense = dense.at[index].set(x, mode='drop', unique_indices=False)
  return dense.reshape(plan.num_tokens, plan.num_slots, *x.shape[1:])


def _mask_rows(rows: jax.Array, mask: jax.Array) -> jax.Array:
  mask = jnp.asarray(mask)
  mask = mask.reshape(*mask.shape, *[1] * (rows.ndim - mask.ndim))
  return jnp.where(mask, rows, jnp.zeros((), rows.dtype))
