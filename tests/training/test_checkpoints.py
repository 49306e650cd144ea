"""Checkpoints: exact, atomic, and what happens to damaged ones."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('orbax.checkpoint')

from structattn_jax import checkpoint
from structattn_jax.training import checkpoints

STATE = {
  'net/~/block': {'w': jnp.arange(2000.0) / 3, 'b': jnp.ones((), jnp.bfloat16)},
  'count': (jnp.array(3), jnp.array([[True, False]])),
}


def at(step):
  return jax.tree.map(lambda x: x + step if x.dtype != bool else x, STATE)


@pytest.fixture
def saved(tmp_path):
  with checkpoints.Checkpoints(tmp_path / 'c', keep=3) as opened:
    for step in (2, 4, 6):
      opened.save(step, at(step), {'who': step})
    yield opened


def data_file(folder: pathlib.Path) -> pathlib.Path:
  """The largest file, which holds the array `w`."""
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[:100])


def test_state_comes_back_bit_by_bit(saved):
  step, state, record = saved.restore_latest(STATE)
  assert (step, record) == (6, {'who': 6})
  assert jax.tree.structure(state) == jax.tree.structure(STATE)
  for got, want in zip(
    jax.tree.leaves(state), jax.tree.leaves(at(6)), strict=True
  ):
    assert got.dtype == want.dtype
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_only_the_latest_are_kept(saved):
  saved.save(8, at(8), {})
  assert saved.steps() == [8, 6, 4]


def test_a_step_can_be_written_again(saved):
  saved.save(6, at(60), {'who': 'again'})
  _, state, record = saved.restore_latest(STATE)
  assert record == {'who': 'again'}
  np.testing.assert_array_equal(state['count'][0], 63)


def test_no_checkpoint_gives_none(tmp_path):
  with checkpoints.Checkpoints(tmp_path / 'none') as opened:
    assert opened.restore_latest(STATE) is None


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', [flip_byte, truncate, pathlib.Path.unlink])
def test_damaged_checkpoint_is_reported_and_the_previous_used(saved, damage):
  damage(data_file(saved.folder / '6'))
  messages = []
  step, state, _ = saved.restore_latest(STATE, report=messages.append)
  assert step == 4
  np.testing.assert_array_equal(state['count'][0], 7)
  (message,) = messages
  assert '/6: damaged' in message
  # Its place is free for the run that goes on.
  assert saved.steps() == [4, 2]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_missing_record_counts_as_damage(saved):
  for path in (saved.folder / '6' / 'record').iterdir():
    path.unlink()
  messages = []
  assert saved.restore_latest(STATE, report=messages.append)[0] == 4
  assert len(messages) == 1


def test_unfinished_checkpoint_is_ignored(saved):
  # What orbax leaves when the process dies before the rename.
  left = saved.folder / '8.orbax-checkpoint-tmp'
  left.mkdir()
  (left / 'half').write_text('x')
  with checkpoints.Checkpoints(saved.folder) as opened:
    assert opened.restore_latest(STATE)[0] == 6


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_all_damaged_is_an_error_not_a_fresh_start(saved):
  for step in saved.steps():
    truncate(data_file(saved.folder / str(step)))
  with pytest.raises(
    checkpoint.CheckpointError, match=r'all checkpoints are damaged \(6, 4, 2'
  ):
    saved.restore_latest(STATE)


def test_check_refuses_a_foreign_checkpoint(saved):
  def check(record):
    raise ValueError(f'not mine: {record["who"]}')

  with pytest.raises(ValueError, match='not mine: 6'):
    saved.restore_latest(STATE, check=check)
