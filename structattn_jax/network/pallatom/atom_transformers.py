"""Pallatom's sparse atom transformers: encoder and decoder.

Follows the API page `pallatom.architecture.atom_transformers` (seed document
002) and the behaviour of github.com/tmatteso/diffusion @ 39c8d25a, written
from its description; step numbers are those of its encoder ("Algorithm 4") and
decoder ("Algorithm 5"). Row l of a sparse pair tensor lists the atoms whose
residue lies within the window of l's residue.

Shapes: n_atom atoms; n_token residues; n_nbr neighbour slots per atom; n_head
heads; c_atom, c_pair (upstream: c_atompair), c_token and c_z channels. Encoder
and decoder also take a leading n_batch. Units: reference positions in angstrom.

Two implementations with the same numbers. 'blocked' works through windows of
consecutive atoms (`residue_windows`): no tensor over atoms and neighbours
exists, neither forward nor backward. 'published' is upstream's form on
[n_atom, n_nbr, c_pair] tensors, for parity and for tokens in any order. What
calls share is the plan of the windows, made once by `plan_neighbours`; there
is no other cached form.

As published, odd or not:
  * Keys and values come from the context c alone, q is never a key. Atoms of a
    token share c in the encoder, so noisy positions of other atoms reach an
    atom only through the pooled s_i.
  * The encoder's attention stays within `ref_space_uid`, the decoder's does
    not; only its p_skip is zero between spaces.
  * Step 1 groups atoms by position, n_atom // n_token at a time, not by token.
  * In a batch `tok_idx[0]` serves all items, except in the mean of step 17.
Those of the blocks are in `atom_blocks`. Differs from published:
`atom_mask` is an extension; an atom without any live slot gets a zero attention
term instead of NaN; under jit the number of slots, or a plan of the windows, is
an argument; logits, softmax and norms are at least float32.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks, numerics
from structattn_jax.components import functional, segment
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.network.pallatom import atom_blocks
from structattn_jax.network.pallatom.neighbour_plan import (
  WINDOW_SIZE as WINDOW_SIZE,
)
from structattn_jax.network.pallatom.neighbour_plan import (
  NeighbourPlan,
)
from structattn_jax.network.pallatom.residue_windows import PairSkip

_ENCODER_NAMES = ('norm_z_init', 'proj_z_init')
_DECODER_NAMES = ('norm_z', 'proj_z')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomFeatureEncoderConfig(atom_blocks.WindowedConfig):
  """Sizes and choices of the encoder; the defaults are Pallatom's main trunk.

  Attributes:
    c_atom: channels of atoms (upstream: m).
    c_pair: channels of atom pairs (upstream: d).
    c_out: channels of the pooled s_i (upstream: c).
    num_block: transformer blocks; the rest as in `WindowedConfig`.
  """

  c_atom: int = 128
  c_pair: int = 16
  c_out: int = 256
  num_block: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomAttentionDecoderConfig(atom_blocks.WindowedConfig):
  """Sizes and choices of the decoder; channels come from the inputs."""


class AtomFeatureEncoderOutput(NamedTuple):
  """What the encoder returns, in upstream's order.

  Attributes:
    s_i: [n_token, c_out], atoms pooled to residues; 0 where there is none.
    q_skip: [n_atom, c_atom], queries after the transformer.
    c_skip: [n_atom, c_atom], features of the reference conformer.
    p_skip: the atom pairs: a `PairSkip` ('blocked'), whose `dense` method gives
      upstream's tensor, or [n_atom, n_nbr, c_pair] ('published').
    c_l: [n_atom, c_atom], context of the decoders.
  """

  s_i: jax.Array
  q_skip: jax.Array
  c_skip: jax.Array
  p_skip: PairSkip | jax.Array
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
    plan: NeighbourPlan | None = None,
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
        wanted; needed by 'blocked' where `tok_idx` is traced.

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
    n_atom, n_token = dims['n_atom'], dims['n_token']
    group = n_atom // max(n_token, 1)
    if not group or n_atom % group:
      raise ValueError(
        f'ref_pos: atoms are grouped n_atom // n_token = {group} at a time '
        f"(n_token={n_token} from 's_input'), which must be at least 1 and "
        f'divide n_atom, got n_atom={n_atom}'
      )
    n_element, c_token, c_z = (
      dims[name] for name in ('n_element', 'c_token', 'c_z')
    )
    table = _encoder_parameters(config, group * (3 + n_element), c_token, c_z)
    params = pm.haiku_parameters(table, hm.parameter_dtype(s_input))
    linear = functools.partial(functional.linear, params)
    # Coordinates must not pass through TF32 or bfloat16 units.
    exact = functools.partial(linear, precision='highest')
    tok_idx = _check_tokens(tok_idx, n_token)
    tok = tok_idx[0] if batch else tok_idx
    dtype = s_input.dtype
    ref_pos, r_scaled = map(numerics.at_least_float32, (ref_pos, r_scaled))
    ref_element = numerics.at_least_float32(ref_element)
    ref_space_uid = jnp.asarray(ref_space_uid)
    count: Any = n_atom
    if atom_mask is not None:
      atom_mask = jnp.asarray(atom_mask)
      real = atom_mask[..., None]
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
    c_group = exact('proj_fref_c', features)
    c_skip = to_atoms(c_group)

    # Steps 5 to 11, in factors. Only differences of positions matter, so that
    # the centre is taken out: exact far from the origin.
    centre = jnp.sum(ref_pos, -2, keepdims=True) / count
    ref_pos = ref_pos - jax.lax.stop_gradient(centre)
    position = exact('proj_d_vec', ref_pos)
    hidden = jax.nn.relu(c_group)
    own, other = (linear(f'proj_{x}_pair', hidden) for x in ('cl', 'cm'))
    constant, inverse_square = (
      params[name]['weights'][0] for name in ('proj_v', 'proj_inv_sq')
    )
    skip: PairSkip | jax.Array = PairSkip(
      query=to_atoms(own) + position + constant,
      key=to_atoms(other) - position,
      position=ref_pos,
      space_uid=ref_space_uid,
      inverse_square=inverse_square,
      atom_mask=atom_mask,
    )

    # Steps 12 and 13; c is the same for all atoms of a residue.
    q = c_skip + exact('proj_r_scaled', r_scaled)
    single = functional.layer_norm(params, 'norm_s_init', s_input)
    single = linear('proj_s_init', single)
    c_token = c_group[..., :n_token, :].astype(dtype) + single

    # Steps 14 to 16.
    neighbours = atom_blocks.neighbours_of(
      config, tok, plan, config.max_neighbours
    )
    if not isinstance(neighbours, NeighbourPlan):
      skip = skip.dense(*neighbours)
    q, _ = atom_blocks.transform_atoms(
      params,
      _ENCODER_NAMES,
      config,
      neighbours,
      q.astype(dtype),
      c_token,
      skip,
      z_input,
      tok,
      space_uid=ref_space_uid,
      atom_mask=atom_mask,
    )

    # Step 17, the one that reads every item's own indices.
    pooled = jax.nn.relu(linear('proj_agg', q))

    def pool(values, ids, mask):
      return segment.segment_mean(values, ids, n_token, mask=mask)

    masks_axis = None if atom_mask is None else 0
    pool = jax.vmap(pool, (0, 0, masks_axis)) if batch else pool
    s_i = pool(pooled, tok_idx, atom_mask)
    return AtomFeatureEncoderOutput(
      s_i, q, c_skip.astype(dtype), skip, to_atoms(c_token)
    )


def _encoder_parameters(
  config: AtomFeatureEncoderConfig, num_feature: int, c_token: int, c_z: int
) -> pm.Table:
  """Of the encoder; `num_feature` is that of all atoms of a residue."""
  linear, names = atom_blocks.linear_parameters, _ENCODER_NAMES
  c_atom, c_pair = config.c_atom, config.c_pair
  return {
    'proj_fref_c': linear(num_feature, c_atom),
    'proj_d_vec': linear(3, c_pair),
    'proj_cl_pair': linear(c_atom, c_pair),
    'proj_cm_pair': linear(c_atom, c_pair),
    'proj_v': linear(1, c_pair),
    'proj_inv_sq': linear(1, c_pair),
    'proj_r_scaled': linear(3, c_atom),
    'norm_s_init': atom_blocks.layer_norm_parameters(c_token),
    'proj_s_init': linear(c_token, c_atom),
    **atom_blocks.atoms_parameters(names, c_atom, c_pair, c_z, config),
    'proj_agg': linear(c_atom, config.c_out),
  }


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
    p_skip: PairSkip | jax.Array,
    c_skip: jax.Array,
    c: jax.Array,
    s: jax.Array,
    z: jax.Array,
    tok_idx: Any,
    atom_mask: jax.Array | None = None,
    *,
    plan: NeighbourPlan | None = None,
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
    separable = isinstance(p_skip, PairSkip)
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
    dims = checks.check_shapes(
      q_skip=(q_skip, f'{lead}n_atom c_atom'),
      **skips,
      c_skip=(c_skip, f'{lead}n_atom c_atom'),
      c=(c, f'{lead}n_atom c_atom'),
      s=(s, f'{lead}n_token c_token'),
      z=(z, f'{lead}n_token n_token c_z'),
      tok_idx=(tok_idx, f'{lead}n_atom'),
      atom_mask=(atom_mask, f'{lead}n_atom'),
    )
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
    table = _decoder_parameters(config, dims)
    params = pm.haiku_parameters(table, hm.parameter_dtype(q_skip))
    tok_idx = _check_tokens(tok_idx, dims['n_token'])
    tok = tok_idx[0] if batch else tok_idx
    if atom_mask is not None:
      atom_mask = jnp.asarray(atom_mask)
    if return_pair is None:
      return_pair = not separable

    def from_single(norm: str, projection: str) -> jax.Array:
      tokens = functional.layer_norm(params, norm, s)
      tokens = functional.linear(params, projection, tokens)
      return jnp.take(tokens, tok, axis=-2, mode='clip').astype(q_skip.dtype)

    # Step 1.
    q = from_single('norm_s_q', 'proj_s_q') + q_skip

    # Steps 2 to 4.
    max_neighbours = config.max_neighbours if separable else dims['n_nbr']
    neighbours = atom_blocks.neighbours_of(config, tok, plan, max_neighbours)
    if separable and not isinstance(neighbours, NeighbourPlan):
      p_skip = p_skip.dense(*neighbours)
    q, p = atom_blocks.transform_atoms(
      params,
      _DECODER_NAMES,
      config,
      neighbours,
      q,
      c,
      p_skip,
      z,
      tok,
      atom_mask=atom_mask,
      return_pair=return_pair,
    )

    # Step 5. Coordinates must not pass through TF32 or bfloat16 units.
    r_update = functional.layer_norm(params, 'norm_q_out', q)
    r_update = functional.linear(
      params, 'proj_r', numerics.at_least_float32(r_update), 'highest'
    )
    if atom_mask is not None:
      r_update = jnp.where(atom_mask[..., None], r_update, 0)

    # Step 6.
    c_out = from_single('norm_s_c', 'proj_s_c') + c_skip
    return AtomAttentionDecoderOutput(q, p, r_update, c_out)


def _decoder_parameters(
  config: AtomAttentionDecoderConfig, dims: Mapping[str, int]
) -> pm.Table:
  """Of the decoder."""
  linear = atom_blocks.linear_parameters
  norm = atom_blocks.layer_norm_parameters
  c_atom, c_pair, c_token = (dims[f'c_{x}'] for x in ('atom', 'pair', 'token'))
  names, c_z = _DECODER_NAMES, dims['c_z']
  return {
    'norm_s_q': norm(c_token),
    'proj_s_q': linear(c_token, c_atom),
    **atom_blocks.atoms_parameters(names, c_atom, c_pair, c_z, config),
    'norm_q_out': norm(c_atom),
    'proj_r': linear(c_atom, 3),
    'norm_s_c': norm(c_token),
    'proj_s_c': linear(c_token, c_atom),
  }


def transform_atom_feature_encoder(
  config: AtomFeatureEncoderConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the encoder.

    >>> from structattn_jax.network.pallatom import plan_neighbours
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
    ...   'plan': plan_neighbours(tok_idx),
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

  return pm.transform(forward)


def transform_atom_attention_decoder(
  config: AtomAttentionDecoderConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the decoder.

    >>> from structattn_jax.network.pallatom import build_sparse_pairs
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

  return pm.transform(forward)


def _check_tokens(tok_idx: Any, n_token: int) -> Any:
  """Checks indices where that is possible; int32 on the host or traced."""
  if not checks.is_concrete(tok_idx):
    return tok_idx
  tok_idx = np.asarray(tok_idx)
  checks.validate_segment_ids(tok_idx.reshape(-1), n_token, name='tok_idx')
  return tok_idx.astype(np.int32)
