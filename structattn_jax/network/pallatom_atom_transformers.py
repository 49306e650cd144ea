"""Pallatom's sparse atom transformers: encoder, decoder and their blocks.

Follows the API page `pallatom.architecture.atom_transformers` (seed document
002) and the behaviour of github.com/tmatteso/diffusion @ 39c8d25a, written
from its description; step numbers are those of its encoder ("Algorithm 4") and
decoder ("Algorithm 5"). Row l of a sparse pair tensor lists the atoms whose
residue lies within the window of l's residue.

Shapes: n_atom atoms; n_token residues; n_nbr neighbour slots per atom; n_head
heads; c_atom, c_pair (upstream: c_atompair), c_token and c_z channels. Encoder
and decoder also take a leading n_batch. Units: reference positions in angstrom.

Two implementations with the same numbers. 'lean' works through windows of
consecutive atoms (`kernels/residue_windows.py`): no tensor over atoms and
neighbours exists, neither forward nor backward. 'dense' is upstream's form on
[n_atom, n_nbr, c_pair] tensors, for parity and for tokens in any order.

As published, odd or not:
  * Keys and values come from the context c alone, q is never a key. Atoms of a
    token share c in the encoder, so noisy positions of other atoms reach an
    atom only through the pooled s_i.
  * The encoder's attention stays within `ref_space_uid`, the decoder's does
    not; only its p_skip is zero between spaces.
  * Step 1 groups atoms by position, n_atom // n_token at a time, not by token.
  * In a batch `tok_idx[0]` serves all items, except in the mean of step 17.
  * Window 32 means the own residue and 15 on each side (strict inequality);
    padding slots hold index n_atom - 1.
Differs from published: `atom_mask` is an extension; an atom without any live
slot gets a zero attention term instead of NaN; under jit the number of slots,
or a plan of the windows, is an argument; logits, softmax and norms are at
least float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import segment
from structattn_jax.kernels import residue_windows

WINDOW_SIZE = 32

Implementation = Literal['lean', 'dense']

# Upstream's numbering of the layers of an MLP with ReLUs between them.
_MLP_LAYERS = (0, 2, 4, 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomTransformerConfig(base_config.BaseConfig):
  """Sizes of the atom transformer; channels come from the inputs.

  Attributes:
    num_block: number of blocks, each with its own weights.
    num_head: number of heads; must divide c_atom.
  """

  num_block: int = 3
  num_head: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomFeatureEncoderConfig(base_config.BaseConfig):
  """Sizes and choices of the encoder; the defaults are Pallatom's main trunk.

  Attributes:
    c_atom: channels of atoms (upstream: m).
    c_pair: channels of atom pairs (upstream: d).
    c_out: channels of the pooled s_i (upstream: c).
    num_block: transformer blocks.
    num_head: heads; must divide c_atom.
    window_size: span of the window in residues. Not used where a call brings
      its own plan.
    implementation: 'lean' or 'dense', see the module. None takes 'lean' unless
      `tok_idx` is traced without a plan, or not sorted.
    max_neighbours: slots per atom in 'dense', needed where `tok_idx` is traced.
  """

  c_atom: int = 128
  c_pair: int = 16
  c_out: int = 256
  num_block: int = 2
  num_head: int = 4
  window_size: int = WINDOW_SIZE
  implementation: Implementation | None = None
  max_neighbours: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomAttentionDecoderConfig(base_config.BaseConfig):
  """Sizes and choices of the decoder; channels come from the inputs.

  Attributes:
    num_block: transformer blocks.
    num_head: heads; must divide c_atom.
    window_size: as in `AtomFeatureEncoderConfig`.
    implementation: likewise.
    max_neighbours: likewise.
  """

  num_block: int = 3
  num_head: int = 4
  window_size: int = WINDOW_SIZE
  implementation: Implementation | None = None
  max_neighbours: int | None = None


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
    _check_heads(c_atom, n_head)
    heads = (n_atom, n_head, c_atom // n_head)

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
    _check_heads(c_atom, n_head)
    wide = 4 * c_atom
    return residue_windows.BlockWeights(
      norm_q=_norm_weights('norm_q', c_atom, dtype),
      norm_c=_norm_weights('norm_c', c_atom, dtype),
      norm_pair=_norm_weights('norm_pair', c_pair, dtype),
      norm_ff=_norm_weights('norm_ff', c_atom, dtype),
      to_q=_linear_weights('to_q', c_atom, c_atom, dtype),
      to_k=_linear_weights('to_k', c_atom, c_atom, dtype),
      to_v=_linear_weights('to_v', c_atom, c_atom, dtype),
      to_out=_linear_weights('to_out', c_atom, c_atom, dtype),
      pair_bias=_linear_weights('pair_bias', c_pair, n_head, dtype),
      ff1=_linear_weights('ff1', c_atom, wide, dtype),
      ff2=_linear_weights('ff2', wide, c_atom, dtype),
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


class AtomFeatureEncoderOutput(NamedTuple):
  """What the encoder returns, in upstream's order.

  Attributes:
    s_i: [n_token, c_out], atoms pooled to residues; 0 where there is none.
    q_skip: [n_atom, c_atom], queries after the transformer.
    c_skip: [n_atom, c_atom], features of the reference conformer.
    p_skip: the atom pairs: a `PairSkip` ('lean'), whose `dense` method gives
      upstream's tensor, or [n_atom, n_nbr, c_pair] ('dense').
    c_l: [n_atom, c_atom], context of the decoders.
  """

  s_i: jax.Array
  q_skip: jax.Array
  c_skip: jax.Array
  p_skip: residue_windows.PairSkip | jax.Array
  c_l: jax.Array


class AtomFeatureEncoder(hk.Module):
  """From reference conformers and noisy positions to atoms and residues.

  Upstream's `AtomFeatureEncoder`, "Algorithm 4"; all inputs and outputs may
  have a leading n_batch. Steps:

     1  f_l = positions, then elements, of all atoms of the residue of l
     2  c_l = f_l W_fref                                4  c_skip = c_l
     5  d_lm = x_l - x_m       6  v_lm = [l, m of one space]
   7-9  p_lm = v_lm (d_lm W_d + W_inv / (1 + |d_lm|^2) + W_v)
    10  p_lm = live_lm (p_lm + relu(c_l) W_cl + relu(c_m) W_cm)
    11  p_skip = p                                 12  q_l = c_l + r_l W_r
    13  c_l += LN(s_t(l)) W_s                  14  p_lm += LN(z_t(l)t(m)) W_z
    15  p_lm += MLP(p_lm), four layers, no activation before the first
    16  q = AtomTransformer(q, c, p)
    17  s_i = mean over the atoms of residue i of relu(q_l W_agg)

  Parameters: LayerNorms `norm_s_init`, `norm_z_init` (`scale`, `offset`);
  `proj_fref_c`, `proj_d_vec`, `proj_inv_sq`, `proj_v`, `proj_cl_pair`,
  `proj_cm_pair`, `proj_r_scaled`, `proj_s_init`, `proj_z_init`, `mlp_p_0`,
  `mlp_p_2`, `mlp_p_4`, `mlp_p_6`, `proj_agg` (`weights` [in, out]); those of
  `AtomTransformerBlock` below `transformer/blocks_0`, `transformer/blocks_1`...
  """

  def __init__(
    self,
    config: AtomFeatureEncoderConfig,
    *,
    name: str = 'atom_feature_encoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    ref_pos: jax.Array,
    ref_element: jax.Array,
    ref_space_uid: jax.Array,
    s_input: jax.Array,
    z_input: jax.Array,
    r_scaled: jax.Array,
    tok_idx: Any,
    atom_mask: jax.Array | None = None,
    *,
    plan: residue_windows.NeighbourPlan | None = None,
  ) -> AtomFeatureEncoderOutput:
    """Returns pooled residues, atoms and pairs.

    Args:
      ref_pos: [n_atom, 3] float, reference conformers, in angstrom.
      ref_element: [n_atom, n_element] float, one-hot.
      ref_space_uid: [n_atom] integer, chain of each atom.
      s_input: [n_token, c_token] float.
      z_input: [n_token, n_token, c_z] float, residue of the query first.
      r_scaled: [n_atom, 3] float, noisy positions divided by
        sqrt(sigma_data^2 + t^2), dimensionless.
      tok_idx: [n_atom] integer in [0, n_token), the residue of each atom.
      atom_mask: [n_atom] bool, True = real atom; None means all. What other
        atoms hold reaches nothing, and their rows of q_skip are zero.
      plan: windows of the atoms, from `plan_neighbours` with the window that is
        wanted; needed by 'lean' where `tok_idx` is traced.

    Returns:
      An `AtomFeatureEncoderOutput`; floats in the dtype of `s_input`, `p_skip`
      at least float32.

    Raises:
      ValueError: on a wrong shape or index, naming the argument; where `plan`
        or `max_neighbours` is missing, or does not fit the implementation.
      TypeError: on a wrong dtype.
    """
    config = self.config
    batch = np.shape(ref_pos)[:-2][:1]
    lead = 'n_batch ' if batch else ''
    dims = checks.check_shapes(
      ref_pos=(ref_pos, f'{lead}n_atom 3'),
      ref_element=(ref_element, f'{lead}n_atom n_element'),
      ref_space_uid=(ref_space_uid, f'{lead}n_atom'),
      s_input=(s_input, f'{lead}n_token c_token'),
      z_input=(z_input, f'{lead}n_token n_token c_z'),
      r_scaled=(r_scaled, f'{lead}n_atom 3'),
      tok_idx=(tok_idx, f'{lead}n_atom'),
      atom_mask=(atom_mask, f'{lead}n_atom'),
    )
    checks.check_dtypes(
      'floating',
      ref_pos=ref_pos,
      ref_element=ref_element,
      s_input=s_input,
      z_input=z_input,
      r_scaled=r_scaled,
    )
    checks.check_dtypes('integer', ref_space_uid=ref_space_uid, tok_idx=tok_idx)
    checks.check_dtypes('bool', atom_mask=atom_mask)
    _check_heads(config.c_atom, config.num_head)
    n_atom, n_token = dims['n_atom'], dims['n_token']
    group = n_atom // max(n_token, 1)
    if not group or n_atom % group:
      raise ValueError(
        f'ref_pos: atoms are grouped n_atom // n_token = {group} at a time '
        f"(n_token={n_token} from 's_input'), which must be at least 1 and "
        f'divide n_atom, got n_atom={n_atom}'
      )
    tok = _shared_tokens(tok_idx, n_token, batch)
    dtype = s_input.dtype
    ref_pos, r_scaled = map(numerics.at_least_float32, (ref_pos, r_scaled))
    ref_element = numerics.at_least_float32(ref_element)
    ref_space_uid = jnp.asarray(ref_space_uid)
    count: Any = n_atom
    if atom_mask is not None:
      real = jnp.asarray(atom_mask)[..., None]
      ref_pos, ref_element, r_scaled = (
        jnp.where(real, x, 0) for x in (ref_pos, ref_element, r_scaled)
      )
      count = jnp.maximum(jnp.sum(real, -2, keepdims=True), 1)

    def to_atoms(tokens: jax.Array) -> jax.Array:
      return jnp.take(tokens, tok, axis=-2, mode='clip')

    # Steps 1, 2 and 4, once per group instead of once per atom.
    features = jnp.concatenate(
      [x.reshape(*batch, n_atom // group, -1) for x in (ref_pos, ref_element)],
      -1,
    )
    c_group = _exact_linear('proj_fref_c', config.c_atom)(features)
    c_skip = to_atoms(c_group)

    # Steps 5 to 11, in factors. Only differences of positions matter, so that
    # the centre is taken out: exact far from the origin.
    centre = jnp.sum(ref_pos, -2, keepdims=True) / count
    ref_pos = ref_pos - jax.lax.stop_gradient(centre)
    position = _exact_linear('proj_d_vec', config.c_pair)(ref_pos)
    hidden = jax.nn.relu(c_group)
    own = LinearNoBias(config.c_pair, name='proj_cl_pair')(hidden)
    other = LinearNoBias(config.c_pair, name='proj_cm_pair')(hidden)
    constant, inverse_square = (
      _linear_weights(name, 1, config.c_pair, hidden.dtype)[0]
      for name in ('proj_v', 'proj_inv_sq')
    )
    skip = residue_windows.PairSkip(
      query=to_atoms(own) + position + constant,
      key=to_atoms(other) - position,
      position=ref_pos,
      space_uid=ref_space_uid,
      inverse_square=inverse_square,
      atom_mask=None if atom_mask is None else jnp.asarray(atom_mask),
    )

    # Steps 12 and 13; c is the same for all atoms of a residue.
    q = c_skip + _exact_linear('proj_r_scaled', config.c_atom)(r_scaled)
    single = hm.LayerNorm(name='norm_s_init')(s_input)
    single = LinearNoBias(config.c_atom, name='proj_s_init')(single)
    c_token = c_group[..., :n_token, :].astype(dtype) + single

    # Steps 14 to 16.
    neighbours = _neighbours(config, tok, plan, config.max_neighbours)
    if not isinstance(neighbours, residue_windows.NeighbourPlan):
      skip = skip.dense(*neighbours)
    q, _ = _transform_atoms(
      config,
      neighbours,
      q.astype(dtype),
      c_token,
      skip,
      z_input,
      tok,
      names=('norm_z_init', 'proj_z_init'),
      context_idx=tok,
      space_uid=ref_space_uid,
      atom_mask=atom_mask,
    )

    # Step 17, the one that reads every item's own indices.
    pooled = jax.nn.relu(LinearNoBias(config.c_out, name='proj_agg')(q))

    def pool(values, ids, mask):
      return segment.segment_mean(values, ids, n_token, mask=mask)

    masks_axis = None if atom_mask is None else 0
    pool = jax.vmap(pool, (0, 0, masks_axis)) if batch else pool
    s_i = pool(pooled, tok_idx, atom_mask)
    return AtomFeatureEncoderOutput(
      s_i, q, c_skip.astype(dtype), skip, to_atoms(c_token)
    )


class AtomAttentionDecoderOutput(NamedTuple):
  """What the decoder returns, in upstream's order.

  Attributes:
    q: [n_atom, c_atom], queries after the transformer.
    p: [n_atom, n_nbr, c_pair] after the MLP; None unless asked for.
    r_update: [n_atom, 3] update of positions, scaled by the caller; at least
      float32.
    c_out: [n_atom, c_atom], context of the next decoder.
  """

  q: jax.Array
  p: jax.Array | None
  r_update: jax.Array
  c_out: jax.Array


class AtomAttentionDecoder(hk.Module):
  """From residues back to updates of atom positions.

  Upstream's `AtomAttentionDecoder`, "Algorithm 5"; all inputs and outputs may
  have a leading n_batch. Steps:

    1  q_l = LN(s_t(l)) W_sq + q_skip_l
    2  p_lm = LN(z_t(l)t(m)) W_z + p_skip_lm
    3  p_lm += MLP(p_lm), zero on padding
    4  q = AtomTransformer(q, c, p)
    5  r_update = LN(q) W_r
    6  c_out_l = LN(s_t(l)) W_sc + c_skip_l

  Several decoders in a chain share the encoder's q_skip, p_skip and c_skip; c
  is the encoder's c_l first and the last decoder's c_out from then on.

  Parameters: LayerNorms `norm_s_q`, `norm_z`, `norm_q_out`, `norm_s_c`
  (`scale`, `offset`); `proj_s_q`, `proj_z`, `mlp_p_0`, `mlp_p_2`, `mlp_p_4`,
  `mlp_p_6`, `proj_r`, `proj_s_c` (`weights` [in, out]); those of
  `AtomTransformerBlock` below `transformer/blocks_0`, `transformer/blocks_1`...
  """

  def __init__(
    self,
    config: AtomAttentionDecoderConfig,
    *,
    name: str = 'atom_attention_decoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    q_skip: jax.Array,
    p_skip: residue_windows.PairSkip | jax.Array,
    c_skip: jax.Array,
    c: jax.Array,
    s: jax.Array,
    z: jax.Array,
    tok_idx: Any,
    atom_mask: jax.Array | None = None,
    *,
    plan: residue_windows.NeighbourPlan | None = None,
    return_pair: bool | None = None,
  ) -> AtomAttentionDecoderOutput:
    """Returns atoms, pairs, the update of positions, and the next context.

    Args:
      q_skip: [n_atom, c_atom] float, from the encoder.
      p_skip: from the encoder, a `PairSkip` or [n_atom, n_nbr, c_pair] float;
        the two implementations take both.
      c_skip: [n_atom, c_atom] float, from the encoder.
      c: [n_atom, c_atom] float, the source of keys and values.
      s: [n_token, c_token] float, trunk single representation.
      z: [n_token, n_token, c_z] float, trunk pair representation.
      tok_idx: [n_atom] integer in [0, n_token), the residue of each atom.
      atom_mask: [n_atom] bool, True = real atom; None means all. What other
        atoms hold reaches nothing, and their rows of q, p and r_update are
        zero.
      plan: as in `AtomFeatureEncoder`.
      return_pair: whether to return `p`, which has an entry per atom and
        neighbour. None does so unless `p_skip` is a `PairSkip`.

    Returns:
      An `AtomAttentionDecoderOutput`, a 4-tuple; q and c_out in the dtype of
      `q_skip`, p and r_update at least float32.

    Raises:
      ValueError: as `AtomFeatureEncoder`.
      TypeError: on a wrong dtype.
    """
    config = self.config
    batch = np.shape(q_skip)[:-2][:1]
    lead = 'n_batch ' if batch else ''
    separable = isinstance(p_skip, residue_windows.PairSkip)
    skips = {'p_skip': (p_skip, f'{lead}n_atom n_nbr c_pair')}
    if separable:
      skips = {
        'p_skip.query': (p_skip.query, f'{lead}n_atom c_pair'),
        'p_skip.key': (p_skip.key, f'{lead}n_atom c_pair'),
        'p_skip.position': (p_skip.position, f'{lead}n_atom 3'),
        'p_skip.space_uid': (p_skip.space_uid, f'{lead}n_atom'),
        'p_skip.inverse_square': (p_skip.inverse_square, 'c_pair'),
        'p_skip.atom_mask': (p_skip.atom_mask, f'{lead}n_atom'),
      }
    n_token = checks.check_shapes(
      q_skip=(q_skip, f'{lead}n_atom c_atom'),
      **skips,
      c_skip=(c_skip, f'{lead}n_atom c_atom'),
      c=(c, f'{lead}n_atom c_atom'),
      s=(s, f'{lead}n_token c_token'),
      z=(z, f'{lead}n_token n_token c_z'),
      tok_idx=(tok_idx, f'{lead}n_atom'),
      atom_mask=(atom_mask, f'{lead}n_atom'),
    )['n_token']
    checks.check_dtypes(
      'floating',
      q_skip=q_skip,
      p_skip=None if separable else p_skip,
      c_skip=c_skip,
      c=c,
      s=s,
      z=z,
    )
    checks.check_dtypes('integer', tok_idx=tok_idx)
    checks.check_dtypes('bool', atom_mask=atom_mask)
    c_atom = np.shape(q_skip)[-1]
    _check_heads(c_atom, config.num_head)
    tok = _shared_tokens(tok_idx, n_token, batch)
    if return_pair is None:
      return_pair = not separable

    def from_single(norm: str, projection: str) -> jax.Array:
      tokens = hm.LayerNorm(name=norm)(s)
      tokens = LinearNoBias(c_atom, name=projection)(tokens)
      return jnp.take(tokens, tok, axis=-2, mode='clip').astype(q_skip.dtype)

    # Step 1.
    q = from_single('norm_s_q', 'proj_s_q') + q_skip

    # Steps 2 to 4.
    max_neighbours = config.max_neighbours
    if not separable:
      max_neighbours = np.shape(p_skip)[-2]
    neighbours = _neighbours(config, tok, plan, max_neighbours)
    if separable and not isinstance(neighbours, residue_windows.NeighbourPlan):
      p_skip = p_skip.dense(*neighbours)
    q, p = _transform_atoms(
      config,
      neighbours,
      q,
      c,
      p_skip,
      z,
      tok,
      names=('norm_z', 'proj_z'),
      atom_mask=atom_mask,
      return_pair=return_pair,
    )

    # Step 5.
    r_update = numerics.at_least_float32(hm.LayerNorm(name='norm_q_out')(q))
    r_update = _exact_linear('proj_r', 3)(r_update)
    if atom_mask is not None:
      r_update = jnp.where(jnp.asarray(atom_mask)[..., None], r_update, 0)

    # Step 6.
    c_out = from_single('norm_s_c', 'proj_s_c') + c_skip
    return AtomAttentionDecoderOutput(q, p, r_update, c_out)


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


def transform_atom_feature_encoder(
  config: AtomFeatureEncoderConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the encoder.

    >>> config = AtomFeatureEncoderConfig(c_atom=8, c_pair=4, c_out=6)
    >>> init, apply = transform_atom_feature_encoder(config)
    >>> tok_idx = np.repeat(np.arange(6), 5)
    >>> inputs = {
    ...   'ref_pos': jnp.ones((30, 3)),
    ...   'ref_element': jnp.ones((30, 4)),
    ...   'ref_space_uid': np.zeros(30, int),
    ...   's_input': jnp.ones((6, 8)),
    ...   'z_input': jnp.ones((6, 6, 8)),
    ...   'r_scaled': jnp.ones((30, 3)),
    ...   'plan': residue_windows.plan_neighbours(tok_idx),
    ... }
    >>> params = init(jax.random.key(0), **inputs, tok_idx=tok_idx)
    >>> out = jax.jit(apply)(params, **inputs, tok_idx=tok_idx)
    >>> out.s_i.shape, out.q_skip.shape, out.p_skip.key.shape
    ((6, 6), (30, 8), (30, 4))

  Args:
    config: sizes; None takes those of Pallatom's main trunk.

  Returns:
    `init(key, ...)` and `apply(params, ...)` with the arguments of
    `AtomFeatureEncoder.__call__`.
  """
  config = config or AtomFeatureEncoderConfig()

  def forward(*args, **kwargs):
    return AtomFeatureEncoder(config)(*args, **kwargs)

  return hk.without_apply_rng(hk.transform(forward))


def transform_atom_attention_decoder(
  config: AtomAttentionDecoderConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the decoder.

    >>> init, apply = transform_atom_attention_decoder()
    >>> tok_idx = np.repeat(np.arange(6), 5)
    >>> neighbours, valid = build_sparse_pairs(tok_idx)
    >>> inputs = {
    ...   'q_skip': jnp.ones((30, 8)),
    ...   'p_skip': jnp.ones((*valid.shape, 4)),
    ...   'c_skip': jnp.ones((30, 8)),
    ...   'c': jnp.ones((30, 8)),
    ...   's': jnp.ones((6, 8)),
    ...   'z': jnp.ones((6, 6, 8)),
    ...   'tok_idx': tok_idx,
    ... }
    >>> params = init(jax.random.key(0), **inputs)
    >>> q, p, r_update, c_out = apply(params, **inputs)
    >>> q.shape, p.shape, r_update.shape, c_out.shape
    ((30, 8), (30, 30, 4), (30, 3), (30, 8))

  Args:
    config: sizes; None takes those of Pallatom's main trunk.

  Returns:
    `init(key, ...)` and `apply(params, ...)` with the arguments of
    `AtomAttentionDecoder.__call__`.
  """
  config = config or AtomAttentionDecoderConfig()

  def forward(*args, **kwargs):
    return AtomAttentionDecoder(config)(*args, **kwargs)

  return hk.without_apply_rng(hk.transform(forward))


_Config = AtomFeatureEncoderConfig | AtomAttentionDecoderConfig
_Neighbours = residue_windows.NeighbourPlan | tuple[Any, Any]


def _shared_tokens(tok_idx: Any, n_token: int, batch: tuple[int, ...]) -> Any:
  """The indices that serve all items, checked where that is possible."""
  if not checks.is_concrete(tok_idx):
    return tok_idx[0] if batch else tok_idx
  tok_idx = np.asarray(tok_idx)
  checks.validate_segment_ids(tok_idx.reshape(-1), n_token, name='tok_idx')
  return tok_idx[0] if batch else tok_idx


def _neighbours(
  config: _Config,
  tok: Any,
  plan: residue_windows.NeighbourPlan | None,
  max_neighbours: int | None,
) -> _Neighbours:
  """The given plan, one made here, or upstream's index lists."""
  implementation = config.implementation
  if plan is not None:
    if implementation == 'dense':
      raise ValueError("plan: expected none with implementation='dense'")
    if np.shape(plan.row) != np.shape(tok):
      raise ValueError(
        f'plan: made for {np.size(plan.row)} atoms, but tok_idx has '
        f'{np.size(tok)}'
      )
    return plan
  if checks.is_concrete(tok):
    if implementation is None and np.any(np.diff(tok) < 0):
      implementation = 'dense'
    if implementation != 'dense':
      return residue_windows.plan_neighbours(tok, config.window_size)
  elif implementation == 'lean':
    raise ValueError(
      "plan: needed by implementation='lean' where tok_idx is traced; make it "
      'on the host with plan_neighbours(tok_idx, window_size)'
    )
  elif max_neighbours is None:
    raise ValueError(
      'plan: needed where tok_idx is traced; make it on the host with '
      'plan_neighbours(tok_idx, window_size), or set max_neighbours in the '
      'config'
    )
  return build_sparse_pairs(
    tok, config.window_size, max_neighbours=max_neighbours
  )


def _transform_atoms(
  config: _Config,
  neighbours: _Neighbours,
  q: jax.Array,
  c: jax.Array,
  p_skip: residue_windows.PairSkip | jax.Array,
  z: jax.Array,
  tok: Any,
  *,
  names: tuple[str, str],
  context_idx: Any = None,
  space_uid: jax.Array | None = None,
  atom_mask: jax.Array | None = None,
  return_pair: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Adds z and the MLP to p_skip and runs the transformer.

  Encoder steps 14 to 16, decoder steps 2 to 4. `c` has rows of atoms, or those
  that `context_idx` assigns to them. A `space_uid` confines attention.
  """
  if atom_mask is not None:
    atom_mask = jnp.asarray(atom_mask)
  if isinstance(neighbours, residue_windows.NeighbourPlan):
    q, p = _lean_transform(
      config,
      neighbours,
      (q, c, p_skip, z, atom_mask),
      names=names,
      context_idx=context_idx,
      within_space=space_uid is not None,
      return_pair=return_pair,
    )
  else:
    if context_idx is not None:
      c = jnp.take(c, context_idx, axis=-2, mode='clip')
    q, p = _dense_transform(
      config, neighbours, q, c, p_skip, z, tok, names, space_uid, atom_mask
    )
    p = p if return_pair else None
  if atom_mask is not None:
    q = jnp.where(atom_mask[..., None], q, 0)
  return q, p


def _dense_transform(
  config: _Config,
  neighbours: tuple[Any, Any],
  q: jax.Array,
  c: jax.Array,
  p_skip: Any,
  z: jax.Array,
  tok: Any,
  names: tuple[str, str],
  space_uid: jax.Array | None,
  atom_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Upstream's form, on tensors [n_atom, n_nbr, c_pair]."""
  tok, neighbor_idx, live = map(jnp.asarray, (tok, *neighbours))
  p_skip = numerics.at_least_float32(p_skip)
  c_pair = p_skip.shape[-1]
  if atom_mask is not None:
    live &= atom_mask[..., :, None] & atom_mask[..., neighbor_idx]

  # z is normalised and projected per pair of tokens, then expanded.
  pair = hm.LayerNorm(name=names[0])(numerics.at_least_float32(z))
  pair = LinearNoBias(c_pair, name=names[1])(pair)
  p = p_skip + pair[..., tok[:, None], tok[neighbor_idx], :]
  hidden = p
  for layer in _MLP_LAYERS:
    hidden = jax.nn.relu(hidden) if layer else hidden
    hidden = LinearNoBias(c_pair, name=f'mlp_p_{layer}')(hidden)
  p = jnp.where(live[..., None], p + hidden, 0)

  if space_uid is not None:
    live &= space_uid[..., :, None] == space_uid[..., neighbor_idx]
  live = jnp.broadcast_to(live, p.shape[:-1])
  transformer: Callable[..., jax.Array] = AtomTransformer(
    AtomTransformerConfig(num_block=config.num_block, num_head=config.num_head),
    name='transformer',
  )
  if q.ndim == 3:
    transformer = hk.vmap(
      transformer, in_axes=(0, 0, 0, None, 0), split_rng=False
    )
  return transformer(q, c, p, neighbor_idx, live), p


def _lean_transform(
  config: _Config,
  plan: residue_windows.NeighbourPlan,
  arrays: tuple[Any, ...],
  *,
  names: tuple[str, str],
  **options: Any,
) -> tuple[jax.Array, jax.Array | None]:
  """The windowed form; reads the same parameters and runs item by item."""
  q, _, p_skip, z, _ = arrays
  c_atom, c_z, dtype = q.shape[-1], z.shape[-1], hm.parameter_dtype(q)
  if isinstance(p_skip, residue_windows.PairSkip):
    c_pair = p_skip.key.shape[-1]
  else:
    c_pair = np.shape(p_skip)[-1]
  weights = residue_windows.PairWeights(
    norm_z=_norm_weights(names[0], c_z, dtype),
    proj_z=_linear_weights(names[1], c_z, c_pair, dtype),
    mlp=tuple(
      _linear_weights(f'mlp_p_{layer}', c_pair, c_pair, dtype)
      for layer in _MLP_LAYERS
    ),
  )
  transformer = AtomTransformer(
    AtomTransformerConfig(num_block=config.num_block, num_head=config.num_head),
    name='transformer',
  )
  blocks = transformer.weights(c_atom, c_pair, dtype)

  def one(arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array | None]:
    q, c, p_skip, z, atom_mask = arrays
    return residue_windows.transform(
      plan,
      blocks,
      weights,
      q,
      c,
      p_skip,
      z,
      num_head=config.num_head,
      atom_mask=atom_mask,
      **options,
    )

  if q.ndim == 2:
    return one(arrays)
  if isinstance(p_skip, residue_windows.PairSkip):
    shared = p_skip.inverse_square
    shared = jnp.broadcast_to(shared, (len(q), *shared.shape))
    p_skip = dataclasses.replace(p_skip, inverse_square=shared)
    arrays = (*arrays[:2], p_skip, *arrays[3:])
  # One after the other keeps a block in the cache of a CPU.
  if jax.default_backend() == 'cpu':
    return jax.lax.map(one, arrays)
  return jax.vmap(one)(arrays)


def _check_heads(c_atom: int, num_head: int) -> None:
  if num_head < 1 or c_atom % num_head:
    raise ValueError(
      f'q: c_atom={c_atom} must be divisible by num_head={num_head}'
    )


def _exact_linear(name: str, num_output: int) -> LinearNoBias:
  """For coordinates, which must not pass through TF32 or bfloat16 units."""
  return LinearNoBias(num_output, precision='highest', name=name)


def _linear_weights(
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


def _norm_weights(name: str, size: int, dtype: Any) -> residue_windows.Norm:
  """What `LayerNorm(name=name)` reads."""
  with hk.name_scope(name):
    return residue_windows.Norm(
      hk.get_parameter('scale', (size,), dtype, jnp.ones),
      hk.get_parameter('offset', (size,), dtype, jnp.zeros),
    )
