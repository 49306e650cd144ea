"""SEDD on two tracks: proteins and ligands that read each other.

Seed document 004, protein_lig_sedd. Two stacks of transformer blocks, one per
track; in every layer each track attends to itself (rotary embedding) and to
the previous layer's state of the other track; the noise level modulates
through AdaLN. `blocks` says what the variants 'published' and 'seed' follow.

Networks return logits; `discrete_diffusion.log_score` turns them into what
SEDD calls its output. Losses and samplers there take the logits.

Parameters, below the scope of a model; STACK and blocks as in `blocks`:

  {protein,ligand}_embed//embedding
  {protein,ligand}_embed/norm//{scale,offset}
  sigma_map/{mlp_0,mlp_2}//{weights,bias}
  dual_track/STACK/blocks_{prot,lig}/...
  {protein,ligand}_output/{norm_final,linear,adaLN_modulation}

Shapes: n_protein and n_ligand tokens, the rest as in `blocks`.
"""

import dataclasses
from typing import Any, Literal, cast, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks
from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.network.sedd import blocks
from structattn_jax.network.sedd.embeddings import TokenEmbedding

Mode = Literal[
  'joint',
  'protein_only',
  'ligand_only',
  'ligand_given_protein',
  'protein_given_ligand',
]
MODES: tuple[Mode, ...] = get_args(Mode)
_TRACKS = ('protein', 'ligand')
# Scopes of their blocks.
_BLOCKS = {'protein': 'blocks_prot', 'ligand': 'blocks_lig'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualTrackConfig(blocks.DDiTConfig):
  """Sizes of the dual-track transformer; defaults are the seed's.

  Attributes:
    protein_vocab: protein tokens, including the absorbing state.
    ligand_vocab: ligand tokens, including the absorbing state.
    variant: 'published' or 'seed', see `blocks`.
  """

  protein_vocab: int = 37
  ligand_vocab: int = 2365
  variant: Literal['published', 'seed'] = 'published'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProteinLigand:
  """Padded tokens of a batch of complexes.

  Attributes:
    protein: [n_batch, n_protein] int32; None if a mode does not need it.
    ligand: [n_batch, n_ligand] int32; likewise.
    protein_mask: [n_batch, n_protein] bool, True = real token, or in training
      one to be modelled; None = all real.
    ligand_mask: [n_batch, n_ligand] bool, likewise.
  """

  protein: jax.Array | np.ndarray | None = None
  ligand: jax.Array | np.ndarray | None = None
  protein_mask: jax.Array | np.ndarray | None = None
  ligand_mask: jax.Array | np.ndarray | None = None


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

  return pm.transform(forward)


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
    Logits, float32, [n, n_vocab] per track, for `discrete_diffusion.log_score`;
    None for a track that is not generated. Those of masked tokens mean nothing.

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

  keys = blocks.split_keys(dropout_key, 2)
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
    track: blocks.FinalLayer(config, vocab[track], name=f'{track}_output')(
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

  return pm.transform(forward)


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
    keys = blocks.split_keys(dropout_key, 2)
    if mode == 'joint':

      def layer(states, keys):
        masks = (protein_mask, ligand_mask)
        return tuple(
          blocks.DDiTBlock(config, name=_BLOCKS[track])(
            states[i],
            condition,
            masks[i],
            states[1 - i],
            masks[1 - i],
            dropout_key=keys[i],
          )
          for i, track in enumerate(_TRACKS)
        )

      return DualTrackOutput(
        *blocks.run_stack(config, layer, (protein, ligand), keys)
      )

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
    """One track without the other's updates; see `blocks.one_track`."""
    return blocks.one_track(self.config, name, *inputs, **options)


def embedding(config: DualTrackConfig, track: str) -> TokenEmbedding:
  """The embedding module of 'protein' or 'ligand'."""
  vocab = {'protein': config.protein_vocab, 'ligand': config.ligand_vocab}
  return TokenEmbedding(vocab[track], config.hidden_size, name=f'{track}_embed')


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
  keys = dict(zip(_TRACKS, blocks.split_keys(dropout_key, 2), strict=True))
  inputs = {'condition': blocks.condition(config, sigma)}
  for name, ids in tokens.items():
    embedded = embedding(config, name)(cast(jax.Array, ids))
    inputs[name] = functional.dropout(keys[name], config.dropout, embedded)
  if config.bfloat16:
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
  return inputs
