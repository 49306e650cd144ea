"""SEDD: discrete diffusion networks of one track, and of protein and ligand.

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

The single track is the original network of Lou, Meng, Ermon 2024
(Score-Entropy-Discrete-Diffusion `model/transformer.py` @ 0605786d;
`variant='sedd'`), and the one whose parameters the seed document counts
(protein_lig_sedd `model/transformer_v100.py` @ d8c4806; `variant='v100'`).

Networks return logits; `log_score` turns them into what SEDD calls its output.
`discrete_diffusion` has losses and samplers, which take the logits.

Parameters, below the scope of a model; all layers of a stack share one entry
with a leading axis of `num_block`, and linear weights are [in, out]:

  {protein,ligand}_embed//embedding          vocab_embed//embedding
  {protein,ligand}_embed/norm//{scale,offset}
  sigma_map/{mlp_0,mlp_2}//{weights,bias}    sigma_map/...
  dual_track/STACK/blocks_{prot,lig}/        sedd/STACK/blocks/
    norm1, norm2, attn_qkv, attn_out,          norm1, norm2, attn_qkv,
    mlp_0, mlp_3, adaLN_modulation             attn_out, mlp_0, mlp_2,
    cross_attn/{norm_q,norm_kv,                adaLN_modulation
      q_proj,k_proj,v_proj,out_proj}
  {protein,ligand}_output/                   output_layer/
    {norm_final,linear,adaLN_modulation}       {...}

with STACK = `__layer_stack_no_per_layer`. Torch's `mlp.0.weight` of block i is
`mlp_0//weights`[i] transposed, and so on.

Shapes: n_protein and n_ligand tokens, or n of one track; c_hidden channels;
n_head heads of d_head channels; c_cond channels of the condition; n_vocab
tokens including the absorbing state, which is the last one. sigma is the total
noise (no unit), not the time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm

Variant = Literal['published', 'seed', 'sedd', 'v100']
Mode = Literal[
  'joint',
  'protein_only',
  'ligand_only',
  'ligand_given_protein',
  'protein_given_ligand',
]
MODES: tuple[Mode, ...] = get_args(Mode)
Remat = Literal['none', 'dots', 'full']

_TRACKS = ('protein', 'ligand')
# Scopes of their blocks.
_BLOCKS = {'protein': 'blocks_prot', 'ligand': 'blocks_lig'}

# One name for all stacks, whether or not layers get inputs of their own.
LAYER_STACK = '__layer_stack_no_per_layer'


@dataclasses.dataclass(frozen=True)
class Style:
  """What the published blocks do differently.

  Attributes:
    gates: whether attention and MLP are multiplied by a modulated gate.
    offset: whether norms have an offset besides the scale.
    attention_bias: whether the output projection of attention has a bias.
    approximate_gelu: whether GELU is the tanh approximation.
    inner_dropout: whether attention weights and the inside of the MLP are
      dropped, too.
    mlp_out: name of the second linear layer.
  """

  gates: bool
  offset: bool
  attention_bias: bool
  approximate_gelu: bool
  inner_dropout: bool
  mlp_out: str


_DUAL = Style(
  gates=False,
  offset=True,
  attention_bias=True,
  approximate_gelu=False,
  inner_dropout=True,
  mlp_out='mlp_3',
)
_SEDD = Style(
  gates=True,
  offset=False,
  attention_bias=False,
  approximate_gelu=True,
  inner_dropout=False,
  mlp_out='mlp_2',
)
STYLES: dict[Variant, Style] = {
  'published': _DUAL,
  'seed': _DUAL,
  'sedd': _SEDD,
  'v100': dataclasses.replace(_SEDD, approximate_gelu=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDiTConfig(base_config.BaseConfig):
  """Sizes of a stack of blocks.

  Attributes:
    hidden_size: channels; divisible by `num_head`, and the head size must be
      even for the rotary embedding.
    num_head: number of heads.
    num_block: number of layers.
    cond_dim: channels of the noise condition.
    mlp_ratio: hidden channels of the MLP over `hidden_size`.
    dropout: rate of all dropouts, if a key is given.
    time_conditioning: False replaces sigma by 0 at the input of the network,
      so that it depends on the tokens alone; samplers then call it only after
      a token has changed.
    remat: what the backward pass computes again in each layer: 'none';
      'dots', all but products with weights; 'full', the layer.
    bfloat16: whether activations are bfloat16. Softmax, norms, parameters and
      output logits stay float32.
  """

  hidden_size: int = 768
  num_head: int = 12
  num_block: int = 8
  cond_dim: int = 256
  mlp_ratio: int = 4
  dropout: float = 0.1
  time_conditioning: bool = True
  remat: Remat = 'none'
  bfloat16: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.hidden_size % (2 * self.num_head):
      raise ValueError(
        f'{type(self).__name__}.hidden_size: {self.hidden_size} must be '
        f'divisible by 2 * num_head = {2 * self.num_head}'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f'{type(self).__name__}.dropout: expected a rate in [0, 1), got '
        f'{self.dropout}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualTrackConfig(DDiTConfig):
  """Sizes of the dual-track transformer; defaults are the seed's.

  Attributes:
    protein_vocab: protein tokens, including the absorbing state.
    ligand_vocab: ligand tokens, including the absorbing state.
    variant: 'published' or 'seed', see the module docstring.
  """

  protein_vocab: int = 37
  ligand_vocab: int = 2365
  variant: Literal['published', 'seed'] = 'published'


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeddConfig(DDiTConfig):
  """Sizes of the single-track transformer; defaults are `sedd-small`'s.

  Attributes:
    vocab: tokens, including the absorbing state if the graph has one.
    variant: 'sedd' or 'v100', see the module docstring. 'v100' applies no SiLU
      to the condition, exact GELU, and no bias to the logits.
  """

  num_block: int = 12
  cond_dim: int = 128
  vocab: int = 50258
  variant: Literal['sedd', 'v100'] = 'sedd'


AnyConfig = DualTrackConfig | SeddConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualTrackOutput:
  """One array per track: hidden states, or logits.

  Attributes:
    protein: [n_protein, c_hidden] states or [n_protein, n_vocab] logits; None
      for logits of a mode that does not generate the protein.
    ligand: [n_ligand, ...], likewise.
  """

  protein: jax.Array | None
  ligand: jax.Array | None


def sedd_dual_track(
  config: DualTrackConfig,
  protein_tokens: jax.Array | None,
  ligand_tokens: jax.Array | None,
  sigma: jax.Array,
  protein_mask: jax.Array | None = None,
  ligand_mask: jax.Array | None = None,
  *,
  mode: Mode = 'joint',
  dropout_key: jax.Array | None = None,
) -> DualTrackOutput:
  """Logits of the generated tracks; a Haiku function.

    joint                 both tracks read each other, layer by layer
    protein_only,         one track without cross-attention
    ligand_only
    ligand_given_protein, the context runs through the first floor(num_block/2)
    protein_given_ligand  blocks of its track by itself; every block of the
                          other track reads that state

  The condition of a context track is the same as that of the generated one,
  although the context carries no noise (as published).

  Args:
    config: sizes.
    protein_tokens: [n_protein] integer in [0, protein_vocab); may be None in
      the mode 'ligand_only'.
    ligand_tokens: [n_ligand] integer in [0, ligand_vocab); may be None in the
      mode 'protein_only'.
    sigma: [] float, total noise of the generated tracks.
    protein_mask: [n_protein] bool, True = real token; None = all real.
    ligand_mask: [n_ligand] bool, True = real token; None = all real.
    mode: what is generated from what. Parameters are the same in all modes.
    dropout_key: PRNG key; None means no dropout.

  Returns:
    Logits, float32 ([n, n_vocab] per track; see `log_score`), and None for a
    track that is not generated. Those of masked tokens mean nothing.

  Raises:
    ValueError: on a wrong shape, an unknown mode, missing tokens, or a concrete
      token outside its vocabulary.
    TypeError: on a wrong dtype.
  """
  tracks = tracks_of(mode)
  tokens = {
    track: value
    for track, value in (('protein', protein_tokens), ('ligand', ligand_tokens))
    if track in (*tracks.generated, *tracks.context)
  }
  for track, value in tokens.items():
    if value is None:
      raise ValueError(f'{track}_tokens: needed in the mode {mode!r}, got None')
  if hk.running_init():
    # Whatever the mode, a model has all parameters.
    nothing = jnp.zeros(1, jnp.int32)
    tokens = {track: tokens.get(track, nothing) for track in _TRACKS}
    mode = 'joint'

  keys = _split(dropout_key, 2)
  inputs = _embedded(
    config,
    tokens,
    sigma,
    {'protein': protein_mask, 'ligand': ligand_mask},
    dropout_key=keys[0],
  )
  states = DualTrack(config)(
    inputs.get('protein'),
    inputs.get('ligand'),
    inputs['condition'],
    protein_mask if 'protein' in tokens else None,
    ligand_mask if 'ligand' in tokens else None,
    mode=mode,
    dropout_key=keys[1],
  )
  vocab = {'protein': config.protein_vocab, 'ligand': config.ligand_vocab}
  logits = {
    track: FinalLayer(config, vocab[track], name=f'{track}_output')(
      getattr(states, track), inputs['condition']
    )
    for track in _TRACKS
    if getattr(states, track) is not None
  }
  return DualTrackOutput(
    **{
      track: logits[track] if track in tracks.generated else None
      for track in _TRACKS
    }
  )


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
  inputs = _embedded(
    config,
    {'protein': protein_tokens, 'ligand': ligand_tokens},
    sigma,
    {'protein': protein_mask, 'ligand': ligand_mask},
  )
  return DualTrack(config)(
    inputs['protein'],
    inputs['ligand'],
    inputs['condition'],
    protein_mask,
    ligand_mask,
  )


def sedd(
  config: SeddConfig,
  tokens: jax.Array,
  sigma: jax.Array,
  mask: jax.Array | None = None,
  *,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Logits of the single-track network; a Haiku function.

  Lou, Meng, Ermon 2024, with the sigma scaling left to `log_score`.

  Args:
    config: sizes and variant.
    tokens: [n] integer in [0, vocab).
    sigma: [] float, total noise.
    mask: [n] bool, True = real token; None = all real.
    dropout_key: PRNG key; None means no dropout.

  Returns:
    [n, n_vocab] logits, float32.

  Raises:
    ValueError: on a wrong shape, or a concrete token outside the vocabulary.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(tokens=(tokens, 'n'), sigma=(sigma, ''), mask=(mask, 'n'))
  checks.check_dtypes('integer', tokens=tokens)
  checks.check_dtypes('bool', mask=mask)
  x = embedding(config, 'vocab')(tokens)
  condition = _condition(config, sigma)
  if config.bfloat16:
    x, condition = x.astype(jnp.bfloat16), condition.astype(jnp.bfloat16)
  x = Track(config, name='sedd')(x, condition, mask, dropout_key=dropout_key)
  return FinalLayer(config, config.vocab, name='output_layer')(x, condition)


def transform_sedd_dual_track(
  config: DualTrackConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the complete dual-track network.

    >>> config = DualTrackConfig(hidden_size=16, num_head=2, num_block=2)
    >>> init, apply = transform_sedd_dual_track(config)
    >>> protein, ligand = jnp.array([0, 4, 36, 2]), jnp.array([0, 7, 1])
    >>> params = init(jax.random.key(0), protein, ligand, jnp.array(0.5))
    >>> logits = apply(
    ...   params, protein, ligand, jnp.array(0.5), mode='protein_given_ligand'
    ... )
    >>> logits.protein.shape, logits.ligand
    ((4, 37), None)

  Args:
    config: sizes; None takes the seed's.

  Returns:
    `init(key, protein_tokens, ligand_tokens, sigma, protein_mask=None,
    ligand_mask=None, *, mode='joint', dropout_key=None)` and
    `apply(params, ...)` with the same arguments, as `sedd_dual_track`. Batches
    come from `jax.vmap(apply, in_axes=...)`; in_axes None for a context shared
    by all samples computes its state once.
  """
  config = config or DualTrackConfig()

  def forward(
    protein_tokens,
    ligand_tokens,
    sigma,
    protein_mask=None,
    ligand_mask=None,
    *,
    mode: Mode = 'joint',
    dropout_key=None,
  ):
    return sedd_dual_track(
      config,
      protein_tokens,
      ligand_tokens,
      sigma,
      protein_mask,
      ligand_mask,
      mode=mode,
      dropout_key=dropout_key,
    )

  return hk.without_apply_rng(hk.transform(forward))


def transform_sedd(config: SeddConfig | None = None) -> hk.Transformed:
  """Pure functions of the single-track network.

    >>> config = SeddConfig(hidden_size=16, num_head=2, num_block=2, vocab=21)
    >>> init, apply = transform_sedd(config)
    >>> params = init(jax.random.key(0), jnp.array([3, 20]), jnp.array(0.5))
    >>> apply(params, jnp.array([3, 20]), jnp.array(0.5)).shape
    (2, 21)

  Args:
    config: sizes; None takes those of `sedd-small`.

  Returns:
    `init(key, tokens, sigma, mask=None, *, dropout_key=None)` and
    `apply(params, ...)` with the same arguments, as `sedd`.
  """
  config = config or SeddConfig()

  def forward(tokens, sigma, mask=None, *, dropout_key=None):
    return sedd(config, tokens, sigma, mask, dropout_key=dropout_key)

  return hk.without_apply_rng(hk.transform(forward))


def transform_dual_track(
  config: DualTrackConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the dual-track transformer, up to the hidden states.

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
    returns a `DualTrackOutput`; shapes as in `dual_track_states`. Parameters
    are those of `transform_sedd_dual_track` without the output layers.
  """
  config = config or DualTrackConfig()

  def forward(
    protein_tokens, ligand_tokens, sigma, protein_mask=None, ligand_mask=None
  ):
    return dual_track_states(
      config, protein_tokens, ligand_tokens, sigma, protein_mask, ligand_mask
    )

  return hk.without_apply_rng(hk.transform(forward))


def log_score(
  logits: jax.Array,
  tokens: jax.Array,
  sigma: jax.Array,
  *,
  scale_by_sigma: bool = True,
) -> jax.Array:
  """SEDD's output: log p_sigma(v) / p_sigma(x) for one changed token.

    s_v = logit_v - log(e^sigma - 1) - log(n_vocab - 1),    s_x = 0

  These are not probabilities. For the uniform graph the subtraction is left
  out.

  Args:
    logits: [..., n, n_vocab] float.
    tokens: [..., n] integer, the input of the network.
    sigma: float that broadcasts against `tokens`, total noise: [] for one
      sequence, [batch, 1] for a batch.
    scale_by_sigma: whether to subtract; True for absorbing graphs.

  Returns:
    [..., n, n_vocab], at least float32.
  """
  logits = numerics.at_least_float32(logits)
  n_vocab = logits.shape[-1]
  if scale_by_sigma:
    offset = log_expm1(jnp.asarray(sigma, logits.dtype))
    logits -= offset[..., None] + np.log(n_vocab - 1)
  # A comparison with the index, so that no one-hot array is made.
  index = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
  return jnp.where(index == tokens[..., None], 0, logits)


def log_expm1(x: jax.Array) -> jax.Array:
  """log(e^x - 1) for x >= 0, accurate near 0 and without overflow."""
  return x + jnp.log(-jnp.expm1(-x))


@dataclasses.dataclass(frozen=True)
class ModeTracks:
  """Which tracks a mode generates, and which it reads."""

  generated: tuple[str, ...]
  context: tuple[str, ...]


def tracks_of(mode: Mode) -> ModeTracks:
  """The tracks of a mode, 'protein' before 'ligand'.

  Raises:
    ValueError: on an unknown mode.
  """
  if mode not in MODES:
    raise ValueError(f'mode: expected one of {", ".join(MODES)}, got {mode!r}')
  if mode == 'joint':
    return ModeTracks(('protein', 'ligand'), ())
  target, _, context = mode.partition('_given_')
  return ModeTracks(
    (target.removesuffix('_only'),), (context,) if context else ()
  )


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
    protein: jax.Array | None,
    ligand: jax.Array | None,
    condition: jax.Array,
    protein_mask: jax.Array | None = None,
    ligand_mask: jax.Array | None = None,
    *,
    mode: Mode = 'joint',
    dropout_key: jax.Array | None = None,
  ) -> DualTrackOutput:
    """Returns the states after the last layer.

    Args:
      protein: [n_protein, c_hidden] float, embedded protein tokens; None if the
        mode does not use them.
      ligand: [n_ligand, c_hidden] float, embedded ligand tokens; likewise.
      condition: [c_cond] float, from `TimestepEmbedder`.
      protein_mask: [n_protein] bool, True = real token; None = all real.
      ligand_mask: [n_ligand] bool, True = real token; None = all real.
      mode: see `sedd_dual_track`.
      dropout_key: PRNG key; None means no dropout.

    Returns:
      The hidden states; those of masked tokens are finite and meaningless. None
      for a track that is not generated.

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
    config = self.config
    tracks = tracks_of(mode)
    states = {
      'protein': (protein, protein_mask),
      'ligand': (ligand, ligand_mask),
    }
    for track in (*tracks.generated, *tracks.context):
      if states[track][0] is None:
        raise ValueError(f'{track}: needed in the mode {mode!r}, got None')
    keys = _split(dropout_key, 2)
    if mode == 'joint':

      def layer(states, keys):
        masks = (protein_mask, ligand_mask)
        return tuple(
          DDiTBlock(config, name=_BLOCKS[track])(
            states[i],
            condition,
            masks[i],
            states[1 - i],
            masks[1 - i],
            dropout_key=keys[i],
          )
          for i, track in enumerate(_TRACKS)
        )

      return DualTrackOutput(*_stack(config, layer, (protein, ligand), keys))

    context, context_mask = None, None
    for track in tracks.context:
      x, context_mask = states[track]
      context = self.one_track(
        _BLOCKS[track],
        x,
        condition,
        context_mask,
        num_layer=config.num_block // 2,
        dropout_key=keys[0],
      )
    (track,) = tracks.generated
    x, mask = states[track]
    x = self.one_track(
      _BLOCKS[track],
      x,
      condition,
      mask,
      context,
      context_mask,
      dropout_key=keys[1],
    )
    return DualTrackOutput(
      **{other: x if other == track else None for other in _TRACKS}
    )

  # Names of modules are counted per call of a method: two calls use one stack.
  @hk.name_like('__call__')
  def one_track(self, name: str, *inputs: Any, **options: Any) -> jax.Array:
    """One track without the other's updates; see `_one_track`."""
    return _one_track(self.config, name, *inputs, **options)


class Track(hk.Module):
  """A stack of blocks without cross-attention, under the name `blocks`."""

  def __init__(self, config: SeddConfig, *, name: str = 'sedd'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Maps [n, c_hidden] to the states after the last layer; see `sedd`."""
    return _one_track(
      self.config, 'blocks', x, condition, mask, dropout_key=dropout_key
    )


def _one_track(
  config: AnyConfig,
  name: str,
  x: Any,
  condition: jax.Array,
  mask: jax.Array | None,
  context: jax.Array | None = None,
  context_mask: jax.Array | None = None,
  *,
  num_layer: int | None = None,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """One track through the first `num_layer` of its blocks; None = all."""

  def layer(x, keys):
    return DDiTBlock(config, name=name)(
      x, condition, mask, context, context_mask, dropout_key=keys[0]
    )

  return _stack(config, layer, x, (dropout_key,), num_layer)


def _stack(
  config: AnyConfig,
  layer: Callable[..., Any],
  states: Any,
  keys: tuple[jax.Array | None, ...],
  num_layer: int | None = None,
) -> Any:
  """Runs `layer(states, keys)` over stacked parameters of all layers."""
  if config.remat != 'none':
    policies = jax.checkpoint_policies
    layer = hk.remat(
      layer,
      # Without a policy nothing is kept.
      policy=policies.dots_with_no_batch_dims_saveable
      if config.remat == 'dots'
      else None,
      # The loop over layers already keeps XLA from merging the two passes.
      prevent_cse=False,
    )

  def step(states, index, keys):
    if num_layer is None or num_layer == config.num_block:
      return layer(states, keys), None
    # The parameters of the layers beyond are there, but not used.
    return hk.cond(
      index < num_layer, layer, lambda states, keys: states, states, keys
    ), None

  keys = tuple(
    None if key is None else jax.random.split(key, config.num_block)
    for key in keys
  )
  stack = hk.layer_stack(
    config.num_block, with_per_layer_inputs=True, name=LAYER_STACK
  )
  states, _ = stack(step)(states, jnp.arange(config.num_block), keys)
  return states


class DDiTBlock(hk.Module):
  """Self-attention, optional cross-attention and MLP of one track.

  'published' (norms with scale and offset, no gates):

    shift1, scale1, shift2, scale2 = chunks of W c + b
    h  = LN_1(x) (1 + scale1) + shift1
    x += softmax(rot(q) . rot(k) / sqrt(d_head)) v W_o,   q, k, v = h W_qkv
    x += CrossAttention(x, context)                       if there is one
    x += MLP(LN_2(x) (1 + scale2) + shift2),              GELU, hidden 4x

  'seed': h = x, and the MLP's input is x (1 + scale) + shift without a norm.
  'sedd' and 'v100' multiply both updates by gates, which are two more chunks;
  see `Style` for the rest.
  """

  def __init__(self, config: AnyConfig, *, name: str = 'ddit_block'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
    context: jax.Array | None = None,
    context_mask: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the updated track.

    Args:
      x: [n, c_hidden] float, this track.
      condition: [c_cond] float.
      mask: [n] bool, True = real token (as a key); None = all real.
      context: [m, c_hidden] float, the other track; None = no
        cross-attention.
      context_mask: [m] bool, True = real token; None = all real.
      dropout_key: PRNG key; None means no dropout.

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
    style = STYLES[config.variant]
    normed = config.variant != 'seed'
    keys = _split(dropout_key, 5)

    def drop(index: int, x: jax.Array) -> jax.Array:
      return functional.dropout(keys[index], config.dropout, x)

    gate1, gate2 = 1, 1
    num_chunk = 6 if style.gates else 4 if normed else 2
    chunks = jnp.split(
      hm.Linear(
        num_chunk * c_hidden, initializer='zeros', name='adaLN_modulation'
      )(condition.astype(x.dtype)),
      num_chunk,
    )
    if style.gates:
      shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    elif normed:
      shift1, scale1, shift2, scale2 = chunks
    else:
      shift2, scale2 = chunks

    h = x
    if normed:
      norm1 = hm.LayerNorm(create_offset=style.offset, name='norm1')
      h = norm1(x) * (1 + scale1) + shift1
    # Xavier's bound is that of the fused matrix, as published.
    qkv = hm.Linear(
      3 * c_hidden,
      initializer='torch' if style.gates else 'xavier',
      use_bias=False,
      name='attn_qkv',
    )(h).reshape(n, 3, config.num_head, -1)
    attended = _attend(
      rotate_half(qkv[:, 0]),
      rotate_half(qkv[:, 1]),
      qkv[:, 2],
      mask,
      rate=config.dropout if style.inner_dropout else 0.0,
      dropout_key=keys[0],
    )
    update = hm.Linear(
      c_hidden,
      initializer='torch' if style.gates else 'xavier',
      use_bias=style.attention_bias,
      name='attn_out',
    )(attended.reshape(n, c_hidden))
    if not style.inner_dropout:
      update = drop(0, update)
    x = x + gate1 * _if_any(mask, update)

    if context is not None:
      x = x + CrossAttention(config, name='cross_attn')(
        x, context, context_mask, dropout_key=keys[1]
      )

    h = x
    if normed:
      h = hm.LayerNorm(create_offset=style.offset, name='norm2')(x)
    h = hm.Linear(
      config.mlp_ratio * c_hidden, initializer='torch', name='mlp_0'
    )(h * (1 + scale2) + shift2)
    h = gelu(h, approximate=style.approximate_gelu)
    if style.inner_dropout:
      h = drop(2, h)
    h = hm.Linear(c_hidden, initializer='torch', name=style.mlp_out)(h)
    return x + gate2 * drop(3, h)


class CrossAttention(hk.Module):
  """What one track reads from the other; the caller adds the residual.

  'published' (`ImprovedCrossAttentionLayer`): queries from the normed track,
  keys from the normed context, values from the raw context, each projected,
  and an output projection. 'seed': the same without any projection.
  """

  def __init__(self, config: AnyConfig, *, name: str = 'cross_attn'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    context: jax.Array,
    context_mask: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the update of `x`.

    Args:
      x: [n, c_hidden] float, the reading track.
      context: [m, c_hidden] float, the track being read.
      context_mask: [m] bool, True = real token; None = all real.
      dropout_key: PRNG key; None means no dropout.

    Returns:
      [n, c_hidden] in the dtype of `x`; zero if the context is fully masked.
    """
    checks.check_shapes(
      x=(x, 'n c_hidden'),
      context=(context, 'm c_hidden'),
      context_mask=(context_mask, 'm'),
    )
    config = self.config
    keys = _split(dropout_key, 2)

    def heads(name: str, y: jax.Array) -> jax.Array:
      if config.variant == 'published':
        y = hm.Linear(
          y.shape[-1], initializer='xavier', use_bias=False, name=name
        )(y)
      return y.reshape(y.shape[0], config.num_head, -1)

    attended = _attend(
      heads('q_proj', hm.LayerNorm(name='norm_q')(x)),
      heads('k_proj', hm.LayerNorm(name='norm_kv')(context)),
      heads('v_proj', context),
      context_mask,
      rate=config.dropout,
      dropout_key=keys[0],
    ).reshape(x.shape)
    if config.variant == 'seed':
      return functional.dropout(keys[1], config.dropout, attended)
    update = hm.Linear(x.shape[-1], initializer='xavier', name='out_proj')(
      attended
    )
    return _if_any(
      context_mask, functional.dropout(keys[1], config.dropout, update)
    )


class FinalLayer(hk.Module):
  """Logits: W (LN(x) (1 + scale) + shift) + b, modulated by the condition."""

  def __init__(self, config: AnyConfig, vocab_size: int, *, name: str):
    super().__init__(name=name)
    self.config = config
    self.vocab_size = vocab_size

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Maps [n, c_hidden], [c_cond] to [n, vocab_size], at least float32."""
    style = STYLES[self.config.variant]
    shift, scale = jnp.split(
      hm.Linear(2 * x.shape[-1], initializer='zeros', name='adaLN_modulation')(
        condition.astype(x.dtype)
      ),
      2,
    )
    norm = hm.LayerNorm(create_offset=style.offset, name='norm_final')
    h = norm(x) * (1 + scale) + shift
    # Differences of logits matter at 1e-3: float32 from here on.
    return hm.Linear(
      self.vocab_size,
      initializer='zeros',
      use_bias=self.config.variant != 'v100',
      name='linear',
    )(numerics.at_least_float32(h))


class TimestepEmbedder(hk.Module):
  """Condition vector of a noise level: c = SiLU(W_2 SiLU(W_0 e + b_0) + b_2).

  e = [cos(sigma f), sin(sigma f)], f_i = 10000^(-i/128), i < 128. 'v100' leaves
  the last SiLU out.
  """

  def __init__(
    self,
    cond_dim: int,
    *,
    variant: Variant = 'published',
    name: str = 'sigma_map',
  ):
    super().__init__(name=name)
    self.cond_dim = cond_dim
    self.variant: Variant = variant

  def __call__(self, sigma: jax.Array) -> jax.Array:
    """Maps sigma [] float (total noise, not time) to [c_cond]."""
    checks.check_shapes(sigma=(sigma, ''))
    checks.check_dtypes('floating', sigma=sigma)
    kind = 'torch' if STYLES[self.variant].gates else 'xavier'
    embedding = timestep_embedding(sigma)
    for name in ('mlp_0', 'mlp_2'):
      embedding = hm.Linear(self.cond_dim, initializer=kind, name=name)(
        embedding
      )
      if name == 'mlp_0' or self.variant != 'v100':
        embedding = jax.nn.silu(embedding)
    return embedding


class TokenEmbedding(hk.Module):
  """Embedded tokens: h = LN(E[token] sqrt(c_hidden)), or E[token] alone."""

  def __init__(
    self,
    vocab_size: int,
    hidden_size: int,
    *,
    normalise: bool = True,
    name: str,
  ):
    super().__init__(name=name)
    self.shape = (vocab_size, hidden_size)
    self.normalise = normalise

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
      hm.initializer('embedding' if self.normalise else 'torch', self.shape[1]),
    )
    rows = (
      jnp.asarray(table)
      .at[tokens]
      .get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
    )
    if not self.normalise:
      return rows
    return hm.LayerNorm(name='norm')(rows * self.shape[1] ** 0.5)


def embedding(config: AnyConfig, track: str) -> TokenEmbedding:
  """The embedding module of 'protein' or 'ligand', or of the only track."""
  if isinstance(config, DualTrackConfig):
    vocab = {'protein': config.protein_vocab, 'ligand': config.ligand_vocab}
    return TokenEmbedding(
      vocab[track], config.hidden_size, name=f'{track}_embed'
    )
  return TokenEmbedding(
    config.vocab, config.hidden_size, normalise=False, name='vocab_embed'
  )


def _condition(config: AnyConfig, sigma: jax.Array) -> jax.Array:
  if not config.time_conditioning:
    sigma = jnp.zeros_like(sigma)
  return TimestepEmbedder(config.cond_dim, variant=config.variant)(sigma)


def _embedded(
  config: DualTrackConfig,
  tokens: dict[str, jax.Array | None],
  sigma: jax.Array,
  masks: dict[str, jax.Array | None],
  dropout_key: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Embedded tracks by name, and 'condition'."""
  for name, ids in tokens.items():
    n = f'n_{name}'
    checks.check_shapes(
      **{f'{name}_tokens': (ids, n), f'{name}_mask': (masks[name], n)}
    )
    checks.check_dtypes('integer', **{f'{name}_tokens': ids})
  checks.check_shapes(sigma=(sigma, ''))
  keys = dict(zip(_TRACKS, _split(dropout_key, 2), strict=True))
  inputs = {'condition': _condition(config, sigma)}
  for name, ids in tokens.items():
    embedded = embedding(config, name)(cast(jax.Array, ids))
    inputs[name] = functional.dropout(keys[name], config.dropout, embedded)
  if config.bfloat16:
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
  return inputs


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
  cos, sin = rotary_tables(n, d_head)
  return rotate(x, cos[:, None], sin[:, None])


def rotary_tables(n: int, d_head: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines, [n, d_head / 2] float64 NumPy, of `rotate_half`."""
  # In NumPy float64: a float32 product n * theta would cost accuracy at long
  # sequences, and both factors are static.
  frequency = 10000.0 ** (-np.arange(0, d_head, 2) / d_head)
  angle = np.arange(n)[:, None] * frequency
  return np.cos(angle), np.sin(angle)


def rotate(x: jax.Array, cos: Any, sin: Any) -> jax.Array:
  """Rotates [..., d_head] by tables that broadcast to [..., d_head / 2]."""
  wide = numerics.at_least_float32(x)
  cos, sin = jnp.asarray(cos, wide.dtype), jnp.asarray(sin, wide.dtype)
  first, second = jnp.split(wide, 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )
  return rotated.astype(x.dtype)


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
  """GELU; x (1 + erf(x / sqrt 2)) / 2, or the tanh approximation.

  `jax.nn.gelu` has the complementary error function instead, which keeps small
  results at large negative x accurate relative to themselves, and takes three
  times as long on CPU.
  """
  if approximate:
    return jax.nn.gelu(x, approximate=True)
  return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


# From so many logits per head on, one head at a time is faster on CPU, where
# they then stay in cache, and its backward pass computes them again.
_LARGE = 2**14


def _attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  *,
  rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """[n, n_head, d] queries over [m, n_head, d] keys; 0 if all are masked."""
  keys = None
  if dropout_key is not None:
    keys = jax.random.split(dropout_key, q.shape[1])
  # Heads in front.
  heads = *(jnp.moveaxis(x, 1, 0) for x in (q, k, v)), keys

  def one(head):
    q, k, v, key = head
    logits = numerics.at_least_float32(q) @ numerics.at_least_float32(k).T
    weights = numerics.masked_softmax(logits * q.shape[-1] ** -0.5, mask)
    return functional.dropout(key, rate, weights).astype(v.dtype) @ v

  is_large = len(q) * len(k) >= _LARGE and jax.default_backend() == 'cpu'
  if is_large:
    attended = jax.lax.map(jax.checkpoint(one, prevent_cse=False), heads)
  else:
    attended = jax.vmap(one)(heads)
  return jnp.moveaxis(attended, 0, 1)


def _if_any(mask: jax.Array | None, update: jax.Array) -> jax.Array:
  """No key to attend to means no update, not even the projection's bias."""
  return update if mask is None else jnp.where(jnp.any(mask), update, 0)


def _split(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
  """Independent keys, or as many None."""
  return (None,) * count if key is None else tuple(jax.random.split(key, count))
