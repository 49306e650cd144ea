"""The benchmark measures what it says; its candidates do the same job."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.benchmark import __main__ as command
from structattn_jax.benchmark import alphafold3 as atom_cross_attention
from structattn_jax.benchmark import alphafold3_diffusion_head as diffusion_head
from structattn_jax.benchmark import harness, segment
from structattn_jax.benchmark.alphafold2 import structure_module


def double(x):
  return 2 * x


def wrong(x):
  return 2 * x + jnp.where(x == 0, jnp.nan, 0)


def build_outer(n):
  x = jnp.ones(n)
  return lambda x: x[:, None] * x, (x,)


def test_measure_known_function_has_all_numbers():
  row = harness.measure(double, jnp.ones(1000), repeats=7, warmup=2)
  assert row.candidate == 'double'
  assert row.calls == 7
  assert row.lower_seconds > 0
  assert row.compile_seconds > 0
  assert 0 < row.min_seconds <= row.median_seconds
  assert row.cpu_seconds >= 0
  assert row.output_bytes == 4000
  assert row.max_relative_error is None


def test_compare_marks_wrong_and_nan_results_and_times_them():
  x = jnp.arange(3.0)
  rows = harness.compare(
    {'right': double, 'nan': wrong, 'off': lambda x: 2.1 * x},
    (x,),
    want=2 * np.arange(3.0),
  )
  assert [row.note[:5] for row in rows] == ['', 'WRONG', 'WRONG']
  assert rows[2].max_relative_error == pytest.approx(0.05, rel=1e-5)
  assert all(row.calls == 20 for row in rows)


def test_compare_slow_candidate_is_called_once():
  calls = []

  def slow(x):
    jax.debug.callback(lambda: calls.append(1))
    return 2 * x

  rows = harness.compare(
    {'slow': slow}, (jnp.ones(3),), repeats=9, budget_seconds=0
  )
  jax.effects_barrier()
  assert rows[0].calls == len(calls) == 1


def test_compare_large_temporaries_are_reported_not_run():
  def outer(x):
    return jnp.sort(x[:, None] * x, 0)[::7].sum(1)

  (row,) = harness.compare(
    {'outer': outer}, (jnp.ones(300),), temp_limit_bytes=1000
  )
  assert row.note.startswith('not run')
  assert row.calls == 0
  assert row.median_seconds is None
  table = harness.Table(title='t', baseline='outer', rows=(row,))
  assert 'not run' in harness.format_table(table)


def test_max_relative_error_wrong_shape_raises():
  with pytest.raises(ValueError, match='got: expected shape'):
    harness.max_relative_error(np.ones(3), np.ones((3, 1)))


def test_format_table_gives_ratios_within_each_case():
  rows = tuple(
    harness.Measurement(
      case=case,
      candidate=candidate,
      lower_seconds=0.001,
      compile_seconds=0.002,
      median_seconds=seconds,
      calls=9,
    )
    for case, candidate, seconds in [
      ('small', 'a', 3.0),
      ('small', 'base', 2.0),
      ('large', 'a', 5.0),
      ('large', 'base', 20.0),
    ]
  )
  table = harness.Table(title='title', baseline='base', rows=rows)
  title, header, *lines = harness.format_table(table).split('\n')
  assert title == 'title'
  column = header.index('/ base')
  ratios = [line[column : column + 6].strip() for line in lines]
  assert ratios == ['1.50', '1.00', '0.25', '1.00']


def test_peak_rss_grows_with_the_result():
  n = 6000
  grown = harness.peak_rss(build_outer, n)
  assert 4 * n**2 <= grown < 4 * n**2 + 100e6


@pytest.mark.parametrize('operation', segment.OPERATIONS)
@pytest.mark.parametrize('case', segment.QUICK_CASES[1:], ids=str)
def test_segment_candidates_match_float64(operation, case):
  args = segment.inputs(operation, case)
  counts = np.bincount(args[1], minlength=case.n_token)
  assert len(counts) == case.n_token
  assert 1 <= counts.min() <= counts.max() <= 15
  assert case.is_sorted == np.all(np.diff(args[1]) >= 0)
  want = segment.expected(operation, case, args)
  for candidate in segment.CANDIDATES:
    with jax.default_matmul_precision('highest'):
      got = jax.jit(segment.function(operation, case, candidate))(*args)
    assert harness.max_relative_error(got, want) < 1e-6, candidate


def test_command_quick_prints_tables_and_writes_json(
  tmp_path, capsys, monkeypatch
):
  cases = (segment.Case(200), segment.Case(200, False))
  monkeypatch.setattr(segment, 'QUICK_CASES', cases)
  path = tmp_path / 'out.json'
  assert command.main(['segment', '--quick', '--no-rss', f'--json={path}']) == 0
  printed = capsys.readouterr().out
  content = json.loads(path.read_text())
  assert content['environment']['jax'] == jax.__version__
  tables = content['sections']['segment']
  assert [table['title'] for table in tables] == [*segment.OPERATIONS.values()]
  for table in tables:
    assert table['title'] in printed
    assert len(table['rows']) == len(cases) * len(segment.CANDIDATES)
    for row in table['rows']:
      assert row['note'] == ''
      assert row['calls'] == 5
      assert row['median_seconds'] > 0
      assert row['max_relative_error'] < 1e-6


@pytest.mark.parametrize('kind', atom_cross_attention.KINDS)
def test_atom_cross_attention_cached_step_matches_published_float64(kind):
  args = atom_cross_attention.inputs('cached step', kind, 32)
  want = atom_cross_attention.expected('cached step', args)
  run = atom_cross_attention.function('cached step', 'blocked')
  assert harness.max_relative_error(jax.jit(run)(*args), want) < 3e-6


def test_structure_module_published_loop_gives_the_same():
  args = structure_module.inputs(12)
  ours, published = (
    jax.jit(structure_module.function('forward', name))(*args)
    for name in ('ours', 'published')
  )
  assert harness.max_relative_error(ours, published) < 2e-5


def test_atom_cross_attention_notes_the_factor_of_cpu_time():
  rows = [
    harness.Measurement(
      candidate=str(i), lower_seconds=0, compile_seconds=0, cpu_seconds=cpu
    )
    for i, cpu in enumerate((0.5, None, 2.0))
  ]
  noted = atom_cross_attention._with_cpu_factors(rows)
  assert [row.note for row in noted] == ['CPU / 4.0', '', '']


def test_command_unknown_section_names_the_choices(capsys):
  with pytest.raises(SystemExit):
    command.main(['fold'])
  message = capsys.readouterr().err
  assert 'expected one of segment, ipa, structure_module, ' in message


def test_diffusion_head_candidates_do_the_same_job():
  step, training = diffusion_head.run(quick=True, rss=False)
  assert [row.candidate for row in step.rows] == ['cached', 'jit', 'recomputed']
  for row in step.rows:
    assert row.max_relative_error < 1e-5
    assert not row.note
  temporaries = {
    (row.case, row.candidate): row.temp_bytes for row in training.rows
  }
  assert len(temporaries) == 4
  assert all(size > 0 for size in temporaries.values())
