"""Pallatom's sparse atom transformer: attention in a window of residues.

Follows the API page `pallatom.architecture.atom_transformers` (seed document
002) and the behaviour of github.com/tmatteso/diffusion @ 39c8d25a, written
from its description. All pair tensors are sparse: row l lists the atoms whose
residue lies within the window of l's residue. The encoder and the decoder
around it are in `pallatom_atom_transformers.py`.

Shapes: n_atom atoms; n_nbr neighbour slots per atom; n_head heads; c_atom and
c_pair (upstream: c_atompair) channels. No units: inputs are activations.

As published: keys and values come from the context c alone, q is never a key;
window 32 means the own residue and 15 on each side (strict inequality);
padding slots hold index n_atom - 1. Differs from published: one complex per
call (batches through `jax.vmap`); an atom without any live slot gets a zero
attention term instead of NaN; under jit the number of slots is an argument.
"""

import dataclasses
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm
from structattn_jax.network.pallatom import residue_windows

WINDOW_SIZE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomTransformerConfig(base_config.BaseConfig):
  """Sizes of the atom transformer; channels come from the inputs.

  Attributes:
    num_block: number of blocks, each with its own weights.
    num_head: number of heads; must divide c_atom.
  """

  num_block: int = 3
  num_head: int = 4


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


class LinearNoBias(hm.Linear):
  """y = x W without a bias, torch's default initialiser.

  Args of the constructor:
    num_output: output size.
    precision: 'highest' where `x` or `y` are coordinates.
    name: module name.
  """

  def __init__(
    self,
    num_output: int,
    *,
    precision: jax.lax.PrecisionLike = None,
    name: str = 'linear_no_bias',
  ):
    super().__init__(
      num_output,
      initializer='torch',
      use_bias=False,
      precision=precision,
      name=name,
    )


class AtomTransformerBlock(hk.Module):
  """Attention over the neighbours of each atom, then a feed-forward layer.

  Seed document 002, `AtomTransformerBlock`. Pre-norm residual, no gates:

    q_l   = LN_q(q) W_q;  k_m = LN_c(c) W_k;  v_m = LN_c(c) W_v
    s_lkh = q_lh . k_mh / sqrt(d) + (LN_pair(p_lk) W_b)_h,  m = neighbour k of l
    q_l  += (softmax over live k of s_lkh, times v_mh) W_o
    q_l  += relu(LN_ff(q_l) W_1) W_2,  4 c_atom hidden channels

  Parameters: modules `norm_q`, `norm_c`, `norm_pair`, `norm_ff` (`scale`,
  `offset`) and `to_q`, `to_k`, `to_v`, `to_out`, `pair_bias`, `ff1`, `ff2`
  (`weights` [in, out], the transpose of torch's).
  """

  def __init__(self, num_head: int, *, name: str = 'atom_transformer_block'):
    super().__init__(name=name)
    self.num_head = num_head

  def __call__(
    self,
    q: jax.Array,
    c: jax.Array,
    p: jax.Array,
    neighbor_idx: jax.Array,
    valid_mask: jax.Array,
  ) -> jax.Array:
    """Returns the updated atom queries.

    Args:
      q: [n_atom, c_atom] float, atom queries.
      c: [n_atom, c_atom] float, atom context: the source of keys and values.
      p: [n_atom, n_nbr, c_pair] float; p[l, k] describes the pair of atom l
        and atom neighbor_idx[l, k].
      neighbor_idx: [n_atom, n_nbr] integer in [0, n_atom).
      valid_mask: [n_atom, n_nbr] bool, True = live pair.

    Returns:
      [n_atom, c_atom] in the dtype of `q`.

    Raises:
      ValueError: on a wrong shape, or if num_head does not divide c_atom.
      TypeError: on a wrong dtype.
    """
    dims = checks.check_shapes(
      q=(q, 'n_atom c_atom'),
      c=(c, 'n_atom c_atom'),
      p=(p, 'n_atom n_nbr c_pair'),
      neighbor_idx=(neighbor_idx, 'n_atom n_nbr'),
      valid_mask=(valid_mask, 'n_atom n_nbr'),
    )
    checks.check_dtypes('floating', q=q, c=c, p=p)
    checks.check_dtypes('integer', neighbor_idx=neighbor_idx)
    checks.check_dtypes('bool', valid_mask=valid_mask)
    n_atom, c_atom, n_head = dims['n_atom'], dims['c_atom'], self.num_head
    check_heads(c_atom, n_head)
    heads = (n_atom, n_head, c_atom // n_head)
    if not dims['n_nbr']:  # One dead slot: a maximum needs something.
      p = jnp.pad(p, ((0, 0), (0, 1), (0, 0)))
      neighbor_idx = jnp.zeros((n_atom, 1), jnp.int32)
      valid_mask = jnp.zeros((n_atom, 1), bool)

    context = hm.LayerNorm(name='norm_c')(c)
    query = LinearNoBias(c_atom, name='to_q')(hm.LayerNorm(name='norm_q')(q))
    key = LinearNoBias(c_atom, name='to_k')(context)
    value = LinearNoBias(c_atom, name='to_v')(context)
    key, value = (x.reshape(heads)[neighbor_idx] for x in (key, value))
    bias = hm.LayerNorm(name='norm_pair')(p)
    bias = LinearNoBias(n_head, name='pair_bias')(bias)

    logits = jnp.einsum(
      'lhd,lkhd->lkh',
      numerics.at_least_float32(query.reshape(heads)),
      numerics.at_least_float32(key),
    )
    logits = logits * heads[-1] ** -0.5 + numerics.at_least_float32(bias)
    weights = numerics.masked_softmax(logits, valid_mask[..., None], axis=1)
    attended = jnp.einsum('lkh,lkhd->lhd', weights.astype(q.dtype), value)
    q = q + LinearNoBias(c_atom, name='to_out')(
      attended.reshape(n_atom, c_atom)
    )

    hidden = LinearNoBias(4 * c_atom, name='ff1')(
      hm.LayerNorm(name='norm_ff')(q)
    )
    return q + LinearNoBias(c_atom, name='ff2')(jax.nn.relu(hidden))

  @hk.name_like('__call__')
  def weights(
    self, c_atom: int, c_pair: int, dtype: Any
  ) -> residue_windows.BlockWeights:
    """The block's parameters, for the lean implementation.

    Args:
      c_atom: channels of atoms.
      c_pair: channels of pairs.
      dtype: of fresh parameters.

    Returns:
      The same parameters that a call reads.
    """
    n_head = self.num_head
    check_heads(c_atom, n_head)
    wide = 4 * c_atom
    return residue_windows.BlockWeights(
      norm_q=norm_weights('norm_q', c_atom, dtype),
      norm_c=norm_weights('norm_c', c_atom, dtype),
      norm_pair=norm_weights('norm_pair', c_pair, dtype),
      norm_ff=norm_weights('norm_ff', c_atom, dtype),
      to_q=linear_weights('to_q', c_atom, c_atom, dtype),
      to_k=linear_weights('to_k', c_atom, c_atom, dtype),
      to_v=linear_weights('to_v', c_atom, c_atom, dtype),
      to_out=linear_weights('to_out', c_atom, c_atom, dtype),
      pair_bias=linear_weights('pair_bias', c_pair, n_head, dtype),
      ff1=linear_weights('ff1', c_atom, wide, dtype),
      ff2=linear_weights('ff2', wide, c_atom, dtype),
    )


class AtomTransformer(hk.Module):
  """A stack of `AtomTransformerBlock`s with the same c, p and neighbours.

  Seed document 002, `AtomTransformer`. Blocks are named `blocks_0`,
  `blocks_1`, ... (upstream `blocks.0`, ...).
  """

  def __init__(
    self, config: AtomTransformerConfig, *, name: str = 'atom_transformer'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    q: jax.Array,
    c: jax.Array,
    p: jax.Array,
    neighbor_idx: jax.Array,
    valid_mask: jax.Array,
  ) -> jax.Array:
    """Returns the updated atom queries; arguments as the block's."""
    for block in range(self.config.num_block):
      q = self._block(block)(q, c, p, neighbor_idx, valid_mask)
    return q

  @hk.name_like('__call__')
  def weights(
    self, c_atom: int, c_pair: int, dtype: Any
  ) -> list[residue_windows.BlockWeights]:
    """The parameters of all blocks; see `AtomTransformerBlock.weights`."""
    return [
      self._block(block).weights(c_atom, c_pair, dtype)
      for block in range(self.config.num_block)
    ]

  @hk.transparent
  def _block(self, block: int) -> AtomTransformerBlock:
    return AtomTransformerBlock(self.config.num_head, name=f'blocks_{block}')


def transform_atom_transformer(
  config: AtomTransformerConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the atom transformer.

    >>> init, apply = transform_atom_transformer()
    >>> tok_idx = np.repeat(np.arange(6), 5)
    >>> neighbours, valid = build_sparse_pairs(tok_idx, 4)
    >>> q = c = jnp.ones((30, 16))
    >>> p = jnp.ones((*neighbours.shape, 2))
    >>> params = init(jax.random.key(0), q, c, p, neighbours, valid)
    >>> jax.jit(apply)(params, q, c, p, neighbours, valid).shape
    (30, 16)

  Args:
    config: sizes; None takes the published ones (3 blocks, 4 heads).

  Returns:
    `init(key, q, c, p, neighbor_idx, valid_mask)` and `apply(params, ...)` with
    the same arguments; shapes as in `AtomTransformerBlock`.
  """
  config = config or AtomTransformerConfig()

  def forward(q, c, p, neighbor_idx, valid_mask):
    return AtomTransformer(config)(q, c, p, neighbor_idx, valid_mask)

  return hk.without_apply_rng(hk.transform(forward))


def check_heads(c_atom: int, num_head: int) -> None:
  """Raises ValueError unless the heads divide the channels."""
  if num_head < 1 or c_atom % num_head:
    raise ValueError(
      f'q: c_atom={c_atom} must be divisible by num_head={num_head}'
    )


def exact_linear(name: str, num_output: int) -> LinearNoBias:
  """For coordinates, which must not pass through TF32 or bfloat16 units."""
  return LinearNoBias(num_output, precision='highest', name=name)


def linear_weights(
  name: str, num_input: int, num_output: int, dtype: Any
) -> jax.Array:
  """What `LinearNoBias(num_output, name=name)` reads."""
  with hk.name_scope(name):
    return hk.get_parameter(
      'weights',
      (num_input, num_output),
      dtype,
      hm.initializer('torch', num_input),
    )


def norm_weights(name: str, size: int, dtype: Any) -> residue_windows.Norm:
  """What `LayerNorm(name=name)` reads."""
  with hk.name_scope(name):
    return residue_windows.Norm(
      hk.get_parameter('scale', (size,), dtype, jnp.ones),
      hk.get_parameter('offset', (size,), dtype, jnp.zeros),
    )
