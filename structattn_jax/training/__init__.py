"""Training of the protein-ligand diffusion model, from data to checkpoints.

  result = train(TrainConfig.from_toml('configs/...toml'), 'out/name')

Needs the extra `train` (orbax, tqdm). `state` and `step` are of use to any
model: optimiser, moving average and data parallelism for a loss function.
"""

from structattn_jax.training.config import (
  DataConfig,
  OptimizerConfig,
  TrainConfig,
)
from structattn_jax.training.loop import (
  RunError,
  TrainResult,
  load_data,
  make_batches,
  read_pairs,
  train,
)
from structattn_jax.training.metrics import read_metrics
from structattn_jax.training.state import (
  TrainState,
  apply_gradients,
  init_state,
  make_optimizer,
  warmup_factor,
)
from structattn_jax.training.step import (
  make_mesh,
  make_step,
  replicate,
  shard_batch,
)

__all__ = (
  'DataConfig',
  'OptimizerConfig',
  'RunError',
  'TrainConfig',
  'TrainResult',
  'TrainState',
  'apply_gradients',
  'init_state',
  'load_data',
  'make_batches',
  'make_mesh',
  'make_optimizer',
  'make_step',
  'read_metrics',
  'read_pairs',
  'replicate',
  'shard_batch',
  'train',
  'warmup_factor',
)
