"""Golden files replayed: all hold, and a wrong number is noticed."""

import json
import math
import pathlib

import numpy as np
import pytest

from structattn_jax import verification as replay
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification import verify

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
AF3 = GOLDENS / 'af3_atom_cross_attention'
SEED = AF3 / 'seed_unsorted.npz'

# What the READMEs of the goldens accept, for comparison with what we derive:
# absolute, relative to the largest value, or the sum of both.
BOLTZ = {'absolute': 2e-5, 'relative': 1e-5, 'gradient': 2e-5}
CEILINGS = {
  ('af2_ipa', 'geometry'): {'absolute': 2e-5, 'gradient': 1e-5},
  ('af2_ipa', 'residue_tables'): {'absolute': 0.0},
  ('af2_ipa', 'ipa_mono'): {'absolute': 5e-6, 'gradient': 1e-5},
  ('af2_ipa', 'ipa_multi'): {'absolute': 5e-6, 'gradient': 1e-5},
  ('af2_ipa', 'structure_module_mono'): {'absolute': 1e-4, 'gradient': 1e-5},
  ('af2_ipa', 'structure_module_multi'): {'absolute': 2e-4, 'gradient': 5e-5},
  ('af3_atom_cross_attention', 'seed_token_atom_attention'): {'relative': 2e-6},
  ('af3_atom_cross_attention', 'blocks'): {'relative': 2e-6},
  ('af3_atom_cross_attention', 'windows'): {'absolute': 0.0},
  ('af3_atom_cross_attention', 'token_transformer'): {'relative': 2e-6},
  ('af3_atom_cross_attention', 'encoder'): {'relative': 2e-6, 'gradient': 3e-5},
  ('af3_atom_cross_attention', 'encoder_decoder'): {
    'relative': 2e-6,
    'gradient': 3e-5,
  },
  # Of the coordinates; conditioning is held to 2e-5 in its own tests.
  ('af3_diffusion_head', 'head'): {'absolute': 6e-5, 'gradient': 2.8e-5},
  ('af3_diffusion_head', 'sampler'): {'relative': 2e-5},
  ('boltz_atom_encoder', 'seed_token_attention'): {'absolute': 2e-5},
  ('boltz_atom_encoder', 'conditioning'): BOLTZ,
  ('boltz_atom_encoder', 'boltz1_encoder'): BOLTZ,
  ('boltz_atom_encoder', 'boltz1_encoder_decoder'): BOLTZ,
  ('boltz_atom_encoder', 'boltz2_encoder'): BOLTZ,
  ('boltz_atom_encoder', 'boltz2_encoder_decoder'): BOLTZ,
  # Trajectories of 5 steps: 1.5 times upstream's own error.
  ('boltz_diffusion', 'boltz1'): {'relative': 2.5e-6, 'gradient': 1e-5},
  ('boltz_diffusion', 'boltz2'): {'relative': 2.5e-6, 'gradient': 1e-5},
  ('pallatom_atom_transformers', 'build_sparse_pairs'): {'absolute': 0.0},
  ('pallatom_atom_transformers', 'AtomTransformer'): {
    'relative': 3e-6,
    'gradient': 1e-5,
  },
  ('pallatom_atom_transformers', 'AtomFeatureEncoder'): {
    'relative': 3e-6,
    'gradient': 1e-4,
  },
  ('pallatom_atom_transformers', 'AtomAttentionDecoder'): {
    'relative': 3e-6,
    'gradient': 1e-5,
  },
  ('pallatom_atom_transformers', 'encoder+decoders'): {
    'relative': 5e-6,
    'gradient': 1e-3,
  },
  ('sedd_protein_ligand', 'dual_components'): {'relative': 5e-6},
  ('sedd_protein_ligand', 'dual_full_width'): {'relative': 5e-6},
  ('sedd_protein_ligand', 'dual_modes'): {'relative': 5e-6, 'gradient': 1e-5},
  # Tokens exactly, probabilities of the analytic predictor.
  ('sedd_protein_ligand', 'dual_sampler'): {'relative': 5e-5},
  ('sedd_protein_ligand', 'sampler'): {'relative': 5e-5},
  ('sedd_protein_ligand', 'graph_noise'): {'relative': 5e-6},
  # Parameters after training steps; all else is below 5e-6.
  ('sedd_protein_ligand', 'single'): {'relative': 5e-5, 'gradient': 1e-5},
  ('sedd_protein_ligand', 'single_v100'): {'relative': 5e-6},
}


@pytest.fixture(scope='module')
def report():
  return verify.verify([GOLDENS])


def kind_of(path) -> tuple[str, str] | None:
  with np.load(path) as file:
    if 'meta' not in file.files:
      return None
    meta = json.loads(file['meta'].item())
  # What checkpoints give has neither.
  return meta.get('system'), meta.get('kind')


def files() -> list[pathlib.Path]:
  found = sorted(GOLDENS.rglob('*.npz'))
  return [path for path in found if kind_of(path) in replay.REPLAYS]


def rewritten(path, target, **changes) -> pathlib.Path:
  """A copy with some arrays changed by functions of the old ones."""
  with np.load(path) as file:
    arrays = dict(file)
  for name, change in changes.items():
    arrays[name] = change(arrays[name])
  np.savez(target, **arrays)
  return target


def test_all_goldens_hold(report):
  failed = [row for row in report.rows if not row.ok]
  assert not failed
  assert not report.errors
  assert report.status == 0
  # Checkpoints have rows, too.
  assert {path.stem for path in files()} <= {row.case for row in report.rows}


def test_every_kind_has_a_golden_here():
  assert set(map(kind_of, files())) == set(replay.REPLAYS)


@pytest.mark.parametrize('path', files(), ids=lambda path: path.stem)
def test_every_recorded_output_is_compared(path, report):
  rows = {row.output for row in report.rows if row.case == path.stem}
  golden = replay.Golden.read(path, path.stem)
  # This one is an input.
  known = {'rotary/qkv_in'}
  assert set(golden.outputs()) - rows <= known
  gradients = {name for name in golden.arrays if name.startswith('grads/')}
  assert gradients <= rows


@pytest.mark.parametrize('path', files(), ids=lambda path: path.stem)
def test_tolerances_are_at_most_those_of_the_readmes(path, report):
  ceiling = CEILINGS[kind_of(path)]
  if path.stem == 'ipa_mono_far_1e3':  # "As good as upstream" there.
    ceiling = {'absolute': 3e-4, 'gradient': 1.5e-4}
  for row in report.rows:
    if row.case != path.stem:
      continue
    # Zero in theory: these are compared absolutely.
    if 'grad' in row.output and row.tolerance > row.scale:
      continue
    if 'grad' in row.output:
      accepted = ceiling['gradient'] * row.scale
    else:
      accepted = ceiling.get('absolute', 0.0)
      accepted += ceiling.get('relative', 0.0) * max(row.scale, 1)
    assert row.tolerance <= accepted * (1 + 1e-12)


def test_wrong_value_in_any_array_fails(report, tmp_path):
  """Ten tolerances off in one number: in both runs, and in one alone."""
  paths = {path.stem: path for path in files()}
  for case in ('seed_unsorted', 'ipa_mono_far_1e3', 'dual_components'):
    path = paths[case]
    rows = [row for row in report.rows if row.case == case]
    with np.load(path) as file:
      arrays = dict(file)
    for both in (True, False):
      changed = dict(arrays)
      for row in rows:
        for prefix in ('outputs64/', 'outputs/', ''):
          name = f'{prefix}{row.output}'
          is_upstream = prefix == 'outputs/' and f'outputs64/{row.output}' in (
            arrays
          )
          if name in changed and (both or not is_upstream):
            changed[name] = changed[name].copy()
            changed[name].flat[changed[name].size // 2] += 10 * row.tolerance
      np.savez(tmp_path / f'{case}.npz', **changed)
      found = verify.verify([tmp_path / f'{case}.npz'])
      assert found.status == 1
      assert not [row.output for row in found.rows if row.ok]


FLOAT64 = (
  'ipa_multi_small',
  'tiny_padded',
  'v2_structure',
  'decoder_uneven',
  'dual_modes',
)


def test_float64_replay_agrees_to_1e_9(tmp_path):
  paths = {path.stem: path for path in files()}
  found = verify.verify([paths[case] for case in FLOAT64], float64=True)
  assert found.status == 0
  for case in FLOAT64:
    with np.load(paths[case]) as file:
      doubled = {
        name.partition('/')[2]
        for name in file.files
        if name.startswith('outputs64/') and file[name].dtype.kind == 'f'
      }
    rows = [row for row in found.rows if row.case == case]
    own = [row for row in rows if row.output in doubled]
    assert own
    assert all(row.tolerance <= 1e-9 * max(row.scale, 1) for row in own)

  def off_by_a_little(arrays, meta):
    arrays['outputs64/out'] += 1e-7

  path = edited('ipa_multi_small', tmp_path, off_by_a_little)
  failed = [
    {row.output for row in verify.verify([path], float64=x).rows if not row.ok}
    for x in (False, True)
  ]
  assert failed == [set(), {'out'}]


def compare(upstream_error, max_error=0.0, scale=1.0, **options):
  return golden_lib.Comparison(
    options.pop('output', 'x'),
    max_error,
    scale,
    upstream_error,
    options.pop('floor', golden_lib.FLOOR),
    **options,
  )


def test_tolerance_follows_upstream_up_to_a_limit():
  compared = [
    compare(1e-7, scale=10.0),
    compare(1.8e-5, scale=10.0),
    compare(1.0, scale=10.0),
    compare(1e-3, scale=10.0, most=1e-3),
  ]
  rows = golden_lib.judge('case', compared)
  tolerances = [row.tolerance for row in rows]
  np.testing.assert_allclose(tolerances, [2e-5, 2.7e-5, 3e-5, 1.5e-3])


def test_gradients_that_are_zero_in_theory_are_compared_absolutely():
  gradients = [
    compare(1e-6, scale=10.0, is_gradient=True),
    compare(1e-6, 5e-6, scale=1e-14, is_gradient=True),
  ]
  _, zero = golden_lib.judge('case', gradients)
  np.testing.assert_allclose(zero.tolerance, 1e-5)
  assert zero.ok
  (alone,) = golden_lib.judge(
    'torch', [compare(None, 5e-5, scale=1e-5, is_gradient=True)]
  )
  assert alone.tolerance == 1e-4


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_values_that_are_not_finite_fail(value):
  ones = np.ones(3)
  arrays = {'outputs/x': ones, 'outputs64/x': ones, 'outputs/y': ones * value}
  golden = replay.Golden('case', {}, arrays)
  got, reference, shape = golden_lib.judge(
    'case',
    [
      golden.value('x', ones * value),
      golden.value('y', ones * value),
      golden.value('x', np.ones(4)),
    ],
  )
  assert not got.ok
  assert got.max_error == math.inf
  assert not reference.ok
  assert not shape.ok
  # JSON has no infinity.
  plain = verify.to_json([got])
  assert plain[0]['max_error'] is None
  json.dumps(plain, allow_nan=False)


def test_rows_are_plain_values_with_the_keys_promised(report):
  rows = verify.to_json(report.rows)
  assert json.loads(json.dumps(rows, allow_nan=False)) == rows
  for row in rows:
    assert list(row) == [
      'case',
      'output',
      'max_error',
      'scale',
      'tolerance',
      'ok',
    ]
    assert row['ok'] is (row['max_error'] <= row['tolerance'])


def test_table_has_a_line_for_each_row(report):
  header, *lines = verify.table(report.rows)
  assert 'tolerance' in header
  assert len(lines) == len(report.rows)
  assert all(line.endswith('ok') for line in lines)


def unknown_kind(tmp_path, **meta) -> pathlib.Path:
  path = tmp_path / 'unknown.npz'
  content = {'system': 'af3_atom_cross_attention', 'kind': 'later', **meta}
  np.savez(path, meta=json.dumps(content), **{'outputs/x': np.ones(2)})
  return path


def test_unknown_kind_named_is_an_error_and_in_a_folder_a_note(tmp_path):
  path = unknown_kind(tmp_path)
  found = verify.verify([path])
  assert found.status == 2
  assert not found.rows
  (error,) = found.errors
  assert error == (
    f"not replayed: {path}: no replay of af3_atom_cross_attention 'later'"
  )
  # Nothing at all could be replayed.
  found = verify.verify([tmp_path])
  assert found.status == 2
  assert found.notes == (error,)
  (tmp_path / SEED.name).write_bytes(SEED.read_bytes())
  found = verify.verify([tmp_path])
  assert found.status == 0
  assert found.notes == (error,)
  assert {row.case for row in found.rows} == {SEED.stem}


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ({'a': np.ones(2)}, 'has no `meta`'),
    ({'meta': 'no JSON'}, '`meta` is not JSON'),
    ({'meta': '[]'}, '`meta` is not JSON'),
    ({'meta': np.ones(3)}, '`meta` is not JSON'),
    ({'meta': '{"system": "a"}'}, '`meta` names no kind'),
    ({'meta': '{"system": "a", "kind": [1]}'}, '`meta` names no kind'),
  ],
)
def test_file_that_is_no_golden_is_an_error(content, message, tmp_path):
  np.savez(tmp_path / 'x.npz', **content)
  (error,) = verify.verify([tmp_path / 'x.npz']).errors
  assert message in error
  assert '\n' not in error


def test_incomplete_golden_is_an_error(tmp_path):
  with np.load(SEED) as file:
    arrays = {name: file[name] for name in file.files if name != 'inputs/q'}
  np.savez(tmp_path / 'x.npz', **arrays)
  found = verify.verify([tmp_path, SEED])
  assert found.status == 2
  assert found.rows  # The other file has been replayed.
  (error,) = found.errors
  assert error.startswith(f'{tmp_path / "x.npz"}: ')
  assert 'cannot be replayed' in error


AF2 = GOLDENS / 'af2_ipa'


def edited(case, target, edit) -> pathlib.Path:
  """A copy of a golden of AlphaFold 2, its arrays and meta edited."""
  with np.load(AF2 / f'{case}.npz') as file:
    arrays = dict(file)
  meta = json.loads(arrays.pop('meta').item())
  edit(arrays, meta)
  np.savez(target / f'{case}.npz', meta=json.dumps(meta), **arrays)
  return target / f'{case}.npz'


@pytest.mark.parametrize(
  'case', ['geometry_fape', 'ipa_multi_small', 'structure_module_multi']
)
def test_golden_without_float64_run_and_with_an_unknown_output(case, tmp_path):
  def edit(arrays, meta):
    for name in [x for x in arrays if x.startswith('outputs64/')]:
      del arrays[name]
    arrays['outputs/later'] = np.ones(3)
    meta.get('config', {})['fape'] = 1.0  # Upstream's configs have more.

  found = verify.verify([edited(case, tmp_path, edit)])
  assert not found.errors
  (note,) = found.notes
  assert note.endswith(': later')
  with np.load(AF2 / f'{case}.npz') as file:
    recorded = [x for x in file.files if x.startswith('outputs/')]
  assert len(found.rows) == len(recorded)
  # Our rounding and upstream's: not all hold by the floor alone.
  assert np.mean([row.ok for row in found.rows]) > 0.7


def test_golden_of_gradients_alone_and_without_a_pair(tmp_path):
  def edit(arrays, meta):
    for name in list(arrays):
      if name.startswith(('outputs/', 'outputs64/')) and 'grad_' not in name:
        del arrays[name]

  found = verify.verify([edited('ipa_mono_small', tmp_path, edit)])
  assert found.status == 0
  assert all(row.output.startswith('grad_') for row in found.rows)

  def without_cotangent(arrays, meta):
    del arrays['inputs/cotangent']

  path = edited('ipa_mono_small', tmp_path, without_cotangent)
  found = verify.verify([path])
  assert found.status == 0
  assert {row.output for row in found.rows} == {'out', 'attn', 'features'}
  (note,) = found.notes
  assert 'grad_inputs_1d' in note

  def without_pair(arrays, meta):
    for name in [x for x in arrays if 'inputs_2d' in x or 'attention_2d' in x]:
      del arrays[name]
    # The monomer's last features are those of the pair: 4 heads.
    own = [x for x in arrays if x.endswith('output_projection//weights')]
    (weights,) = (x for x in own if x.startswith('params/'))
    arrays[weights] = arrays[weights][: -4 * channels]

  with np.load(AF2 / 'ipa_mono_small.npz') as file:
    channels = file['inputs/inputs_2d'].shape[-1]
  # The numbers are those with a pair, so they fail; but they are compared.
  found = verify.verify([edited('ipa_mono_small', tmp_path, without_pair)])
  assert not found.errors
  (out,) = (row for row in found.rows if row.output == 'out')
  assert not out.ok
  assert np.isfinite(out.max_error)


def test_degenerate_geometry_is_that_of_upstream(tmp_path):
  """Equal points and an angle of length zero, by upstream's formulas."""

  def edit(arrays, meta):
    arrays['inputs/three_points'][0] = 1.0
    arrays['inputs/unnormalized_torsions'][0, 3] = 0.0
    for run in ('outputs', 'outputs64'):
      reference = arrays[f'{run}/multimer_make_transform_from_reference']
      reference[0] = 0.0
      reference[0, :, 3] = 1.0
      flat = arrays[f'{run}/rigid_from_3_points_flat12']
      flat[0] = [0.0] * 9 + [1.0] * 3
      arrays[f'{run}/torsions'][0, 3] = 0.0

  found = verify.verify([edited('geometry_fape', tmp_path, edit)])
  rows = {row.output: row for row in found.rows}
  for name in (
    'multimer_make_transform_from_reference',
    'rigid_from_3_points_flat12',
    'torsions',
  ):
    assert rows[name].ok


@pytest.mark.parametrize('name', ['gone.npz', 'cut.npz', ''])
def test_nothing_to_read_is_an_error(name, tmp_path):
  (tmp_path / 'folder').mkdir()
  path = tmp_path / name if name else tmp_path / 'folder'
  if name == 'cut.npz':
    path.write_bytes(SEED.read_bytes()[:5000])
  found = verify.verify([path])
  assert found.status == 2
  (error,) = found.errors
  assert str(path) in error


def test_progress_names_each_file():
  messages = []
  verify.verify([SEED], progress=messages.append)
  assert messages == ['seed_unsorted (seed_token_atom_attention)']
