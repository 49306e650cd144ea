"""The command `structattn`.

structattn run [FILE]             run the five systems on a complex
structattn convert INPUT OUTPUT   take over published parameters
structattn info FILE              say what a converted file holds
structattn verify PATH...         replay recorded outputs of published code
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from structattn_jax import checkpoint, convert, data, demo, verify

# Exit status for input that cannot be used, as argparse gives for bad options.
_BAD_INPUT = 2
_CHECK_FAILED = 1
# Errors that are about what the user gave, not about this program.
_EXPECTED = (
  checkpoint.CheckpointError,
  data.StructureFileError,
  ImportError,
  OSError,
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status.

  Args:
    arguments: words of the command line; None takes those of the process.

  Returns:
    0; 1 if `verify` finds a difference; 2 if a file or an option cannot be
    used.
  """
  parser = argparse.ArgumentParser(
    prog='structattn', description='Attention systems for structural biology.'
  )
  commands = parser.add_subparsers(dest='command', required=True)
  run = commands.add_parser(
    'run',
    help='run the five systems on a complex',
    description='Runs the five attention systems under jax.jit on a real '
    'complex, compares each with its float64 oracle, checks symmetries and '
    'padding, and draws attention maps.',
  )
  run.add_argument(
    'file',
    nargs='?',
    type=pathlib.Path,
    help='mmCIF or PDB file with a protein (default: the bundled 1S3V)',
  )
  run.add_argument(
    '--ligand',
    type=pathlib.Path,
    help='SDF file with a ligand that the structure file lacks',
  )
  run.add_argument(
    '--model', type=int, default=1, help='model of the file, from 1'
  )
  run.add_argument('--seed', type=int, default=0, help='seed of the weights')
  run.add_argument(
    '--out',
    type=pathlib.Path,
    default=pathlib.Path('out'),
    help='folder for the figures (default: out)',
  )
  run.add_argument(
    '--json', action='store_true', help='print JSON instead of a table'
  )
  run.set_defaults(function=_run)
  _add_convert(commands)
  _add_verify(commands)
  options = parser.parse_args(arguments)
  try:
    return options.function(options)
  except _EXPECTED as error:
    message = ' '.join(str(error).split())
    print(f'structattn: {message}', file=sys.stderr)
    return _BAD_INPUT


def _add_convert(commands: Any) -> None:
  parser = commands.add_parser(
    'convert',
    help='take over published parameters',
    description='Converts a part of a published checkpoint (AlphaFold 2 '
    'params_model_*.npz) into one file with parameters, configuration and '
    'provenance. Every entry of the part must be there, be known and have the '
    'right shape.',
  )
  parser.add_argument('input', type=pathlib.Path, help='published checkpoint')
  parser.add_argument(
    'output', type=pathlib.Path, help='.safetensors or .npz file to write'
  )
  parser.add_argument(
    '--part',
    choices=convert.PARTS,
    default='structure_module',
    help='what to take (default: %(default)s)',
  )
  parser.set_defaults(function=_convert)
  parser = commands.add_parser(
    'info',
    help='say what a converted file holds',
    description='Prints configuration and provenance of a converted file.',
  )
  parser.add_argument('file', type=pathlib.Path)
  parser.set_defaults(function=_info)


def _add_verify(commands: Any) -> None:
  parser = commands.add_parser(
    'verify',
    help='replay recorded outputs of published code',
    description='Replays golden files, inputs, parameters and outputs recorded '
    'from published code, on the present device. Exit status: 0 all arrays are '
    'within tolerance, 1 some are not, 2 something could not be run.',
  )
  parser.add_argument(
    'path',
    nargs='+',
    type=pathlib.Path,
    help='npz file, or folder that is searched for them',
  )
  parser.add_argument(
    '--json', action='store_true', help='print JSON instead of a table'
  )
  parser.set_defaults(function=_verify)


def _convert(options: argparse.Namespace) -> int:
  try:
    checkpoint.check_suffix(options.output)
  except ValueError as error:
    raise checkpoint.CheckpointError(str(error)) from None
  written = convert.convert_file(options.input, options.output, options.part)
  print(f'{options.output}: {convert.describe(written)}')
  return 0


def _info(options: argparse.Namespace) -> int:
  content = checkpoint.load(options.file)
  print(f'{options.file}: {convert.describe(content)}')
  return 0


def _verify(options: argparse.Namespace) -> int:
  def progress(message: str) -> None:
    print(f'... {message}', file=sys.stderr, flush=True)

  report = verify.verify(options.path, progress=progress)
  for message in (*report.notes, *report.errors):
    print(f'structattn: {message}', file=sys.stderr)
  if options.json:
    print(json.dumps(verify.to_json(report.rows), indent=2))
  elif report.rows:
    print('\n'.join(verify.table(report.rows)))
    failed = sum(not row.ok for row in report.rows)
    cases = len({row.case for row in report.rows})
    verdict = f'{failed} FAIL' if failed else 'all within tolerance'
    print(f'{len(report.rows)} arrays of {cases} cases: {verdict}')
  return report.status


def _run(options: argparse.Namespace) -> int:
  def progress(message: str) -> None:
    print(f'... {message}', file=sys.stderr, flush=True)

  # Imported here: a missing extra must be one clear line, not a traceback.
  from structattn_jax import figures

  path, ligand = options.file, options.ligand
  if path is None:
    path, ligand = data.example('1s3v')
  progress(f'reading {path.name}')
  try:
    structure = data.load_structure(path, ligand=ligand, model=options.model)
  except data.StructureFileError:
    raise
  except ValueError as error:  # For instance a model that is not there.
    raise data.StructureFileError(f'{path}: {error}') from None
  whole = data.featurise(structure)
  features = demo.crop(whole)
  if not features.tokens.frame_mask.any():
    raise data.StructureFileError(
      f'{path}: no residue has all of N, CA and C, so there are no backbone '
      'frames; give a file with the full backbone'
    )
  # The largest ligand: ions and buffer are small.
  found = [ligand.smiles or '' for ligand in data.ligand_smiles(structure)]
  smiles = max(found, key=len, default='')

  chosen = demo.experiments(features, smiles, seed=options.seed)
  try:
    reports = list(demo.run(chosen, seed=options.seed, progress=progress))
  except AssertionError as error:  # A symmetry or padding check.
    print(f'structattn: {path}: check failed: {error}', file=sys.stderr)
    return _CHECK_FAILED
  progress('figures')
  options.out.mkdir(parents=True, exist_ok=True)
  written = figures.draw_all(features, chosen, options.out, seed=options.seed)

  summary = {
    'structure': whole.metadata.name if whole.metadata else path.name,
    'tokens': whole.n_token,
    'protein_residues': int(whole.tokens.is_protein.sum()),
    'ligand_tokens': int(whole.tokens.is_ligand.sum()),
    'atoms': whole.n_atom,
    'tokens_used': features.n_token,
    'ligand_smiles': smiles,
    'seed': options.seed,
  }
  if options.json:
    systems = [dataclasses.asdict(report) for report in reports]
    content = {
      **summary,
      'systems': systems,
      'figures': [str(file) for file in written],
    }
    print(json.dumps(content, indent=2))
    return 0
  print(describe(summary))
  print(table(reports))
  print('figures: ' + ', '.join(str(file) for file in written))
  return 0


def describe(summary: dict[str, Any]) -> str:
  """One paragraph about the complex."""
  lines = [
    '{structure}: {tokens} tokens ({protein_residues} protein residues, '
    '{ligand_tokens} ligand atoms), {atoms} atoms'.format(**summary)
  ]
  if summary['tokens_used'] < summary['tokens']:
    lines.append(
      'cut to {tokens_used} tokens: the oracles are loops'.format(**summary)
    )
  if summary['ligand_smiles']:
    lines.append('ligand: {ligand_smiles}'.format(**summary))
  lines.append(
    'weights are random (seed {seed}); errors are relative to the largest '
    'output'.format(**summary)
  )
  return '\n'.join(lines)


def table(reports: Sequence[demo.Report]) -> str:
  """All reports as one table with several lines per row."""
  header = (
    'system',
    'inputs',
    'parameters',
    'compile ms',
    'run ms',
    'oracle error',
    'checks',
  )
  rows: list[tuple[list[str], ...]] = [tuple([title] for title in header)]
  for report in reports:
    inputs = [
      f'{name} [{", ".join(map(str, shape))}]'
      for name, shape in report.inputs.items()
    ]
    checks = [f'{name}: {error:.1e}' for name, error in report.checks.items()]
    rows.append(
      (
        [report.title, report.algorithm],
        inputs,
        [f'{report.num_parameters:,}'],
        [f'{report.compile_ms:,.0f}'],
        [f'{report.run_ms:,.1f}'],
        [f'{report.oracle_error:.1e}'],
        checks,
      )
    )
  widths = [
    max(len(line) for row in rows for line in row[column])
    for column in range(len(header))
  ]
  numeric = range(2, 6)
  rule = '-+-'.join('-' * width for width in widths)
  lines = [rule]
  for row in rows:
    for i in range(max(map(len, row))):
      cells = [
        f'{cell[i] if i < len(cell) else "":{">" if c in numeric else "<"}{w}}'
        for c, (cell, w) in enumerate(zip(row, widths, strict=True))
      ]
      lines.append(' | '.join(cells).rstrip())
    lines.append(rule)
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main())
