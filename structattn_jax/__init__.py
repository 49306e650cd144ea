"""Attention systems of structural biology for JAX and Haiku.

  import structattn_jax as sa

  init, apply = sa.transform_ipa(sa.InvariantPointAttentionConfig())

Modules live in `structattn_jax.network`, one algorithm per file; everything a
user needs is re-exported here. `structattn_jax.data` (structure files, extra
`data`) and `structattn_jax.reference` (float64 oracles) are imported when they
are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from structattn_jax import geometry, testing
from structattn_jax.common.base_config import BaseConfig
from structattn_jax.common.checks import (
  check_dtypes,
  check_shapes,
  validate_rotations,
  validate_segment_ids,
  validate_sorted,
)
from structattn_jax.common.numerics import (
  layer_norm,
  masked_softmax,
  safe_norm,
)
from structattn_jax.components.haiku_modules import LayerNorm, Linear
from structattn_jax.components.neighbour_plan import (
  NeighbourPlan,
  PlanSizes,
  plan_neighbours,
)
from structattn_jax.components.segment import (
  max_segment_size,
  segment_attention,
  segment_broadcast,
  segment_max,
  segment_mean,
  segment_softmax,
  segment_sum,
)
from structattn_jax.geometry import Rigid
from structattn_jax.kernels.residue_windows import PairSkip
from structattn_jax.network.atom_cross_attention import (
  AtomConditioning,
  AtomCrossAttConfig,
  AtomCrossAttEncoderOutput,
  AtomCrossAttentionConfig,
  AtomCrossAttentionOutput,
  AtomCrossAttHead,
  AtomCrossAttHeadOutput,
  AtomEncoding,
  AtomToTokenAttention,
  TokenToAtomAttention,
  atom_cross_att_decoder,
  atom_cross_att_encoder,
  atom_cross_att_parameters,
  atom_cross_attention,
  transform_atom_cross_att,
  transform_atom_cross_attention,
)
from structattn_jax.network.atom_layout import (
  AtomCrossAtt,
  DenseBatch,
  RefStructure,
  WindowPlan,
  build_window_plan,
)
from structattn_jax.network.boltz_conditioning import (
  FourierEmbedding,
  PairwiseConditioning,
  RelativePositionConfig,
  RelativePositionEncoder,
  SingleConditioning,
  noise_time,
)
from structattn_jax.network.boltz_encoders import (
  BoltzAtomAttention,
  BoltzAtomContext,
  BoltzAtomEncoderOutput,
  transform_boltz_atom_attention,
)
from structattn_jax.network.boltz_features import (
  Boltz1AtomAttentionConfig,
  Boltz2AtomAttentionConfig,
  BoltzAtomFeatures,
)
from structattn_jax.network.boltz_modules import (
  Boltz1AtomAttentionDecoder,
  Boltz1AtomAttentionEncoder,
  Boltz2AtomAttentionDecoder,
  Boltz2AtomAttentionEncoder,
  Boltz2AtomEncoder,
  Boltz2DiffusionConditioning,
)
from structattn_jax.network.boltz_token_attention import (
  TokenAttentionPool,
  TokenAttentionPoolConfig,
  transform_token_attention_pool,
)
from structattn_jax.network.diffusion_transformer import (
  CrossAttentionConfig,
  CrossAttTransformer,
  CrossAttTransformerConfig,
  SelfAttentionConfig,
  Transformer,
  TransformerConfig,
)
from structattn_jax.network.fape import (
  backbone_loss,
  frame_aligned_point_error,
  multimer_backbone_loss,
  sidechain_loss,
  torsion_angle_loss,
)
from structattn_jax.network.invariant_point_attention import (
  InvariantPointAttention,
  InvariantPointAttentionConfig,
  InvariantPointAttentionOutput,
  LowRankPair,
  SharedPair,
  transform_ipa,
  transform_ipa_pair_bias,
)
from structattn_jax.network.pallatom_atom_transformers import (
  AtomAttentionDecoder,
  AtomAttentionDecoderConfig,
  AtomAttentionDecoderOutput,
  AtomFeatureEncoder,
  AtomFeatureEncoderConfig,
  AtomFeatureEncoderOutput,
  AtomTransformer,
  AtomTransformerBlock,
  AtomTransformerConfig,
  LinearNoBias,
  build_sparse_pairs,
  required_neighbours,
  transform_atom_attention_decoder,
  transform_atom_feature_encoder,
  transform_atom_transformer,
)
from structattn_jax.network.sedd_dual_track import (
  DDiTBlock,
  DualTrack,
  DualTrackConfig,
  DualTrackOutput,
  FinalLayer,
  SeddConfig,
  TimestepEmbedder,
  TokenEmbedding,
  dual_track_states,
  log_score,
  sedd,
  sedd_dual_track,
  transform_dual_track,
  transform_sedd,
  transform_sedd_dual_track,
)
from structattn_jax.network.structure_module import (
  FoldIteration,
  StructureModule,
  StructureModuleConfig,
  StructureModuleOutput,
  transform_structure_module,
)

if TYPE_CHECKING:
  from structattn_jax import (
    data,
    discrete_diffusion,
    generate,
    reference,
    training,
  )

__version__ = '0.1.0'

_LAZY = ('data', 'discrete_diffusion', 'generate', 'reference', 'training')

__all__ = [
  'AtomAttentionDecoder',
  'AtomAttentionDecoderConfig',
  'AtomAttentionDecoderOutput',
  'AtomConditioning',
  'AtomCrossAtt',
  'AtomCrossAttConfig',
  'AtomCrossAttEncoderOutput',
  'AtomCrossAttHead',
  'AtomCrossAttHeadOutput',
  'AtomCrossAttentionConfig',
  'AtomCrossAttentionOutput',
  'AtomEncoding',
  'AtomFeatureEncoder',
  'AtomFeatureEncoderConfig',
  'AtomFeatureEncoderOutput',
  'AtomToTokenAttention',
  'AtomTransformer',
  'AtomTransformerBlock',
  'AtomTransformerConfig',
  'BaseConfig',
  'Boltz1AtomAttentionConfig',
  'Boltz1AtomAttentionDecoder',
  'Boltz1AtomAttentionEncoder',
  'Boltz2AtomAttentionConfig',
  'Boltz2AtomAttentionDecoder',
  'Boltz2AtomAttentionEncoder',
  'Boltz2AtomEncoder',
  'Boltz2DiffusionConditioning',
  'BoltzAtomAttention',
  'BoltzAtomContext',
  'BoltzAtomEncoderOutput',
  'BoltzAtomFeatures',
  'CrossAttTransformer',
  'CrossAttTransformerConfig',
  'CrossAttentionConfig',
  'DDiTBlock',
  'DenseBatch',
  'DualTrack',
  'DualTrackConfig',
  'DualTrackOutput',
  'FinalLayer',
  'FoldIteration',
  'FourierEmbedding',
  'InvariantPointAttention',
  'InvariantPointAttentionConfig',
  'InvariantPointAttentionOutput',
  'LayerNorm',
  'Linear',
  'LinearNoBias',
  'LowRankPair',
  'NeighbourPlan',
  'PairSkip',
  'PairwiseConditioning',
  'PlanSizes',
  'RefStructure',
  'RelativePositionConfig',
  'RelativePositionEncoder',
  'Rigid',
  'SeddConfig',
  'SelfAttentionConfig',
  'SharedPair',
  'SingleConditioning',
  'StructureModule',
  'StructureModuleConfig',
  'StructureModuleOutput',
  'TimestepEmbedder',
  'TokenAttentionPool',
  'TokenAttentionPoolConfig',
  'TokenEmbedding',
  'TokenToAtomAttention',
  'Transformer',
  'TransformerConfig',
  'WindowPlan',
  'atom_cross_att_decoder',
  'atom_cross_att_encoder',
  'atom_cross_att_parameters',
  'atom_cross_attention',
  'backbone_loss',
  'build_sparse_pairs',
  'build_window_plan',
  'check_dtypes',
  'check_shapes',
  'data',
  'discrete_diffusion',
  'dual_track_states',
  'frame_aligned_point_error',
  'generate',
  'geometry',
  'layer_norm',
  'log_score',
  'masked_softmax',
  'max_segment_size',
  'multimer_backbone_loss',
  'noise_time',
  'plan_neighbours',
  'reference',
  'required_neighbours',
  'safe_norm',
  'sedd',
  'sedd_dual_track',
  'segment_attention',
  'segment_broadcast',
  'segment_max',
  'segment_mean',
  'segment_softmax',
  'segment_sum',
  'sidechain_loss',
  'testing',
  'torsion_angle_loss',
  'training',
  'transform_atom_attention_decoder',
  'transform_atom_cross_att',
  'transform_atom_cross_attention',
  'transform_atom_feature_encoder',
  'transform_atom_transformer',
  'transform_boltz_atom_attention',
  'transform_dual_track',
  'transform_ipa',
  'transform_ipa_pair_bias',
  'transform_sedd',
  'transform_sedd_dual_track',
  'transform_structure_module',
  'transform_token_attention_pool',
  'validate_rotations',
  'validate_segment_ids',
  'validate_sorted',
]


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
