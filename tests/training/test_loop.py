"""Runs: they learn, stop, crash, go on bit by bit, and refuse what is wrong."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

pytest.importorskip('orbax.checkpoint')

from structattn_jax import checkpoint, data, training
from structattn_jax.network.sedd import dual_track as sedd_dual_track


class CrashError(Exception):
  pass


def at_step(wanted, action):
  def after_step(step):
    if step == wanted:
      action()

  return after_step


def crash():
  raise CrashError


def rows(folder):
  """The metrics without the seconds, which no two runs share."""
  found = training.read_metrics(folder / 'metrics.csv')
  return [{k: v for k, v in row.items() if k != 'seconds'} for row in found]


def assert_same_run(folder, result, whole_run):
  whole_folder, whole = whole_run
  assert (result.step, result.interrupted) == (6, False)
  for got, want in zip(
    jax.tree.leaves(result.params), jax.tree.leaves(whole.params), strict=True
  ):
    assert got.tobytes() == want.tobytes()
  assert result.bounds == whole.bounds
  assert rows(folder) == rows(whole_folder)
  model = (folder / 'model.npz').read_bytes()
  assert model == (whole_folder / 'model.npz').read_bytes()


def test_run_leaves_what_it_promises(tiny, whole_run):
  folder, result = whole_run
  assert training.TrainConfig.from_toml(folder / 'config.toml') == tiny
  vocabulary = data.SmilesTokenizer.from_file(folder / 'vocabulary.json')
  found = rows(folder)
  assert [row['step'] for row in found] == [1, 2, 3, 4, 5, 6]
  assert [row['mode'] for row in found] == [*tiny.modes] * 3
  assert ('protein_loss' in found[0], 'protein_loss' in found[1]) == (
    True,
    False,
  )
  assert [row['learning_rate'] for row in found[:3]] == [0.005, 0.01, 0.01]
  assert {row['step'] for row in found if 'bound_joint' in row} == {3, 6}
  assert found[-1]['bound_ligand_only'] == result.bounds['ligand_only']
  model = checkpoint.load(folder / 'model.npz')
  assert model.config == tiny.model
  assert json.loads(model.provenance['smiles_vocabulary']) == (
    vocabulary.vocabulary
  )
  lengths = json.loads(model.provenance['protein_lengths'])
  assert lengths == {'5': 2, '6': 2}


def test_run_is_repeatable(tiny, tmp_path, whole_run):
  assert_same_run(tmp_path, training.train(tiny, tmp_path), whole_run)


@pytest.mark.parametrize('step', [1, 3, 5])
def test_crash_goes_on_bit_by_bit(tiny, tmp_path, whole_run, step):
  with pytest.raises(CrashError):
    training.train(tiny, tmp_path, after_step=at_step(step, crash))
  messages = []
  result = training.train(tiny, tmp_path, report=messages.append)
  assert_same_run(tmp_path, result, whole_run)
  start = step // 2 * 2  # The last checkpoint.
  assert any(f'step {start} of' in m for m in messages) == (start > 0)


def test_signal_stops_with_a_checkpoint_and_goes_on(tiny, tmp_path, whole_run):
  before = signal.getsignal(signal.SIGTERM)
  stop = at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
  result = training.train(tiny, tmp_path, after_step=stop)
  assert (result.step, result.interrupted) == (3, True)
  assert not (tmp_path / 'model.npz').exists()
  assert signal.getsignal(signal.SIGTERM) is before
  messages = []
  result = training.train(tiny, tmp_path, report=messages.append)
  assert f'going on from step 3 of {tmp_path}' in messages
  assert_same_run(tmp_path, result, whole_run)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damaged_checkpoint_costs_steps_not_the_result(
  tiny, tmp_path, whole_run
):
  with pytest.raises(CrashError):
    training.train(tiny, tmp_path, after_step=at_step(5, crash))
  files = [
    p for p in (tmp_path / 'checkpoints' / '4').rglob('*') if p.is_file()
  ]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  messages = []
  result = training.train(tiny, tmp_path, report=messages.append)
  assert any('4: damaged' in message for message in messages)
  assert any('going on from step 2' in message for message in messages)
  assert_same_run(tmp_path, result, whole_run)


def test_finished_run_can_be_extended(tiny, change, tmp_path, whole_run):
  half = training.train(change(steps=3), tmp_path)
  assert half.step == 3
  assert_same_run(tmp_path, training.train(tiny, tmp_path), whole_run)
  again = training.train(tiny, tmp_path)
  assert again.bounds == whole_run[1].bounds


def test_another_configuration_is_refused(tiny, change, tmp_path):
  training.train(change(steps=1), tmp_path)
  other = dataclasses.replace(tiny.model, num_block=1)
  with pytest.raises(training.RunError, match=r'model\.num_block: 1, but'):
    training.train(change(model=other), tmp_path)
  with pytest.raises(training.RunError, match='seed: 1, but'):
    training.train(change(seed=1), tmp_path)


def test_other_data_are_refused(tiny, change, table, tmp_path):
  copy = tmp_path / 'pairs.csv'
  copy.write_text(table.read_text())
  settings = dataclasses.replace(tiny.data, path=str(copy))
  training.train(change(steps=1, data=settings), tmp_path / 'run')
  copy.write_text(table.read_text().replace('CCN', 'CCC'))
  with pytest.raises(training.RunError, match='pairs are not those'):
    training.train(change(steps=2, data=settings), tmp_path / 'run')


@pytest.mark.parametrize(
  ('values', 'match'),
  [
    ({'modes': ()}, 'modes: expected at least one'),
    (
      {'model': sedd_dual_track.DualTrackConfig(ligand_vocab=9)},
      r'model\.ligand_vocab: 9 ids are too few for \d+ tokens',
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(change, tmp_path, values, match):
  with pytest.raises(training.RunError, match=match):
    training.train(change(**values), tmp_path)


def test_batch_that_does_not_fit_the_devices_is_refused(change, tmp_path):
  devices = jax.devices() * 3
  with pytest.raises(training.RunError, match='give a multiple of 3'):
    training.train(change(), tmp_path, devices=devices)


def test_validation_split_gives_the_bounds(tiny, change, tmp_path):
  lines = ['sequence,smiles,split', 'MKT,CCO,train', 'GGAL,CCN,test']
  table = tmp_path / 'pairs.csv'
  table.write_text('\n'.join(lines))
  settings = dataclasses.replace(
    tiny.data, path=str(table), split='train', validation_split='test'
  )
  found = training.load_data(change(data=settings))
  assert (len(found.train), len(found.validation)) == (1, 1)
  # The vocabulary is that of the training rows.
  assert found.messages == (
    "validation: unknown ligand tokens became <unk>: 'N' (1)",
  )


def test_learning_lowers_every_bound(change, tmp_path):
  start = training.train(change(steps=1), tmp_path / 'start').bounds
  config = change(steps=40, evaluate_every=0, checkpoint_every=40)
  end = training.train(config, tmp_path / 'end').bounds
  for mode, bound in end.items():
    assert np.isfinite(bound)
    assert bound < 0.8 * start[mode]
