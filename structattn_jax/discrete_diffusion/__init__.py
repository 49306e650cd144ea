"""Discrete diffusion of tokens: graphs, noise, losses and samplers."""

from structattn_jax.discrete_diffusion.graph import (
  Absorbing,
  Graph,
  Uniform,
  make_graph,
)
from structattn_jax.discrete_diffusion.losses import (
  DualTrackLoss,
  PerplexityBound,
  ProteinLigand,
  batched_logits,
  corrupt,
  dual_track_loss,
  perplexity_bound,
  sample_times,
  score_entropy,
  sedd_loss,
  times_from_uniform,
)
from structattn_jax.discrete_diffusion.noise import (
  CosineNoise,
  GeometricNoise,
  LogLinearNoise,
  Noise,
  make_noise,
)
from structattn_jax.discrete_diffusion.sampling import (
  SampleOutput,
  SamplerConfig,
  sample,
  sample_absorbing_from_uniform,
  sample_from_uniform,
  sample_sedd,
)

__all__ = [
  'Absorbing',
  'CosineNoise',
  'DualTrackLoss',
  'GeometricNoise',
  'Graph',
  'LogLinearNoise',
  'Noise',
  'PerplexityBound',
  'ProteinLigand',
  'SampleOutput',
  'SamplerConfig',
  'Uniform',
  'batched_logits',
  'corrupt',
  'dual_track_loss',
  'make_graph',
  'make_noise',
  'perplexity_bound',
  'sample',
  'sample_absorbing_from_uniform',
  'sample_from_uniform',
  'sample_sedd',
  'sample_times',
  'score_entropy',
  'sedd_loss',
  'times_from_uniform',
]
