"""`structattn convert`, `info` and `verify` from the outside."""

import hashlib
import json
import pathlib

import jax
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax import checkpoint, cli, convert

GOLDENS = pathlib.Path(__file__).parent / 'goldens'
SAMPLE = GOLDENS / 'af2_ipa/params_sample_multimer.npz'
GOLDEN = GOLDENS / 'af3_atom_cross_attention/seed_unsorted.npz'


def run(*arguments) -> int:
  return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize('suffix', checkpoint.SUFFIXES)
@pytest.mark.parametrize('part', convert.FORMATS['alphafold2'].parts)
def test_convert_writes_parameters_config_and_provenance(
  part, suffix, tmp_path, capsys
):
  output = tmp_path / f'out{suffix}'
  options = ['--part', part] if part == 'ipa' else []  # The default.
  assert run('convert', SAMPLE, output, *options) == 0
  printed = capsys.readouterr()
  assert not printed.err
  loaded = checkpoint.load(output)
  load = {
    'ipa': convert.load_ipa,
    'structure_module': convert.load_structure_module,
  }[part]
  config, params = load(SAMPLE)
  assert loaded.config == config
  jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), params)
  assert loaded.provenance == {
    'converter': f'structattn_jax {sa.__version__}',
    'part': part,
    'source_file': SAMPLE.name,
    'source_format': 'alphafold2',
    'source_sha256': hashlib.sha256(SAMPLE.read_bytes()).hexdigest(),
  }
  values = sum(array.size for array in jax.tree.leaves(params))
  for text in (str(output), f'{values:,} parameters', 'num_head=3'):
    assert text in printed.out
  # One paragraph.
  assert '\n\n' not in printed.out.strip()
  assert run('info', output) == 0
  assert capsys.readouterr().out == printed.out


@pytest.mark.parametrize(
  ('source', 'target', 'message'),
  [
    ('gone.npz', 'out.npz', 'No such file'),
    (GOLDEN, 'out.npz', 'without parameters of a known model'),
    ('cut.npz', 'out.npz', 'damaged'),
    ('text.npz', 'out.npz', 'unknown format'),
    ('empty.npz', 'out.npz', 'empty'),
    ('model.bin.zst', 'out.npz', 'zstandard'),
    ('legacy.pt', 'out.npz', 'pickle, which is never read'),
    ('other.safetensors', 'out.npz', 'safetensors'),
    (SAMPLE, 'out.txt', '.safetensors or .npz'),
    (SAMPLE, 'no/out.npz', 'there is no folder'),
  ],
)
def test_convert_of_bad_input_is_one_line_and_status_2(
  source, target, message, tmp_path, capsys
):
  contents = {
    'cut.npz': SAMPLE.read_bytes()[:-100],
    'text.npz': b'hello, hello',
    'empty.npz': b'',
    'model.bin.zst': b'\x28\xb5\x2f\xfd' + b'0' * 20,
    'legacy.pt': b'\x80\x02' + b'0' * 20,
    'other.safetensors': b'\x02' + b'\x00' * 7 + b'{}',
  }
  for name, content in contents.items():
    (tmp_path / name).write_bytes(content)
  before = sorted(tmp_path.iterdir())
  assert run('convert', tmp_path / source, tmp_path / target) == 2
  printed = capsys.readouterr()
  assert not printed.out
  (line,) = printed.err.splitlines()
  assert line.startswith('structattn: ')
  assert message in line
  assert sorted(tmp_path.iterdir()) == before


def test_convert_lists_all_problems_and_writes_nothing(tmp_path, capsys):
  with np.load(SAMPLE) as file:
    content = dict(file)
  names = sorted(content)
  del content[names[0]], content[names[5]]
  content[names[7]] = content[names[7]][:-1]
  np.savez(tmp_path / 'bad.npz', **content)
  (tmp_path / 'out.npz').write_bytes(b'old')
  assert run('convert', tmp_path / 'bad.npz', tmp_path / 'out.npz') == 2
  (line,) = capsys.readouterr().err.splitlines()
  for expected in (
    f'missing {names[0]}',
    f'missing {names[5]}',
    f'wrong {names[7]} ',
  ):
    assert expected in line
  assert (tmp_path / 'out.npz').read_bytes() == b'old'


def test_convert_of_what_is_converted_says_so(tmp_path, capsys):
  assert run('convert', SAMPLE, tmp_path / 'a.npz') == 0
  assert run('convert', tmp_path / 'a.npz', tmp_path / 'b.npz') == 2
  assert 'converted already' in capsys.readouterr().err
  (tmp_path / 'c.npz').write_bytes(SAMPLE.read_bytes())
  assert run('convert', tmp_path / 'c.npz', tmp_path / 'c.npz') == 2
  assert 'would replace the source' in capsys.readouterr().err
  assert run('info', SAMPLE) == 2
  assert 'structattn convert' in capsys.readouterr().err


def test_convert_warns_of_dead_parameters_in_one_line(tmp_path, capsys):
  source = GOLDENS / 'sedd_protein_ligand/checkpoints/protlig_checkpoint.pth'
  output = tmp_path / 'out.npz'
  assert run('convert', source, output, '--weights', 'model') == 0
  printed = capsys.readouterr()
  (line,) = printed.err.splitlines()
  assert line.startswith(f'structattn: warning: {source}: left out')
  assert 'transformer.blocks_lig.0.norm3.bias' in line
  assert 'weights: model' in printed.out
  assert run('info', output) == 0
  assert capsys.readouterr().out == printed.out


def test_verify_prints_a_table(capsys):
  assert run('verify', GOLDEN) == 0
  printed = capsys.readouterr()
  lines = printed.out.splitlines()
  assert [line.split()[:2] for line in lines[1:-1]] == [
    ['seed_unsorted', 'to_atoms'],
    ['seed_unsorted', 'to_tokens'],
  ]
  assert lines[-1] == '2 arrays of 1 cases: all within tolerance'


def test_verify_prints_json_and_nothing_else(capsys):
  assert run('verify', GOLDEN, '--json') == 0
  rows = json.loads(capsys.readouterr().out)
  assert [row['output'] for row in rows] == ['to_atoms', 'to_tokens']
  for row in rows:
    assert row.keys() == {
      'case',
      'output',
      'max_error',
      'scale',
      'tolerance',
      'ok',
    }
    assert row['case'] == 'seed_unsorted'
    assert row['ok'] is True


def test_verify_of_a_wrong_golden_has_status_1(tmp_path, capsys):
  with np.load(GOLDEN) as file:
    arrays = dict(file)
  for run_name in ('outputs', 'outputs64'):
    arrays[f'{run_name}/to_atoms'][3, 4] += 3e-5
  np.savez(tmp_path / 'wrong.npz', **arrays)
  assert run('verify', tmp_path / 'wrong.npz', GOLDEN, '--json') == 1
  rows = json.loads(capsys.readouterr().out)
  failed = [(row['case'], row['output']) for row in rows if not row['ok']]
  assert failed == [('wrong', 'to_atoms')]
  assert run('verify', tmp_path / 'wrong.npz') == 1
  assert '1 FAIL' in capsys.readouterr().out


def test_verify_of_nothing_usable_is_one_line_and_status_2(tmp_path, capsys):
  (tmp_path / 'bad.npz').write_bytes(GOLDEN.read_bytes()[:999])
  meta = json.dumps({'system': 'af3_atom_cross_attention', 'kind': 'later'})
  np.savez(tmp_path / 'later.npz', meta=meta)
  (tmp_path / 'folder').mkdir()
  for name in ('bad.npz', 'later.npz', 'folder', 'gone.npz'):
    assert run('verify', tmp_path / name) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith('structattn: ')
    assert name in line
