"""AlphaFold 3's diffusion head as published: from noisy to denoised atoms.

Abramson et al. (2024) Suppl. Algs. 20 (diffusion module), 21 (conditioning), 22
(Fourier embedding) and 3 (relative position encoding). The atoms of Algs. 5 to
7 are in `atom_cross_attention`, the transformers of Algs. 23 to 26 in
`diffusion_transformer`; sampling (Algs. 18 and 19) and losses are in
`structattn_jax.diffusion`. Mirrors alphafold3 `model/network/diffusion_head.py`
(`DiffusionHead`), `noise_level_embeddings.py` and
`featurization.create_relative_encoding` @ c0f97ed.

`cached_diffusion_head` computes the same with what is constant over steps and
samples computed once; this is what it is tested and measured against.

Shapes: n_token tokens; n_slot = 24 slots of atoms per token; c_single, c_pair
and c_target channels of the trunk; c_s and c_z of the conditioning, c_token of
the token transformer.
Units: positions and noise levels in angstrom.

Differs from the paper as the released code does: the offset of copies of an
entity is encoded for all tokens of the same entity, also of the same chain;
without conditioning the atoms still see the trunk's single embedding.
Differs from the released code: positions in empty slots are not read, and
logits of tokens that are all masked give zeros.
"""

import dataclasses
import functools
import importlib.resources
import math
from collections.abc import Mapping
from typing import Any, Unpack

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks
from structattn_jax.components import functional, preconditioning
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_cross_attention as published
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import transformer_parameters as tp

# Clipping of offsets along a chain and of copies of an entity.
R_MAX, S_MAX = 32, 2
# Channels of the relative encoding: two one-hot offsets, whether the entity is
# the same, and the one-hot offset of copies.
REL_CHANNELS = 2 * (2 * R_MAX + 2) + 1 + (2 * S_MAX + 2)
# Prefix of the parameters of the atoms; hidden channels of the transitions of
# the conditioning per channel, and how many there are.
ATOMS, _FACTOR, _NUM_TRANSITIONS = 'diffusion', 2, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionHeadConfig(base_config.BaseConfig):
  """Sizes and execution of AF3's diffusion head.

  Attributes:
    seq_channel: channels of the single conditioning.
    pair_channel: channels of the pair conditioning.
    atoms: sizes, quirks and execution of the atom encoder and decoder; its
      `per_token_channels` are those of the token transformer.
    transformer: sizes of the token transformer; `block_remat`: whether to
      recompute its blocks in the backward pass.
    bfloat16: whether the token transformer computes in bfloat16; conditioning,
      softmax, norms and coordinates stay float32. `atoms.bfloat16` is the same
      for the atoms, in `cached_diffusion_head`.
  """

  seq_channel: int = 384
  pair_channel: int = 128
  atoms: published.AtomCrossAttConfig = dataclasses.field(
    default_factory=published.AtomCrossAttConfig
  )
  transformer: tp.TransformerConfig = dataclasses.field(
    default_factory=lambda: tp.TransformerConfig(block_remat=True)
  )
  bfloat16: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'seq_channel', 'pair_channel')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenIds:
  """What the relative encoding and the attention need of the tokens.

  Attributes:
    token_index: [n_token] integer, counts all tokens from 1.
    residue_index: [n_token] integer, position along the sequence of the entity
      from 1, gaps kept; atoms of a ligand share one.
    asym_id: [n_token] integer, running number of the chain from 1.
    entity_id: [n_token] integer, the same for chains of equal sequence.
    sym_id: [n_token] integer, counts the chains of an entity from 1.
    mask: [n_token] bool, True for real tokens. Padding is zero everywhere.
  """

  token_index: jax.Array
  residue_index: jax.Array
  asym_id: jax.Array
  entity_id: jax.Array
  sym_id: jax.Array
  mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionHeadBatch:
  """One structure as the diffusion head takes it.

  Attributes:
    atoms: layout and reference conformers of the atoms.
    tokens: numbers of the tokens, and which are real.
  """

  atoms: atom_layout.DenseBatch
  tokens: TokenIds

  @classmethod
  def from_batch(
    cls, batch: Mapping[str, Any], **options: Unpack[window_plan.PlanOptions]
  ) -> 'DiffusionHeadBatch':
    """Reads upstream's batch dictionary, on the host.

    Args:
      batch: upstream's features: those of `DenseBatch.from_batch`, and
        `token_index`, `residue_index`, `asym_id`, `entity_id`, `sym_id` and
        `seq_mask`, [n_token].
      **options: as in `DenseBatch.from_batch`.

    Returns:
      The typed batch.

    Raises:
      ValueError: if a feature is missing or has a wrong shape.
      TypeError: on a wrong dtype.
    """
    fields = [field.name for field in dataclasses.fields(TokenIds)]
    names = {x: 'seq_mask' if x == 'mask' else x for x in fields}
    missing = [x for x in names.values() if x not in batch]
    if missing:
      raise ValueError(
        f'batch: expected the features {", ".join(missing)}, got '
        f'{", ".join(sorted(batch)[:20])}'
      )
    tokens: dict[str, Any] = {
      field: np.asarray(batch[x]) for field, x in names.items()
    }
    tokens['mask'] = tokens['mask'].astype(bool)
    dense = atom_layout.DenseBatch.from_batch(batch, **options)
    found = cls(dense, TokenIds(**tokens))
    _check_tokens(found)
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrunkEmbeddings:
  """What the trunk hands to the diffusion head.

  Attributes:
    single: [n_token, c_single] float.
    pair: [n_token, n_token, c_pair] float, row token first.
    target_feat: [n_token, c_target] float, the embedded inputs.
  """

  single: jax.Array
  pair: jax.Array
  target_feat: jax.Array


def diffusion_head(
  params: Params,
  positions_noisy: jax.Array,
  noise_level: jax.Array,
  batch: DiffusionHeadBatch,
  embeddings: TrunkEmbeddings,
  use_conditioning: bool | jax.Array = True,
  *,
  config: DiffusionHeadConfig | None = None,
) -> jax.Array:
  """Denoises the atoms of one sample (Alg. 20).

  Args:
    params: with upstream's names below `diffusion_head`; see
      `diffusion_head_parameters`.
    positions_noisy: [n_token, n_slot, 3] float, angstrom.
    noise_level: [] float, angstrom, positive: the paper's t^.
    batch: the structure.
    embeddings: of the trunk.
    use_conditioning: [] bool; False: as if single and pair were zero in the
      conditioning.
    config: quirks and execution; sizes are read off the parameters.

  Returns:
    [n_token, n_slot, 3] denoised positions, angstrom, at least float32; zero
    in empty slots.

  Raises:
    ValueError: on a wrong shape, a noise level that is not positive, or
      parameters for other channels.
    TypeError: on a wrong dtype.
  """
  config = config or DiffusionHeadConfig()
  check_inputs(batch, embeddings, use_conditioning)
  n_token, n_slot = batch.atoms.pred_dense_atom_mask.shape
  lead = {'n_token': (n_token, 'the batch'), 'n_slot': (n_slot, 'the batch')}
  checks.check_shapes(
    lead, positions_noisy=(positions_noisy, 'n_token n_slot 3')
  )
  checks.check_dtypes('floating', positions_noisy=positions_noisy)
  check_noise_level(noise_level)
  mask = jnp.asarray(batch.atoms.pred_dense_atom_mask)[..., None]
  positions = jnp.where(mask, positions_noisy, 0)
  noise_level = jnp.asarray(noise_level, positions.dtype)

  # Line 1.
  single_cond, pair_cond = conditioning(
    params, noise_level, batch.tokens, embeddings, use_conditioning
  )
  # Lines 2 and 3. The atoms see the single embedding in any case.
  encoded = published.atom_cross_att_encoder(
    params,
    batch.atoms,
    preconditioning.preconditioning(noise_level).c_in * positions,
    embeddings.single,
    pair_cond,
    config=config.atoms,
    prefix=ATOMS,
  )
  # Line 4.
  act = encoded.token_act + embed_single_cond(params, single_cond)
  # Line 5.
  dtype = jnp.bfloat16 if config.bfloat16 else act.dtype
  act = dt.transformer(
    pm.below(params, 'transformer/'),
    act.astype(dtype),
    batch.tokens.mask,
    single_cond.astype(dtype),
    pair_cond,
    block_remat=config.transformer.block_remat,
  ).astype(act.dtype)
  # Lines 6 and 7.
  act = functional.layer_norm(params, 'output_norm', act)
  update = published.atom_cross_att_decoder(
    params,
    batch.atoms,
    act,
    encoded,
    config=config.atoms,
    prefix=ATOMS,
  )
  # Line 8.
  denoised = preconditioning.denoised_positions(positions, update, noise_level)
  return jnp.where(mask, denoised, 0)


def conditioning(
  params: Params,
  noise_level: jax.Array,
  tokens: TokenIds,
  embeddings: TrunkEmbeddings,
  use_conditioning: bool | jax.Array = True,
) -> tuple[jax.Array, jax.Array]:
  """Single and pair conditioning (Alg. 21).

  Args:
    params: as in `diffusion_head`.
    noise_level: [] float, angstrom, positive.
    tokens: of the structure.
    embeddings: of the trunk.
    use_conditioning: as in `diffusion_head`.

  Returns:
    [n_token, c_s], and [n_token, n_token, c_z], row token first.
  """
  # Lines 1 to 5.
  pair = jnp.where(use_conditioning, embeddings.pair, 0)
  relative = relative_encoding(tokens).astype(pair.dtype)
  pair_cond = _normalise_and_project(
    params, 'pair_cond_initial', jnp.concatenate([pair, relative], -1)
  )
  pair_cond = transitions(params, 'pair_transition', pair_cond)
  # Lines 6 to 12.
  single_cond = initial_single_cond(params, embeddings, use_conditioning)
  return noisy_single_cond(params, single_cond, noise_level), pair_cond


def initial_single_cond(
  params: Params,
  embeddings: TrunkEmbeddings,
  use_conditioning: bool | jax.Array = True,
) -> jax.Array:
  """The single conditioning before the noise (Alg. 21, lines 6 and 7)."""
  single = jnp.where(use_conditioning, embeddings.single, 0)
  joined = jnp.concatenate([single, embeddings.target_feat], -1)
  return _normalise_and_project(params, 'single_cond_initial', joined)


def noisy_single_cond(
  params: Params, single_cond: jax.Array, noise_level: jax.Array
) -> jax.Array:
  """The single conditioning at a noise level (Alg. 21, lines 8 to 12)."""
  noise = noise_embedding(noise_level).astype(single_cond.dtype)
  single_cond += _normalise_and_project(
    params, 'noise_embedding_initial', noise
  )
  return transitions(params, 'single_transition', single_cond)


def transitions(params: Params, name: str, x: jax.Array) -> jax.Array:
  """The two transitions of a conditioning (Alg. 21, lines 3-5 and 10-12)."""
  for i in range(_NUM_TRANSITIONS):
    x += dt.transition_block(params, x, prefix=f'{name}_{i}')
  return x


def embed_single_cond(params: Params, single_cond: jax.Array) -> jax.Array:
  """The single conditioning for the token activations (Alg. 20, line 4)."""
  return _normalise_and_project(params, 'single_cond_embedding', single_cond)


def noise_embedding(noise_level: jax.Array) -> jax.Array:
  """Fourier embedding of the noise level (Alg. 21 line 8, Alg. 22).

  cos(2 pi (log(t / 16) / 4 w + b)), with w and b drawn once by the authors.

  Args:
    noise_level: [...] float, angstrom, positive.

  Returns:
    [..., 256], in the dtype of `noise_level`.
  """
  weight, bias = (x.astype(noise_level.dtype) for x in noise_constants())
  time = preconditioning.noise_time(noise_level)[..., None]
  return jnp.cos(2 * math.pi * (time * weight + bias))


def relative_encoding(tokens: TokenIds) -> jax.Array:
  """Relative position encoding before its projection (Alg. 3).

  Args:
    tokens: of the structure.

  Returns:
    [n_token, n_token, 139] float32, i row, j column: one-hot offset along the
    sequence of a chain, 66 wide; of tokens in a residue, 66 wide; whether the
    entity is the same; one-hot offset of copies of an entity, 6 wide.
  """
  bins, same_entity = relative_bins(tokens)
  width, copies = 2 * R_MAX + 2, 2 * S_MAX + 2
  return jnp.concatenate(
    [
      jax.nn.one_hot(bins[..., 0], width),
      jax.nn.one_hot(bins[..., 1], width),
      same_entity[..., None].astype(jnp.float32),
      jax.nn.one_hot(bins[..., 2], copies),
    ],
    -1,
  )


def relative_bins(tokens: TokenIds) -> tuple[jax.Array, jax.Array]:
  """Which channels of the relative encoding are one.

  Args:
    tokens: of the structure.

  Returns:
    [n_token, n_token, 3] int32, the bins of the offsets of residues, tokens and
    copies, each within its own one-hot vector; [n_token, n_token] bool, whether
    the entity is the same.
  """

  def compare(name: str) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(getattr(tokens, name)).astype(jnp.int32)
    return x[:, None], x[None]

  def same(name: str) -> jax.Array:
    row, column = compare(name)
    return row == column

  def offset(name: str, largest: int, where: jax.Array) -> jax.Array:
    row, column = compare(name)
    clipped = jnp.clip(row - column + largest, 0, 2 * largest)
    return jnp.where(where, clipped, 2 * largest + 1)

  same_chain, same_entity = same('asym_id'), same('entity_id')
  same_residue = same_chain & same('residue_index')
  bins = [
    offset('residue_index', R_MAX, same_chain),
    offset('token_index', R_MAX, same_residue),
    # The paper's has a bin of its own for the same chain.
    offset('sym_id', S_MAX, same_entity),
  ]
  return jnp.stack(bins, -1), same_entity


class DiffusionHead(hk.Module):
  """`diffusion_head` as a Haiku module, with upstream's parameters.

  Args of the constructor:
    config: sizes, quirks and execution.
    name: name of the module; upstream's is 'diffusion_head'.
  """

  def __init__(
    self,
    config: DiffusionHeadConfig | None = None,
    *,
    name: str = 'diffusion_head',
  ):
    super().__init__(name=name)
    self.config = config or DiffusionHeadConfig()

  def __call__(
    self,
    positions_noisy: jax.Array,
    noise_level: jax.Array,
    batch: DiffusionHeadBatch,
    embeddings: TrunkEmbeddings,
    use_conditioning: bool | jax.Array = True,
  ) -> jax.Array:
    """Arguments and result as `diffusion_head`."""
    return _head(
      self.config,
      positions_noisy,
      noise_level,
      batch,
      embeddings,
      use_conditioning,
    )


def transform_diffusion_head(
  config: DiffusionHeadConfig | None = None,
) -> hk.Transformed:
  """Pure functions of AF3's diffusion head, as published.

  For many steps or samples of one structure `cached_diffusion_head` is the same
  for a part of the work, with the same parameters. Shapes of the released sizes
  for two tokens of three atoms:

    >>> ids, atoms = np.ones(2, np.int32), np.ones((2, 3), np.int32)
    >>> names = 'token_index residue_index asym_id entity_id sym_id'.split()
    >>> batch = DiffusionHeadBatch.from_batch(
    ...   {
    ...     **dict.fromkeys(names, ids),
    ...     'seq_mask': ids > 0,
    ...     'pred_dense_atom_mask': atoms > 0,
    ...     'ref_mask': atoms > 0,
    ...     'ref_pos': np.zeros((2, 3, 3), np.float32),
    ...     'ref_element': atoms,
    ...     'ref_charge': np.zeros((2, 3), np.float32),
    ...     'ref_space_uid': atoms,
    ...     'ref_atom_name_chars': np.ones((2, 3, 4), np.int32),
    ...   },
    ...   num_queries=4,
    ...   num_keys=8,
    ... )
    >>> embeddings = TrunkEmbeddings(
    ...   jnp.ones((2, 384)), jnp.ones((2, 2, 128)), jnp.ones((2, 447))
    ... )
    >>> inputs = (jnp.zeros((2, 3, 3)), jnp.float32(16), batch, embeddings)
    >>> init, apply = transform_diffusion_head()
    >>> params = jax.eval_shape(init, jax.random.key(0), *inputs)
    >>> jax.eval_shape(apply, params, *inputs).shape
    (2, 3, 3)

  Args:
    config: sizes; None takes the released ones.

  Returns:
    `init(key, positions_noisy, noise_level, batch, embeddings,
    use_conditioning=True)` and `apply(params, ...)` with the same arguments,
    which returns denoised positions; see `diffusion_head`.
  """
  return pm.transform(functools.partial(_head, config or DiffusionHeadConfig()))


def diffusion_head_parameters(
  config: DiffusionHeadConfig,
  *,
  single_channels: int = 384,
  pair_channels: int = 128,
  target_channels: int = 447,
) -> pm.Table:
  """All parameters of the head, with upstream's names.

  Args:
    config: sizes.
    single_channels: of the trunk's single embedding.
    pair_channels: of the trunk's pair embedding.
    target_channels: of the embedded inputs.

  Returns:
    The table, for `components.parameters`.
  """
  c_s, c_z = config.seq_channel, config.pair_channel
  c_token = config.atoms.per_token_channels
  joined = {
    'pair_cond_initial': (pair_channels + REL_CHANNELS, c_z),
    'single_cond_initial': (single_channels + target_channels, c_s),
    'noise_embedding_initial': (len(noise_constants()[0]), c_s),
  }
  table = published.atom_cross_att_parameters(
    config.atoms, ATOMS, single_channels=single_channels, pair_channels=c_z
  )
  for name, (size, channels) in joined.items():
    table[f'{name}_norm'] = pm.layer_norm(size)
    table[f'{name}_projection'] = pm.linear(size, channels)
  for name, channels in (('pair', c_z), ('single', c_s)):
    for i in range(_NUM_TRANSITIONS):
      table |= tp.transition_block_parameters(
        channels, None, _FACTOR, f'{name}_transition_{i}'
      )
  table['single_cond_embedding_norm'] = pm.layer_norm(c_s)
  table['single_cond_embedding_projection'] = pm.linear(
    c_s, c_token, initializer='zeros'
  )
  transformer = tp.transformer_parameters(config.transformer, c_token, c_s, c_z)
  table |= {f'transformer/{name}': own for name, own in transformer.items()}
  table['output_norm'] = pm.layer_norm(c_token)
  return table


def check_inputs(
  batch: DiffusionHeadBatch,
  embeddings: TrunkEmbeddings,
  use_conditioning: bool | jax.Array = True,
) -> None:
  """Checks what both forms take, but for positions and noise level.

  Raises:
    ValueError: on a wrong shape.
    TypeError: on a wrong type or dtype.
  """
  for name, given, expected, how in (
    ('batch', batch, DiffusionHeadBatch, 'DiffusionHeadBatch.from_batch'),
    ('embeddings', embeddings, TrunkEmbeddings, 'TrunkEmbeddings'),
  ):
    if not isinstance(given, expected):
      raise TypeError(
        f'{name}: expected {expected.__name__}, got {type(given).__name__}; '
        f'make it with `{how}(...)`'
      )
  _check_tokens(batch)
  arrays = {
    field.name: getattr(embeddings, field.name)
    for field in dataclasses.fields(embeddings)
  }
  checks.check_shapes(
    {'n_token': (batch.atoms.plan.num_tokens, 'the batch')},
    single=(arrays['single'], 'n_token c_single'),
    pair=(arrays['pair'], 'n_token n_token c_pair'),
    target_feat=(arrays['target_feat'], 'n_token c_target'),
  )
  checks.check_dtypes('floating', **arrays)
  checks.check_shapes(use_conditioning=(use_conditioning, ''))
  checks.check_dtypes('bool', use_conditioning=use_conditioning)


def check_noise_level(noise_level: Any) -> None:
  """Checks that a noise level is a positive number, where it is known.

  Raises:
    ValueError: on a wrong shape, or if it is known and not positive.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(noise_level=(noise_level, ''))
  checks.check_dtypes('floating', noise_level=noise_level)
  if checks.is_concrete(noise_level) and not np.asarray(noise_level) > 0:
    raise ValueError(
      f'noise_level: expected a positive number of angstrom, got {noise_level}'
    )


def _head(
  config: DiffusionHeadConfig,
  positions_noisy: jax.Array,
  noise_level: jax.Array,
  batch: DiffusionHeadBatch,
  embeddings: TrunkEmbeddings,
  use_conditioning: bool | jax.Array = True,
) -> jax.Array:
  """`diffusion_head` with parameters in the current Haiku module."""
  check_inputs(batch, embeddings)
  table = diffusion_head_parameters(
    config,
    single_channels=embeddings.single.shape[-1],
    pair_channels=embeddings.pair.shape[-1],
    target_channels=embeddings.target_feat.shape[-1],
  )
  params = pm.haiku_parameters(table, hm.parameter_dtype(embeddings.single))
  return diffusion_head(
    params,
    positions_noisy,
    noise_level,
    batch,
    embeddings,
    use_conditioning,
    config=config,
  )


def _check_tokens(batch: DiffusionHeadBatch) -> None:
  ids = {
    field.name: getattr(batch.tokens, field.name)
    for field in dataclasses.fields(batch.tokens)
  }
  checks.check_shapes(
    {'n_token': (batch.atoms.plan.num_tokens, 'the atoms')},
    **{name: (x, 'n_token') for name, x in ids.items()},
  )
  checks.check_dtypes('bool', mask=ids.pop('mask'))
  checks.check_dtypes('integer', **ids)


def _normalise_and_project(
  params: Params, name: str, x: jax.Array
) -> jax.Array:
  """LayerNorm, then a linear layer without bias."""
  x = functional.layer_norm(params, f'{name}_norm', x)
  return functional.linear(params, f'{name}_projection', x, 'highest')


@functools.cache
def noise_constants() -> tuple[np.ndarray, np.ndarray]:
  """Frequencies and phases of the noise embedding, [256] float64 each."""
  folder = importlib.resources.files('structattn_jax.network.alphafold3')
  path = folder / 'noise_embedding.npz'
  with path.open('rb') as file, np.load(file, allow_pickle=False) as values:
    return values['weight'], values['bias']
