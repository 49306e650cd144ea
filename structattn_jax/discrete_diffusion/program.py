"""Parameters of SEDD, rearranged once for the prepared network.

* Scale and offset of norms, 1 + scale and shift of AdaLN are linear in the
  condition: one product gives those of all layers (and, for a sampler, of all
  steps) as one scale and one shift per norm.
* The scale and offset of `norm_q` go into the query projection, as does
  1 / sqrt(d_head); the scale of `norm_kv` into the key projection. Its offset
  adds the same to all logits of a query and is dropped.
* Token embeddings are normalised once per vocabulary entry.
* The output column of the absorbing state, which no sampler reads, is dropped;
  the rest is padded to whole blocks of `BLOCK` with logits of `PADDED`.

Parameters of layers are unstacked, as XLA on CPU copies slices of a stack.
M = channels of all modulations of a track.
"""

import dataclasses
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.network.sedd import blocks, embeddings
from structattn_jax.network.sedd.dual_track import DualTrackConfig
from structattn_jax.network.sedd.single_track import SeddConfig

AnyConfig = DualTrackConfig | SeddConfig
# Columns of the output are padded to multiples of this.
BLOCK = 64
PADDED = -1e30
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
    head_bias = jnp.pad(head_bias[:-1], (0, extra), constant_values=PADDED)
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
