"""`structattn run` from the outside."""

import json
import pathlib
import re
import tomllib

import jax
import numpy as np
import pytest

from structattn_jax import cli, data
from structattn_jax.apps import demo

FILES = pathlib.Path(__file__).parent / 'data' / 'files'


@pytest.fixture(scope='module')
def small_complex(tmp_path_factory):
  """40 residues of 1S3V around the ligand, as a PDB file."""
  path = tmp_path_factory.mktemp('pdb') / 'small.pdb'
  lines = data.example('1s3v').structure.read_text().splitlines()
  kept = [
    line for line in lines if line.startswith('ATOM') and int(line[22:26]) <= 40
  ]
  path.write_text('\n'.join([*kept, 'END', '']))
  return path


@pytest.fixture(scope='module')
def finished(small_complex, tmp_path_factory):
  """One complete run with JSON output."""
  out = tmp_path_factory.mktemp('out') / 'figures'
  ligand = data.example('1s3v').ligand
  arguments = ['run', str(small_complex), '--ligand', str(ligand)]
  arguments += ['--out', str(out), '--json']
  printed = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      'builtins.print', lambda *a, **k: printed.append((a, k.get('file')))
    )
    status = cli.main(arguments)
  assert status == 0
  (text,) = [a[0] for a, file in printed if file is None]
  return json.loads(text), out


def test_run_reports_all_five_systems_within_bounds(finished):
  report, _ = finished
  names = [system['name'] for system in report['systems']]
  assert names == [
    'af2_ipa',
    'af3_atom_cross_attention',
    'boltz_token_attention',
    'pallatom_atom_transformer',
    'sedd_dual_track',
  ]
  for system in report['systems']:
    assert 0 < system['oracle_error'] < 1e-5
    assert system['num_parameters'] > 0
    assert system['compile_ms'] > 0
    assert system['run_ms'] > 0
    assert system['checks']['padding']['error'] < 1e-5
  assert report['systems'][0]['checks']['SE(3), 100 A']['error'] < 1e-5
  assert report['protein_residues'] == 40
  assert report['ligand_tokens'] == 27


def test_run_writes_figures_that_are_not_blank(finished):
  from matplotlib import image

  report, out = finished
  names = {'ipa_attention', 'cross_attention', 'sparse_pairs', 'window_layout'}
  assert {file.stem for file in out.iterdir()} == names
  assert len(report['figures']) == 4
  for file in out.iterdir():
    pixels = image.imread(file)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_table_shows_every_number(finished):
  report, _ = finished
  reports = []
  for system in report['systems']:
    checks = {k: demo.Check(**check) for k, check in system['checks'].items()}
    reports.append(demo.Report(**{**system, 'checks': checks}))
  text = cli.table(reports)
  assert 'OVER' not in text
  for one in reports:
    assert one.title in text
    assert one.algorithm in text
    assert f'{one.num_parameters:,}' in text
    assert f'{one.oracle_error:.1e}' in text
    for name, check in one.checks.items():
      assert f'{name}: {check.error:.1e}' in text
    for name, shape in one.inputs.items():
      assert f'{name} [{", ".join(map(str, shape))}]' in text
  assert 'small: ' in cli.describe(report)


WATER = (
  'HETATM    1  O   HOH A   1      11.104   6.134  -6.504  1.00  0.00'
  '           O  \n'
)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('gone.pdb', None, 'gone.pdb'),
    ('empty.pdb', '', 'empty.pdb'),
    ('garbage.cif', '\x00\x01 no structure', 'garbage.cif'),
    ('garbage.pdb', 'hello\nworld\n', 'garbage.pdb'),
    ('water.pdb', WATER, 'water'),
    ('text.xyz', 'C 0 0 0', 'text.xyz'),
  ],
)
def test_unusable_file_gives_one_line_and_status_2(
  name, content, message, tmp_path, capsys
):
  path = tmp_path / name
  if content is not None:
    path.write_text(content)
  assert cli.main(['run', str(path), '--out', str(tmp_path / 'out')]) == 2
  captured = capsys.readouterr()
  (line,) = [
    line for line in captured.err.splitlines() if not line.startswith('...')
  ]
  assert line.startswith('structattn: ')
  assert message in line
  assert not captured.out
  assert not (tmp_path / 'out').exists()


def test_trace_of_ca_atoms_only_is_refused(small_complex, tmp_path, capsys):
  path = tmp_path / 'ca.pdb'
  lines = small_complex.read_text().splitlines(keepends=True)
  path.write_text(''.join(x for x in lines if re.match('ATOM.{8} CA ', x)))
  assert cli.main(['run', str(path)]) == 2
  assert 'no backbone frames' in capsys.readouterr().err


def test_check_over_its_tolerance_marks_its_row():
  def fails(*, tolerance):
    raise AssertionError('garbage changes an output')

  over = demo.Check.of(1e-5, lambda *, tolerance: 2e-5)
  broken = demo.Check.of(1e-5, fails)
  assert (over.ok, broken.ok) == (False, False)
  report = demo.Report(
    'a',
    'A',
    'Alg. 1',
    {'x': (1,)},
    1,
    1.0,
    1.0,
    1e-7,
    {'padding': broken, 'permutation': over, 'SE(3)': demo.Check(1e-6, 1e-5)},
  )
  text = cli.table([report])
  assert 'padding: inf OVER 1e-05' in text
  assert 'permutation: 2.0e-05 OVER 1e-05' in text
  assert re.search(r'SE\(3\): 1\.0e-06 *$', text, re.MULTILINE)


def test_error_of_ours_is_no_traceback(small_complex, capsys, monkeypatch):
  def fail(*args, **kwargs):
    raise KeyError('of the program')

  monkeypatch.setattr(demo, 'run', fail)
  assert cli.main(['run', str(small_complex)]) == 70
  captured = capsys.readouterr()
  assert 'unexpected KeyError' in captured.err
  assert 'Traceback' not in captured.err
  monkeypatch.setenv('STRUCTATTN_TRACEBACK', '1')
  with pytest.raises(KeyError):
    cli.main(['run', str(small_complex)])


@pytest.mark.parametrize(
  ('name', 'tokens'), [('far1000.cif', 32), ('single.pdb', 1)]
)
def test_unusual_complexes_run(name, tokens, tmp_path, capsys):
  assert cli.main(['run', str(FILES / name), '--out', str(tmp_path)]) == 0
  printed = capsys.readouterr().out
  assert 'OVER' not in printed
  assert 'figures: ' in printed
  assert f': {tokens} tokens' in printed
  assert len(list(tmp_path.iterdir())) == 4


def test_cutting_keeps_protein_behind_rna():
  features = data.featurise(data.load_structure(FILES / 'ribo_small.cif'))
  protein = int(features.tokens.is_protein.sum())
  assert 0 < protein < 42 < features.n_token
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(demo, 'MAX_TOKENS', 42)
    cut = demo.crop(features)
  assert cut.n_token == 42
  assert int(cut.tokens.is_protein.sum()) == protein


def test_model_out_of_range_is_refused(small_complex, capsys):
  assert cli.main(['run', str(small_complex), '--model', '7']) == 2
  assert 'model' in capsys.readouterr().err


def test_large_complex_is_cut_and_stays_consistent():
  path, ligand = data.example('1s3v')
  features = data.featurise(data.load_structure(path, ligand=ligand))
  limit = demo.MAX_TOKENS
  assert demo.crop(features) is features
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(demo, 'MAX_TOKENS', 60)
    cut = demo.crop(features)
  assert limit == demo.MAX_TOKENS
  assert cut.n_token == 60
  assert int(cut.tokens.is_ligand.sum()) == 15
  index = cut.atoms.token_index
  assert np.all(np.diff(index) >= 0)
  np.testing.assert_array_equal(np.unique(index), np.arange(60))
  # Every atom still belongs to the residue it came from.
  np.testing.assert_array_equal(
    cut.tokens.residue_uid[index], cut.atoms.ref_space_uid
  )


def test_info_without_a_file_says_what_is_installed(capsys, monkeypatch):
  version = cli._version
  monkeypatch.setattr(
    cli, '_version', lambda name: None if name == 'tqdm' else version(name)
  )
  assert cli.main(['info']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('structattn-jax 0.')
  assert f'jax {jax.__version__}' in lines[0]
  assert 'cpu' in lines[1]
  assert 'alphafold2, alphafold3, boltz, pallatom, sedd, seeds' in lines[2]
  (train,) = [line for line in lines if line.startswith('extra train')]
  assert train.endswith('missing tqdm')


def test_info_names_the_extras_of_the_project():
  text = (pathlib.Path(__file__).parents[1] / 'pyproject.toml').read_text()
  extras = tomllib.loads(text)['project']['optional-dependencies']
  for extra, (packages, _) in cli._EXTRAS.items():
    named = extras[extra]
    for other in re.findall(r'structattn-jax\[(.*?)\]', ' '.join(named)):
      named = [*named, *(p for e in other.split(',') for p in extras[e])]
    assert {re.split(r'[<>=]', p)[0] for p in named if '[' not in p} == {
      *packages
    }
