"""Boltz's atom attention as upstream's Haiku modules, one by one.

Mirrors boltz `model/modules/encoders.py`, `encodersv2.py` and
`diffusion_conditioning.py` @ 832486d: each module holds the parameters that it
has upstream and hands on what it hands on there, such as the atom pair.
`transform_atom_attention` computes the same from the same parameters without
ever holding that pair.

Shapes and units as in `atom_attention`.
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
  """What Alg. 5 has before the noisy positions: lines 1 to 10, 13 and 14.

  Attributes:
    queries: [n_atom, atom_s], q without positions.
    conditioning: [n_atom, atom_s], c with the trunk's single.
    pair: [n_window, n_query, n_key, atom_z].
  """

  queries: jax.Array
  conditioning: jax.Array
  pair: jax.Array


class _AtomModule(hk.Module):
  """A module with a configuration, called as upstream calls it."""

  upstream_name = ''

  def __init__(self, config: bf.Config, *, name: str | None = None):
    super().__init__(name=name or self.upstream_name)
    self.config = config


class Boltz1AtomAttentionEncoder(_AtomModule):
  """Boltz-1's `AtomAttentionEncoder`, Alg. 5, all at once."""

  upstream_name = 'atom_attention_encoder'

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
    bf.check_inputs(self.config, features, single, pair)
    params = pm.haiku_parameters(
      bp.attention_encoder_parameters(self.config),
      hm.parameter_dtype(jnp.asarray(features.ref_pos)),
    )
    embedding = _embed(params, self.config, features, single, pair)
    bf.check_positions(self.config, positions, embedding.queries)
    stack = pm.below(params, 'atom_encoder/diffusion_transformer/')
    biases = _projected(stack, embedding.pair)
    context = _context(features, embedding, stack, biases)
    return be.encode(params, context, positions), embedding


class Boltz1AtomAttentionDecoder(_AtomModule):
  """Boltz-1's `AtomAttentionDecoder`, Alg. 6."""

  upstream_name = 'atom_attention_decoder'

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
    biases = _projected(stack, embedding.pair)
    context = _context(features, embedding, stack, biases)
    return be.decode(params, context, token_act, atoms)


class Boltz2AtomEncoder(_AtomModule):
  """Boltz-2's `AtomEncoder`: lines 1 to 10, 13 and 14 of Alg. 5."""

  upstream_name = 'atom_encoder'

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array | None = None,
    pair: jax.Array | None = None,
  ) -> AtomEmbedding:
    """Returns q, c and p; arguments as `Boltz1AtomAttentionEncoder`."""
    bf.check_inputs(self.config, features, single, pair)
    dtype = hm.parameter_dtype(jnp.asarray(features.ref_pos))
    params = pm.haiku_parameters(bp.atom_encoder_parameters(self.config), dtype)
    return _embed(params, self.config, features, single, pair)


class Boltz2AtomAttentionEncoder(_AtomModule):
  """Boltz-2's `AtomAttentionEncoder`: lines 11 and 15 to 17 of Alg. 5."""

  upstream_name = 'atom_attention_encoder'

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


class Boltz2AtomAttentionDecoder(_AtomModule):
  """Boltz-2's `AtomAttentionDecoder`, Alg. 6."""

  upstream_name = 'atom_attention_decoder'

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


class Boltz2DiffusionConditioning(_AtomModule):
  """Boltz-2's `DiffusionConditioning`: what the diffusion module shares."""

  upstream_name = 'diffusion_conditioning'
  config: bf.Boltz2AtomAttentionConfig

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
    embedding = _embed(own, config, features, single, z)

    def biases(name: str, depth: int, x: jax.Array) -> jax.Array:
      layers = [bt.pair_bias(params, f'{name}_{i}', x) for i in range(depth)]
      return jnp.concatenate(layers, -1)

    return Boltz2Conditioning(
      z,
      embedding,
      biases('atom_enc_proj_z', config.atom_encoder_depth, embedding.pair),
      biases('atom_dec_proj_z', config.atom_decoder_depth, embedding.pair),
      biases('token_trans_proj_z', config.token_transformer_depth, z),
    )


def _embed(
  params: Params,
  config: bf.Config,
  features: BoltzAtomFeatures,
  single: jax.Array | None,
  pair: jax.Array | None,
) -> AtomEmbedding:
  features = bf.without_padding(features)
  queries, c = be.atom_conditioning(params, config, features, single)
  p = be.atom_pair(params, config, features, c, pair)
  return AtomEmbedding(queries, c, p)


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
