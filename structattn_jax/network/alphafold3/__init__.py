"""AlphaFold 3: diffusion head, atom cross attention, transformers, layouts."""

from structattn_jax.network.alphafold3.atom_layout import (
  AtomCrossAtt,
  DenseBatch,
  RefStructure,
  WindowPlan,
  build_window_plan,
)
from structattn_jax.network.alphafold3.cached_atom_attention import (
  AtomConditioning,
  AtomCrossAttConfig,
  AtomCrossAttEncoderOutput,
  AtomCrossAttHead,
  AtomCrossAttHeadOutput,
  AtomEncoding,
  atom_cross_att_decoder,
  atom_cross_att_encoder,
  atom_cross_att_parameters,
  transform_atom_cross_att,
)
from structattn_jax.network.alphafold3.cached_diffusion import (
  CachedDiffusionHead,
  DiffusionConditioning,
  cached_diffusion_head,
)
from structattn_jax.network.alphafold3.diffusion_head import (
  DiffusionHead,
  DiffusionHeadBatch,
  DiffusionHeadConfig,
  TokenIds,
  TrunkEmbeddings,
  diffusion_head_parameters,
  transform_diffusion_head,
)
from structattn_jax.network.alphafold3.diffusion_transformer import (
  CrossAttentionConfig,
  CrossAttTransformer,
  CrossAttTransformerConfig,
  SelfAttentionConfig,
  Transformer,
  TransformerConfig,
)

__all__ = [
  'AtomConditioning',
  'AtomCrossAtt',
  'AtomCrossAttConfig',
  'AtomCrossAttEncoderOutput',
  'AtomCrossAttHead',
  'AtomCrossAttHeadOutput',
  'AtomEncoding',
  'CachedDiffusionHead',
  'CrossAttTransformer',
  'CrossAttTransformerConfig',
  'CrossAttentionConfig',
  'DenseBatch',
  'DiffusionConditioning',
  'DiffusionHead',
  'DiffusionHeadBatch',
  'DiffusionHeadConfig',
  'RefStructure',
  'SelfAttentionConfig',
  'TokenIds',
  'Transformer',
  'TransformerConfig',
  'TrunkEmbeddings',
  'WindowPlan',
  'atom_cross_att_decoder',
  'atom_cross_att_encoder',
  'atom_cross_att_parameters',
  'build_window_plan',
  'cached_diffusion_head',
  'diffusion_head_parameters',
  'transform_atom_cross_att',
  'transform_diffusion_head',
]
