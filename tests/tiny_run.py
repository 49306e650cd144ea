"""A run small enough to be made many times."""

import dataclasses

import pytest

from structattn_jax import training
from structattn_jax.network.sedd import dual_track as sedd_dual_track

ROWS = (
  ('MKT', 'CCO'),
  ('GGAL', 'c1ccccc1'),
  ('MKTW', 'CCN'),
  ('LLV', 'COC'),
  ('', 'CCCC'),
)


@pytest.fixture(scope='session')
def table(tmp_path_factory):
  path = tmp_path_factory.mktemp('pairs') / 'pairs.csv'
  lines = ['sequence,smiles', *(','.join(row) for row in ROWS)]
  path.write_text('\n'.join(lines) + '\n')
  return path


@pytest.fixture(scope='session')
def tiny(table):
  """Six steps of two modes, a checkpoint after every other one."""
  return training.TrainConfig(
    data=training.DataConfig(
      path=str(table), protein_buckets=(6,), ligand_buckets=(10,)
    ),
    model=sedd_dual_track.DualTrackConfig(
      hidden_size=16,
      num_head=2,
      num_block=2,
      cond_dim=8,
      ligand_vocab=16,
      dropout=0.1,
    ),
    optimizer=training.OptimizerConfig(learning_rate=1e-2, warmup=2),
    modes=('joint', 'ligand_only'),
    noise_curriculum=4,
    steps=6,
    batch_size=8,
    log_every=2,
    evaluate_every=3,
    checkpoint_every=2,
  )


@pytest.fixture(scope='session')
def whole_run(tiny, tmp_path_factory):
  """Folder and result of the run without any interruption."""
  pytest.importorskip('orbax.checkpoint')
  folder = tmp_path_factory.mktemp('whole')
  return folder, training.train(tiny, folder)


@pytest.fixture
def change(tiny):
  """The run with other settings."""
  return lambda **values: dataclasses.replace(tiny, **values)
