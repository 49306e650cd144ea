"""AlphaFold 3: diffusion head, atom cross attention, transformers, layouts."""

from structattn_jax.network.alphafold3.atom_cross_attention import (
  AtomCrossAttConfig,
  AtomCrossAttEncoderOutput,
  atom_cross_att_decoder,
  atom_cross_att_encoder,
  atom_cross_att_parameters,
)
from structattn_jax.network.alphafold3.atom_layout import (
  AtomCrossAtt,
  DenseBatch,
)
from structattn_jax.network.alphafold3.cached_atom_attention import (
  AtomConditioning,
  AtomCrossAttHead,
  AtomCrossAttHeadOutput,
  AtomEncoding,
  CachedAtomCrossAtt,
  atom_cross_att,
  cached_atom_cross_att,
  transform_atom_cross_att,
)
from structattn_jax.network.alphafold3.cached_diffusion import (
  CachedDiffusionHead,
  DiffusionConditioning,
  cached_diffusion_head,
)
from structattn_jax.network.alphafold3.dense_atom_attention import (
  DenseAtomCrossAtt,
  dense_atom_cross_att,
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
  CrossAttTransformer,
  Transformer,
  transform_transformer,
)
from structattn_jax.network.alphafold3.transformer_parameters import (
  CrossAttentionConfig,
  CrossAttTransformerConfig,
  SelfAttentionConfig,
  TransformerConfig,
)
from structattn_jax.network.alphafold3.window_plan import (
  RefStructure,
  WindowPlan,
  build_window_plan,
)

__all__ = [
  'AtomConditioning',
  'AtomCrossAtt',
  'AtomCrossAttConfig',
  'AtomCrossAttEncoderOutput',
  'AtomCrossAttHead',
  'AtomCrossAttHeadOutput',
  'AtomEncoding',
  'CachedAtomCrossAtt',
  'CachedDiffusionHead',
  'CrossAttTransformer',
  'CrossAttTransformerConfig',
  'CrossAttentionConfig',
  'DenseAtomCrossAtt',
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
  'atom_cross_att',
  'atom_cross_att_decoder',
  'atom_cross_att_encoder',
  'atom_cross_att_parameters',
  'build_window_plan',
  'cached_atom_cross_att',
  'cached_diffusion_head',
  'dense_atom_cross_att',
  'diffusion_head_parameters',
  'transform_atom_cross_att',
  'transform_diffusion_head',
  'transform_transformer',
]
