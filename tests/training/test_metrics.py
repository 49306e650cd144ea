"""The CSV and TensorBoard files of a run."""

import pytest

from structattn_jax.training import metrics


def write(folder, steps, **options):
  writer = metrics.MetricsWriter(folder, ('mode', 'loss'), **options)
  for step in steps:
    writer.write(step, {'mode': 'joint', 'loss': step / 8})
  writer.close()
  return metrics.read_metrics(folder / 'metrics.csv')


def test_rows_come_back_as_written(tmp_path):
  rows = write(tmp_path, [1, 2])
  assert rows == [
    {'step': 1, 'mode': 'joint', 'loss': 0.125},
    {'step': 2, 'mode': 'joint', 'loss': 0.25},
  ]


def test_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  write(tmp_path / 'a', range(1, 7))
  write(tmp_path / 'b', range(1, 5))
  with (tmp_path / 'b' / 'metrics.csv').open('a') as file:
    file.write('5,jo')  # Killed in the middle of a row.
  write(tmp_path / 'b', range(3, 7), step=2)
  a, b = ((tmp_path / n / 'metrics.csv').read_bytes() for n in 'ab')
  assert a == b


def test_missing_values_are_empty_cells(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, ('mode', 'loss'))
  writer.write(1, {'loss': 2.0})
  writer.close()
  assert writer.path.read_text() == 'step,mode,loss\n1,,2.0\n'


def test_unknown_columns_are_refused(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, ('loss',))
  with pytest.raises(ValueError, match='lost'):
    writer.write(1, {'lost': 1.0})
  writer.close()


def test_event_file_holds_the_numbers(tmp_path):
  tensorboard = pytest.importorskip('tensorboardX')
  from tensorboardX.proto import event_pb2

  assert tensorboard.__version__
  write(tmp_path, [1, 2])
  (path,) = (tmp_path / 'events').iterdir()
  content, found = path.read_bytes(), {}
  while content:  # length (8), checksum (4), event, checksum (4)
    size = int.from_bytes(content[:8], 'little')
    event = event_pb2.Event.FromString(content[12 : 12 + size])
    for value in event.summary.value:
      found[event.step, value.tag] = value.simple_value
    content = content[16 + size :]
  assert found == {(1, 'loss'): 0.125, (2, 'loss'): 0.25}
