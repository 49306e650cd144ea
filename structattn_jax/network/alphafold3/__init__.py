"""AlphaFold 3: atom cross attention, transformers, layouts and windows."""

from structattn_jax.network.alphafold3.atom_layout import (
  AtomCrossAtt,
  DenseBatch,
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
from structattn_jax.network.alphafold3.diffusion_transformer import (
  CrossAttentionConfig,
  CrossAttTransformer,
  CrossAttTransformerConfig,
  SelfAttentionConfig,
  Transformer,
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
  'CrossAttTransformer',
  'CrossAttTransformerConfig',
  'CrossAttentionConfig',
  'DenseBatch',
  'RefStructure',
  'SelfAttentionConfig',
  'Transformer',
  'TransformerConfig',
  'WindowPlan',
  'atom_cross_att_decoder',
  'atom_cross_att_encoder',
  'atom_cross_att_parameters',
  'build_window_plan',
  'transform_atom_cross_att',
]
