"""`structattn train` and `structattn sample`, and the library below them."""

import csv
import json
import os
import signal

import jax
import numpy as np
import pytest

pytest.importorskip('orbax.checkpoint')

from structattn_jax import checkpoint, cli, data, training
from structattn_jax.apps import generate
from structattn_jax.data import sample_metrics
from structattn_jax.network.sedd import single_track

STEPS = ('--steps', '3', '--num', '2')


@pytest.fixture(scope='module')
def model(whole_run):
  return generate.load_model(whole_run[0])


def run(capsys, *arguments):
  status = cli.main([str(argument) for argument in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def test_train_command_writes_a_run(tiny, tmp_path, capsys, whole_run):
  config = tmp_path / 'tiny.toml'
  config.write_text(tiny.to_toml())
  folder = tmp_path / 'run'
  status, out, _ = run(capsys, 'train', config, '--out', folder, '--quiet')
  assert status == 0
  assert '6 steps; perplexity bounds' in out
  assert f'{whole_run[1].bounds["joint"]:.3f}' in out
  assert (folder / 'model.npz').exists()


def test_train_command_shows_progress(change, tmp_path, capsys):
  pytest.importorskip('tqdm')
  config = tmp_path / 'tiny.toml'
  config.write_text(change().to_toml())
  status, _, error = run(
    capsys, 'train', config, '--out', tmp_path / 'run', '--steps', 2
  )
  assert status == 0
  assert '2/2' in error


def test_stopped_train_command_has_its_own_status(
  tiny, tmp_path, capsys, monkeypatch
):
  config = tmp_path / 'tiny.toml'
  config.write_text(tiny.to_toml())
  real = training.train

  def stopped(*arguments, **options):
    options['after_step'] = lambda step: (
      os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
    )
    return real(*arguments, **options)

  monkeypatch.setattr(training, 'train', stopped)
  status, _, error = run(
    capsys, 'train', config, '--out', tmp_path / 'run', '--quiet'
  )
  assert status == 143
  assert 'stopped at step 2; the same command goes on' in error


def test_sample_command_writes_all_formats(whole_run, tmp_path, capsys):
  chem = pytest.importorskip('rdkit.Chem')
  status, out, _ = run(
    capsys,
    *('sample', whole_run[0], '--mode', 'ligand_given_protein'),
    *('--protein', 'MKT', '--out', tmp_path, '--json', *STEPS),
  )
  assert status == 0
  metrics = json.loads(out)
  assert metrics == json.loads((tmp_path / 'metrics.json').read_text())
  assert set(metrics) == {'mode', 'ligand'}
  ligand = metrics['ligand']
  assert ligand['perplexity_bound'] > 1
  with (tmp_path / 'samples.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['name'] for row in rows] == ['sample_0', 'sample_1']
  assert {row['protein_sequence'] for row in rows} == {'MKT'}
  valid = 0
  for row, line in zip(
    rows, (tmp_path / 'ligands.smi').read_text().splitlines(), strict=True
  ):
    assert line == f'{row["ligand_smiles"]}\t{row["name"]}'
    found = chem.MolFromSmiles(row['ligand_smiles'])
    ok = bool(row['ligand_smiles']) and found is not None
    assert bool(row['canonical_smiles']) == ok
    valid += ok
  assert ligand['validity'] == valid / 2
  fasta = (tmp_path / 'proteins.fasta').read_text()
  assert fasta == '>sample_0\nMKT\n>sample_1\nMKT\n'


def test_sample_command_prints_a_summary(whole_run, tmp_path, capsys):
  status, out, _ = run(
    capsys,
    *('sample', whole_run[0] / 'model.npz', '--out', tmp_path, *STEPS),
  )
  assert status == 0
  assert 'protein: validity' in out
  assert 'perplexity bound' in out
  assert 'samples.csv' in out
  metrics = json.loads((tmp_path / 'metrics.json').read_text())
  assert set(metrics['protein']['composition']) == {*data.AMINO_ACID_LETTERS}


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    (('--mode', 'ligand_given_protein'), 'needs a whole protein, got None'),
    (
      ('--mode', 'ligand_given_protein', '--protein', 'MK<mask>'),
      'needs a whole protein',
    ),
    (('--mode', 'ligand_only', '--protein', 'MKT'), 'protein: not used in'),
    (('--mode', 'ligand_only', '--ligand', 'CCl'), 'does not know: Cl'),
    (('--mode', 'ligand_only', '--ligand', 'C!'), 'ligand: smiles: no token'),
    (
      ('--mode', 'ligand_only', '--ligand', 'CC', '--ligand-length', '3'),
      'ligand_length: the template says',
    ),
    (('--steps', '0'), 'SamplerConfig.steps: expected at least 1'),
    (('--protein-length', '0'), 'protein_length: expected at least 1'),
  ],
)
def test_requests_that_cannot_work_are_one_line(
  whole_run, tmp_path, capsys, arguments, match
):
  status, _, error = run(
    capsys, 'sample', whole_run[0], '--out', tmp_path, *arguments
  )
  assert status == 2
  assert match in error
  assert len(error.splitlines()) == 1


def test_unusable_checkpoints_are_one_line(tmp_path, capsys):
  status, _, error = run(capsys, 'sample', tmp_path)
  assert status == 2
  assert 'neither model.npz nor checkpoints' in error
  checkpoint.save(
    tmp_path / 'x.npz', {'m': {'w': np.ones(1)}}, single_track.SeddConfig()
  )
  status, _, error = run(capsys, 'sample', tmp_path / 'x.npz')
  assert status == 2
  assert 'SeddConfig, not a dual-track model' in error


@pytest.mark.parametrize(
  ('text', 'match'),
  [('stepz = 3', "did you mean 'steps'"), ('steps = 0', 'expected at least 1')],
)
def test_unusable_configurations_are_one_line(tmp_path, capsys, text, match):
  config = tmp_path / 'bad.toml'
  config.write_text(text)
  status, _, error = run(capsys, 'train', config, '--out', tmp_path / 'run')
  assert status == 2
  assert match in error
  assert not (tmp_path / 'run').exists()


def test_unfinished_run_gives_its_moving_average(tiny, tmp_path):
  def stop(step):
    raise KeyboardInterrupt

  # As a crash after the first checkpoint.
  with pytest.raises(KeyboardInterrupt):
    training.train(
      tiny, tmp_path, after_step=lambda step: stop(step) if step == 3 else None
    )
  model = generate.load_model(tmp_path)
  expected = training.train(
    tiny.from_dict({**tiny.to_dict(), 'steps': 2}), tmp_path / 'two'
  )
  for got, want in zip(
    jax.tree.leaves(model.params), jax.tree.leaves(expected.params), strict=True
  ):
    np.testing.assert_array_equal(got, want)
  assert model.settings == tiny
  assert model.lengths['protein'] == {5: 2, 6: 2}


def test_published_parameters_need_vocabulary_and_lengths(model, tmp_path):
  path = tmp_path / 'published.npz'
  checkpoint.save(path, model.params, model.config)
  bare = generate.load_model(path)
  key = jax.random.key(0)
  with pytest.raises(generate.GenerateError, match='no SMILES vocabulary'):
    generate.generate(bare, key, mode='ligand_only', ligand_length=3)
  with pytest.raises(generate.GenerateError, match='give a length'):
    generate.generate(bare, key, mode='protein_only')
  model.smiles_tokenizer.save(tmp_path / 'vocabulary.json')
  known = generate.load_model(path, vocabulary=tmp_path / 'vocabulary.json')
  assert known.smiles_tokenizer.vocabulary == model.smiles_tokenizer.vocabulary


def test_template_positions_stay_and_blanks_are_filled(model):
  samples = generate.generate(
    model,
    jax.random.key(1),
    mode='joint',
    num=2,
    protein='MK<mask>W',
    ligand='CC<mask>',
    sampler=generate.discrete_diffusion.SamplerConfig(steps=3),
    return_states=True,
  )
  states = samples.states['protein']
  assert states.shape == (4, 2, 6)
  # The blank is the only absorbed position of the first network call.
  absorbing = model.config.protein_vocab - 1
  np.testing.assert_array_equal(
    states[0] == absorbing, [[False] * 3 + [True] + [False] * 2] * 2
  )
  np.testing.assert_array_equal(
    states[:, :, [0, 1, 2, 4, 5]],
    np.broadcast_to(
      model.protein_tokenizer.encode('MKLW')[[0, 1, 2, 4, 5]], (4, 2, 5)
    ),
  )
  assert all(text.startswith('CC') for text in samples.ligand)


def test_decode_stops_at_the_end_and_survives_any_id():
  tokenizer = data.ProteinTokenizer()
  assert generate.decode(tokenizer, np.array([0, 4, 36, 5, 2, 4, 1])) == (
    'L<unk>A'
  )
  assert generate.decode(tokenizer, np.array([0, 4, 5])) == 'LA'


def test_ligand_metrics_count_molecules_not_spellings():
  pytest.importorskip('rdkit')
  found = sample_metrics.ligand_metrics(
    ['OCC', 'CCO', 'c1ccccc1', 'C(', ''], training=['C1=CC=CC=C1']
  )
  assert found.canonical == ('CCO', 'CCO', 'c1ccccc1', None, None)
  assert found.validity == 3 / 5
  assert found.uniqueness == 2 / 3
  assert found.novelty == 1 / 2
  assert sample_metrics.ligand_metrics(['C']).novelty is None


def test_protein_metrics_count_letters():
  found = sample_metrics.protein_metrics(
    ['AAL', 'AAL', 'A<unk>', ''], training=['AAL']
  )
  assert (found.validity, found.uniqueness, found.novelty) == (0.5, 0.5, 0.0)
  assert found.composition['A'] == 5 / 7
  assert found.mean_length == (3 + 3 + 6) / 4
  assert sum(found.composition.values()) == pytest.approx(1)
