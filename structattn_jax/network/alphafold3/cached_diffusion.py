"""AF3's diffusion head with the work done once that can be.

Abramson et al. (2024) Suppl. Algs. 20 and 21: the numbers of `diffusion_head`,
which is the published form. Once per structure, for all steps and samples:
relative encoding and pair conditioning, the pair side of all attention, and
what of the atoms depends on no noisy position. Once per step, for all samples:
the single conditioning and its adaptive terms in every block. Per sample: the
atoms and the activations of the tokens.

Shapes and units: see `diffusion_head`; n_sample samples, n_block blocks of the
token transformer with n_head heads.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from structattn_jax.common import checks, numerics
from structattn_jax.components import functional, mapping, preconditioning
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_layout
from structattn_jax.network.alphafold3 import cached_atom_attention as aca
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import transformer_parameters as tp

# Pairs of tokens whose conditioning is computed at a time: what stays in cache
# on CPU, and what takes half a GB elsewhere.
_CPU_PAIRS, _DEVICE_PAIRS = 2048, 1 << 18
# Logits that stay in cache on CPU.
_CPU_LOGITS = 1 << 18
# Bytes up to which pair logits are kept by default.
_MOST_LOGITS = 1 << 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionConditioning:
  """Result of `precompute`: constant over diffusion steps and samples.

  Attributes:
    atoms: of the atom encoder and decoder.
    atom_mask: [n_token, n_slot] bool, slots that hold an atom.
    token_mask: [n_token] bool, True for real tokens.
    single_cond: [n_token, c_s], before the noise.
    pair: [n_token, n_token, c_z], normalised pair conditioning; None if its
      logits are there.
    pair_logits: [n_block, n_head, n_token, n_token], or None.
  """

  atoms: aca.AtomConditioning
  atom_mask: jax.Array
  token_mask: jax.Array
  single_cond: jax.Array
  pair: jax.Array | None
  pair_logits: jax.Array | None


class Init(Protocol):
  """Makes parameters; see `cached_diffusion_head`."""

  def __call__(
    self,
    key: jax.Array,
    batch: dh.DiffusionHeadBatch,
    embeddings: dh.TrunkEmbeddings,
  ) -> dict[str, dict[str, jax.Array]]:
    """Initial parameters for the channels of the embeddings."""
    ...


class Precompute(Protocol):
  """Does what is constant; see `cached_diffusion_head`."""

  def __call__(
    self,
    params: Params,
    batch: dh.DiffusionHeadBatch,
    embeddings: dh.TrunkEmbeddings,
    use_conditioning: bool | jax.Array = True,
  ) -> DiffusionConditioning:
    """What all steps and samples share."""
    ...


class Denoise(Protocol):
  """Denoises samples; see `cached_diffusion_head`."""

  def __call__(
    self,
    params: Params,
    conditioning: DiffusionConditioning,
    positions_noisy: jax.Array,
    noise_level: jax.Array,
  ) -> jax.Array:
    """Denoised positions of all samples."""
    ...


class CachedDiffusionHead(NamedTuple):
  """The functions of `cached_diffusion_head`."""

  init: Init
  precompute: Precompute
  denoise: Denoise


def cached_diffusion_head(
  config: dh.DiffusionHeadConfig | None = None,
  *,
  cache_pair_logits: bool | None = None,
) -> CachedDiffusionHead:
  """AF3's diffusion head for many steps and samples of one structure.

    init, precompute, denoise = cached_diffusion_head()
    conditioning = jax.jit(precompute)(params, batch, embeddings)
    step = jax.jit(functools.partial(denoise, params, conditioning))
    denoised = step(positions_noisy, noise_level)

  `init(key, batch, embeddings)` makes the parameters, the same as those of
  `transform_diffusion_head`; a released checkpoint has them.

  `precompute(params, batch, embeddings, use_conditioning=True)` returns a
  `DiffusionConditioning`. Its arguments are those of `diffusion_head`. Nothing
  of the size of pairs times channels exists in it but the conditioning itself.

  `denoise(params, conditioning, positions_noisy, noise_level)` maps
  [n_sample, n_token, n_slot, 3] noisy positions at one noise level, [], to
  denoised ones, in angstrom, at least float32, zero in empty slots. What
  `structattn_jax.diffusion` samples with is it with the first two arguments
  given. In training, where samples have noise levels of their own, map it:
  `jax.vmap(lambda x, t: denoise(params, conditioning, x[None], t)[0])`.

  All three raise a ValueError on wrong shapes, a noise level that is not
  positive or parameters for other channels, and a TypeError on wrong dtypes.

  Args:
    config: sizes and execution; None takes the released ones.
    cache_pair_logits: whether to keep the pair logits of all blocks, 4 n_block
      n_head n_token^2 bytes (released sizes: 0.10 GB at 256 tokens, 0.9 GB at
      768, 1.6 GB at 1024, 26 GB at 4096), instead of the pair conditioning, 4
      c_z n_token^2 bytes, a third of that; this spares n_block n_head c_z
      n_token^2 multiplications per step. None: up to 1 GiB.

  Returns:
    `init`, `precompute` and `denoise`.
  """
  config = config or dh.DiffusionHeadConfig()

  def init(
    key: jax.Array,
    batch: dh.DiffusionHeadBatch,
    embeddings: dh.TrunkEmbeddings,
  ) -> dict[str, dict[str, jax.Array]]:
    dh.check_inputs(batch, embeddings)
    return pm.init_parameters(
      dh.diffusion_head_parameters(
        config,
        single_channels=embeddings.single.shape[-1],
        pair_channels=embeddings.pair.shape[-1],
        target_channels=embeddings.target_feat.shape[-1],
      ),
      key,
    )

  def precompute(
    params: Params,
    batch: dh.DiffusionHeadBatch,
    embeddings: dh.TrunkEmbeddings,
    use_conditioning: bool | jax.Array = True,
  ) -> DiffusionConditioning:
    dh.check_inputs(batch, embeddings, use_conditioning)
    plan = batch.atoms.plan
    pair_cond = _pair_cond(params, batch.tokens, embeddings, use_conditioning)
    # The atoms see the single embedding in any case.
    conditioned_atoms = aca.precompute(
      params,
      plan,
      jax.tree.map(
        lambda x: atom_layout.atoms_from_dense(plan, x), batch.atoms.ref
      ),
      embeddings.single,
      pair_cond,
      config=config.atoms,
      prefix=dh.ATOMS,
    )
    blocks = _blocks(params)
    pair = functional.layer_norm(
      params, 'transformer/pair_input_layer_norm', pair_cond
    )
    projections = blocks['pair_logits_projection']['weights']
    n_block, _, n_head = projections.shape
    size = 4 * n_block * n_head * plan.num_tokens**2
    logits = None
    if cache_pair_logits or (cache_pair_logits is None and size < _MOST_LOGITS):
      logits = jax.lax.map(
        lambda own: _pair_logits(own, pair, batch.tokens.mask), projections
      )
    return DiffusionConditioning(
      atoms=conditioned_atoms,
      atom_mask=jnp.asarray(batch.atoms.pred_dense_atom_mask),
      token_mask=jnp.asarray(batch.tokens.mask),
      single_cond=dh.initial_single_cond(params, embeddings, use_conditioning),
      pair=pair if logits is None else None,
      pair_logits=logits,
    )

  def denoise(
    params: Params,
    conditioning: DiffusionConditioning,
    positions_noisy: jax.Array,
    noise_level: jax.Array,
  ) -> jax.Array:
    n_token, n_slot = conditioning.atom_mask.shape
    lead = {
      'n_token': (n_token, 'the conditioning'),
      'n_slot': (n_slot, 'the conditioning'),
    }
    checks.check_shapes(
      lead, positions_noisy=(positions_noisy, 'n_sample n_token n_slot 3')
    )
    checks.check_dtypes('floating', positions_noisy=positions_noisy)
    dh.check_noise_level(noise_level)
    plan = conditioning.atoms.plan
    positions = jax.vmap(lambda x: atom_layout.atoms_from_dense(plan, x))(
      numerics.at_least_float32(positions_noisy)
    )
    noise_level = jnp.asarray(noise_level, positions.dtype)
    single_cond = dh.noisy_single_cond(
      params, conditioning.single_cond, noise_level
    )
    encoding = jax.vmap(
      lambda x: aca.encode(
        params, conditioning.atoms, x, config=config.atoms, prefix=dh.ATOMS
      )
    )(preconditioning.preconditioning(noise_level).c_in * positions)
    act = numerics.at_least_float32(encoding.token_act)
    act += dh.embed_single_cond(params, single_cond)
    dtype = jnp.bfloat16 if config.bfloat16 else act.dtype
    act = _transform_tokens(
      _blocks(params),
      act.astype(dtype),
      single_cond.astype(dtype),
      conditioning,
      remat=config.transformer.block_remat,
    ).astype(act.dtype)
    act = functional.layer_norm(params, 'output_norm', act)
    update = jax.vmap(
      lambda act, skip: aca.decode(
        params,
        conditioning.atoms,
        act,
        skip,
        config=config.atoms,
        prefix=dh.ATOMS,
      )
    )(act, encoding.skip_connection)
    denoised = preconditioning.denoised_positions(
      positions, update, noise_level
    )
    return jax.vmap(lambda x: atom_layout.atoms_to_dense(plan, x))(denoised)

  return CachedDiffusionHead(
    init,
    pm.with_cast_parameters(precompute),
    pm.with_cast_parameters(denoise),
  )


def _pair_cond(
  params: Params,
  tokens: dh.TokenIds,
  embeddings: dh.TrunkEmbeddings,
  use_conditioning: bool | jax.Array,
) -> jax.Array:
  """The pair conditioning (Alg. 21, lines 1 to 5), some rows at a time."""
  n_token, _, c_pair = embeddings.pair.shape
  scale = pm.module(params, 'pair_cond_initial_norm')['scale']
  weights = pm.module(params, 'pair_cond_initial_projection')['weights']
  if scale.shape[0] != c_pair + dh.REL_CHANNELS:
    raise ValueError(
      f"params: 'pair_cond_initial_norm' is for {scale.shape[0]} channels, "
      f'its input has {dh.REL_CHANNELS} more than pair, {embeddings.pair.shape}'
    )
  bins, same_entity = dh.relative_bins(tokens)
  on_cpu = max(1, _CPU_PAIRS // n_token)
  rows = on_cpu
  if jax.default_backend() != 'cpu':
    rows = max(1, _DEVICE_PAIRS // n_token)
  return mapping.chunked_map(
    _pair_cond_rows,
    functional.chunk_size(n_token, rows, on_cpu=on_cpu),
    None,
    {
      'initial': (scale[:, None] * weights).astype(embeddings.pair.dtype),
      'transitions': {
        name: own
        for name, own in params.items()
        if name.startswith('pair_transition')
      },
      'use': jnp.where(use_conditioning, 1.0, 0.0),
    },
    None,
    None,
    embeddings.pair,
    (bins.astype(jnp.uint8), same_entity),
  )


def _pair_cond_rows(
  weights: Mapping[str, Any],
  taken: None,
  pair: jax.Array,
  constants: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Pair conditioning of some rows, [n, n_token, c_z].

  The layer norm over pair and relative encoding, and the projection behind it,
  without the latter: mean and variance follow from the number of ones, the
  product is a sum of rows of the weights.
  """
  del taken
  bins, same_entity = constants
  c_pair = pair.shape[-1]
  of_pair, *tables = jnp.split(
    weights['initial'], [c_pair, c_pair + 66, c_pair + 132, c_pair + 133]
  )
  pair = jnp.where(weights['use'] > 0, pair, 0)
  wide = numerics.at_least_float32(pair)
  ones = 3 + same_entity[..., None].astype(wide.dtype)
  total = c_pair + dh.REL_CHANNELS
  mean = (jnp.sum(wide, -1, keepdims=True) + ones) / total
  centred = wide - mean
  squares = jnp.sum(jnp.square(centred), -1, keepdims=True)
  squares += ones * jnp.square(1 - mean)
  squares += (dh.REL_CHANNELS - ones) * jnp.square(mean)
  of_residue, of_token, of_entity, of_copy = tables
  x = jnp.dot(centred.astype(pair.dtype), of_pair, precision='highest')
  x += of_residue[bins[..., 0]] + of_token[bins[..., 1]]
  x += of_copy[bins[..., 2]] + jnp.where(same_entity[..., None], of_entity, 0)
  x -= mean * sum(jnp.sum(table, 0) for table in tables)
  x = (x * jax.lax.rsqrt(squares / total + 1e-5)).astype(pair.dtype)
  return dh.transitions(weights['transitions'], 'pair_transition', x)


def _blocks(params: Params) -> dict[str, Any]:
  """Parameters of the token transformer, [n_block, ...] instead of stacks."""
  own = pm.below(params, 'transformer/')

  def join(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])

  blocks: dict[str, Any] = jax.tree.map(
    join, pm.below(own, f'{tp.STACK}{tp.STACK}transformer')
  )
  name = 'pair_logits_projection'
  projection = pm.module(own, f'{tp.STACK}{name}')['weights']
  blocks[name] = {'weights': join(jnp.moveaxis(projection, 2, 1))}
  return blocks


def _pair_logits(
  projection: jax.Array, pair: jax.Array, mask: jax.Array
) -> jax.Array:
  """[n_head, n_token, n_token] of one block, -1e9 for masked keys."""
  logits = jnp.einsum('ch,ijc->hij', projection.astype(pair.dtype), pair)
  return jnp.where(mask, logits, dt.MASKED)


def _transform_tokens(
  blocks: Mapping[str, Any],
  act: jax.Array,
  single_cond: jax.Array,
  conditioning: DiffusionConditioning,
  *,
  remat: bool,
) -> jax.Array:
  """The token transformer of all samples (Algs. 23 to 26).

  Args:
    blocks: of `_blocks`.
    act: [n_sample, n_token, c_token].
    single_cond: [n_token, c_s], in the dtype of `act`.
    conditioning: what all steps share.
    remat: whether to recompute each block in the backward pass.

  Returns:
    Like `act`.
  """
  mask, pair = conditioning.token_mask, conditioning.pair
  # On CPU the activations of one sample stay in cache.
  at_a_time = functional.chunk_size(act.shape[0], on_cpu=1)

  def block(act: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
    own, logits = inputs
    if pair is not None:
      projection = own['pair_logits_projection']['weights']
      logits = _pair_logits(projection, pair, mask)
    of_attention, of_transition = (
      _adaptive_terms(own, single_cond, name) for name in ('', 'ffw_')
    )

    def one_sample(act: jax.Array) -> jax.Array:
      x = of_attention.scale * numerics.layer_norm(act) + of_attention.shift
      act += of_attention.gate * _attend(own, x, logits, mask)
      x = of_transition.scale * numerics.layer_norm(act) + of_transition.shift
      hidden = functional.swish_gate(
        functional.linear(own, 'ffw_transition1', x)
      )
      update = functional.linear(own, 'ffw_transition2', hidden)
      return act + of_transition.gate * update

    return jax.lax.map(one_sample, act, batch_size=at_a_time), None

  run: Any = block
  if remat:
    run = jax.checkpoint(block, prevent_cse=False)
  return jax.lax.scan(run, act, (blocks, conditioning.pair_logits))[0]


class _AdaptiveTerms(NamedTuple):
  """What a half of a block needs of the conditioning, [n_token, c_token]."""

  scale: jax.Array
  shift: jax.Array
  gate: jax.Array


def _adaptive_terms(
  own: Params, single_cond: jax.Array, name: str
) -> _AdaptiveTerms:
  """Of the norm and of the output (Algs. 25 and 26)."""
  normalised = functional.layer_norm(
    own, f'{name}single_cond_layer_norm', single_cond
  )

  def linear(leaf: str, x: jax.Array) -> jax.Array:
    return functional.linear(own, f'{name}{leaf}', x)

  return _AdaptiveTerms(
    scale=jax.nn.sigmoid(linear('single_cond_scale', normalised)),
    shift=linear('single_cond_bias', normalised),
    gate=jax.nn.sigmoid(linear('adaptive_zero_cond', single_cond)),
  )


def _attend(
  own: Params, x: jax.Array, pair_logits: jax.Array, mask: jax.Array
) -> jax.Array:
  """The update of attention before its gate (Alg. 24); x [n_token, c_token]."""
  q, k = (
    numerics.at_least_float32(functional.linear(own, f'{name}_projection', x))
    for name in ('q', 'k')
  )
  v = functional.linear(own, 'v_projection', x)
  # Without any key all weights are equal, and all values zero.
  v = jnp.where(mask[:, None, None], v, 0)
  q *= q.shape[-1] ** -0.5

  def one_head(inputs: tuple[jax.Array, ...]) -> jax.Array:
    q, k, v, bias = inputs
    weights = jax.nn.softmax(q @ k.T + bias)
    return weights.astype(v.dtype) @ v

  heads = (*(jnp.swapaxes(y, 0, 1) for y in (q, k, v)), pair_logits)
  n_head, n_token, _ = pair_logits.shape
  at_a_time = functional.chunk_size(
    n_head, on_cpu=max(1, _CPU_LOGITS // n_token**2)
  )
  out = jax.lax.map(one_head, heads, batch_size=at_a_time)
  out = jnp.swapaxes(out, 0, 1).reshape(n_token, -1)
  out *= jax.nn.sigmoid(functional.linear(own, 'gating_query', x))
  return functional.linear(own, 'transition2', out)
