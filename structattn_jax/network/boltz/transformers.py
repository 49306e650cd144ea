"""Boltz's transformers with pair bias: over windows of atoms, over tokens.

Abramson et al. (2024) Suppl. Algs. 7 (atom transformer), 23 (diffusion
transformer), 24 (attention with pair bias), 25 (conditioned transition) and 26
(adaptive layer norm). Mirrors boltz `model/modules/transformers.py`,
`transformersv2.py` and `model/layers/attention.py`, `attentionv2.py` @ 832486d.

Everything is a pure function of a parameter tree.
Names are upstream's: the torch module `a.0.b` is the Haiku module `a_0/b`, its
`weight` [out, in] is `weights` [in, out], or `scale` with `offset` for its
`bias` in a layer norm. Upstream's state dicts hold `output_projection.0` as a
second name of `output_projection_linear`; here there is one.

Shapes: n_atom rows (atoms, or tokens in one window of all); n_window windows
of n_query and n_key atoms; c channels, c_cond of the conditioning; n_head
heads. Window k has the queries n_query k ... and, as `components.windows`
says, the keys around them, zero and masked beyond the ends.

Differs from the paper as the released code does: keys share the adaptive layer
norm of the queries; the transition follows the attention instead of running
beside it and has a third factor `a_to_b`; gates see the conditioning before
its layer norm; a key is masked for all queries.
Differs from the released code: rows whose keys are all masked attend to
nothing, where upstream subtracts 10^6 from all of their logits; projections
are computed once per atom, not once per window; what depends on the
conditioning alone (`LayerTerms`, pair biases) can be computed in advance.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from structattn_jax.common import numerics
from structattn_jax.components import functional, windowed_attention, windows
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params

# Logit of a masked key: its weight is zero, and no infinity meets another.
MASKED = -1e9
# Windows whose atoms pass through the rest of a layer together on CPU: less
# memory for more atoms, while up to so many are kept for the backward pass.
_CPU_WINDOWS = 32
# Fresh gates are sigmoid of this, 0.119.
_GATE_BIAS = -2.0


class LayerTerms(NamedTuple):
  """What a layer needs of the conditioning, each [n_atom, c]."""

  attention_scale: jax.Array
  attention_shift: jax.Array
  attention_gate: jax.Array
  transition_scale: jax.Array
  transition_shift: jax.Array
  transition_gate: jax.Array


# Tables of parameters.


def linear_parameters(
  num_input: int,
  num_output: int,
  *,
  initializer: hm.Initializer = 'torch',
  use_bias: bool = False,
) -> dict[str, pm.Parameter]:
  """Of a linear layer that starts as torch's: weights and bias uniform."""
  table = pm.linear(num_input, num_output, initializer=initializer)
  if use_bias:
    uniform = hm.initializer('torch', num_input)
    table['bias'] = pm.Parameter((num_output,), uniform)
  return table


def layer_norm_parameters(channels: int) -> dict[str, pm.Parameter]:
  """Of a layer norm with scale and offset."""
  return pm.layer_norm(channels, offset=True)


def ada_ln_parameters(channels: int, cond_channels: int) -> pm.Table:
  """Of `ada_ln`."""
  return {
    's_norm': pm.layer_norm(cond_channels),
    's_scale': linear_parameters(cond_channels, channels, use_bias=True),
    's_bias': linear_parameters(cond_channels, channels),
  }


def attention_parameters(
  channels: int, num_head: int, pair_channels: int | None = None
) -> pm.Table:
  """Of `attention_pair_bias`; with pair channels, of `pair_bias` too."""
  if channels % num_head:
    raise ValueError(
      f'channels={channels} must be divisible by num_head={num_head}'
    )
  table = {
    'proj_q': linear_parameters(channels, channels, use_bias=True),
    **{
      f'proj_{x}': linear_parameters(channels, channels)
      for x in ('k', 'v', 'g')
    },
    'proj_o': linear_parameters(channels, channels, initializer='zeros'),
  }
  if pair_channels is not None:
    table |= pair_bias_parameters(pair_channels, num_head, 'proj_z')
  return table


def pair_bias_parameters(
  pair_channels: int, num_bias: int, name: str
) -> pm.Table:
  """Of `pair_bias`: a layer norm and a linear layer without bias."""
  return {
    f'{name}_0': layer_norm_parameters(pair_channels),
    f'{name}_1': linear_parameters(pair_channels, num_bias),
  }


def transition_parameters(
  channels: int, cond_channels: int, expansion_factor: int = 2
) -> pm.Table:
  """Of `conditioned_transition`."""
  hidden = expansion_factor * channels
  return {
    **pm.nest(ada_ln_parameters(channels, cond_channels), 'adaln/'),
    'swish_gate_0': linear_parameters(channels, 2 * hidden),
    'a_to_b': linear_parameters(channels, hidden),
    'b_to_a': linear_parameters(hidden, channels),
    'output_projection_0': _gate_parameters(channels, cond_channels),
  }


def diffusion_transformer_parameters(
  depth: int,
  num_head: int,
  channels: int,
  cond_channels: int,
  pair_channels: int | None = None,
  *,
  post_layer_norm: bool = False,
) -> pm.Table:
  """Of `diffusion_transformer`.

  Args:
    depth: number of layers.
    num_head: number of heads.
    channels: c.
    cond_channels: c_cond.
    pair_channels: those of the pair of Boltz-1, whose layers project it
      themselves; None where biases are given, as in Boltz-2.
    post_layer_norm: whether each layer ends with a layer norm (Boltz-2).
  """
  attention = attention_parameters(channels, num_head, pair_channels)
  layer = {
    **pm.nest(ada_ln_parameters(channels, cond_channels), 'adaln/'),
    **pm.nest(attention, 'pair_bias_attn/'),
    'output_projection_linear': _gate_parameters(channels, cond_channels),
    **pm.nest(transition_parameters(channels, cond_channels), 'transition/'),
  }
  if post_layer_norm:
    layer['post_lnorm'] = layer_norm_parameters(channels)
  return pm.numbered(layer, 'layers', depth)


def _gate_parameters(
  channels: int, cond_channels: int
) -> dict[str, pm.Parameter]:
  return pm.linear(
    cond_channels, channels, initializer='zeros', bias=_GATE_BIAS
  )


# Functions of parameters.


def pair_bias(params: Params, name: str, pair: jax.Array) -> jax.Array:
  """Linear(LN(pair)): [..., c_pair] to [..., num_bias], at least float32."""
  pair = numerics.at_least_float32(pair)
  return functional.linear(
    params, f'{name}_1', functional.layer_norm(params, f'{name}_0', pair)
  )


def ada_ln(params: Params, a: jax.Array, s: jax.Array) -> jax.Array:
  """Adaptive layer norm, Alg. 26.

  sigmoid(Linear(s')) LN(a) + Linear'(s'), s' = LN(s) with scale, no offset.
  """
  scale, shift = _ada_ln_terms(params, functional.normalise(s))
  return scale * functional.normalise(a) + shift


def _ada_ln_terms(
  params: Params, normalised: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Scale and shift from LN(s) without its scale."""
  x = normalised * params['s_norm']['scale'].astype(normalised.dtype)
  return _sigmoid(functional.linear(params, 's_scale', x)), functional.linear(
    params, 's_bias', x
  )


def conditioned_transition(
  params: Params, a: jax.Array, s: jax.Array
) -> jax.Array:
  """The update of `a` by the conditioned transition, Alg. 25."""
  gate = _sigmoid(functional.linear(params, 'output_projection_0', s))
  x = ada_ln(pm.below(params, 'adaln/'), a, s)
  return gate * _transition(params, x)


def _transition(params: Params, x: jax.Array) -> jax.Array:
  # The second half is what goes through silu.
  x1, x2 = jnp.split(functional.linear(params, 'swish_gate_0', x), 2, -1)
  hidden = _swish_gate(x1, x2, functional.linear(params, 'a_to_b', x))
  return functional.linear(params, 'b_to_a', hidden)


def attention_pair_bias(
  params: Params,
  x: jax.Array,
  bias: jax.Array,
  mask: jax.Array,
  *,
  chunk: int | None = None,
) -> jax.Array:
  """Gated attention over windows, Alg. 24 without its layer norms.

  Args:
    params: those of `attention_parameters`.
    x: [n_atom, c] float, normalised.
    bias: [n_window, n_head, n_query, n_key] float, added to the logits; that
      of masked keys is `MASKED` (see `masked_bias`).
    mask: [n_atom] bool, True = keep, of the keys.
    chunk: windows at a time; see `components.windowed_attention`.

  Returns:
    [n_atom, c]; zero before `proj_o` for rows without any key.
  """
  return _gated(params, x, _attend(params, x, bias, mask, chunk))


def _attend(
  params: Params,
  x: jax.Array,
  bias: jax.Array,
  mask: jax.Array,
  chunk: int | None,
) -> jax.Array:
  """What all heads collect, [n_atom, c]."""
  n_atom, channels = x.shape
  n_window, n_head, n_query, n_key = bias.shape
  d_head = channels // n_head
  offset = windows.key_offset(n_query, n_key)

  def keys(name: str) -> jax.Array:
    y = functional.linear(params, name, x)
    return jnp.pad(y, ((-offset, -offset), (0, 0))).reshape(-1, n_head, d_head)

  is_key = windows.key_windows(mask, n_query, n_key)
  q = functional.linear(params, 'proj_q', x) * d_head**-0.5
  out = windowed_attention.windowed_attention(
    functional.chunk_size(
      n_window, chunk, on_cpu=windowed_attention.CPU_WINDOWS
    ),
    q.reshape(n_atom, n_head, d_head),
    keys('proj_k'),
    keys('proj_v'),
    bias,
    n_query * jnp.arange(n_window, dtype=jnp.int32),
  ).reshape(n_window, n_query, channels)
  out = jnp.where(jnp.any(is_key, -1)[:, None, None], out, 0)
  return out.reshape(n_atom, channels)


def _gated(params: Params, x: jax.Array, out: jax.Array) -> jax.Array:
  gate = _sigmoid(functional.linear(params, 'proj_g', x))
  return functional.linear(params, 'proj_o', gate * out)


def masked_bias(bias: jax.Array, mask: jax.Array) -> jax.Array:
  """[n_window, n_head, n_query, n_key] with `MASKED` at masked keys."""
  is_key = windows.key_windows(mask, *bias.shape[2:])
  return jnp.where(is_key[:, None, None], bias, MASKED)


def layer_terms(
  params: Params, s: jax.Array, normalised: jax.Array
) -> LayerTerms:
  """All of a layer that depends on the conditioning alone.

  Args:
    params: those of the layer.
    s: [n_atom, c_cond] float.
    normalised: LN(s) without scale, which all layers share.

  Returns:
    The terms: 6 of the 19 units of work of a layer.
  """
  scale, shift = _ada_ln_terms(pm.below(params, 'adaln/'), normalised)
  transition_scale, transition_shift = _ada_ln_terms(
    pm.below(params, 'transition/adaln/'), normalised
  )
  return LayerTerms(
    scale,
    shift,
    _sigmoid(functional.linear(params, 'output_projection_linear', s)),
    transition_scale,
    transition_shift,
    _sigmoid(functional.linear(params, 'transition/output_projection_0', s)),
  )


def layer(
  params: Params,
  a: jax.Array,
  terms: LayerTerms,
  bias: jax.Array,
  mask: jax.Array,
  *,
  chunk: int | None = None,
) -> jax.Array:
  """One layer of the diffusion transformer; arguments as `attention_pair_bias`.

  Returns:
    New activations [n_atom, c].
  """
  attention = pm.below(params, 'pair_bias_attn/')
  transition = pm.below(params, 'transition/')

  def attention_input(a: jax.Array, terms: LayerTerms) -> jax.Array:
    return (
      terms.attention_scale * functional.normalise(a) + terms.attention_shift
    )

  def update(a: jax.Array, out: jax.Array, terms: LayerTerms) -> jax.Array:
    x = attention_input(a, terms)
    a = a + terms.attention_gate * _gated(attention, x, out)
    x = (
      terms.transition_scale * functional.normalise(a) + terms.transition_shift
    )
    a = a + terms.transition_gate * _transition(transition, x)
    if 'post_lnorm' in params:
      a = functional.layer_norm(params, 'post_lnorm', a)
    return a

  out = _attend(attention, attention_input(a, terms), bias, mask, chunk)
  found = by_rows(lambda xs: update(*xs), (a, out, terms), rows_per_chunk(bias))
  return found.reshape(a.shape)


def rows_per_chunk(bias: jax.Array) -> int:
  """How many atoms to work on at a time, where atoms are independent."""
  n_window, _, n_query, _ = bias.shape
  return n_query * functional.chunk_size(n_window, on_cpu=_CPU_WINDOWS)


def by_rows(
  fn: Callable[[Any], jax.Array], arrays: Any, rows: int
) -> jax.Array:
  """Calls `fn` on `rows` rows of all arrays at a time.

  Its intermediates are recomputed in the backward pass.

  Args:
    fn: maps a tree like `arrays` to one array.
    arrays: tree of arrays [n, ...].
    rows: a divisor of n; all of them are not recomputed.

  Returns:
    The results, [n / rows, ...].
  """
  n = jax.tree.leaves(arrays)[0].shape[0]
  if n == rows:
    return fn(arrays)[None]
  split = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), arrays)
  return jax.lax.map(jax.checkpoint(fn), split)


def transformer_terms(params: Params, s: jax.Array) -> tuple[LayerTerms, ...]:
  """The terms of every layer; see `layer_terms`."""
  normalised = functional.normalise(s)
  return tuple(layer_terms(own, s, normalised) for own in layers(params))


def diffusion_transformer(
  params: Params,
  a: jax.Array,
  s: jax.Array | None,
  biases: Sequence[jax.Array],
  mask: jax.Array,
  terms: Sequence[LayerTerms] | None = None,
  *,
  chunk: int | None = None,
) -> jax.Array:
  """All layers, Alg. 23; over windows of atoms it is Alg. 7.

  Args:
    params: those of `diffusion_transformer_parameters`.
    a: [n_atom, c] float.
    s: [n_atom, c_cond] float; not needed if there are terms.
    biases: of each layer, [n_window, n_head, n_query, n_key], `masked_bias`.
    mask: [n_atom] bool, True = keep, of the keys.
    terms: of each layer; None computes them here.
    chunk: windows at a time.

  Returns:
    [n_atom, c] in the dtype of `a`.
  """
  normalised = None if s is None else functional.normalise(s)
  for i, own in enumerate(layers(params)):
    if terms is not None:
      own_terms = terms[i]
    else:
      # One layer after the other: the terms of all of them need six arrays
      # each.
      a, s, normalised = jax.lax.optimization_barrier((a, s, normalised))
      own_terms = layer_terms(own, s, normalised)
    a = layer(own, a, own_terms, biases[i], mask, chunk=chunk)
  return a


def layers(params: Params) -> list[Params]:
  """The parameters of each layer of a diffusion transformer."""
  depth = 1 + max(
    int(module.split('/')[0].removeprefix('layers_')) for module in params
  )
  return [pm.below(params, f'layers_{i}/') for i in range(depth)]


# Functions whose backward passes keep less than those that JAX derives: of a
# layer that is half of all it keeps.


@jax.custom_vjp
def _sigmoid(x: jax.Array) -> jax.Array:
  return jax.nn.sigmoid(x)


def _sigmoid_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  y = jax.nn.sigmoid(x)
  return y, y


@numerics.standard_promotion()
def _sigmoid_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  return (gradient * y * (1 - y),)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


@jax.custom_vjp
def _swish_gate(x: jax.Array, gate: jax.Array, factor: jax.Array) -> jax.Array:
  """Product of x, silu(gate) and the factor."""
  return jax.nn.silu(gate) * x * factor


def _swish_gate_forward(x, gate, factor) -> tuple[jax.Array, Any]:
  return _swish_gate(x, gate, factor), (x, gate, factor)


@numerics.standard_promotion()
def _swish_gate_backward(kept: Any, gradient: jax.Array) -> tuple:
  x, gate, factor = kept
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  d_silu = sigmoid + silu * (1 - sigmoid)
  gradients = (
    gradient * silu * factor,
    gradient * x * factor * d_silu,
    gradient * x * silu,
  )
  return numerics.cast_like(gradients, kept)


_swish_gate.defvjp(_swish_gate_forward, _swish_gate_backward)
