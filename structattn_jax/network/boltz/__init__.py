"""Boltz-1 and Boltz-2: diffusion module, atom attention, conditioning."""

from structattn_jax.components.preconditioning import noise_time
from structattn_jax.network.boltz.atom_attention import (
  BoltzAtomAttentionOutput,
  BoltzAtomContext,
  BoltzAtomEncoderOutput,
  CachedAtomAttention,
  atom_attention_outputs,
  cached_atom_attention,
  transform_atom_attention,
)
from structattn_jax.network.boltz.conditioning import (
  FourierEmbedding,
  PairwiseConditioning,
  RelativePositionConfig,
  RelativePositionEncoder,
  SingleConditioning,
)
from structattn_jax.network.boltz.diffusion import (
  Boltz1DiffusionConfig,
  Boltz2DiffusionConfig,
  BoltzDiffusionContext,
  BoltzDiffusionOutput,
  CachedDiffusion,
  cached_diffusion,
  diffusion_outputs,
  parameter_labels,
  transform_diffusion,
)
from structattn_jax.network.boltz.features import (
  Boltz1AtomAttentionConfig,
  Boltz2AtomAttentionConfig,
  BoltzAtomFeatures,
)
from structattn_jax.network.boltz.modules import (
  Boltz1AtomAttentionDecoder,
  Boltz1AtomAttentionEncoder,
  Boltz2AtomAttentionDecoder,
  Boltz2AtomAttentionEncoder,
  Boltz2AtomEncoder,
  Boltz2DiffusionConditioning,
)

__all__ = [
  'Boltz1AtomAttentionConfig',
  'Boltz1AtomAttentionDecoder',
  'Boltz1AtomAttentionEncoder',
  'Boltz1DiffusionConfig',
  'Boltz2AtomAttentionConfig',
  'Boltz2AtomAttentionDecoder',
  'Boltz2AtomAttentionEncoder',
  'Boltz2AtomEncoder',
  'Boltz2DiffusionConditioning',
  'Boltz2DiffusionConfig',
  'BoltzAtomAttentionOutput',
  'BoltzAtomContext',
  'BoltzAtomEncoderOutput',
  'BoltzAtomFeatures',
  'BoltzDiffusionContext',
  'BoltzDiffusionOutput',
  'CachedAtomAttention',
  'CachedDiffusion',
  'FourierEmbedding',
  'PairwiseConditioning',
  'RelativePositionConfig',
  'RelativePositionEncoder',
  'SingleConditioning',
  'atom_attention_outputs',
  'cached_atom_attention',
  'cached_diffusion',
  'diffusion_outputs',
  'noise_time',
  'parameter_labels',
  'transform_atom_attention',
  'transform_diffusion',
]
