"""Diffusion of structures: what AlphaFold 3, Boltz and Pallatom share."""

from structattn_jax.components.preconditioning import (
  Preconditioning,
  denoised_positions,
  noise_time,
  preconditioning,
)
from structattn_jax.diffusion.augmentation import (
  RigidMove,
  centre_random_augmentation,
  random_move,
  rotation_from_normal,
)
from structattn_jax.diffusion.losses import (
  DiffusionLoss,
  LossConfig,
  alignment_weights,
  bond_loss,
  diffusion_loss,
  sigma_weight,
  smooth_lddt_loss,
  weighted_mse,
)
from structattn_jax.diffusion.samplers import (
  SampleOutput,
  SamplerConfig,
  SamplerDraws,
  Trajectory,
  sample,
  sampler_steps,
)
from structattn_jax.diffusion.schedules import (
  ScheduleConfig,
  TrainingNoiseConfig,
  draw_use_conditioning,
  noise_levels,
  training_noise_levels,
)

__all__ = [
  'DiffusionLoss',
  'LossConfig',
  'Preconditioning',
  'RigidMove',
  'SampleOutput',
  'SamplerConfig',
  'SamplerDraws',
  'ScheduleConfig',
  'TrainingNoiseConfig',
  'Trajectory',
  'alignment_weights',
  'bond_loss',
  'centre_random_augmentation',
  'denoised_positions',
  'diffusion_loss',
  'draw_use_conditioning',
  'noise_levels',
  'noise_time',
  'preconditioning',
  'random_move',
  'rotation_from_normal',
  'sample',
  'sampler_steps',
  'sigma_weight',
  'smooth_lddt_loss',
  'training_noise_levels',
  'weighted_mse',
]
