"""Structure module: AF2's goldens, oracle, masks, dropout, transformations."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import geometry
from structattn_jax.network.alphafold2 import all_atom, residue_constants
from structattn_jax.network.alphafold2 import structure_module as sm
from structattn_jax.reference.alphafold2 import structure_module as reference

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens/af2_ipa'
SCOPE = 'alphafold/alphafold_iteration/'
# Compiles in half the time.
QUICK = {'xla_backend_optimization_level': 0}
# What the README of the goldens accepts in float32: angstrom, `act`, angles,
# and gradients relative to the largest.
BOUNDS = {
  ('monomer', 'float32'): (1e-4, 1e-5, 1e-5),
  ('multimer', 'float32'): (2e-4, 1e-5, 5e-5),
  ('monomer', 'float64'): (1e-11, 1e-12, 1e-11),
  ('multimer', 'float64'): (1e-11, 1e-12, 1e-11),
}
each_form = pytest.mark.parametrize('form', ['monomer', 'multimer'])
each_dtype = pytest.mark.parametrize('dtype', ['float32', 'float64'])


@functools.cache
def load(name):
  with np.load(GOLDENS / f'{name}.npz', allow_pickle=False) as file:
    return dict(file)


def golden(form):
  name = {'monomer': 'mono', 'multimer': 'multi'}[form]
  return load(f'structure_module_{name}')


def sizes(form):
  return json.loads(str(golden(form)['meta']))['config']


def config(form, **options):
  chosen = {**sizes(form), 'parameterisation': form, **options}
  return sm.StructureModuleConfig.from_dict(chosen)


def params(form, dtype, prefix='params/'):
  found = {}
  for name, value in golden(form).items():
    if name.startswith(prefix + SCOPE):
      scope, kind = name.removeprefix(prefix + SCOPE).split('//')
      found.setdefault(scope, {})[kind] = value.astype(dtype)
  return found


def arguments(form, dtype='float32'):
  """(single, pair, aatype, mask) of a golden."""
  own = golden(form)
  return (
    own['inputs/single'].astype(dtype),
    own['inputs/pair'].astype(dtype),
    own['inputs/aatype'],
    own['inputs/seq_mask'] > 0,
  )


def apply(form, **options):
  return sm.transform_structure_module(config(form, **options)).apply


@functools.cache
def outputs_and_gradients(form, dtype):
  """Outputs of a golden, gradients of its scalar: parameters, single, pair."""
  own = golden(form)
  single, pair, aatype, mask = arguments(form, dtype)
  cotangents = {
    name: own[f'inputs/cotangent_{name}'].astype(dtype)
    for name in ('act', 'traj', 'atom_pos')
  }

  def scalar(params, single, pair):
    outputs = apply(form)(params, single, pair, aatype, mask)
    total = sum((getattr(outputs, n) * c).sum() for n, c in cotangents.items())
    return total, outputs

  with jax.enable_x64(dtype == 'float64'):
    gradient = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)
    gradients, outputs = jax.jit(gradient, compiler_options=QUICK)(
      params(form, dtype), single, pair
    )
    return outputs, jax.tree.map(np.asarray, gradients)


@functools.cache
def jitted(form, **options):
  return jax.jit(apply(form, **options), compiler_options=QUICK)


@functools.cache
def plain(form):
  return jitted(form)(params(form, 'float32'), *arguments(form))


def largest(difference):
  return np.abs(np.asarray(difference, np.float64)).max()


@each_dtype
@each_form
def test_golden_outputs_match(form, dtype):
  outputs, _ = outputs_and_gradients(form, dtype)
  length, unit, _ = BOUNDS[form, dtype]
  mask = arguments(form)[-1]
  for field in dataclasses.fields(outputs):
    got = getattr(outputs, field.name)
    want = golden(form)[f'outputs64/{field.name}']
    assert got.shape == want.shape, field.name
    assert str(got.dtype) == ('bool' if 'mask' in field.name else dtype)
    rows = mask if len(got) == len(mask) else (slice(None), mask)
    unitless = field.name == 'act' or 'angles' in field.name
    bound = unit if unitless else length
    difference = np.asarray(got, np.float64)[rows] - want[rows]
    assert largest(difference) < bound, field.name


@each_dtype
@each_form
def test_golden_gradients_match(form, dtype):
  _, (of_params, of_single, of_pair) = outputs_and_gradients(form, dtype)
  bound = BOUNDS[form, dtype][-1]
  want = params(form, 'float64', 'outputs64/grad_params/')
  assert jax.tree.structure(of_params) == jax.tree.structure(want)
  attention = 'structure_module/fold_iteration/invariant_point_attention'
  # Analytically zero: these biases add the same to all logits of a row.
  assert largest(of_params[f'{attention}/attention_2d'].pop('bias')) < 1e-4
  want = {scope: dict(values) for scope, values in want.items()}
  del want[f'{attention}/attention_2d']['bias']
  got = {'params': of_params, 'single': of_single, 'pair': of_pair}
  want = {
    'params': want,
    'single': golden(form)['outputs64/grad_single'],
    'pair': golden(form)['outputs64/grad_pair'],
  }
  errors = jax.tree.map(lambda a, b: largest(a - b) / largest(b), got, want)
  for path, error in jax.tree.leaves_with_path(errors):
    assert error < bound, path


@each_form
def test_golden_oracle_matches(form):
  own = golden(form)
  single, pair, aatype, mask = arguments(form, 'float64')
  got = reference.structure_module(
    {
      scope.removeprefix('structure_module/'): values
      for scope, values in params(form, 'float64').items()
    },
    single,
    pair,
    aatype,
    mask,
    load('residue_tables'),
    sizes=sizes(form),
  )
  for name, value in got.items():
    want = own[f'outputs64/{name}']
    rows = mask if len(value) == len(mask) else (slice(None), mask)
    assert largest(value[rows] - want[rows]) < 1e-10, name


@each_form
def test_parameter_names_are_those_of_checkpoints(form):
  init = sm.transform_structure_module(config(form)).init
  shapes = jax.eval_shape(init, jax.random.key(0), *arguments(form))
  got = jax.tree.map(lambda x: x.shape, shapes)
  assert got == jax.tree.map(lambda x: x.shape, params(form, 'float32'))


@each_form
def test_fresh_parameters_leave_residues_at_the_origin(form):
  init, own_apply = sm.transform_structure_module(config(form))

  @functools.partial(jax.jit, compiler_options=QUICK)
  def fresh_outputs(key):
    return own_apply(init(key, *arguments(form)), *arguments(form))

  frames = fresh_outputs(jax.random.key(0)).backbone_frames
  np.testing.assert_array_equal(frames.translation, 0)
  np.testing.assert_allclose(
    frames.rotation, np.broadcast_to(np.eye(3), frames.rotation.shape)
  )


@each_form
def test_only_the_last_side_chains_are_those_of_all(form):
  got = jitted(form, sidechain_iterations='last')(
    params(form, 'float32'), *arguments(form)
  )
  for field in dataclasses.fields(got):
    value, want = getattr(got, field.name), getattr(plain(form), field.name)
    if value.shape != want.shape:
      assert len(value) == 1
      want = want[-1:]
    np.testing.assert_allclose(value, want, atol=2e-5, err_msg=field.name)


@each_form
def test_frames_of_the_output_are_views_of_its_tensors(form):
  outputs = plain(form)
  backbone, groups = outputs.backbone_frames, outputs.group_frames
  assert backbone.shape == outputs.traj.shape[:2]
  assert groups.shape == (*backbone.shape, 8)
  known = arguments(form)[2] < residue_constants.UNKNOWN
  # The first group is the backbone; its default frame changes nothing.
  for name in ('rotation', 'translation'):
    np.testing.assert_allclose(
      getattr(groups, name)[:, known, 0],
      getattr(backbone, name)[:, known],
      atol=1e-6,
    )


def test_side_chain_frames_golden_match():
  own = load('geometry_fape')
  raw = own['inputs/unnormalized_torsions'].astype(np.float64)
  length = np.sqrt(np.maximum(np.sum(raw**2, -1, keepdims=True), 1e-12))
  with jax.enable_x64(True):
    backbone = geometry.Rigid.from_quaternion(
      own['inputs/quat'].astype(np.float64),
      own['inputs/translation'].astype(np.float64),
    )
    aatype = jnp.asarray(own['inputs/aatype'])
    frames = all_atom.torsion_angles_to_frames(backbone, raw / length, aatype)
    atoms = all_atom.frames_to_atom14(frames, aatype)
    assert largest(raw / length - own['outputs64/torsions']) < 1e-12
    assert largest(frames.to_flat12() - own['outputs64/frames_flat12']) < 1e-11
    assert largest(atoms - own['outputs64/atom14']) < 1e-11


@each_form
def test_masked_residues_do_not_reach_real_ones(form):
  single, pair, aatype, mask = arguments(form)
  rng = np.random.default_rng(0)
  masked_pairs = ~(mask[:, None] & mask)
  got = jitted(form)(
    params(form, 'float32'),
    np.where(mask[:, None], single, 100 * rng.standard_normal(single.shape)),
    np.where(
      masked_pairs[..., None], 100 * rng.standard_normal(pair.shape), pair
    ),
    np.where(mask, aatype, 7),
    mask,
  )
  for name in ('act', 'final_atom_positions', 'final_atom_mask'):
    rows = mask if name == 'act' else slice(None)
    np.testing.assert_array_equal(
      getattr(got, name)[rows], getattr(plain(form), name)[rows], err_msg=name
    )
  assert not np.asarray(got.final_atom_mask)[~mask].any()
  assert not np.asarray(got.final_atom_positions)[~mask].any()


@each_form
def test_masked_nan_reaches_neither_values_nor_gradients(form):
  single, pair, aatype, mask = arguments(form)
  own_apply = apply(form, num_layer=2)

  @functools.partial(jax.jit, compiler_options=QUICK)
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
  def run(params, single, pair):
    found = own_apply(params, single, pair, aatype, mask)
    return jnp.sum(jnp.sin(found.final_atom_positions))

  want = run(params(form, 'float32'), single, pair)
  masked_pairs = ~(mask[:, None] & mask)[..., None]
  got = run(
    params(form, 'float32'),
    np.where(mask[:, None], single, np.nan),
    np.where(masked_pairs, np.nan, pair),
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)


@each_form
def test_edge_cases_have_finite_values_and_gradients(form):
  single, pair, aatype, mask = arguments(form)
  own_apply = apply(form, num_layer=2)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def gradients(single, pair, aatype, mask):
    def scalar(params, single, pair):
      outputs = own_apply(params, single, pair, aatype, mask)
      floats = [x for x in jax.tree.leaves(outputs) if x.dtype == jnp.float32]
      return sum(jnp.sum(x) for x in floats), floats

    gradient = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)
    return gradient(params(form, 'float32'), single, pair)

  unknown = np.full_like(aatype, residue_constants.UNKNOWN)
  for case in (
    (single, pair, aatype, np.zeros_like(mask)),
    (single, pair, unknown, mask),
    (np.zeros_like(single), np.zeros_like(pair), aatype, mask),
  ):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients(*case)))


def test_unknown_residues_have_no_atoms():
  outputs = plain('monomer')
  unknown = arguments('monomer')[2] == residue_constants.UNKNOWN
  assert unknown.any()
  assert not np.asarray(outputs.final_atom_mask)[unknown].any()
  assert not np.asarray(outputs.final_atom14_mask)[unknown].any()
  np.testing.assert_array_equal(
    np.asarray(outputs.group_frames.rotation)[:, unknown], 0
  )


def test_given_atom_masks_are_taken():
  given = np.zeros((12, 14), bool), np.ones((12, 37), bool)
  outputs = jitted('monomer')(
    params('monomer', 'float32'), *arguments('monomer'), *given
  )
  np.testing.assert_array_equal(outputs.final_atom14_mask, given[0])
  np.testing.assert_array_equal(outputs.final_atom_mask, given[1])


def test_dropout_acts_only_with_a_key_and_only_by_the_key():
  own_params, inputs = params('monomer', 'float32'), arguments('monomer')
  acts = [
    jitted('monomer')(own_params, *inputs, dropout_key=key).act
    for key in (None, *map(jax.random.key, (0, 0, 1)))
  ]
  np.testing.assert_array_equal(acts[1], acts[2])
  assert largest(acts[1] - acts[0]) > 1e-2
  assert largest(acts[1] - acts[3]) > 1e-2
  without = jitted('monomer', dropout=0.0)(
    own_params, *inputs, dropout_key=jax.random.key(0)
  )
  np.testing.assert_allclose(without.act, acts[0], atol=1e-6)


def test_vmap_and_remat_give_the_same():
  own_params = params('monomer', 'float32')
  single, pair, aatype, mask = arguments('monomer')
  want = plain('monomer').final_atom_positions

  def positions(single):
    outputs = apply('monomer')(own_params, single, pair, aatype, mask)
    return outputs.final_atom_positions

  batch = jax.jit(jax.vmap(jax.checkpoint(positions)), compiler_options=QUICK)(
    np.stack([single, 2 * single + 1])
  )
  np.testing.assert_allclose(batch[0], want, atol=1e-4)
  assert np.isfinite(batch).all()


def test_program_does_not_grow_with_the_number_of_iterations():
  def size(num_layer):
    own_apply = apply('monomer', num_layer=num_layer)
    inputs = params('monomer', 'float32'), *arguments('monomer')
    return len(str(jax.make_jaxpr(own_apply)(*inputs)))

  assert size(20) < 1.02 * size(2)


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'single': np.ones((5, 20), np.float32)}, ValueError, 'pair: expected'),
    ({'aatype': np.zeros(11, int)}, ValueError, 'aatype: expected'),
    ({'aatype': np.zeros(12)}, TypeError, 'aatype: expected integer'),
    ({'mask': np.ones(12)}, TypeError, 'mask: expected bool'),
    ({'mask': np.ones(11, bool)}, ValueError, 'mask: expected'),
    ({'atom14_mask': np.ones((12, 37), bool)}, ValueError, 'atom14_mask'),
    ({'atom37_mask': np.ones((12, 14), bool)}, ValueError, 'atom37_mask'),
  ],
)
def test_wrong_argument_is_named(change, error, message):
  names = ('single', 'pair', 'aatype', 'mask')
  inputs = dict(zip(names, arguments('monomer'), strict=True))
  with pytest.raises(error, match=message):
    apply('monomer')(params('monomer', 'float32'), **{**inputs, **change})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_layer': 0}, 'StructureModuleConfig.num_layer'),
    ({'dropout': 1.0}, 'StructureModuleConfig.dropout'),
    ({'position_scale': -1.0}, 'StructureModuleConfig.position_scale'),
    ({'sidechain': {'num_channel': 0}}, 'SideChainConfig.num_channel'),
    (
      {'sidechain': {'num_residual_block': -1}},
      'SideChainConfig.num_residual_block',
    ),
    ({'num_head': 0}, 'num_head'),
    ({'parameterisation': 'seed'}, 'parameterisation'),
    ({'sidechain': {'channels': 3}}, 'unknown key'),
  ],
)
def test_wrong_config_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    sm.StructureModuleConfig.from_dict(options)


def test_residue_tables_are_those_of_alphafold():
  want, got = load('residue_tables'), residue_constants.residue_tables()
  names = {
    'default_frame': 'restype_rigid_group_default_frame',
    'atom14_group': 'restype_atom14_to_rigid_group',
    'atom14_position': 'restype_atom14_rigid_group_positions',
    'atom14_mask': 'restype_atom14_mask',
    'atom37_mask': 'restype_atom37_mask',
    'atom37_to_atom14': 'restype_atom37_to_atom14',
    'atom14_to_atom37': 'restype_atom14_to_atom37',
    'chi_mask': 'chi_angles_mask',
    'chi_pi_periodic': 'chi_pi_periodic',
    'atom14_is_ambiguous': 'restype_atom14_is_ambiguous',
  }
  for ours, theirs in names.items():
    np.testing.assert_array_equal(getattr(got, ours), want[theirs])
  renaming = np.eye(14)[got.atom14_renamed]
  np.testing.assert_array_equal(renaming, want['renaming_matrices'])
  assert got.atom_types == tuple(want['atom_types37'])
  assert ''.join(want['restypes']) == residue_constants.RESTYPES + 'X'
  assert residue_constants.residue_tables() is got


def test_residue_tables_are_geometry_of_amino_acids():
  """Independent of the file: bond lengths within the ideal residues."""
  tables = residue_constants.residue_tables()
  aatype = np.arange(20)
  angles = np.broadcast_to(np.array([0.0, 1.0], np.float32), (20, 7, 2))
  frames = all_atom.torsion_angles_to_frames(
    geometry.Rigid.identity((20,)), angles, aatype
  )
  atom37 = all_atom.atom14_to_atom37(
    all_atom.frames_to_atom14(frames, aatype), aatype
  )
  slot = {name: index for index, name in enumerate(tables.atom_types)}

  def distance(first, second):
    present = (
      tables.atom37_mask[:20, slot[first]]
      & tables.atom37_mask[:20, slot[second]]
    )
    assert present.any()
    difference = atom37[:, slot[first]] - atom37[:, slot[second]]
    return np.linalg.norm(difference, axis=-1)[present]

  for first, second, length in (
    ('N', 'CA', 1.46),
    ('CA', 'C', 1.52),
    ('C', 'O', 1.23),
    ('CA', 'CB', 1.53),
    ('CB', 'CG', 1.52),
    ('CD', 'CE', 1.52),
    ('NE', 'CZ', 1.33),
  ):
    np.testing.assert_allclose(distance(first, second), length, atol=0.04)
