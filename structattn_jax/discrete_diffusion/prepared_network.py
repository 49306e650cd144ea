"""SEDD for samplers: apart from `network.sedd`, as it is 1.4 to 2 times faster.

(Samplers with one or the other, 4 x (128 + 64) tokens, 256 channels, one CPU
core.) The same functions up to rounding, of parameters rearranged once by
`program.prepare`; what training needs, parameters under their published names,
dropout and gradients, stays in `network.sedd`, whose rotary embedding, GELU,
noise and token embeddings are used here. Besides:

* Where there are fewer vocabulary entries than positions, the first layer's
  projections are made per entry.
* A context and all that is projected from it has a batch of its own, which may
  be 1.
* The last layer and the output run only at given `positions`; keys and values
  there need all of them.

Batched: B sequences of n tokens, M = channels of all modulations of a track.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import numerics
from structattn_jax.discrete_diffusion.program import (
  PADDED,
  TRACKS,
  AnyConfig,
  Layer,
  Program,
  prepare,
)
from structattn_jax.network.sedd import (
  blocks,
  dual_track,
  embeddings,
  single_track,
)

# From so many logits per head on, heads are taken one by one on CPU.
_LARGE = 2**16


class Context(NamedTuple):
  """Keys and values of the other track, for each layer, and its mask.

  Attributes:
    layers: (keys, values) per layer, each [B or 1, m, n_head, d_head].
    mask: [B or 1, m] bool, or None.
  """

  layers: tuple[tuple[jax.Array, jax.Array], ...]
  mask: jax.Array | None


class CachedSedd(NamedTuple):
  """Closures over one config; see the functions of the same names.

  Attributes:
    init: of `transform_sedd_dual_track(config)` or `transform_sedd(config)`.
    precompute: `precompute(params)` gives a `Program`, once for all calls.
    modulations: `modulations(program, sigma)`, once for all steps.
    encode_context: what one track reads of the other, once for all samples.
    begin: all layers of the generated tracks; `.logits()` of what it returns
      ends the last one.
  """

  init: Callable[..., hk.Params]
  precompute: Callable[[hk.Params], Program]
  modulations: Callable[..., dict[str, jax.Array]]
  encode_context: Callable[..., Context]
  begin: Callable[..., 'Unfinished']


def cached_sedd(config: AnyConfig, *, absorbing: bool = True) -> CachedSedd:
  """The network for many calls with the same parameters.

    >>> config = single_track.SeddConfig(
    ...   hidden_size=16, num_head=2, num_block=2, vocab=21
    ... )
    >>> cached = cached_sedd(config, absorbing=False)
    >>> tokens, sigma = jnp.array([3, 20]), jnp.array(0.5)
    >>> program = cached.precompute(
    ...   cached.init(jax.random.key(0), tokens, sigma)
    ... )
    >>> begun = cached.begin(
    ...   program,
    ...   cached.modulations(program, sigma),
    ...   {'only': tokens[None]},
    ...   {'only': None},
    ... )
    >>> begun.logits()['only'].shape
    (1, 2, 21)

  Args:
    config: of either network; the variant 'seed' is not supported.
    absorbing: see `prepare`.

  Returns:
    The closures; `discrete_diffusion.sample` takes their `Program` in place of
    the parameters.
  """
  if isinstance(config, dual_track.DualTrackConfig):
    init = dual_track.transform_sedd_dual_track(config).init
  else:
    init = single_track.transform_sedd(config).init
  return CachedSedd(
    init,
    functools.partial(prepare, config, absorbing=absorbing),
    modulations,
    encode_context,
    begin,
  )


def modulations(program: Program, sigma: jax.Array) -> dict[str, jax.Array]:
  """All scales, shifts and gates of noise levels.

  Args:
    program: from `prepare`.
    sigma: [...] float, total noise.

  Returns:
    [..., M] by track. An entry of shape [M] serves a whole batch.
  """
  config = program.config
  embedder = hk.without_apply_rng(
    hk.transform(
      lambda sigma: embeddings.TimestepEmbedder(
        config.cond_dim, variant=config.variant
      )(sigma)
    )
  )
  sigma = jnp.asarray(sigma)
  if not config.time_conditioning:
    sigma = jnp.zeros_like(sigma)
  condition = jnp.vectorize(
    lambda sigma: embedder.apply(program.timestep, sigma), signature='()->(c)'
  )(sigma)
  return {
    name: condition @ track.modulation + track.modulation_bias
    for name, track in program.tracks.items()
  }


def begin(
  program: Program,
  modulation: Mapping[str, jax.Array],
  tokens: Mapping[str, jax.Array],
  masks: Mapping[str, jax.Array | None],
  context: Context | None = None,
) -> 'Unfinished':
  """Generated tracks up to the last layer; arguments by track.

  Args:
    program: from `prepare`.
    modulation: [M] or [B, M], from `modulations`.
    tokens: [B, n] integer, of both tracks in the mode 'joint', else of one.
    masks: [B or 1, n] bool, True = real; None = all real.
    context: what one track reads, from `encode_context`.

  Returns:
    All but the end of the last layer; see `Unfinished.logits`.
  """
  runs = {
    track: _Run(program, track, modulation[track], ids, masks[track])
    for track, ids in tokens.items()
  }
  for index in range(program.config.num_block):
    reads: dict[str, Any] = dict.fromkeys(runs, ())
    if context is not None:
      reads = dict.fromkeys(runs, (context.layers[index], context.mask))
    elif len(runs) == 2:
      # Both read the other's state before this layer.
      for (track, run), other in zip(
        runs.items(), reversed(runs.values()), strict=True
      ):
        layer = run.track.layers[index]
        reads[track] = other.keys_and_values(layer), other.mask
    for track, run in runs.items():
      run.begin(index, *reads[track])
    if index < program.config.num_block - 1:
      for run in runs.values():
        run.finish()
  return Unfinished(runs)


def encode_context(
  program: Program,
  modulation: Mapping[str, jax.Array],
  track: str,
  tokens: jax.Array,
  mask: jax.Array | None,
) -> Context:
  """What the other track reads of a context, for all its layers.

  Args:
    program: from `prepare`.
    modulation: [M] or [B, M] by track.
    track: of the context.
    tokens: [B or 1, m] integer.
    mask: [B or 1, m] bool, True = real; None = all real.

  Returns:
    Keys and values.
  """
  run = _Run(program, track, modulation[track], tokens, mask)
  for index in range(program.config.num_block // 2):
    run.begin(index)
    run.finish()
  (other,) = set(TRACKS) - {track}
  layers = program.tracks[other].layers
  return Context(tuple(map(run.keys_and_values, layers)), mask)


@dataclasses.dataclass(frozen=True)
class Unfinished:
  """Tracks in the last layer, of which all that needs all tokens is done."""

  runs: 'Mapping[str, _Run]'

  def logits(
    self, positions: Mapping[str, jax.Array] | None = None
  ) -> dict[str, jax.Array]:
    """Logits by track.

    Args:
      positions: [B, k] integer by track, where logits are wanted; None =
        everywhere.

    Returns:
      [B, n or k, n_out], at least float32.
    """
    found = {}
    for track, run in self.runs.items():
      run = copy.copy(run)
      run.finish(None if positions is None else positions[track])
      found[track] = run.logits()
    return found


class _Run:
  """One track on its way through the layers."""

  def __init__(
    self,
    program: Program,
    track: str,
    modulation: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None,
  ):
    if len(modulation) == 1 and modulation.ndim == 2:
      modulation = modulation[0]
    self.config = program.config
    self.track = program.tracks[track]
    self.style = blocks.STYLES[program.config.variant]
    self.tokens = tokens
    self.mask = mask
    self.x = self.track.table[tokens]
    # [..., 1, c_hidden] each, so that [M] serves a whole batch.
    chunks = modulation.shape[-1] // self.config.hidden_size
    self.chunks = jnp.split(modulation[..., None, :], chunks, axis=-1)
    # Before the first layer, projections of a token depend on nothing else.
    self.is_table = len(self.track.table) < tokens.size
    self.is_modulated_table = self.is_table and modulation.ndim == 1
    d_head = self.config.hidden_size // self.config.num_head
    cos, sin = embeddings.rotary_tables(tokens.shape[-1], d_head)
    self.rotary = jnp.asarray(cos)[:, None], jnp.asarray(sin)[:, None]
    self.begun: Any = None

  def begin(
    self,
    index: int,
    read: tuple[jax.Array, jax.Array] | None = None,
    read_mask: jax.Array | None = None,
  ) -> None:
    """Keys and values of a block, which need all tokens."""
    layer = self.track.layers[index]
    scale, shift = self._chunks(index)[:2]
    *query, key, value = self._projected(
      lambda x: _modulated(x, scale, shift) @ layer.qkv,
      3 if layer.query is None else 2,
      self.is_modulated_table,
    )
    key = embeddings.rotate(key, *self.rotary)
    self.begun = index, query, key, value, read, read_mask

  def finish(self, positions: jax.Array | None = None) -> None:
    """The rest of the block, at `positions` only if there are any."""
    index, query, key, value, read, read_mask = self.begun
    layer = self.track.layers[index]
    scale1, shift1, scale2, shift2, *gates = self._chunks(index)
    gate1, gate2 = gates or (None, None)
    rotary = self.rotary
    if positions is not None:
      self.x = _rows(self.x, positions)
      rotary = tuple(table[positions] for table in rotary)
    if not query:
      query = self._heads(_modulated(self.x, scale1, shift1) @ layer.query, 1)
    query = embeddings.rotate(query[0], *rotary)
    update = _attend(query, key, value, self.mask) @ layer.out
    self._add(update, layer.out_bias, gate1, self.mask)
    self.is_table = self.is_modulated_table = False

    if read is not None:
      cross = layer.cross
      query = self._heads(_normed(self.x) @ cross.query + cross.query_bias, 1)
      update = _attend(query[0], *read, read_mask) @ cross.out
      self._add(update, cross.out_bias, None, read_mask)

    hidden = _modulated(self.x, scale2, shift2) @ layer.mlp_in
    hidden = blocks.gelu(
      hidden + layer.mlp_in_bias, approximate=self.style.approximate_gelu
    )
    self._add(hidden @ layer.mlp_out, layer.mlp_out_bias, gate2)

  def keys_and_values(self, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """What a layer of the other track reads of the present state."""
    cross: Any = layer.cross
    (key,) = self._projected(lambda x: _normed(x) @ cross.key, 1, self.is_table)
    # Values see the state as it is, as published.
    (value,) = self._projected(lambda x: x @ cross.value, 1, self.is_table)
    return key, value

  def logits(self) -> jax.Array:
    """Output layer, at least float32."""
    scale, shift = self.chunks[-2:]
    hidden = numerics.at_least_float32(_modulated(self.x, scale, shift))
    return hidden @ self.track.head + self.track.head_bias

  def _chunks(self, index: int) -> list[jax.Array]:
    count = 6 if self.style.gates else 4
    return self.chunks[count * index : count * (index + 1)]

  def _projected(
    self,
    project: Callable[[jax.Array], jax.Array],
    count: int,
    is_table: bool,
  ) -> list[jax.Array]:
    """`count` projections of all tokens, each [B, n, n_head, d_head]."""
    if is_table:
      return self._heads(project(self.track.table[None])[0][self.tokens], count)
    return self._heads(project(self.x), count)

  def _heads(self, x: jax.Array, count: int) -> list[jax.Array]:
    shape = (*x.shape[:2], self.config.num_head, -1)
    return [part.reshape(shape) for part in jnp.split(x, count, axis=-1)]

  def _add(
    self,
    update: jax.Array,
    bias: jax.Array | None,
    gate: jax.Array | None,
    mask: jax.Array | None = None,
  ) -> None:
    """Adds to the state, unless all keys are masked out."""
    if bias is not None:
      update = update + bias
    if gate is not None:
      update = gate * update
    if mask is not None:
      update = jnp.where(jnp.any(mask, -1)[:, None, None], update, 0)
    self.x = self.x + update.astype(self.x.dtype)


def _normed(x: jax.Array) -> jax.Array:
  return numerics.layer_norm(x)


def _modulated(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
  return (_normed(x) * scale + shift).astype(x.dtype)


def _rows(x: jax.Array, chosen: jax.Array) -> jax.Array:
  """Rows `chosen` [B, k] of [B, n, ...]."""
  return jax.vmap(lambda x, chosen: x[chosen])(x, chosen)


def _attend(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
  """[B, n, h, d] over [B or 1, m, h, d]; queries are scaled already."""
  batch, n, n_head, d_head = query.shape
  shared = key.shape[0] == 1 and batch > 1
  if shared:
    # All samples are rows of one product, unless their masks differ.
    if mask is None or mask.shape[0] == 1:
      query = query.reshape(1, batch * n, n_head, d_head)
    else:
      key, value = (jnp.repeat(x, batch, 0) for x in (key, value))
  # Heads in front.
  heads = [jnp.moveaxis(x, 2, 0) for x in (query, key, value)]

  def one(head):
    query, key, value = head
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum('bnd,bmd->bnm', query, key, preferred_element_type=wide)
    if mask is not None:
      logits = jnp.where(mask[:, None, :], logits, PADDED)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    out = jnp.einsum('bnm,bmd->bnd', weights.astype(value.dtype), value)
    return out / jnp.sum(weights, -1, keepdims=True).astype(value.dtype)

  # One head at a time stays in cache.
  is_large = n * key.shape[1] >= _LARGE and jax.default_backend() == 'cpu'
  out = jax.lax.map(one, heads) if is_large else jax.vmap(one)(heads)
  return jnp.moveaxis(out, 0, 2).reshape(batch, n, n_head * d_head)
