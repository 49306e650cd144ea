"""mmCIF files: what is written is what is read."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip('biotite')

from structattn_jax import data

FIELDS = (
  'residue_name',
  'component_name',
  'residue_id',
  'insertion_code',
  'residue_chain',
  'residue_kind',
  'sequence_index',
  'atom_residue',
  'atom_name',
  'element',
  'charge',
)


@pytest.mark.parametrize('name', ['1s3v', '1tqh'])
def test_written_structure_reads_back(name, tmp_path):
  files = data.example(name)
  given = data.load_structure(files.structure, ligand=files.ligand)
  moved = given.position + np.array([1.0, -20.0, 300.0])
  path = data.write_mmcif(tmp_path / f'{given.name}.cif', given, moved)
  found = data.load_structure(path)
  assert found.name == given.name
  assert found.chain_ids == given.chain_ids
  for field in FIELDS:
    assert getattr(found, field).tolist() == getattr(given, field).tolist()
  np.testing.assert_allclose(found.position, moved, rtol=0, atol=5.1e-4)
  np.testing.assert_allclose(found.b_factor, given.b_factor, atol=5.1e-3)
  np.testing.assert_allclose(found.occupancy, given.occupancy, atol=5.1e-3)
  if name == '1tqh':
    assert given.b_factor.min() > 0


def test_names_that_need_quotes_are_quoted(tmp_path):
  given = data.load_structure(data.example('1tqh').structure)
  few = given.atom_residue == 0
  given = dataclasses.replace(
    given,
    name="a b'c",
    atom_name=np.array(["O5'", 'C"', "N'A", 'X', '_A', 'CA', 'C'])[: few.sum()],
    **{
      field: getattr(given, field)[few]
      for field in (
        'atom_residue',
        'element',
        'charge',
        'occupancy',
        'position',
        'b_factor',
      )
    },
    **{field: getattr(given, field)[:1] for field in FIELDS[:7]},
  )
  text = data.mmcif_text(given, given.position)
  assert text.startswith('data_a_b_c')
  path = tmp_path / 'x.cif'
  path.write_text(text)
  found = data.load_structure(path)
  assert set(found.atom_name) == set(given.atom_name)


def test_positions_that_do_not_fit_are_refused(tmp_path):
  given = data.load_structure(data.example('1tqh').structure)
  path = tmp_path / 'x.cif'
  with pytest.raises(ValueError, match=r'position: expected shape'):
    data.write_mmcif(path, given, given.position[1:])
  with pytest.raises(ValueError, match='position: expected finite'):
    data.write_mmcif(path, given, given.position * np.nan)
  assert not path.exists()
