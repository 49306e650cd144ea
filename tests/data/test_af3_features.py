"""AlphaFold 3's inputs against what its own featurisation recorded."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import time
import types

import jax
import numpy as np
import pytest

from structattn_jax import data
from structattn_jax.data import chemical_components, conformers, structures
from structattn_jax.network.alphafold3 import atom_layout, window_plan

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/af3_atom_cross_attention'
FIXED = {'seed': 0, 'conformer': 'ideal', 'augment': False}
_CODES = dict(
  zip(
    chemical_components.AMINO_ACID_LETTERS,
    chemical_components.AMINO_ACIDS,
    strict=True,
  )
)

# SHA-256 of what upstream's featurisation makes of the protein and the ligand
# of 5TGY: alphafold3 test_data/featurised_example.json @ c0f97ed (Apache 2.0).
# It leaves out positions and charges, which depend on the version of RDKit.
_5TGY = (
  'SEFEKLRQTGDELVQAFQRLREIFDKGDDDSLEQVLEEIEELIQKHRQLFDNRQEAADTEAAKQGDQWVQLFQRFR'
  'EAIDKGDKDSLEQLLEELEQALQKIRELAEKKN',
  ['7BU'],
)
_DIGESTS = {
  'pred_dense_atom_mask': (
    '1e388e40167a4d31291903d74c98544868d0dc574706cdfd259ddd65f56d2993'
  ),
  'ref_atom_name_chars': (
    '043f3242ff4dff04fd36699ccefdff718c57c325f72c71f33f4c4774e75a64dc'
  ),
  'ref_element': (
    'cc437747adeea094daf8a0e551be02f406c7e7d9b0a9328a84a59d907c5492b5'
  ),
  'ref_mask': (
    '1e388e40167a4d31291903d74c98544868d0dc574706cdfd259ddd65f56d2993'
  ),
  'ref_space_uid': (
    '97afd7d9d3ba835731457ef090ba4939d707bb2a270d48fde56369bde8e58e9f'
  ),
  'token_atoms_to_queries:gather_idxs': (
    '50a1708678bb3d848be6fb49816196b13fcac36891817dac585f4a7556a8310e'
  ),
  'token_atoms_to_queries:gather_mask': (
    '3f4ac4f311cea0c7f6b8464e225815b791a767c9a8d15f9c7fb488c49f674fa9'
  ),
  'tokens_to_queries:gather_idxs': (
    'f82b61cc7f007a744fc9186107647ff333b598642a681b046d61aef4994931e1'
  ),
  'tokens_to_queries:gather_mask': (
    '3f4ac4f311cea0c7f6b8464e225815b791a767c9a8d15f9c7fb488c49f674fa9'
  ),
  'tokens_to_keys:gather_idxs': (
    'bc16a2a2b81bdbb3fb3ff180d984704b201866a7cdc373fb345a9be417aa246e'
  ),
  'tokens_to_keys:gather_mask': (
    '7ddcbfda2904f013d9ab73c55517ac933ecb3dbfbfab9bb351ee43b5fd66e54e'
  ),
  'queries_to_keys:gather_idxs': (
    'e0a2fd867fbae573b5613a98ee037eeb575cc5aa3285db2fe5158cda0e8c49cd'
  ),
  'queries_to_keys:gather_mask': (
    '7ddcbfda2904f013d9ab73c55517ac933ecb3dbfbfab9bb351ee43b5fd66e54e'
  ),
  'queries_to_token_atoms:gather_idxs': (
    '3c2d0028564167c93b2f33e877974d45756c1e2e8934270c024fc5f1e85fcf14'
  ),
  'queries_to_token_atoms:gather_mask': (
    '1e388e40167a4d31291903d74c98544868d0dc574706cdfd259ddd65f56d2993'
  ),
}
# What the goldens were recorded with, as their atom names show it.
_COMPOSITIONS = {
  'diffusion_mixed': ('RILANYARVKGL', ['DC', 'DG', 'DT'], ['ATP'], ['ZN']),
  'evoformer_conditioning': ('QVDDEDMRWTALRQGI', ['NAG']),
}


def sequences(*chains: str | list[str]) -> structures.Structure:
  """A structure without any resolved atom, one chain per argument."""
  names, chain, kinds = [], [], []
  for i, residues in enumerate(chains):
    if isinstance(residues, str):
      codes, kind = [_CODES[x] for x in residues], structures.PROTEIN
    else:
      codes, kind = residues, structures.LIGAND
      if residues[0] in chemical_components.NUCLEOTIDES:
        kind = structures.NUCLEIC
    names += codes
    chain += [i] * len(codes)
    kinds += [kind] * len(codes)
  n_residue = len(names)
  return structures.Structure(
    name='sequences',
    chain_ids=tuple('ABCDEF'[: len(chains)]),
    residue_name=np.array(names),
    component_name=np.array(names),
    residue_id=np.arange(n_residue, dtype=np.int32),
    insertion_code=np.full(n_residue, ''),
    residue_chain=np.array(chain, np.int32),
    residue_kind=np.array(kinds),
    atom_residue=np.zeros(0, np.int32),
    atom_name=np.zeros(0, str),
    element=np.zeros(0, str),
    charge=np.zeros(0, np.int32),
    occupancy=np.zeros(0, np.float32),
    position=np.zeros((0, 3)),
    mol_blocks=types.MappingProxyType({}),
  )


def names_of(features, token=None) -> list[str]:
  """Names of the atoms of a token, or of all."""
  atoms = features.atoms
  chosen = slice(None) if token is None else atoms.token_index == token
  return [
    ''.join(chr(code + 32) for code in codes).rstrip()
    for codes in atoms.ref_atom_name_chars[chosen]
  ]


@pytest.fixture(scope='module')
def dhfr():
  files = data.example('1s3v')
  structure = data.load_structure(files.structure, ligand=files.ligand)
  return structure, data.featurise_alphafold3(structure, seed=0)


def test_batch_of_5tgy_is_upstreams_bit_by_bit():
  features = data.featurise_alphafold3(sequences(*_5TGY), **FIXED)
  batch = data.alphafold3_batch(features)
  assert batch.keys() - _DIGESTS.keys() == {
    'ref_pos',
    'ref_charge',
    *(name for name in batch if name.endswith(':input_shape')),
  }
  for name, digest in _DIGESTS.items():
    array = batch[name]
    if name.endswith(':gather_idxs'):
      array = array.astype(np.int64)
    assert hashlib.sha256(array.tobytes()).hexdigest() == digest, name


@pytest.mark.parametrize('case', _COMPOSITIONS)
def test_batch_is_that_of_the_golden(case):
  with np.load(GOLDENS / f'{case}.npz') as file:
    want = {
      name.removeprefix('inputs/'): file[name]
      for name in file.files
      if name.startswith('inputs/')
    }
  n_token = len(want['ref_mask'])
  features = data.featurise_alphafold3(
    sequences(*_COMPOSITIONS[case]),
    seed=1,
    standalone_glycans='whole',  # As the golden's NAG was recorded.
  )
  features = data.pad_features(features, n_token=n_token)
  batch = data.alphafold3_batch(features)
  for name in batch:
    if name.startswith('ref_') and name != 'ref_space_uid':
      continue
    np.testing.assert_array_equal(batch[name], want[name], err_msg=name)
  # Some reference atoms were taken out of the golden.
  known = want['ref_mask']
  assert 0 <= (batch['ref_mask'] & ~known).sum() <= 3
  assert not (known & ~batch['ref_mask']).any()
  for name in ('ref_element', 'ref_charge', 'ref_atom_name_chars'):
    np.testing.assert_array_equal(
      batch[name][known], want[name][known], err_msg=name
    )


def test_conformers_have_the_bonds_of_the_golden():
  """Nothing else can be compared: the search is random."""
  case = 'evoformer_conditioning'
  with np.load(GOLDENS / f'{case}.npz') as file:
    want, uid = file['inputs/ref_pos'], file['inputs/ref_space_uid']
    mask = file['inputs/ref_mask']
  features = data.featurise_alphafold3(
    sequences(*_COMPOSITIONS[case]), seed=2, standalone_glycans='whole'
  )
  got = data.alphafold3_batch(features)['ref_pos']
  compared = 0
  for residue in np.unique(uid[mask]):
    own = mask & (uid == residue)
    offsets = [x[own][:, None] - x[own][None] for x in (want, got)]
    distances = [np.linalg.norm(offset, axis=-1) for offset in offsets]
    near = (distances[0] < 1.75) & (distances[0] > 0)
    # The golden's positions are rounded to coarse steps.
    assert np.abs(distances[0] - distances[1])[near].max() < 0.2
    compared += near.sum()
  assert compared > 250
  assert np.abs(got - want)[mask].max() > 1.0


def test_1s3v_lists_all_atoms_of_its_components(dhfr):
  structure, features = dhfr
  tokens, atoms = features.tokens, features.atoms
  assert (features.n_token, tokens.is_ligand.sum()) == (213, 27)
  expected = sum(
    len(chemical_components.find_component(name).atom_names) - 1
    for name in structure.component_name[:186].tolist()
  )
  # The last residue keeps its OXT; the file has all other atoms, too.
  assert features.n_atom == expected + 1 + 27
  assert atoms.position_mask.sum() == structure.n_atom
  assert atoms.ref_mask.all()
  assert names_of(features, 185)[-1] == 'OXT'
  assert 'OXT' not in names_of(features, 184)
  rows = np.flatnonzero(atoms.token_index >= 186)
  np.testing.assert_array_equal(atoms.dense_slot[rows], 0)
  np.testing.assert_array_equal(atoms.token_index[rows], np.arange(186, 213))
  np.testing.assert_array_equal(atoms.ref_space_uid[rows], 186)
  np.testing.assert_allclose(
    atoms.position[rows], structure.position[-27:], rtol=1e-6
  )
  by_name = {
    (int(r), str(name)): x
    for r, name, x in zip(
      structure.atom_residue,
      structure.atom_name,
      structure.position,
      strict=True,
    )
  }
  for uid, name, there, x in zip(
    atoms.ref_space_uid,
    names_of(features),
    atoms.position_mask,
    atoms.position,
    strict=True,
  ):
    assert there == ((int(uid), name) in by_name)
    want = by_name.get((int(uid), name), np.zeros(3))
    np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-6)


def test_windows_agree_with_those_of_the_batch(dhfr):
  features = data.pad_features(dhfr[1], n_token=256)
  plan, ref = data.alphafold3_windows(features)
  batch = data.alphafold3_batch(features)
  want = window_plan.plan_from_batch(batch, n_atom=plan.n_atom)
  assert plan.n_atom == features.atoms.mask.size
  jax.tree.map(np.testing.assert_array_equal, plan, want)
  for field in dataclasses.fields(ref):
    reference = atom_layout.atoms_from_dense(want, batch[field.name])
    np.testing.assert_array_equal(getattr(ref, field.name), reference)
  assert int(plan.num_atoms) == dhfr[1].n_atom
  assert ref.ref_pos.shape == (plan.n_atom, 3)


def test_ideal_conformers_are_centred_with_their_hydrogens():
  features = data.featurise_alphafold3(sequences('GA', ['ZN']), **FIXED)
  again = data.featurise_alphafold3(
    sequences('GA', ['ZN']), seed=9, conformer='ideal', augment=False
  )
  jax.tree.map(np.testing.assert_array_equal, features, again)
  from biotite.structure import info

  for uid, name in enumerate(('GLY', 'ALA', 'ZN')):
    whole = info.residue(name)
    expected = whole.coord - whole.coord.mean(axis=0)
    own = features.atoms.ref_space_uid == uid
    for atom, x in zip(
      np.array(names_of(features))[own],
      features.atoms.ref_pos[own],
      strict=True,
    ):
      want = expected[whole.atom_name == atom][0]
      np.testing.assert_allclose(x, want, atol=2e-3)


def test_augmentation_is_a_motion_of_each_residue():
  structure = sequences('WW', ['ATP'])
  fixed = data.featurise_alphafold3(structure, **FIXED).atoms
  moved = data.featurise_alphafold3(structure, seed=3, conformer='ideal').atoms
  shifts = []
  for uid in range(3):
    own = fixed.ref_space_uid == uid
    x, y = fixed.ref_pos[own], moved.ref_pos[own]
    centred = [z - z.mean(axis=0) for z in (x, y)]
    u, _, vh = np.linalg.svd(centred[0].T @ centred[1])
    turn = u @ vh
    assert np.linalg.det(turn) == pytest.approx(1.0, abs=1e-5)  # No mirror.
    np.testing.assert_allclose(centred[0] @ turn, centred[1], atol=1e-5)
    assert np.abs(turn - np.eye(3)).max() > 0.1
    shifts.append(y.mean(axis=0) - x.mean(axis=0) @ turn)
  # One motion per residue.
  for a, b in itertools.combinations(shifts, 2):
    assert np.abs(a - b).max() > 0.05


def test_seed_decides_about_everything_random():
  structure = sequences('FW', ['ATP'])
  first, second, other = (
    data.featurise_alphafold3(structure, seed=seed) for seed in (1, 1, 2)
  )
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert np.abs(first.atoms.ref_pos - other.atoms.ref_pos).max() > 0.5
  rest = {'ref_pos': first.atoms.ref_pos}
  jax.tree.map(
    np.testing.assert_array_equal,
    first,
    dataclasses.replace(other, atoms=dataclasses.replace(other.atoms, **rest)),
  )


def test_generated_conformers_keep_chirality():
  atoms = data.featurise_alphafold3(sequences('ALIVTW'), seed=5).atoms
  for uid in range(6):
    own = atoms.ref_space_uid == uid
    n, ca, c, _, cb = atoms.ref_pos[own][:5]
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 1.0


def test_nucleotides_are_one_token_with_empty_slots():
  features = data.featurise_alphafold3(
    sequences(['DG', 'DA'], ['A', 'U']), **FIXED
  )
  assert features.tokens.is_nucleic.tolist() == [True] * 4
  assert names_of(features, 0)[:2] == ['OP3', 'P']
  assert names_of(features, 1)[0] == 'P'
  assert names_of(features, 2)[0] == 'OP3'
  batch = data.alphafold3_batch(features)
  assert batch['pred_dense_atom_mask'][:, 0].tolist() == [True, False] * 2
  assert batch['pred_dense_atom_mask'][:, 1].all()
  # Also on empty slots.
  np.testing.assert_array_equal(batch['ref_space_uid'][1], 1)


@pytest.mark.parametrize(
  'chain', [('OMC', 'OMG', 'OMU'), ('OMC', 'G', 'OMU'), ('C', 'G', 'U')]
)
def test_only_the_first_residue_of_a_nucleic_chain_has_op3(chain, pdb, write):
  for i, name in enumerate(chain):
    hetero = name.startswith('OM')
    # O3' lies 1.6 angstrom before the next P.
    for atom, x in (('P', 0.0), ("O5'", 1.5), ("C1'", 3.5), ("O3'", 5.0)):
      pdb.atom(atom, name, i + 1, (6.6 * i + x, 0.0, 0.0), hetero=hetero)
  features = data.featurise_alphafold3(data.load_structure(write(pdb)), **FIXED)
  atom_residue = features.tokens.residue_uid[features.atoms.token_index]
  names = np.array(names_of(features))
  for residue in range(3):
    own = names[atom_residue == residue]
    assert 'P' in own
    assert ('OP3' in own) == (residue == 0)


def test_padding_of_features_is_that_of_the_windows():
  features = data.featurise_alphafold3(sequences('AGA'), **FIXED)
  plan, _ = data.alphafold3_windows(features)
  assert plan.n_atom == 128
  padded = data.pad_features(features, n_token=8, n_atom=200)
  plan, ref = data.alphafold3_windows(padded)
  assert (plan.n_atom, plan.num_tokens) == (224, 8)
  assert ref.ref_pos.shape == (224, 3)
  assert data.alphafold3_windows(padded, n_atom=160)[0].n_atom == 160


def test_unknown_residue_is_listed_as_glycine():
  structure = sequences('AGA')
  structure.component_name[1] = 'UNK'
  features = data.featurise_alphafold3(structure, **FIXED)
  assert names_of(features, 1) == ['N', 'CA', 'C', 'O']
  assert features.tokens.is_protein.all()


def test_modified_residue_is_one_token_per_atom(pdb, write):
  pdb.residue('ALA', 1)
  pdb.residue('SEP', 2, hetero=True)
  pdb.residue('GLY', 3, names=('N', 'CA', 'C', 'O'))
  features = data.featurise_alphafold3(data.load_structure(write(pdb)), **FIXED)
  tokens, atoms = features.tokens, features.atoms
  modified = np.flatnonzero(tokens.is_modified)
  names = [names_of(features, token) for token in modified]
  component = chemical_components.find_component('SEP')
  assert [n for (n,) in names] == [
    n for n in component.atom_names if n != 'OXT'
  ]
  # The phosphate is not in the file.
  there = atoms.position_mask[np.isin(atoms.token_index, modified)]
  assert there.sum() == 5
  assert (tokens.residue_uid[modified] == 1).all()
  assert names_of(features, features.n_token - 1) == [
    *('N', 'CA', 'C', 'O', 'OXT')
  ]


def test_oxt_in_the_file_is_kept_inside_a_chain(pdb, write):
  pdb.residue('ALA', 1)
  pdb.atom('OXT', 'ALA', 1, (5.5, 1.0, 0.0))
  pdb.residue('ALA', 5)
  features = data.featurise_alphafold3(data.load_structure(write(pdb)), **FIXED)
  assert [names_of(features, token)[-1] for token in (0, 1)] == ['OXT', 'OXT']
  assert features.atoms.position_mask.tolist() == [True] * 11 + [False]


@pytest.mark.parametrize(
  ('bonded_atom', 'option', 'has_o1'),
  [
    (None, 'released', False),
    (None, 'whole', True),
    ('O3', 'released', False),
    ('O3', 'whole', False),
    ('O1', 'released', True),
    ('O1', 'whole', True),
  ],
)
def test_o1_leaves_a_glycan(bonded_atom, option, has_o1, pdb, write):
  component = chemical_components.find_component('NAG')
  centre = np.array([50.0, 0.0, 0.0])
  offset = component.positions - component.positions.mean(axis=0)
  pdb.residue('ALA', 1)
  for name, element, x in zip(
    component.atom_names,
    component.elements,
    centre + offset,
    strict=True,
  ):
    pdb.atom(name, 'NAG', 2, x, chain='B', element=element, hetero=True)
  if bonded_atom is not None:
    x = offset[component.index[bonded_atom]]
    x = centre + x * (1 + 1.4 / np.linalg.norm(x))  # Outside of the ring.
    pdb.atom('ZN', 'ZN', 3, x, chain='C', element='ZN', hetero=True)
  structure = data.load_structure(write(pdb))
  features = data.featurise_alphafold3(
    structure, standalone_glycans=option, **FIXED
  )
  sugar = names_of(features)
  assert ('O1' in sugar) == has_o1
  assert 'O3' in sugar
  assert features.tokens.is_ligand.sum() == (
    len(component.atom_names) - (not has_o1) + (bonded_atom is not None)
  )


def test_free_amino_acid_keeps_oxt(pdb, write):
  pdb.residue('ALA', 1)
  pdb.residue('SER', 9, chain='B', hetero=True, shift=30.0)
  features = data.featurise_alphafold3(data.load_structure(write(pdb)), **FIXED)
  assert features.tokens.is_ligand.sum() == 7  # N CA C O CB OG OXT


def test_ligand_outside_the_ccd_has_a_conformer_of_its_bonds():
  files = data.example('1s3v')
  structure = data.load_structure(
    files.structure, ligand=files.ligand, ligand_names=['']
  )
  assert structure.component_name[-1] == ''
  generated = data.featurise_alphafold3(structure, seed=0, augment=False)
  ligand = generated.atoms.token_index >= 186
  assert ligand.sum() == 27
  assert generated.atoms.position_mask[ligand].all()
  position = generated.atoms.position[ligand]
  ref_pos = generated.atoms.ref_pos[ligand]
  distance, own = (
    np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (position, ref_pos)
  )
  bonded = (distance > 0) & (distance < 1.7)
  assert bonded.sum() == 2 * 29  # As many as SMILES has.
  assert np.abs(distance - own)[bonded].max() < 0.2
  assert np.abs(distance - own).max() > 0.5  # Not the deposited pose.
  ideal = data.featurise_alphafold3(structure, **FIXED)
  np.testing.assert_array_equal(ideal.atoms.ref_pos[ligand], 0.0)
  assert ideal.atoms.ref_element[ligand].min() == 6
  assert ideal.atoms.ref_mask.all()


def test_long_atom_names_and_unknown_options_are_errors():
  files = data.example('1s3v')
  structure = data.load_structure(
    files.structure, ligand=files.ligand, ligand_names=['']
  )
  names = structure.atom_name.astype('U8')
  names[-1] = 'C1234'
  renamed = dataclasses.replace(structure, atom_name=names)
  with pytest.raises(data.StructureFileError, match=r"'C1234'.*4 characters"):
    data.featurise_alphafold3(renamed, **FIXED)
  with pytest.raises(ValueError, match=r'conformer: expected.*rdkit'):
    data.featurise_alphafold3(structure, seed=0, conformer='rdkit')
  with pytest.raises(ValueError, match='standalone_glycans: expected'):
    data.featurise_alphafold3(structure, seed=0, standalone_glycans='no')
  with pytest.raises(ValueError, match='non-negative'):
    data.featurise_alphafold3(structure, seed=-1)


def test_missing_rdkit_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'rdkit', None)
  chemical_components.find_component('ALA')
  data.conformers._component_molecule.cache_clear()
  with pytest.raises(ImportError, match=r'structattn-jax\[chem\]'):
    data.featurise_alphafold3(sequences('A'), seed=0)
  features = data.featurise_alphafold3(sequences('A'), **FIXED)
  assert features.n_atom == 6


def test_structure_without_atoms_gives_empty_features():
  structure = sequences(['UNL'])
  features = data.featurise_alphafold3(structure, **FIXED)
  assert (features.n_token, features.n_atom) == (0, 0)
  assert features.atoms.ref_pos.shape == (0, 3)


def test_failed_conformers_are_searched_for_once(monkeypatch):
  from rdkit.Chem import rdDistGeom

  searched = []
  embed = rdDistGeom.EmbedMolecule

  def counted(molecule, options):
    searched.append((molecule.GetNumAtoms(), options.maxIterations))
    options.maxIterations = 5  # The failure is sure, and sooner.
    return embed(molecule, options)

  monkeypatch.setattr(rdDistGeom, 'EmbedMolecule', counted)
  monkeypatch.setattr(
    conformers,
    '_can_be_embedded',
    functools.cache(conformers._can_be_embedded.__wrapped__),
  )
  file = pathlib.Path(__file__).parent / 'files/cla3.cif'
  structure = data.load_structure(file)
  assert (structure.residue_name == 'CLA').sum() == 3
  first = data.featurise_alphafold3(structure, seed=0, augment=False)
  again = data.featurise_alphafold3(structure, seed=1, augment=False)
  chlorophyll = conformers.ideal_conformer('CLA')
  assert chlorophyll is not None
  whole = [n for n, _ in searched if n == len(chlorophyll.atom_names)]
  assert len(whole) == 1
  # RDKit's own cap, which 0 stands for, grows with the molecule.
  assert all(0 < most <= 1000 for _, most in searched)
  # The CCD's coordinates stand in, whatever the seed.
  rows = np.isin(
    first.atoms.ref_space_uid,
    np.flatnonzero(structure.residue_name == 'CLA'),
  )
  np.testing.assert_array_equal(
    first.atoms.ref_pos[rows], again.atoms.ref_pos[rows]
  )
  assert np.ptp(first.atoms.ref_pos[rows], axis=0).min() > 1.0


def test_hard_component_has_a_generated_conformer():
  found = conformers.generated_conformer('FAD', seed=7)
  ideal = conformers.ideal_conformer('FAD')
  assert found is not None
  assert ideal is not None
  assert found.atom_names == ideal.atom_names
  assert np.abs(found.positions - ideal.positions).max() > 0.1


def _long_chain(n_residue):
  """Copies of the first residues of a protein behind each other."""
  structure = data.load_structure(data.example('1tqh').structure)
  copies, piece = n_residue // 200, 200
  rows = structure.atom_residue < piece

  def repeat(values, keep):
    return np.concatenate([values[keep]] * copies)

  residues = np.arange(structure.n_residue) < piece
  offset = np.repeat(np.arange(copies) * piece, rows.sum())
  changes = {
    name: repeat(getattr(structure, name), residues)
    for name in (
      'residue_name',
      'component_name',
      'insertion_code',
      'residue_chain',
      'residue_kind',
    )
  } | {
    field.name: repeat(getattr(structure, field.name), rows)
    for field in dataclasses.fields(structure)
    if np.shape(getattr(structure, field.name))[:1] == (structure.n_atom,)
  }
  changes['atom_residue'] = (changes['atom_residue'] + offset).astype(np.int32)
  number = np.arange(1, n_residue + 1, dtype=np.int32)
  changes['residue_id'] = number
  if hasattr(structure, 'sequence_index'):
    changes['sequence_index'] = number
  return dataclasses.replace(structure, **changes)


def test_time_is_linear_in_the_length_of_a_chain():
  def seconds(n_residue):
    structure = _long_chain(n_residue)
    start = time.process_time()
    data.featurise_alphafold3(structure, **FIXED)
    return time.process_time() - start

  seconds(200)  # Reads the components.
  # Quadratic work made this 22 times as long as for 600, and 18 s.
  assert seconds(4800) < 6


def test_bond_of_a_sugar_is_found_among_many_atoms(pdb, write):
  for i in range(400):
    pdb.residue('GLY', i + 1, names=('N', 'CA', 'C', 'O'))
  for i, (name, x) in enumerate((('NAG', 100.0), ('NAG', 104.0))):
    for atom, dx in (('C1', 0.0), ('O1', 1.4), ('C2', 2.5)):
      pdb.atom(atom, name, 900 + i, (x + dx, 0.1, 30.0), hetero=True)
  structure = data.load_structure(write(pdb))
  features = data.featurise_alphafold3(structure, **FIXED)
  chars = features.atoms.ref_atom_name_chars
  o1 = (chars == [ord('O') - 32, ord('1') - 32, 0, 0]).all(axis=1)
  assert features.atoms.ref_space_uid[o1].tolist() == []
  # O1 of the first reaches C1 of a third.
  pdb.atom('C1', 'NAG', 902, (101.4, 1.5, 30.0), hetero=True)
  structure = data.load_structure(write(pdb))
  features = data.featurise_alphafold3(structure, **FIXED)
  chars = features.atoms.ref_atom_name_chars
  o1 = (chars == [ord('O') - 32, ord('1') - 32, 0, 0]).all(axis=1)
  assert features.atoms.ref_space_uid[o1].tolist() == [400]


def test_structure_file_becomes_the_batch_of_the_diffusion_head():
  files = data.example('1s3v')
  batch = data.alphafold3_head_batch(
    files.structure, ligand=files.ligand, n_token=256, **FIXED
  )
  structure = data.load_structure(files.structure, ligand=files.ligand)
  tokens = data.featurise_alphafold3(structure, **FIXED).tokens
  n_real = len(tokens.mask)
  ids = batch.tokens
  assert ids.mask.shape == (256,)
  np.testing.assert_array_equal(np.flatnonzero(ids.mask), np.arange(n_real))
  np.testing.assert_array_equal(ids.token_index[:n_real], 1 + np.arange(n_real))
  for name in (
    'token_index',
    'residue_index',
    'asym_id',
    'entity_id',
    'sym_id',
  ):
    own = getattr(ids, name)
    assert own.dtype == np.int32
    assert own[:n_real].min() == 1
    assert not own[n_real:].any()
  # Atoms of the ligand share a residue and are a chain and an entity.
  ligand = np.flatnonzero(tokens.is_ligand)
  assert len(set(ids.residue_index[ligand])) == 1
  assert not set(ids.asym_id[ligand]) & set(ids.asym_id[: ligand[0]])
  mask = batch.atoms.pred_dense_atom_mask
  assert mask[:n_real].any(1).all()
  assert not mask[n_real:].any()
  with pytest.raises(ValueError, match='ligand: expected None'):
    data.alphafold3_head_batch(structure, ligand=files.ligand, **FIXED)
