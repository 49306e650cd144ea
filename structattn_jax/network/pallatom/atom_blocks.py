"""Pallatom's sparse atom transformer: attention in a window of residues.

Follows the API page `pallatom.architecture.atom_transformers` (seed document
002) and the behaviour of github.com/tmatteso/diffusion @ 39c8d25a, written
from its description. All pair tensors are sparse: row l lists the atoms whose
residue lies within the window of l's residue (`neighbour_plan`). The encoder
and the decoder around it are in `atom_transformers`; `transform_atoms` is what
both do with the pairs of atoms.

Shapes: n_atom atoms; n_nbr neighbour slots per atom; n_head heads; c_atom and
c_pair (upstream: c_atompair) channels. No units: inputs are activations.

As published: keys and values come from the context c alone, q is never a key;
window 32 means the own residue and 15 on each side (strict inequality);
padding slots hold index n_atom - 1. Differs from published: one complex per
call (batches through `jax.vmap`); an atom without any live slot gets a zero
attention term instead of NaN; under jit the number of slots is an argument.
"""

import dataclasses
import functools
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.pallatom import residue_windows
from structattn_jax.network.pallatom.neighbour_plan import (
  WINDOW_SIZE,
  NeighbourPlan,
  build_sparse_pairs,
  plan_neighbours,
)
from structattn_jax.network.pallatom.residue_windows import PairSkip

Implementation = Literal['published', 'blocked']
# A plan of windows, or upstream's lists and masks.
Neighbours = NeighbourPlan | tuple[Any, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomTransformerConfig(base_config.BaseConfig):
  """Sizes of the atom transformer; channels come from the inputs.

  Attributes:
    num_block: number of blocks, each with its own weights.
    num_head: number of heads; must divide c_atom.
  """

  num_block: int = 3
  num_head: int = 4


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


# Tables of parameters.


def linear_parameters(
  num_input: int, num_output: int
) -> dict[str, pm.Parameter]:
  """Of a linear layer without bias, torch's default initialiser."""
  return pm.linear(num_input, num_output, initializer='torch')


def layer_norm_parameters(channels: int) -> dict[str, pm.Parameter]:
  """Of a LayerNorm with scale and offset."""
  return pm.layer_norm(channels, offset=True)


def block_parameters(c_atom: int, c_pair: int, num_head: int) -> pm.Table:
  """Of `atom_transformer_block`.

  Raises:
    ValueError: unless the heads divide the channels.
  """
  if num_head < 1 or c_atom % num_head:
    raise ValueError(
      f'q: c_atom={c_atom} must be divisible by num_head={num_head}'
    )
  norms = {'q': c_atom, 'c': c_atom, 'pair': c_pair, 'ff': c_atom}
  return {
    **{f'norm_{x}': layer_norm_parameters(c) for x, c in norms.items()},
    **{
      f'to_{x}': linear_parameters(c_atom, c_atom)
      for x in ('q', 'k', 'v', 'out')
    },
    'pair_bias': linear_parameters(c_pair, num_head),
    'ff1': linear_parameters(c_atom, 4 * c_atom),
    'ff2': linear_parameters(4 * c_atom, c_atom),
  }


def atoms_parameters(
  names: tuple[str, str],
  c_atom: int,
  c_pair: int,
  c_z: int,
  config: AtomTransformerConfig,
) -> pm.Table:
  """Of `transform_atoms`."""
  block = block_parameters(c_atom, c_pair, config.num_head)
  return {
    names[0]: layer_norm_parameters(c_z),
    names[1]: linear_parameters(c_z, c_pair),
    **{x: linear_parameters(c_pair, c_pair) for x in residue_windows.MLP},
    **pm.numbered(block, 'transformer/blocks', config.num_block),
  }


# The transformer.


def atom_transformer_block(
  params: Params,
  num_head: int,
  q: jax.Array,
  c: jax.Array,
  p: jax.Array,
  neighbor_idx: jax.Array,
  valid_mask: jax.Array,
) -> jax.Array:
  """`AtomTransformerBlock` as a function of `block_parameters`."""
  n_atom, c_atom = q.shape
  heads = (n_atom, num_head, c_atom // num_head)
  linear = functools.partial(functional.linear, params)
  layer_norm = functools.partial(functional.layer_norm, params)
  if not neighbor_idx.shape[1]:  # One dead slot: a maximum needs something.
    p = jnp.pad(p, ((0, 0), (0, 1), (0, 0)))
    neighbor_idx = jnp.zeros((n_atom, 1), jnp.int32)
    valid_mask = jnp.zeros((n_atom, 1), bool)

  context = layer_norm('norm_c', c)
  query = linear('to_q', layer_norm('norm_q', q)).reshape(heads)
  key, value = (
    linear(name, context).reshape(heads)[neighbor_idx]
    for name in ('to_k', 'to_v')
  )
  bias = linear('pair_bias', layer_norm('norm_pair', p))
  logits = jnp.einsum(
    'lhd,lkhd->lkh',
    numerics.at_least_float32(query),
    numerics.at_least_float32(key),
  )
  logits = logits * heads[-1] ** -0.5 + numerics.at_least_float32(bias)
  weights = numerics.masked_softmax(logits, valid_mask[..., None], axis=1)
  attended = jnp.einsum('lkh,lkhd->lhd', weights.astype(q.dtype), value)
  q = q + linear('to_out', attended.reshape(n_atom, c_atom))

  hidden = linear('ff1', layer_norm('norm_ff', q))
  return q + linear('ff2', jax.nn.relu(hidden))


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
    table = block_parameters(dims['c_atom'], dims['c_pair'], self.num_head)
    params = pm.haiku_parameters(table, hm.parameter_dtype(q))
    return atom_transformer_block(
      params,
      self.num_head,
      *map(jnp.asarray, (q, c, p)),
      neighbor_idx,
      valid_mask,
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
    for i in range(self.config.num_block):
      block = AtomTransformerBlock(self.config.num_head, name=f'blocks_{i}')
      q = block(q, c, p, neighbor_idx, valid_mask)
    return q


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

  return pm.transform(forward)


# What encoder and decoder do with pairs of atoms.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(AtomTransformerConfig):
  """What encoder and decoder choose about their transformer.

  Attributes:
    window_size: span of the window in residues. Not used where a call brings
      its own plan.
    implementation: 'published' or 'blocked', see `atom_transformers`. None
      takes 'blocked' unless `tok_idx` is traced without a plan, or not sorted.
    max_neighbours: slots per atom in 'published', needed where `tok_idx` is
      traced.
  """

  window_size: int = WINDOW_SIZE
  implementation: Implementation | None = None
  max_neighbours: int | None = None


def neighbours_of(
  config: WindowedConfig,
  tok: Any,
  plan: NeighbourPlan | None,
  max_neighbours: int | None,
) -> Neighbours:
  """The given plan, one made here, or upstream's index lists."""
  implementation = config.implementation
  if plan is not None:
    if implementation == 'published':
      raise ValueError("plan: expected none with implementation='published'")
    if np.shape(plan.row) != np.shape(tok):
      raise ValueError(
        f'plan: made for {np.size(plan.row)} atoms, but tok_idx has '
        f'{np.size(tok)}'
      )
    return plan
  if checks.is_concrete(tok):
    if implementation is None and np.any(np.diff(tok) < 0):
      implementation = 'published'
    if implementation != 'published':
      return plan_neighbours(tok, config.window_size)
  elif implementation == 'blocked':
    raise ValueError(
      "plan: needed by implementation='blocked' where tok_idx is traced; make "
      'it on the host with plan_neighbours(tok_idx, window_size)'
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


def transform_atoms(
  params: Params,
  names: tuple[str, str],
  config: WindowedConfig,
  neighbours: Neighbours,
  q: jax.Array,
  c: jax.Array,
  p_skip: PairSkip | jax.Array,
  z: jax.Array,
  tok: Any,
  *,
  space_uid: jax.Array | None = None,
  atom_mask: jax.Array | None = None,
  return_pair: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Adds z and the MLP to p_skip and runs the transformer.

  Encoder steps 14 to 16, decoder steps 2 to 4; arrays may have a leading
  n_batch.

  Args:
    params: those of `atoms_parameters`.
    names: of the LayerNorm of z and of its projection.
    config: of the encoder or the decoder.
    neighbours: of `neighbours_of`.
    q: [n_atom, c_atom] float.
    c: [n, c_atom] float, rows of atoms; of residues with a `space_uid`.
    p_skip: factors, or [n_atom, n_nbr, c_pair] float.
    z: [n_token, n_token, c_z] float.
    tok: [n_atom] integer, the residue of each atom.
    space_uid: [n_atom] integer, which attention does not leave; or None.
    atom_mask: [n_atom] bool, or None if all atoms are real.
    return_pair: whether to return the pair.

  Returns:
    q [n_atom, c_atom], zero where it is masked, and p [n_atom, n_nbr, c_pair]
    or None.
  """
  if isinstance(neighbours, NeighbourPlan):
    run = functools.partial(
      residue_windows.transform,
      neighbours,
      params,
      names,
      num_block=config.num_block,
      num_head=config.num_head,
      context_idx=None if space_uid is None else tok,
      within_space=space_uid is not None,
      return_pair=return_pair,
    )
    q, p = _by_item(run, q, c, p_skip, z, atom_mask)
  else:
    tok, neighbor_idx, live = map(jnp.asarray, (tok, *neighbours))
    if atom_mask is not None:
      live &= atom_mask[..., :, None] & atom_mask[..., neighbor_idx]
    # z is normalised and projected per pair of tokens, then expanded.
    pair = numerics.at_least_float32(z)
    pair = functional.layer_norm(params, names[0], pair)
    pair = functional.linear(params, names[1], pair)
    p = numerics.at_least_float32(p_skip)
    p = p + pair[..., tok[:, None], tok[neighbor_idx], :]
    hidden = p
    for i, name in enumerate(residue_windows.MLP):
      hidden = jax.nn.relu(hidden) if i else hidden
      hidden = functional.linear(params, name, hidden)
    p = jnp.where(live[..., None], p + hidden, 0)
    if space_uid is not None:
      c = jnp.take(c, tok, axis=-2, mode='clip')
      live &= space_uid[..., :, None] == space_uid[..., neighbor_idx]
    live = jnp.broadcast_to(live, p.shape[:-1])
    for i in range(config.num_block):
      own = pm.below(params, f'transformer/blocks_{i}/')
      block = functools.partial(atom_transformer_block, own, config.num_head)
      if q.ndim == 3:
        block = jax.vmap(block, (0, 0, 0, None, 0))
      q = block(q, c, p, neighbor_idx, live)
    p = p if return_pair else None
  if atom_mask is not None:
    q = jnp.where(atom_mask[..., None], q, 0)
  return q, p


def _by_item(run: Any, *arrays: Any) -> tuple[jax.Array, jax.Array | None]:
  """The blocked form of q, c, p_skip, z, atom_mask and of batches of them."""

  def one(arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array | None]:
    return run(*arrays[:-1], atom_mask=arrays[-1])

  q, c, p_skip, z, atom_mask = arrays
  if q.ndim == 2:
    return one(arrays)
  if isinstance(p_skip, PairSkip):
    shared = p_skip.inverse_square
    shared = jnp.broadcast_to(shared, (len(q), *shared.shape))
    p_skip = dataclasses.replace(p_skip, inverse_square=shared)
  arrays = (q, c, p_skip, z, atom_mask)
  # One after the other keeps a block in the cache of a CPU.
  if jax.default_backend() == 'cpu':
    return jax.lax.map(one, arrays)
  return jax.vmap(one)(arrays)
