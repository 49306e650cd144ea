"""Boltz's transformers and atom attention as Haiku modules, as published.

Mirrors boltz `model/modules/be.py`, `encodersv2.py` and
`diffusion_conditioning.py` @ 832486d, module by module: each holds the
parameters that it has upstream and hands on what it hands on there, such as the
atom pair. `transform_boltz_atom_attention` computes the same from the same
parameters without ever holding that pair.

Shapes and units as in `boltz_encoders`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import checks
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.boltz import atom_attention as be
from structattn_jax.network.boltz import conditioning
from structattn_jax.network.boltz import features as bf
from structattn_jax.network.boltz import parameters as bp
from structattn_jax.network.boltz import transformers as bt
from structattn_jax.network.boltz.features import BoltzAtomFeatures


class AtomEmbedding(NamedTuple):
  """Result of steps 1 to 6 of the encoder.

  Attributes:
    queries: [n_atom, atom_s], q without positions.
    conditioning: [n_atom, atom_s], c with the trunk's single.
    pair: [n_window, n_query, n_key, atom_z].
  """

  queries: jax.Array
  conditioning: jax.Array
  pair: jax.Array


class Boltz1AtomAttentionEncoder(hk.Module):
  """Boltz-1's `AtomAttentionEncoder`, Alg. 5, all at once.

  Hands on the atom pair as upstream does; `transform_boltz_atom_attention` is
  the lean form of the same with the same parameters.
  """

  def __init__(
    self,
    config: bf.Boltz1AtomAttentionConfig,
    *,
    name: str = 'atom_attention_encoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array | None = None,
    pair: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> tuple[be.BoltzAtomEncoderOutput, AtomEmbedding]:
    """Returns tokens and atoms, and q, c and p before the transformer.

    Args:
      features: of one complex.
      single: [n_token, token_s] float; this and the next two are given with
        structure prediction and only then.
      pair: [n_token, n_token, token_z] float, conditioned.
      positions: [n_atom, 3] float, scaled.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    config = self.config
    bf.check_inputs(config, features, single, pair)
    features = bf.without_padding(features)
    dtype = hm.parameter_dtype(jnp.asarray(features.ref_pos))
    params = pm.haiku_parameters(bp.attention_encoder_parameters(config), dtype)
    queries, c = be.atom_conditioning(params, config, features, single)
    bf.check_positions(config, positions, queries)
    embedding = AtomEmbedding(
      queries, c, be.atom_pair(params, config, features, c, pair)
    )
    stack = pm.below(params, 'atom_encoder/diffusion_transformer/')
    context = _context(
      features, embedding, stack, _projected(stack, embedding.pair)
    )
    return be.encode(params, context, positions), embedding


class Boltz1AtomAttentionDecoder(hk.Module):
  """Boltz-1's `AtomAttentionDecoder`, Alg. 6."""

  def __init__(
    self,
    config: bf.Boltz1AtomAttentionConfig,
    *,
    name: str = 'atom_attention_decoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    token_act: jax.Array,
    atoms: jax.Array,
    embedding: AtomEmbedding,
    features: BoltzAtomFeatures,
  ) -> jax.Array:
    """Returns the update of the positions, [n_atom, 3].

    Args:
      token_act: [n_token, 2 token_s] float.
      atoms: [n_atom, atom_s] float, of the encoder.
      embedding: of the encoder.
      features: of the complex.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    bf.check_decoder_inputs(self.config, token_act, atoms, features.num_tokens)
    params = pm.haiku_parameters(
      bp.attention_decoder_parameters(self.config),
      hm.parameter_dtype(atoms),
    )
    stack = pm.below(params, 'atom_decoder/diffusion_transformer/')
    context = _context(
      features, embedding, stack, _projected(stack, embedding.pair)
    )
    return be.decode(params, context, token_act, atoms)


class Boltz2AtomEncoder(hk.Module):
  """Boltz-2's `AtomEncoder`: lines 1 to 14 of Alg. 5."""

  def __init__(
    self, config: bf.Boltz2AtomAttentionConfig, *, name: str = 'atom_encoder'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array | None = None,
    pair: jax.Array | None = None,
  ) -> AtomEmbedding:
    """Returns q, c and p; arguments as `Boltz1AtomAttentionEncoder`."""
    bf.check_inputs(self.config, features, single, pair)
    features = bf.without_padding(features)
    dtype = hm.parameter_dtype(jnp.asarray(features.ref_pos))
    params = pm.haiku_parameters(bp.atom_encoder_parameters(self.config), dtype)
    queries, c = be.atom_conditioning(params, self.config, features, single)
    return AtomEmbedding(
      queries, c, be.atom_pair(params, self.config, features, c, pair)
    )


class Boltz2AtomAttentionEncoder(hk.Module):
  """Boltz-2's `AtomAttentionEncoder`: Alg. 5 from line 15 on."""

  def __init__(
    self,
    config: bf.Boltz2AtomAttentionConfig,
    *,
    name: str = 'atom_attention_encoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    embedding: AtomEmbedding,
    bias: jax.Array,
    positions: jax.Array | None = None,
  ) -> be.BoltzAtomEncoderOutput:
    """Returns tokens and atoms.

    Args:
      features: of one complex.
      embedding: of `Boltz2AtomEncoder`.
      bias: [n_window, n_query, n_key, depth * n_head] float, layer after layer.
      positions: [n_atom, 3] float, scaled; with structure prediction only.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    bf.check_positions(self.config, positions, embedding.queries)
    params = pm.haiku_parameters(
      bp.attention_encoder_parameters(self.config),
      hm.parameter_dtype(embedding.queries),
    )
    stack = pm.below(params, 'atom_encoder/diffusion_transformer/')
    biases = _given(bias, self.config.atom_encoder_depth)
    return be.encode(
      params, _context(features, embedding, stack, biases), positions
    )


class Boltz2AtomAttentionDecoder(hk.Module):
  """Boltz-2's `AtomAttentionDecoder`, Alg. 6."""

  def __init__(
    self,
    config: bf.Boltz2AtomAttentionConfig,
    *,
    name: str = 'atom_attention_decoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    token_act: jax.Array,
    atoms: jax.Array,
    embedding: AtomEmbedding,
    bias: jax.Array,
    features: BoltzAtomFeatures,
  ) -> jax.Array:
    """Returns the update of the positions, [n_atom, 3].

    Args:
      token_act: [n_token, 2 token_s] float.
      atoms: [n_atom, atom_s] float, of the encoder.
      embedding: of `Boltz2AtomEncoder`.
      bias: [n_window, n_query, n_key, depth * n_head] float, layer after layer.
      features: of the complex.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    bf.check_decoder_inputs(self.config, token_act, atoms, features.num_tokens)
    params = pm.haiku_parameters(
      bp.attention_decoder_parameters(self.config),
      hm.parameter_dtype(atoms),
    )
    stack = pm.below(params, 'atom_decoder/diffusion_transformer/')
    biases = _given(bias, self.config.atom_decoder_depth)
    context = _context(features, embedding, stack, biases)
    return be.decode(params, context, token_act, atoms)


class Boltz2Conditioning(NamedTuple):
  """Result of `Boltz2DiffusionConditioning`.

  Attributes:
    pair: [n_token, n_token, token_z], conditioned.
    embedding: q, c and p of the atoms.
    encoder_bias: [n_window, n_query, n_key, depth * n_head], layer after layer.
    decoder_bias: likewise.
    token_bias: [n_token, n_token, depth * n_head] of the token transformer.
  """

  pair: jax.Array
  embedding: AtomEmbedding
  encoder_bias: jax.Array
  decoder_bias: jax.Array
  token_bias: jax.Array


class Boltz2DiffusionConditioning(hk.Module):
  """Boltz-2's `DiffusionConditioning`: what the diffusion module shares."""

  def __init__(
    self,
    config: bf.Boltz2AtomAttentionConfig,
    *,
    name: str = 'diffusion_conditioning',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array,
    pair: jax.Array,
    relative_position: jax.Array,
  ) -> Boltz2Conditioning:
    """Returns the conditioning of samples.

    Args:
      features: of one complex.
      single: [n_token, token_s] float, of the trunk.
      pair: [n_token, n_token, token_z] float, of the trunk.
      relative_position: [n_token, n_token, token_z] float.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    config = self.config
    bf.check_inputs(config, features, single, pair)
    features = bf.without_padding(features)
    checks.check_shapes(
      pair=(pair, 'n_token n_token token_z'),
      relative_position=(relative_position, 'n_token n_token token_z'),
    )
    params = pm.haiku_parameters(
      bp.diffusion_conditioning_parameters(config),
      hm.parameter_dtype(pair),
    )
    z = conditioning.pairwise_conditioning(
      pm.below(params, 'pairwise_conditioner/'), pair, relative_position
    )
    own = pm.below(params, 'atom_encoder/')
    queries, c = be.atom_conditioning(own, config, features, single)
    p = be.atom_pair(own, config, features, c, z)

    def biases(name: str, depth: int, x: jax.Array) -> jax.Array:
      layers = [bt.pair_bias(params, f'{name}_{i}', x) for i in range(depth)]
      return jnp.concatenate(layers, -1)

    return Boltz2Conditioning(
      z,
      AtomEmbedding(queries, c, p),
      biases('atom_enc_proj_z', config.atom_encoder_depth, p),
      biases('atom_dec_proj_z', config.atom_decoder_depth, p),
      biases('token_trans_proj_z', config.token_transformer_depth, z),
    )


def _context(
  features: BoltzAtomFeatures,
  embedding: AtomEmbedding,
  stack: Params,
  biases: Sequence[jax.Array],
) -> be.BoltzAtomContext:
  """A context whose encoder and decoder are the same transformer."""
  features = bf.without_padding(features)
  own = be.Transformer(
    bt.transformer_terms(stack, embedding.conditioning),
    tuple(bt.masked_bias(x, features.atom_mask) for x in biases),
  )
  return be.BoltzAtomContext(
    embedding.queries,
    embedding.conditioning,
    own,
    own,
    jnp.asarray(features.atom_mask),
    jnp.asarray(features.atom_to_token),
    features.num_tokens,
  )


def _projected(stack: Params, pair: jax.Array) -> list[jax.Array]:
  """Boltz-1's biases of each layer, heads first."""
  return [
    jnp.moveaxis(bt.pair_bias(own, 'pair_bias_attn/proj_z', pair), -1, 1)
    for own in bt.layers(stack)
  ]


def _given(bias: jax.Array, depth: int) -> list[jax.Array]:
  """Boltz-2's biases of each layer, heads first."""
  return [jnp.moveaxis(x, -1, 1) for x in jnp.split(bias, depth, -1)]


# Transformers.


class AdaLN(hk.Module):
  """Adaptive layer norm, Alg. 26; see `ada_ln`."""

  def __call__(self, a: jax.Array, s: jax.Array) -> jax.Array:
    """Maps [..., c] and [..., c_cond] to [..., c]."""
    table = bt.ada_ln_parameters(a.shape[-1], s.shape[-1])
    return bt.ada_ln(pm.haiku_parameters(table, hm.parameter_dtype(a)), a, s)


class ConditionedTransitionBlock(hk.Module):
  """Conditioned transition, Alg. 25, with Boltz's third factor.

    x  = AdaLN(a, s),  [x1 | x2] = Linear(x)
    da = sigmoid(Linear(s)) Linear(silu(x2) x1 Linear(x))

  Args of the constructor:
    expansion_factor: hidden channels per channel.
    name: module name.
  """

  def __init__(self, *, expansion_factor: int = 2, name: str = 'transition'):
    super().__init__(name=name)
    self.expansion_factor = expansion_factor

  def __call__(self, a: jax.Array, s: jax.Array) -> jax.Array:
    """Returns the update [..., c] of [..., c] given [..., c_cond]."""
    table = bt.transition_parameters(
      a.shape[-1], s.shape[-1], self.expansion_factor
    )
    params = pm.haiku_parameters(table, hm.parameter_dtype(a))
    return bt.conditioned_transition(params, a, s)


class AttentionPairBias(hk.Module):
  """Gated attention with pair bias over windows, Alg. 24; the inner one.

    l_ij = q_i . k_j / sqrt(d_head) + bias_ij,  out = W_o (sigmoid(g) A v)

  Only the queries have a bias. The layer norms around it belong to the layer.

  Args of the constructor:
    num_head: number of heads.
    name: module name.
  """

  def __init__(self, num_head: int, *, name: str = 'pair_bias_attn'):
    super().__init__(name=name)
    self.num_head = num_head

  def __call__(
    self,
    x: jax.Array,
    pair: jax.Array,
    mask: jax.Array,
    *,
    project_pair: bool = True,
  ) -> jax.Array:
    """Returns [n_atom, c].

    Args:
      x: [n_atom, c] float.
      pair: [n_window, n_query, n_key, c_pair] float, projected to the bias
        with `proj_z` as in Boltz-1; without `project_pair` the bias itself,
        [n_window, n_query, n_key, n_head], as in Boltz-2.
      mask: [n_atom] bool, True = keep, of the keys.
      project_pair: whether there is `proj_z`.
    """
    _check(mask, pair, x=x)
    pair_channels = pair.shape[-1] if project_pair else None
    table = bt.attention_parameters(x.shape[-1], self.num_head, pair_channels)
    params = pm.haiku_parameters(table, hm.parameter_dtype(x))
    bias = bt.pair_bias(params, 'proj_z', pair) if project_pair else pair
    return bt.attention_pair_bias(params, x, _heads_first(bias, mask), mask)


class _Transformer(hk.Module):
  """What both transformers take."""

  def __init__(
    self,
    depth: int,
    num_head: int,
    *,
    project_pair: bool = True,
    post_layer_norm: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self.depth = depth
    self.num_head = num_head
    self.project_pair = project_pair
    self.post_layer_norm = post_layer_norm


class DiffusionTransformer(_Transformer):
  """Layers of attention with pair bias and conditioned transition, Alg. 23.

  Each layer of Boltz-1 projects the pair to its bias; in Boltz-2 the biases of
  all layers are given, layer after layer on the last axis.

  Args of the constructor:
    depth: number of layers.
    num_head: number of heads.
    project_pair: True for Boltz-1.
    post_layer_norm: whether each layer ends with a layer norm (Boltz-2).
    name: module name.
  """

  def __call__(
    self, a: jax.Array, s: jax.Array, pair: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """Returns new activations.

    Args:
      a: [n_atom, c] float.
      s: [n_atom, c_cond] float.
      pair: [n_atom, n_atom, c_pair] float for attention among all rows, or
        [n_window, n_query, n_key, c_pair] over windows; c_pair is depth *
        num_head if biases are given.
      mask: [n_atom] bool, True = keep.

    Returns:
      [n_atom, c] in the dtype of `a`.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    if pair.ndim == 3:
      pair = pair[None]
    _check(mask, pair, a=a, s=s)
    table = bt.diffusion_transformer_parameters(
      self.depth,
      self.num_head,
      a.shape[-1],
      s.shape[-1],
      pair.shape[-1] if self.project_pair else None,
      post_layer_norm=self.post_layer_norm,
    )
    params = pm.haiku_parameters(table, hm.parameter_dtype(a))
    if self.project_pair:
      biases = [
        bt.pair_bias(own, 'pair_bias_attn/proj_z', pair)
        for own in bt.layers(params)
      ]
    else:
      checks.check_shapes(
        {'n_bias': self.depth * self.num_head},
        pair=(pair, 'n_window n_query n_key n_bias'),
      )
      biases = jnp.split(pair, self.depth, -1)
    return bt.diffusion_transformer(
      params, a, s, [_heads_first(x, mask) for x in biases], mask
    )


class AtomTransformer(_Transformer):
  """The diffusion transformer over windows of atoms, Alg. 7.

  Args of the constructor: as `DiffusionTransformer`.
  """

  def __call__(
    self, q: jax.Array, c: jax.Array, p: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """Returns new activations, [n_atom, c].

    Args:
      q: [n_atom, c] float.
      c: [n_atom, c_cond] float.
      p: [n_window, n_query, n_key, c_pair] float.
      mask: [n_atom] bool, True = keep.
    """
    transformer = DiffusionTransformer(
      self.depth,
      self.num_head,
      project_pair=self.project_pair,
      post_layer_norm=self.post_layer_norm,
    )
    return transformer(q, c, p, mask)


def _heads_first(bias: jax.Array, mask: jax.Array) -> jax.Array:
  """[n_window, n_query, n_key, n_head], masked and with the heads second."""
  return bt.masked_bias(jnp.moveaxis(bias, -1, 1), mask)


def _check(mask: jax.Array, pair: jax.Array, **acts: jax.Array) -> None:
  """Shapes and dtypes of a transformer's arguments."""
  sizes = checks.check_shapes(
    mask=(mask, 'n_atom'),
    **{name: (x, f'n_atom c_{name}') for name, x in acts.items()},
    pair=(pair, 'n_window n_query n_key c_pair'),
  )
  checks.check_dtypes('floating', pair=pair, **acts)
  checks.check_dtypes('bool', mask=mask)
  if sizes['n_window'] * sizes['n_query'] != sizes['n_atom']:
    raise ValueError(
      f'pair: expected n_window * n_query = {sizes["n_atom"]} atoms from '
      f"'mask', got {sizes['n_window']} windows of {sizes['n_query']}"
    )
