"""`structattn verify` of PyTorch checkpoints and of what lies beside them."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch_archive

from structattn_jax import convert
from structattn_jax.verification import torch_checkpoint, verify

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
BOLTZ = GOLDENS / 'boltz_atom_encoder'
PALLATOM = GOLDENS / 'pallatom_atom_transformers'
SEDD = GOLDENS / 'sedd_protein_ligand/checkpoints'


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """The single-track checkpoint with its outputs, to be changed."""
  for name in ('sedd_checkpoint.pth', 'sedd_checkpoint_expected.npz'):
    shutil.copy(SEDD / name, tmp_path)
  return tmp_path


def test_checkpoints_are_found_below_a_folder():
  found = torch_checkpoint.find(GOLDENS)
  assert {path.name for path in found} >= {
    'boltz1_sample.ckpt',
    'checkpoint_run_config_bare_state_dict.pt',
    'sedd_checkpoint.pth',
    'model.safetensors',
  }
  assert not any(path.suffix == '.npz' for path in found)


def test_outputs_of_a_checkpoint_are_compared_once(folder):
  by_folder = verify.verify([folder])
  assert by_folder.status == 0
  assert not by_folder.notes
  outputs = [row.output for row in by_folder.rows]
  assert outputs == ['sedd: 20 arrays', 'log_score', 'log_score_ema']
  # Whichever of the two files is named.
  named = verify.verify([folder / 'sedd_checkpoint_expected.npz'])
  assert named.rows == by_folder.rows


def test_wrong_outputs_fail(folder):
  path = folder / 'sedd_checkpoint_expected.npz'
  with np.load(path) as file:
    arrays = dict(file)
  arrays['outputs/log_score_ema'][1, 2, 3] += 1e-3
  np.savez(path, **arrays)
  report = verify.verify([folder / 'sedd_checkpoint.pth'])
  assert report.status == 1
  assert [row.output for row in report.rows if not row.ok] == ['log_score_ema']


@pytest.mark.parametrize(
  'path',
  [
    BOLTZ / 'boltz1_sample.ckpt',
    BOLTZ / 'boltz2_sample_omegaconf.ckpt',
    PALLATOM / 'checkpoint_run_config_resume.pt',
  ],
)
def test_every_part_is_converted(path):
  report = verify.verify([path])
  assert report.status == 0
  outputs = [row.output for row in report.rows]
  expected = {
    'boltz1_sample': 'confidence_input_embedder: 34 arrays',
    'boltz2_sample_omegaconf': 'score_model: 110 arrays',
    'checkpoint_run_config_resume': 'atom_decoders.2: 61 arrays',
  }[path.stem]
  assert expected in outputs


def test_parameters_are_compared_with_goldens_beside(tmp_path):
  source = PALLATOM / 'checkpoint_run_config_wrapped.pt'
  shutil.copy(source, tmp_path / 'a.pt')
  with np.load(PALLATOM / 'chain_run_config.npz') as file:
    arrays = {n: file[n] for n in file if n.startswith('params/')}
  np.savez(tmp_path / 'chain.npz', **arrays)
  (row,) = verify.verify([tmp_path / 'a.pt']).rows[-1:]
  assert row.output == '231 arrays of chain'
  assert row.ok
  arrays['params/atom_encoder.proj_agg.weight'][0, 0] += 1e-6
  np.savez(tmp_path / 'chain.npz', **arrays)
  (row,) = verify.verify([tmp_path / 'a.pt']).rows[-1:]
  assert not row.ok
  np.testing.assert_allclose(row.max_error, 1e-6, rtol=0.1)
  # Other parameters under the same names are another model's.
  np.savez(tmp_path / 'chain.npz', **{n: x + 1 for n, x in arrays.items()})
  assert 'chain' not in str(verify.verify([tmp_path / 'a.pt']).rows)


def test_bad_checkpoints_are_errors_and_foreign_ones_notes(tmp_path):
  path = tmp_path / 'model.ckpt'
  content = (BOLTZ / 'boltz1_sample.ckpt').read_bytes()
  path.write_bytes(content[:-500])
  report = verify.verify([tmp_path])
  assert report.status == 2
  assert len(report.errors) == 1
  assert str(path) in report.errors[0]
  torch_archive.write(path, {'layer.weight': np.ones(3)})
  report = verify.verify([path])
  assert report.status == 2
  assert 'not of a known model' not in report.errors[0]
  assert 'parameters of a known model' in report.errors[0]
  report = verify.verify([tmp_path])
  assert len(report.notes) == 1


@pytest.mark.filterwarnings(
  'ignore::structattn_jax.convert.DeadParametersWarning'
)
@pytest.mark.parametrize(
  'path',
  [
    BOLTZ / 'boltz2_sample_omegaconf.ckpt',
    PALLATOM / 'checkpoint_run_config_bare_state_dict.pt',
    SEDD / 'protlig_checkpoint.pth',
    SEDD / 'hf_sedd/model.safetensors',
  ],
)
def test_damaged_checkpoint_is_refused_or_converts_equal(path, tmp_path):
  content = path.read_bytes()
  kind = convert.detect_format(path)
  read = convert.FORMATS[kind].read
  part = convert.FORMATS[kind].parts[0]
  want = read(path, part, None)
  damaged = tmp_path / f'damaged{path.suffix}'
  rng = np.random.default_rng(0)
  refusals = []
  for place in rng.integers(0, len(content), 80).tolist():
    broken = bytearray(content)
    broken[place] ^= 1 << int(rng.integers(8))
    damaged.write_bytes(broken)
    try:
      got = read(damaged, part, None)
    except convert.CheckpointError as error:
      refusals.append(str(error))
    else:
      # Safetensors files have no checksum: their values cannot be checked.
      assert got.params.keys() == want.params.keys()
      if path.suffix != '.safetensors':
        assert got.config == want.config
        jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  assert len(refusals) >= (1 if path.suffix == '.safetensors' else 10)
  assert all(message.startswith(f'{damaged}: ') for message in refusals)
