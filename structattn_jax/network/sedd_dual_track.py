"""Dual-track transformer of SEDD: a protein and a ligand read each other.

Seed document 004. Two stacks of transformer blocks, one per track; in every
layer each track attends to itself (rotary embedding) and to the previous
layer's state of the other track; the noise level modulates through AdaLN.

We implement the design of protein_lig_sedd
`model/transformers_protlig_cross_improved.py` @ b2af3812 with the repairs that
make it run (attention along the sequence, one projection, rotary on queries
and keys; `variant='published'`), because that file is the one the seed
describes; and the seed's own lines (`variant='seed'`), which leave out what
the file has: norm and modulation before self-attention, norm before the MLP,
and all projections inside cross-attention.

Shapes: n_protein and n_ligand tokens; c_hidden channels; n_head heads of d_head
channels; c_cond channels of the condition. sigma is the total noise (no unit).
"""

import dataclasses
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm

Variant = Literal['published', 'seed']


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualTrackConfig(base_config.BaseConfig):
  """Sizes of the dual-track transformer; defaults are the seed's.

  Attributes:
    hidden_size: channels of both tracks; divisible by `num_head`, and the head
      size must be even for the rotary embedding.
    num_head: number of heads.
    num_block: number of layers.
    cond_dim: channels of the noise condition.
    mlp_ratio: hidden channels of the MLP over `hidden_size`.
    protein_vocab: protein tokens, including the absorbing state.
    ligand_vocab: ligand tokens, including the absorbing state.
    variant: 'published' or 'seed', see the module docstring.
    bfloat16: whether activations are bfloat16. Softmax, norms and parameters
      stay float32.
  """

  hidden_size: int = 768
  num_head: int = 12
  num_block: int = 8
  cond_dim: int = 256
  mlp_ratio: int = 4
  protein_vocab: int = 37
  ligand_vocab: int = 2365
  variant: Variant = 'published'
  bfloat16: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.hidden_size % (2 * self.num_head):
      raise ValueError(
        f'DualTrackConfig.hidden_size: {self.hidden_size} must be divisible '
        f'by 2 * num_head = {2 * self.num_head}'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualTrackOutput:
  """Final hidden states of both tracks.

  Attributes:
    protein: [n_protein, c_hidden].
    ligand: [n_ligand, c_hidden].
  """

  protein: jax.Array
  ligand: jax.Array


class DualTrack(hk.Module):
  """All layers; both tracks of a layer read the previous layer's states.

    for layer i: p' = Block_p,i(p, context=l), l' = Block_l,i(l, context=p);
                 p, l = p', l'

  Layers are stacked: parameters carry a leading axis of `num_block`, under
  `blocks_prot` and `blocks_lig`.
  """

  def __init__(self, config: DualTrackConfig, *, name: str = 'dual_track'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    protein: jax.Array,
    ligand: jax.Array,
    condition: jax.Array,
    protein_mask: jax.Array | None = None,
    ligand_mask: jax.Array | None = None,
  ) -> DualTrackOutput:
    """Returns the states after the last layer.

    Args:
      protein: [n_protein, c_hidden] float, embedded protein tokens.
      ligand: [n_ligand, c_hidden] float, embedded ligand tokens.
      condition: [c_cond] float, from `TimestepEmbedder`.
      protein_mask: [n_protein] bool, True = real token; None = all real.
      ligand_mask: [n_ligand] bool, True = real token; None = all real.

    Returns:
      The hidden states; those of masked tokens are finite and meaningless.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    checks.check_shapes(
      {'c_hidden': self.config.hidden_size, 'c_cond': self.config.cond_dim},
      protein=(protein, 'n_protein c_hidden'),
      ligand=(ligand, 'n_ligand c_hidden'),
      condition=(condition, 'c_cond'),
      protein_mask=(protein_mask, 'n_protein'),
      ligand_mask=(ligand_mask, 'n_ligand'),
    )
    checks.check_dtypes(
      'floating', protein=protein, ligand=ligand, condition=condition
    )
    checks.check_dtypes(
      'bool', protein_mask=protein_mask, ligand_mask=ligand_mask
    )

    def layer(protein, ligand):
      update_protein = DDiTBlock(self.config, name='blocks_prot')
      update_ligand = DDiTBlock(self.config, name='blocks_lig')
      return (
        update_protein(protein, condition, protein_mask, ligand, ligand_mask),
        update_ligand(ligand, condition, ligand_mask, protein, protein_mask),
      )

    stack = hk.layer_stack(self.config.num_block)(layer)
    protein, ligand = stack(protein, ligand)
    return DualTrackOutput(protein, ligand)


class DDiTBlock(hk.Module):
  """Self-attention, optional cross-attention and MLP of one track.

  'published' (norms with scale and offset, no gates):

    shift1, scale1, shift2, scale2 = chunks of W c + b
    h  = LN_1(x) (1 + scale1) + shift1
    x += softmax(rot(q) . rot(k) / sqrt(d_head)) v W_o,   q, k, v = h W_qkv
    x += CrossAttention(x, context)                       if there is one
    x += MLP(LN_2(x) (1 + scale2) + shift2),              GELU, hidden 4x

  'seed': h = x, and the MLP's input is x (1 + scale) + shift without a norm.
  """

  def __init__(self, config: DualTrackConfig, *, name: str = 'ddit_block'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
    context: jax.Array | None = None,
    context_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the updated track.

    Args:
      x: [n, c_hidden] float, this track.
      condition: [c_cond] float.
      mask: [n] bool, True = real token (as a key); None = all real.
      context: [m, c_hidden] float, the other track; None = no
        cross-attention.
      context_mask: [m] bool, True = real token; None = all real.

    Returns:
      [n, c_hidden] in the dtype of `x`.

    Raises:
      ValueError: on a wrong shape.
    """
    config = self.config
    dims = checks.check_shapes(
      {'c_hidden': config.hidden_size, 'c_cond': config.cond_dim},
      x=(x, 'n c_hidden'),
      condition=(condition, 'c_cond'),
      mask=(mask, 'n'),
      context=(context, 'm c_hidden'),
      context_mask=(context_mask, 'm'),
    )
    n, c_hidden = dims['n'], dims['c_hidden']
    published = config.variant == 'published'
    modulation = hm.Linear(
      (4 if published else 2) * c_hidden,
      initializer='zeros',
      name='adaLN_modulation',
    )(condition.astype(x.dtype))
    *first, shift, scale = jnp.split(modulation, 4 if published else 2)

    h = x
    if published:
      h = hm.LayerNorm(name='norm1')(x) * (1 + first[1]) + first[0]
    qkv = hm.Linear(
      3 * c_hidden, initializer='xavier', use_bias=False, name='attn_qkv'
    )(h).reshape(n, 3, config.num_head, -1)
    attended = _attend(
      rotate_half(qkv[:, 0]), rotate_half(qkv[:, 1]), qkv[:, 2], mask
    )
    update = hm.Linear(c_hidden, initializer='xavier', name='attn_out')(
      attended.reshape(n, c_hidden)
    )
    x = x + _if_any(mask, update)

    if context is not None:
      x = x + CrossAttention(config, name='cross_attn')(
        x, context, context_mask
      )

    h = hm.LayerNorm(name='norm2')(x) if published else x
    h = hm.Linear(
      config.mlp_ratio * c_hidden, initializer='torch', name='mlp_0'
    )(h * (1 + scale) + shift)
    h = jax.nn.gelu(h, approximate=False)
    return x + hm.Linear(c_hidden, initializer='torch', name='mlp_3')(h)


class CrossAttention(hk.Module):
  """What one track reads from the other; the caller adds the residual.

  'published' (`ImprovedCrossAttentionLayer`): queries from the normed track,
  keys from the normed context, values from the raw context, each projected,
  and an output projection. 'seed': the same without any projection.
  """

  def __init__(self, config: DualTrackConfig, *, name: str = 'cross_attn'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    context: jax.Array,
    context_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the update of `x`.

    Args:
      x: [n, c_hidden] float, the reading track.
      context: [m, c_hidden] float, the track being read.
      context_mask: [m] bool, True = real token; None = all real.

    Returns:
      [n, c_hidden] in the dtype of `x`; zero if the context is fully masked.
    """
    checks.check_shapes(
      x=(x, 'n c_hidden'),
      context=(context, 'm c_hidden'),
      context_mask=(context_mask, 'm'),
    )
    num_head = self.config.num_head

    def heads(name: str, y: jax.Array) -> jax.Array:
      if self.config.variant == 'published':
        y = hm.Linear(
          y.shape[-1], initializer='xavier', use_bias=False, name=name
        )(y)
      return y.reshape(y.shape[0], num_head, -1)

    attended = _attend(
      heads('q_proj', hm.LayerNorm(name='norm_q')(x)),
      heads('k_proj', hm.LayerNorm(name='norm_kv')(context)),
      heads('v_proj', context),
      context_mask,
    ).reshape(x.shape)
    if self.config.variant == 'seed':
      return attended
    update = hm.Linear(x.shape[-1], initializer='xavier', name='out_proj')(
      attended
    )
    return _if_any(context_mask, update)


class TimestepEmbedder(hk.Module):
  """Condition vector of a noise level: c = SiLU(W_2 SiLU(W_0 e + b_0) + b_2).

  e = [cos(sigma f), sin(sigma f)], f_i = 10000^(-i/128), i < 128.
  """

  def __init__(self, cond_dim: int, *, name: str = 'sigma_map'):
    super().__init__(name=name)
    self.cond_dim = cond_dim

  def __call__(self, sigma: jax.Array) -> jax.Array:
    """Maps sigma [] float (total noise, not time) to [c_cond]."""
    checks.check_shapes(sigma=(sigma, ''))
    checks.check_dtypes('floating', sigma=sigma)
    embedding = timestep_embedding(sigma)
    for name in ('mlp_0', 'mlp_2'):
      linear = hm.Linear(self.cond_dim, initializer='xavier', name=name)
      embedding = jax.nn.silu(linear(embedding))
    return embedding


class TokenEmbedding(hk.Module):
  """Embedded tokens: h = LN(E[token] sqrt(c_hidden))."""

  def __init__(self, vocab_size: int, hidden_size: int, *, name: str):
    super().__init__(name=name)
    self.shape = (vocab_size, hidden_size)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps [n] integer tokens to [n, c_hidden].

    Ids outside the vocabulary raise a ValueError if they are concrete, and
    give NaN under jit.
    """
    checks.check_shapes(tokens=(tokens, 'n'))
    checks.check_dtypes('integer', tokens=tokens)
    if checks.is_concrete(tokens):
      ids = np.asarray(tokens)
      if ids.size and not (ids.min() >= 0 and ids.max() < self.shape[0]):
        raise ValueError(
          f'{self.name}: expected tokens in [0, {self.shape[0]}), got '
          f'{ids.min()} to {ids.max()}'
        )
    table = hk.get_parameter(
      'embedding',
      self.shape,
      jnp.float32,
      hm.initializer('embedding', self.shape[1]),
    )
    rows = (
      jnp.asarray(table)
      .at[tokens]
      .get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
    )
    return hm.LayerNorm(name='norm')(rows * self.shape[1] ** 0.5)


def dual_track_states(
  config: DualTrackConfig,
  protein_tokens: jax.Array,
  ligand_tokens: jax.Array,
  sigma: jax.Array,
  protein_mask: jax.Array | None = None,
  ligand_mask: jax.Array | None = None,
) -> DualTrackOutput:
  """Hidden states of both tracks from tokens; a Haiku function.

  Args:
    config: sizes.
    protein_tokens: [n_protein] integer in [0, protein_vocab).
    ligand_tokens: [n_ligand] integer in [0, ligand_vocab).
    sigma: [] float, total noise.
    protein_mask: [n_protein] bool, True = real token; None = all real.
    ligand_mask: [n_ligand] bool, True = real token; None = all real.

  Returns:
    The hidden states after all layers.

  Raises:
    ValueError: on a wrong shape, or a concrete token outside its vocabulary.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(
    protein_tokens=(protein_tokens, 'n_protein'),
    ligand_tokens=(ligand_tokens, 'n_ligand'),
    sigma=(sigma, ''),
    protein_mask=(protein_mask, 'n_protein'),
    ligand_mask=(ligand_mask, 'n_ligand'),
  )
  checks.check_dtypes(
    'integer', protein_tokens=protein_tokens, ligand_tokens=ligand_tokens
  )
  size = config.hidden_size
  protein = TokenEmbedding(config.protein_vocab, size, name='protein_embed')(
    protein_tokens
  )
  ligand = TokenEmbedding(config.ligand_vocab, size, name='ligand_embed')(
    ligand_tokens
  )
  condition = TimestepEmbedder(config.cond_dim)(sigma)
  if config.bfloat16:
    protein, ligand, condition = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), (protein, ligand, condition)
    )
  return DualTrack(config)(
    protein, ligand, condition, protein_mask, ligand_mask
  )


def transform_dual_track(
  config: DualTrackConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the dual-track transformer.

    >>> config = DualTrackConfig(hidden_size=16, num_head=2, num_block=2)
    >>> init, apply = transform_dual_track(config)
    >>> protein, ligand = jnp.array([0, 4, 5, 2]), jnp.array([0, 7, 1])
    >>> params = init(jax.random.key(0), protein, ligand, jnp.array(0.5))
    >>> states = jax.jit(apply)(params, protein, ligand, jnp.array(0.5))
    >>> states.protein.shape, states.ligand.shape
    ((4, 16), (3, 16))

  Args:
    config: sizes; None takes the seed's.

  Returns:
    `init(key, protein_tokens, ligand_tokens, sigma, protein_mask=None,
    ligand_mask=None)` and `apply(params, ...)` with the same arguments, which
    returns a `DualTrackOutput`; shapes as in `dual_track_states`.
  """
  config = config or DualTrackConfig()

  def forward(
    protein_tokens, ligand_tokens, sigma, protein_mask=None, ligand_mask=None
  ):
    return dual_track_states(
      config, protein_tokens, ligand_tokens, sigma, protein_mask, ligand_mask
    )

  return hk.without_apply_rng(hk.transform(forward))


def timestep_embedding(sigma: jax.Array, size: int = 256) -> jax.Array:
  """Cosines then sines of sigma at geometric frequencies.

  Args:
    sigma: [] float.
    size: static, even.

  Returns:
    [size], at least float32.
  """
  sigma = numerics.at_least_float32(sigma)
  half = size // 2
  frequency = np.exp(-np.log(10000.0) * np.arange(half) / half)
  angle = sigma * jnp.asarray(frequency, sigma.dtype)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])


def rotate_half(x: jax.Array) -> jax.Array:
  """Rotary position embedding, half-split convention, positions 0 .. n-1.

  With x = [x1, x2] split in halves and theta_j = 10000^(-2j/d_head):
  x' = [x1 cos(n theta) - x2 sin(n theta), x2 cos(n theta) + x1 sin(n theta)].

  Args:
    x: [n, n_head, d_head] float, d_head even.

  Returns:
    [n, n_head, d_head] in the dtype of `x`; angles are at least float32.
  """
  n, _, d_head = x.shape
  # In NumPy float64: a float32 product n * theta would cost accuracy at long
  # sequences, and both factors are static.
  frequency = 10000.0 ** (-np.arange(0, d_head, 2) / d_head)
  angle = np.arange(n)[:, None, None] * frequency
  wide = numerics.at_least_float32(x)
  cos = jnp.asarray(np.cos(angle), wide.dtype)
  sin = jnp.asarray(np.sin(angle), wide.dtype)
  first, second = jnp.split(wide, 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )
  return rotated.astype(x.dtype)


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> jax.Array:
  """[n, n_head, d] queries over [m, n_head, d] keys; 0 if all are masked."""
  logits = jnp.einsum(
    'nhd,mhd->hnm', numerics.at_least_float32(q), numerics.at_least_float32(k)
  )
  weights = numerics.masked_softmax(logits * q.shape[-1] ** -0.5, mask)
  return jnp.einsum('hnm,mhd->nhd', weights.astype(v.dtype), v)


def _if_any(mask: jax.Array | None, update: jax.Array) -> jax.Array:
  """No key to attend to means no update, not even the projection's bias."""
  return update if mask is None else jnp.where(jnp.any(mask), update, 0)
