"""SEDD: one track, and the dual track of proteins and ligands."""

from structattn_jax.network.sedd.blocks import (
  CrossAttention,
  DDiTBlock,
  FinalLayer,
)
from structattn_jax.network.sedd.dual_track import (
  DualTrack,
  DualTrackConfig,
  DualTrackOutput,
  ProteinLigand,
  dual_track_states,
  sedd_dual_track,
  transform_dual_track,
  transform_sedd_dual_track,
)
from structattn_jax.network.sedd.embeddings import (
  TimestepEmbedder,
  TokenEmbedding,
)
from structattn_jax.network.sedd.single_track import (
  SeddConfig,
  sedd,
  transform_sedd,
)

__all__ = [
  'CrossAttention',
  'DDiTBlock',
  'DualTrack',
  'DualTrackConfig',
  'DualTrackOutput',
  'FinalLayer',
  'ProteinLigand',
  'SeddConfig',
  'TimestepEmbedder',
  'TokenEmbedding',
  'dual_track_states',
  'sedd',
  'sedd_dual_track',
  'transform_dual_track',
  'transform_sedd',
  'transform_sedd_dual_track',
]
