"""SEDD: one track, and the dual track of proteins and ligands."""

from structattn_jax.network.sedd.dual_track import (
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

__all__ = [
  'DDiTBlock',
  'DualTrack',
  'DualTrackConfig',
  'DualTrackOutput',
  'FinalLayer',
  'SeddConfig',
  'TimestepEmbedder',
  'TokenEmbedding',
  'dual_track_states',
  'log_score',
  'sedd',
  'sedd_dual_track',
  'transform_dual_track',
  'transform_sedd',
  'transform_sedd_dual_track',
]
