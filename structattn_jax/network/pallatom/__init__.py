"""Pallatom: atom transformers over sparse pairs."""

from structattn_jax.network.pallatom.atom_blocks import (
  AtomTransformer,
  AtomTransformerBlock,
  AtomTransformerConfig,
  LinearNoBias,
  transform_atom_transformer,
)
from structattn_jax.network.pallatom.atom_transformers import (
  AtomAttentionDecoder,
  AtomAttentionDecoderConfig,
  AtomAttentionDecoderOutput,
  AtomFeatureEncoder,
  AtomFeatureEncoderConfig,
  AtomFeatureEncoderOutput,
  transform_atom_attention_decoder,
  transform_atom_feature_encoder,
)
from structattn_jax.network.pallatom.neighbour_plan import (
  NeighbourPlan,
  PlanSizes,
  build_sparse_pairs,
  plan_neighbours,
  required_neighbours,
)
from structattn_jax.network.pallatom.residue_windows import PairSkip

__all__ = [
  'AtomAttentionDecoder',
  'AtomAttentionDecoderConfig',
  'AtomAttentionDecoderOutput',
  'AtomFeatureEncoder',
  'AtomFeatureEncoderConfig',
  'AtomFeatureEncoderOutput',
  'AtomTransformer',
  'AtomTransformerBlock',
  'AtomTransformerConfig',
  'LinearNoBias',
  'NeighbourPlan',
  'PairSkip',
  'PlanSizes',
  'build_sparse_pairs',
  'plan_neighbours',
  'required_neighbours',
  'transform_atom_attention_decoder',
  'transform_atom_feature_encoder',
  'transform_atom_transformer',
]
