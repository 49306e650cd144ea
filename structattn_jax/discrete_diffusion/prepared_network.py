"""SEDD for inference, apart from `network.sedd` for speed: X times on CPU.

Training needs parameters under their published names, one sequence at a time
and all positions; samplers call a network many times with the same parameters,
context and noise levels. The same functions, up to rounding, of parameters
rearranged once by `prepare`:

* Scale and offset of norms, 1 + scale and shift of AdaLN are linear in the
  condition: one product gives those of all layers (and, for a sampler, of all
  steps) as one scale and one shift per norm.
* The scale and offset of `norm_q` go into the query projection, as does
  1 / sqrt(d_head); the scale of `norm_kv` into the key projection. Its offset
  adds the same to all logits of a query and is dropped.
* Token embeddings are normalised once per vocabulary entry.
* The output column of the absorbing state, which no sampler reads, is dropped;
  the rest is padded to whole blocks of `BLOCK` with logits of -1e30.
* Where there are fewer vocabulary entries than positions, the first layer's
  projections are made per entry.
* A context and all that is projected from it has a batch of its own, which may
  be 1.
* The last layer and the output run only at given `positions`; keys and values
  there need all of them.

Parameters of layers are unstacked, as XLA on CPU copies slices of a stack.
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
from structattn_jax.network.sedd import (
  blocks,
  dual_track,
  embeddings,
  single_track,
)
from structattn_jax.network.sedd.dual_track import DualTrackConfig
from structattn_jax.network.sedd.single_track import SeddConfig

AnyConfig = DualTrackConfig | SeddConfig

# Columns of the output are padded to multiples of this.
BLOCK = 64
_PADDED = -1e30
# From so many logits per head on, heads are taken one by one on CPU.
_LARGE = 2**16

TRACKS = ('protein', 'ligand')
# The track of the single-track network.
ONLY = 'only'
_SCOPES = {
  'protein': ('protein_embed', 'dual_track', 'blocks_prot', 'protein_output'),
  'ligand': ('ligand_embed', 'dual_track', 'blocks_lig', 'ligand_output'),
  ONLY: ('vocab_embed', 'sedd', 'blocks', 'output_layer'),
}


class Cross(NamedTuple):
  """Cross-attention of one layer; weights [in, out]."""

  query: jax.Array
  query_bias: jax.Array
  key: jax.Array
  value: jax.Array
  out: jax.Array
  out_bias: jax.Array


class Layer(NamedTuple):
  """One block; weights [in, out], biases None where there are none.

  The last block has `query` by itself, and `qkv` has only keys and values.
  """

  query: jax.Array | None
  qkv: jax.Array
  out: jax.Array
  out_bias: jax.Array | None
  mlp_in: jax.Array
  mlp_in_bias: jax.Array
  mlp_out: jax.Array
  mlp_out_bias: jax.Array
  cross: Cross | None


class TrackProgram(NamedTuple):
  """One track.

  Attributes:
    table: [n_vocab, c_hidden] embedded tokens.
    layers: the blocks.
    modulation: [c_cond, M], all scales, shifts and gates of the track.
    modulation_bias: [M].
    head: [c_hidden, n_out] output weights.
    head_bias: [n_out].
  """

  table: jax.Array
  layers: tuple[Layer, ...]
  modulation: jax.Array
  modulation_bias: jax.Array
  head: jax.Array
  head_bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Program:
  """Rearranged parameters of one network.

  Attributes:
    config: sizes (static).
    timestep: parameters of the timestep embedder.
    tracks: 'protein' and 'ligand', or 'only'.
  """

  config: AnyConfig = dataclasses.field(metadata={'static': True})
  timestep: Any
  tracks: dict[str, TrackProgram]


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

    >>> config = SeddConfig(hidden_size=16, num_head=2, num_block=2, vocab=21)
    >>> cached = cached_sedd(config, absorbing=False)
    >>> tokens, sigma = jnp.array([3, 20]), jnp.array(0.5)
    >>> program = cached.precompute(
    ...   cached.init(jax.random.key(0), tokens, sigma)
    ... )
    >>> begun = cached.begin(
    ...   program,
    ...   cached.modulations(program, sigma),
    ...   {ONLY: tokens[None]},
    ...   {ONLY: None},
    ... )
    >>> begun.logits()[ONLY].shape
    (1, 2, 21)

  Args:
    config: of either network; the variant 'seed' is not supported.
    absorbing: see `prepare`.

  Returns:
    The closures; `discrete_diffusion.sample` takes their `Program` in place of
    the parameters.
  """
  if isinstance(config, DualTrackConfig):
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


def prepare(
  config: AnyConfig, params: hk.Params, *, absorbing: bool = True
) -> Program:
  """Rearranges parameters; costs about as much as copying them.

  Args:
    config: of the network; the variant 'seed' is not supported.
    params: of `transform_sedd_dual_track(config)` or `transform_sedd(config)`.
    absorbing: whether to drop the output of the last state and to pad.

  Returns:
    The program, a pytree of arrays.

  Raises:
    ValueError: for the variant 'seed', which has no norms to merge.
  """
  if config.variant == 'seed':
    raise ValueError(
      "config.variant: 'seed' cannot be sampled, it has no norms to prepare; "
      "use 'published', or give sample_from_uniform the network itself"
    )
  dual = isinstance(config, DualTrackConfig)
  dtype = jnp.bfloat16 if config.bfloat16 else None
  tracks = {
    track: _prepare_track(config, params, track, absorbing, dtype)
    for track in (TRACKS if dual else (ONLY,))
  }
  timestep = {
    path: values
    for path, values in params.items()
    if path.startswith('sigma_map/')
  }
  return Program(config, timestep, tracks)


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
      logits = jnp.where(mask[:, None, :], logits, _PADDED)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    out = jnp.einsum('bnm,bmd->bnd', weights.astype(value.dtype), value)
    return out / jnp.sum(weights, -1, keepdims=True).astype(value.dtype)

  # One head at a time stays in cache.
  is_large = n * key.shape[1] >= _LARGE and jax.default_backend() == 'cpu'
  out = jax.lax.map(one, heads) if is_large else jax.vmap(one)(heads)
  return jnp.moveaxis(out, 0, 2).reshape(batch, n, n_head * d_head)


def _prepare_track(
  config: AnyConfig,
  params: hk.Params,
  track: str,
  absorbing: bool,
  dtype: Any,
) -> TrackProgram:
  embed, stack, own, output = _SCOPES[track]
  scope = f'{stack}/{blocks.LAYER_STACK}/{own}/'
  gates = blocks.STYLES[config.variant].gates
  c_hidden = config.hidden_size

  def stacked(path: str, name: str) -> Any:
    return params.get(f'{scope}{path}', {}).get(name)

  def of_layer(index: int) -> Layer:
    def get(path: str, name: str = 'weights') -> Any:
      value = stacked(path, name)
      return None if value is None else value[index]

    scale = (c_hidden // config.num_head) ** -0.5
    qkv = get('attn_qkv')
    query, qkv = qkv[:, :c_hidden] * scale, qkv[:, c_hidden:]
    is_last = index == config.num_block - 1
    if not is_last:
      qkv = jnp.concatenate([query, qkv], 1)
    cross = None
    if isinstance(config, DualTrackConfig):
      read = get('cross_attn/q_proj') * scale
      cross = Cross(
        query=get('cross_attn/norm_q', 'scale')[:, None] * read,
        query_bias=get('cross_attn/norm_q', 'offset') @ read,
        key=get('cross_attn/norm_kv', 'scale')[:, None]
        * get('cross_attn/k_proj'),
        value=get('cross_attn/v_proj'),
        out=get('cross_attn/out_proj'),
        out_bias=get('cross_attn/out_proj', 'bias'),
      )
    mlp_out = blocks.STYLES[config.variant].mlp_out
    return Layer(
      query=query if is_last else None,
      qkv=qkv,
      out=get('attn_out'),
      out_bias=get('attn_out', 'bias'),
      mlp_in=get('mlp_0'),
      mlp_in_bias=get('mlp_0', 'bias'),
      mlp_out=get(mlp_out),
      mlp_out_bias=get(mlp_out, 'bias'),
      cross=cross,
    )

  def merged(path: str, norms: list[str], get: Any) -> tuple[Any, Any]:
    """Shift, scale (and gate) chunks as scale, shift (and gates)."""
    weights, bias = get(path, 'weights'), get(path, 'bias')
    per_norm = 3 if gates and len(norms) > 1 else 2
    w_chunks = jnp.split(weights, per_norm * len(norms), -1)
    b_chunks = jnp.split(bias, per_norm * len(norms), -1)
    found, found_gates = [], []
    for i, norm in enumerate(norms):
      w_shift, w_scale, *w_gate = w_chunks[per_norm * i : per_norm * (i + 1)]
      b_shift, b_scale, *b_gate = b_chunks[per_norm * i : per_norm * (i + 1)]
      scale = get(norm, 'scale')
      offset = get(norm, 'offset')
      offset = jnp.zeros_like(scale) if offset is None else offset
      # (y s + o) (1 + scale) + shift, as a scale and a shift of y.
      found += [
        (w_scale * scale, (1 + b_scale) * scale),
        (w_scale * offset + w_shift, (1 + b_scale) * offset + b_shift),
      ]
      found_gates += zip(w_gate, b_gate, strict=True)
    weights, biases = zip(*found, *found_gates, strict=True)
    return jnp.concatenate(weights, -1), jnp.concatenate(biases, -1)

  modulation = [
    merged(
      'adaLN_modulation',
      ['norm1', 'norm2'],
      lambda path, name, i=i: (
        None if stacked(path, name) is None else stacked(path, name)[i]
      ),
    )
    for i in range(config.num_block)
  ]
  modulation.append(
    merged(
      'adaLN_modulation',
      ['norm_final'],
      lambda path, name: params[f'{output}/{path}'].get(name),
    )
  )
  weights, biases = zip(*modulation, strict=True)
  shape = params[embed]['embedding'].shape
  table = hk.without_apply_rng(
    hk.transform(
      lambda tokens: embeddings.TokenEmbedding(
        *shape, normalise=track != ONLY, name=embed
      )(tokens)
    )
  ).apply(params, jnp.arange(shape[0]))
  head = params[f'{output}/linear']['weights']
  head_bias = params[f'{output}/linear'].get('bias')
  if head_bias is None:
    head_bias = jnp.zeros(head.shape[-1], head.dtype)
  if absorbing:
    extra = -(head.shape[-1] - 1) % BLOCK
    head = jnp.pad(head[:, :-1], ((0, 0), (0, extra)))
    head_bias = jnp.pad(head_bias[:-1], (0, extra), constant_values=_PADDED)
  layers = tuple(map(of_layer, range(config.num_block)))
  if dtype is not None:
    table, layers = jax.tree.map(lambda x: x.astype(dtype), (table, layers))
  return TrackProgram(
    table=table,
    layers=layers,
    modulation=jnp.concatenate(weights, -1),
    modulation_bias=jnp.concatenate(biases, -1),
    head=head,
    head_bias=head_bias,
  )
