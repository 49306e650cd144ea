"""AlphaFold 2: invariant point attention, structure module, FAPE."""

from structattn_jax.network.alphafold2.fape import (
  backbone_loss,
  frame_aligned_point_error,
  multimer_backbone_loss,
  sidechain_loss,
  torsion_angle_loss,
)
from structattn_jax.network.alphafold2.invariant_point_attention import (
  CachedIpa,
  InvariantPointAttention,
  InvariantPointAttentionConfig,
  InvariantPointAttentionOutput,
  LowRankPair,
  SharedPair,
  cached_ipa,
  transform_ipa,
)
from structattn_jax.network.alphafold2.structure_module import (
  FoldIteration,
  StructureModule,
  StructureModuleConfig,
  StructureModuleOutput,
  transform_structure_module,
)

__all__ = [
  'CachedIpa',
  'FoldIteration',
  'InvariantPointAttention',
  'InvariantPointAttentionConfig',
  'InvariantPointAttentionOutput',
  'LowRankPair',
  'SharedPair',
  'StructureModule',
  'StructureModuleConfig',
  'StructureModuleOutput',
  'backbone_loss',
  'cached_ipa',
  'frame_aligned_point_error',
  'multimer_backbone_loss',
  'sidechain_loss',
  'torsion_angle_loss',
  'transform_ipa',
  'transform_structure_module',
]
