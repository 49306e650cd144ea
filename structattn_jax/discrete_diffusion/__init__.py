"""Discrete diffusion of tokens: graphs, noise, losses and samplers."""

from structattn_jax.discrete_diffusion.absorbing import (
  SampleOutput,
  sample_absorbing_from_uniform,
)
from structattn_jax.discrete_diffusion.graph import (
  Absorbing,
  Graph,
  Uniform,
  log_score,
  make_graph,
)
from structattn_jax.discrete_diffusion.literal import sample_from_uniform
from structattn_jax.discrete_diffusion.losses import (
  DualTrackLoss,
  PerplexityBound,
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
from structattn_jax.discrete_diffusion.prepared_network import cached_sedd
from structattn_jax.discrete_diffusion.samplers import sample, sample_sedd
from structattn_jax.discrete_diffusion.schedule import SamplerConfig

__all__ = [
  'Absorbing',
  'CosineNoise',
  'DualTrackLoss',
  'GeometricNoise',
  'Graph',
  'LogLinearNoise',
  'Noise',
  'PerplexityBound',
  'SampleOutput',
  'SamplerConfig',
  'Uniform',
  'batched_logits',
  'cached_sedd',
  'corrupt',
  'dual_track_loss',
  'log_score',
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
