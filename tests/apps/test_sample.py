"""Structures from embeddings: sizes, files, steering, the command line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import checkpoint, cli, data, diffusion
from structattn_jax.apps import sample
from structattn_jax.network import boltz

pytest.importorskip('biotite')

SIZES = {
  'atom_s': 8,
  'atom_z': 4,
  'token_s': 6,
  'token_z': 4,
  'atom_encoder_depth': 1,
  'atom_encoder_heads': 2,
  'atom_decoder_depth': 1,
  'atom_decoder_heads': 2,
  'token_transformer_depth': 1,
  'token_transformer_heads': 2,
  'dim_fourier': 4,
}
CONFIGS = {
  'boltz1': boltz.Boltz1DiffusionConfig(**SIZES, token_s_inputs=7),
  'boltz2': boltz.Boltz2DiffusionConfig(**SIZES, token_s_inputs=6),
}
# Two residues, in another order of atoms than the component dictionary's, an
# insertion code, and an ion of another chain.
PDB = """\
ATOM      1  CB  ALA A  -1      11.000   2.000   3.000  1.00 10.50           C
ATOM      2  N   ALA A  -1      10.000   1.000   3.000  1.00 11.50           N
ATOM      3  CA  ALA A  -1      10.500   2.000   2.000  1.00 12.50           C
ATOM      4  C   ALA A  -1      11.500   3.000   2.500  1.00 13.50           C
ATOM      5  O   ALA A  -1      11.700   4.000   1.800  0.50 14.50           O
ATOM      6  N   GLY A   1B     12.000   3.100   3.700  1.00 15.50           N
ATOM      7  CA  GLY A   1B     13.000   4.100   4.000  1.00 16.50           C
ATOM      8  C   GLY A   1B     14.000   3.600   5.000  1.00 17.50           C
ATOM      9  O   GLY A   1B     14.900   4.300   5.400  1.00 18.50           O
HETATM   10 ZN    ZN B   7      15.000   8.000   2.000  1.00 19.50          ZN2+
END
"""
N_TOKEN = 3


@pytest.fixture(scope='module')
def structure(tmp_path_factory):
  path = tmp_path_factory.mktemp('structure') / 'small.pdb'
  path.write_text(PDB)
  return path


def arrays(system: str, n_token: int = N_TOKEN) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  config = CONFIGS[system]
  shapes = {
    's_inputs': (n_token, config.token_s_inputs),
    's': (n_token, config.token_s),
    'z': (n_token, n_token, config.token_z),
    'rel_pos': (n_token, n_token, config.token_z),
  }
  return {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }


@functools.cache
def weights(system: str):
  init = jax.jit(boltz.cached_diffusion(CONFIGS[system]).init)
  params = init(jax.random.key(0))
  # Nothing is left at the zeros of fresh parameters.
  return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), params)


def drawn(system, structure, **options):
  options = {
    'num_samples': 2,
    'sampler': sample.sampler_of(system, 4),
    'key': jax.random.key(1),
    **options,
  }
  return sample.sample_structures(
    CONFIGS[system],
    weights(system),
    data.load_structure(structure),
    arrays(system),
    **options,
  )


@pytest.mark.parametrize('system', sample.SYSTEMS)
def test_command_writes_files_with_what_the_input_says(
  system, structure, tmp_path, capsys
):
  checkpoint.save(tmp_path / 'w.npz', weights(system), CONFIGS[system])
  embeddings = {k: x[None] for k, x in arrays(system).items()}
  np.savez(tmp_path / 'e.npz', **embeddings)
  command = ['sample', '--system', system, '--weights', tmp_path / 'w.npz']
  command += ['--structure', structure, '--embeddings', tmp_path / 'e.npz']
  command += ['--samples', 2, '--steps', 4, '--out', tmp_path / 'out', '--json']
  assert cli.main([str(word) for word in command]) == 0
  printed = capsys.readouterr()
  names = ['sample_1.cif', 'sample_2.cif', 'trajectory.png']
  assert json.loads(printed.out)['files'] == [
    str(tmp_path / 'out' / name) for name in names
  ]
  assert 'step 4 of 4' in printed.err
  assert (tmp_path / 'out' / names[2]).read_bytes().startswith(b'\x89PNG')
  given = data.load_structure(structure)
  found = [data.load_structure(tmp_path / 'out' / name) for name in names[:2]]
  for one in found:
    assert one.chain_ids == given.chain_ids == ('A', 'B')
    for name in ('residue_name', 'residue_id', 'insertion_code'):
      assert getattr(one, name).tolist() == getattr(given, name).tolist()
    assert one.residue_kind.tolist() == given.residue_kind.tolist()
    # Atoms are in the order of the component dictionary.
    order = data.atom_order(given)
    assert order.tolist() != sorted(order)
    for name in ('atom_name', 'element', 'charge', 'occupancy', 'b_factor'):
      want = getattr(given, name)[order].tolist()
      assert getattr(one, name).tolist() == want
    assert not np.allclose(one.position, given.position[order])
  assert not np.allclose(found[0].position, found[1].position)


def test_samples_are_those_of_the_sampler(structure):
  """The app adds features, padding and order, nothing else."""
  system = 'boltz2'
  found = drawn(system, structure)
  given = data.load_structure(structure)
  features = data.featurise(given)
  atoms = data.boltz_atom_features(features)
  _, precompute, denoise = boltz.cached_diffusion(CONFIGS[system])
  params, embeddings = weights(system), arrays(system)
  context = precompute(
    params,
    atoms,
    np.ones(N_TOKEN, bool),
    *(embeddings[name] for name in sample.NAMES),
  )
  want = diffusion.sample(
    lambda x, sigma: denoise(params, context, x, sigma),
    jnp.asarray(atoms.atom_mask),
    sample.sampler_of(system, 4),
    num_samples=2,
    key=jax.random.key(1),
  )
  n_atom = given.n_atom
  assert atoms.atom_mask.sum() == n_atom < len(atoms.atom_mask)
  # Random weights do not denoise: positions are a thousand angstrom apart.
  error = np.abs(found.positions - want.positions[:, :n_atom]).max()
  assert error < 3e-5 * np.abs(found.positions).max()
  assert found.denoised.shape == (4, 2, n_atom, 3)


def test_hook_steers_what_is_sampled(structure):
  def pull(state, denoised, x_noisy, sigma, step):
    del x_noisy, sigma, step
    middle = (denoised[:, 0] + denoised[:, 8]) / 2
    return state + 1, denoised.at[:, 0].set(middle).at[:, 8].set(middle)

  free = drawn('boltz1', structure)
  found = drawn(
    'boltz1', structure, hook=pull, hook_state=jnp.zeros((), jnp.int32)
  )

  def distance(samples):
    x = samples.denoised[-1]
    return np.linalg.norm(x[:, 0] - x[:, 8], axis=-1)

  assert (distance(free) > 1e-2).all()
  assert (distance(found) < 1e-5).all()


def test_all_sizes_that_do_not_fit_are_in_one_error(structure):
  wrong = arrays('boltz1', n_token=4)
  with pytest.raises(sample.SampleError) as caught:
    sample.sample_structures(
      CONFIGS['boltz2'],
      weights('boltz2'),
      data.load_structure(structure),
      wrong,
      key=jax.random.key(0),
    )
  message = str(caught.value)
  assert message.startswith("the embeddings do not fit 3 tokens of 'small'")
  assert 's_inputs: expected (3, 6), got (4, 7)' in message
  for name in sample.NAMES:
    assert f'{name}: expected' in message


@pytest.mark.parametrize(
  ('change', 'text'),
  [
    ({'z': None}, 'missing or unknown: z'),
    ({'pae': np.zeros(3)}, 'missing or unknown: pae'),
    ({'s': np.zeros((3, 6), int)}, 's: expected floating numbers, got int64'),
    ({'s': np.full((3, 6), np.nan)}, 's: expected finite numbers'),
  ],
)
def test_embeddings_that_are_none_are_refused(change, text, tmp_path):
  given = {**arrays('boltz2'), **change}
  given = {name: x for name, x in given.items() if x is not None}
  np.savez(tmp_path / 'e.npz', **given)
  with pytest.raises(sample.SampleError, match=text):
    sample.load_embeddings(tmp_path / 'e.npz')


def test_safetensors_files_are_read_too(tmp_path):
  safetensors = pytest.importorskip('safetensors.numpy')
  given = arrays('boltz2')
  safetensors.save_file(given, tmp_path / 'e.safetensors')
  found = sample.load_embeddings(tmp_path / 'e.safetensors')
  assert set(found) == set(given)
  for name in given:
    np.testing.assert_array_equal(found[name], given[name])


def test_weights_of_another_kind_are_refused(tmp_path, capsys):
  path = tmp_path / 'w.npz'
  checkpoint.save(path, weights('boltz1'), CONFIGS['boltz1'])
  with pytest.raises(sample.SampleError, match='diffusion module of boltz2'):
    sample.load_weights(path, 'boltz2')
  command = ['sample', '--system', 'boltz2', '--weights', str(path)]
  assert cli.main(command) == 2
  assert 'missing: --structure, --embeddings' in capsys.readouterr().err
  assert cli.main(['sample']) == 2
  assert 'checkpoint: expected' in capsys.readouterr().err


def test_wrong_numbers_are_refused(structure):
  with pytest.raises(sample.SampleError, match='steps'):
    sample.sampler_of('boltz1', 0)
  with pytest.raises(sample.SampleError, match='num_samples'):
    drawn('boltz2', structure, num_samples=0)
