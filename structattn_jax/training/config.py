"""Settings of a training run: data, model, optimiser and loop."""

import dataclasses
from typing import Literal

from structattn_jax.common import base_config
from structattn_jax.network.sedd import dual_track as sedd_dual_track

# The name of the set that comes with the package.
BUNDLED = 'bundled'
_MOST_STEPS = 2**31 - 1
_DUAL_TRACK = sedd_dual_track.DualTrackConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(base_config.BaseConfig):
  """Which pairs, and how they become batches.

  Attributes:
    path: CSV or Parquet table of pairs; 'bundled' is the set of the package. A
      relative path is relative to the working folder.
    split: rows whose column `split` has this value; None takes all.
    skip_bad_rows: whether rows that are no pairs are left out and reported,
      instead of an error, see `data.read_pairs`. A row without a protein is a
      pair if the run has the mode 'ligand_only', one without a ligand if it has
      'protein_only'.
    validation_split: rows for the bounds that are logged; None takes the
      training pairs.
    vocabulary: SMILES vocabulary, see `SmilesTokenizer.from_file`; None builds
      one from the training SMILES. It is stored with the checkpoints.
    protein_buckets: padded lengths in tokens with <cls> and <eos>. Pairs
      longer than the last bucket are dropped and reported.
    ligand_buckets: padded lengths in tokens with <bos> and <eos>.
    length_stages: curriculum of lengths, see `data.PairBatches`.
    learn_ligand_length: whether the model learns where a ligand ends; otherwise
      sampling needs its length.
    keep_ends: whether start tokens stay clean, and end tokens where the length
      is given, as they are when sampling. Without any of them a rotary
      embedding cannot tell the positions of a masked sequence apart.
  """

  largest = _MOST_STEPS

  path: str = BUNDLED
  split: str | None = None
  skip_bad_rows: bool = False
  validation_split: str | None = None
  vocabulary: str | None = None
  protein_buckets: tuple[int, ...] = (512,)
  ligand_buckets: tuple[int, ...] = (128,)
  length_stages: tuple[tuple[int, int, int], ...] = ()
  learn_ligand_length: bool = True
  keep_ends: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(base_config.BaseConfig):
  """AdamW with warm-up, clipping and moving average, as SEDD trains.

  Attributes:
    learning_rate: after warm-up; no unit.
    warmup: steps over which it rises linearly.
    weight_decay: of every parameter, norms and biases included.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    clip: largest global norm of the gradient.
    ema_decay: largest decay of the moving average of the parameters.
  """

  largest = _MOST_STEPS

  learning_rate: float = 3e-4
  warmup: int = 2500
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip: float = 1.0
  ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(base_config.BaseConfig):
  """One training run, with the absorbing graph.

  Attributes:
    data: pairs and batches.
    model: the network; the vocabularies must hold the tokenisers' ids and the
      absorbing state.
    optimizer: AdamW and moving average.
    noise: schedule of the noise, with its default constants.
    modes: step s trains mode s modulo their number.
    noise_curriculum: until this step times are drawn smaller than uniform,
      from t = u^3 at first; 0 = no curriculum.
    steps: number of optimiser steps.
    batch_size: pairs per step over all devices.
    accumulate: parts that a batch is cut into, one after the other.
    seed: of parameters, noise and shuffling.
    log_every: steps between rows of the metrics.
    evaluate_every: steps between perplexity bounds; 0 = only at the end.
    checkpoint_every: steps between checkpoints.
    keep: number of checkpoints that stay.
  """

  largest = _MOST_STEPS

  data: DataConfig = DataConfig()
  model: sedd_dual_track.DualTrackConfig = _DUAL_TRACK
  optimizer: OptimizerConfig = OptimizerConfig()
  noise: Literal['loglinear', 'geometric', 'cosine'] = 'loglinear'
  modes: tuple[sedd_dual_track.Mode, ...] = ('joint',)
  noise_curriculum: int = 0
  steps: int = 100_000
  batch_size: int = 32
  accumulate: int = 1
  seed: int = 0
  log_every: int = 10
  evaluate_every: int = 1000
  checkpoint_every: int = 1000
  keep: int = 3

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(
      1,
      *('steps', 'batch_size', 'accumulate', 'log_every', 'checkpoint_every'),
      'keep',
    )
    if self.batch_size % self.accumulate:
      raise ValueError(
        f'TrainConfig.accumulate: {self.accumulate} must divide batch_size = '
        f'{self.batch_size}'
      )
