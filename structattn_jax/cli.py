"""The command `structattn`.

structattn run [FILE]             run the five systems on a complex
structattn convert INPUT OUTPUT   take over published parameters
structattn info [FILE]            say what a converted file holds, or what is
                                  installed
structattn train CONFIG           train the protein-ligand diffusion model
structattn sample CHECKPOINT      sample proteins and ligands from it
structattn sample --system boltz2 sample structures, given a trunk's embeddings
structattn verify PATH...         replay recorded outputs of published code
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from structattn_jax import (
  __version__,
  checkpoint,
  convert,
  data,
  discrete_diffusion,
  network,
  training,
)
from structattn_jax.apps import demo, generate, sample
from structattn_jax.common import files
from structattn_jax.network.sedd import dual_track as sedd_dual_track
from structattn_jax.verification import verify

# Exit status for input that cannot be used, as argparse gives for bad options.
_BAD_INPUT = 2
# An error that is not about the input, as in sysexits.h.
_INTERNAL = 70
# Environment variable with which such an error shows its traceback.
_TRACEBACK = 'STRUCTATTN_TRACEBACK'
# What a shell reports for a program that SIGTERM ended.
_STOPPED = 143
# Extras with their packages, as in pyproject.toml, and what they are for.
_EXTRAS = {
  'data': (('biotite', 'gemmi', 'msgpack'), 'structure files'),
  'chem': (('rdkit',), 'SMILES'),
  'run': (
    ('biotite', 'gemmi', 'msgpack', 'rdkit', 'matplotlib'),
    'structattn run',
  ),
  'convert': (('safetensors', 'zstandard'), 'structattn convert'),
  'train': (('orbax-checkpoint', 'tqdm'), 'structattn train'),
  'tensorboard': (('tensorboardX',), 'event files of a run'),
  'parquet': (('pyarrow',), 'tables of pairs'),
}
# Errors that are about what the user gave, not about this program.
_EXPECTED = (
  files.FileError,
  data.StructureFileError,
  generate.GenerateError,
  sample.SampleError,
  training.RunError,
  ImportError,
  OSError,
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status.

  Args:
    arguments: words of the command line; None takes those of the process.

  Returns:
    0; 1 if `verify` finds a difference; 2 if a file or an option cannot be
    used; 70 after an error that is not about these; 143 if `train` was stopped
    by a signal and can go on.
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
  _add_train(commands)
  _add_sample(commands)
  _add_verify(commands)
  options = parser.parse_args(arguments)
  try:
    return options.function(options)
  except _EXPECTED as error:
    message = ' '.join(str(error).split())
    print(f'structattn: {message}', file=sys.stderr)
    return _BAD_INPUT
  except Exception as error:
    if os.environ.get(_TRACEBACK):
      raise
    message = ' '.join(str(error).split())[:500]
    print(
      f'structattn: unexpected {type(error).__name__}: {message} (a fault of '
      f'this program; {_TRACEBACK}=1 shows where)',
      file=sys.stderr,
    )
    return _INTERNAL


def _add_convert(commands: Any) -> None:
  parser = commands.add_parser(
    'convert',
    help='take over published parameters',
    description='Converts a part of a published checkpoint into one file with '
    'parameters, configuration and provenance. Every entry of the part must '
    'be there, be known and have the right shape. Formats and their parts: '
    + '; '.join(
      f'{kind.title}: {", ".join(kind.parts)}'
      for kind in convert.FORMATS.values()
    ),
  )
  parser.add_argument('input', type=pathlib.Path, help='published checkpoint')
  parser.add_argument(
    'output', type=pathlib.Path, help='.safetensors or .npz file to write'
  )
  parser.add_argument(
    '--part', help='what to take (default: the first part of the format)'
  )
  parser.add_argument(
    '--weights',
    choices=('model', 'ema'),
    help='trained values or their moving averages, where a file has both '
    '(default: what upstream runs with)',
  )
  parser.add_argument(
    '--allow-nan',
    action='store_true',
    help='take parameters that are not finite, which are an error otherwise',
  )
  parser.set_defaults(function=_convert)
  parser = commands.add_parser(
    'info',
    help='say what a converted file holds, or what is installed',
    description='Prints configuration and provenance of a converted file; '
    'without one: versions, devices, extras and what each would add, systems.',
  )
  parser.add_argument('file', type=pathlib.Path, nargs='?')
  parser.set_defaults(function=_info)


def _add_train(commands: Any) -> None:
  parser = commands.add_parser(
    'train',
    help='train the protein-ligand diffusion model',
    description='Trains a dual-track SEDD as a TOML file says, or goes on with '
    'a run that was stopped: the same command in the same folder. SIGTERM and '
    'Ctrl-C end a run with a checkpoint.',
  )
  parser.add_argument(
    'config',
    type=pathlib.Path,
    help='TOML file, such as configs/sedd_protein_ligand_small.toml',
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    help='folder of the run (default: out/NAME_OF_CONFIG)',
  )
  parser.add_argument(
    '--steps', type=int, help='number of steps, instead of that of the file'
  )
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  hosts = parser.add_argument_group(
    'several hosts', 'The same command on each, with its own --process-id.'
  )
  hosts.add_argument(
    '--coordinator', help='HOST:PORT of the first process (jax.distributed)'
  )
  hosts.add_argument('--num-processes', type=int)
  hosts.add_argument('--process-id', type=int)
  parser.set_defaults(function=_train)


def _add_sample(commands: Any) -> None:
  parser = commands.add_parser(
    'sample',
    help='sample proteins and ligands, or structures',
    description='Samples from a trained dual-track SEDD, writes CSV, FASTA and '
    'SMILES, and measures the samples. With --system boltz1 or boltz2: samples '
    'structures, given embeddings of a trunk, and writes mmCIF files.',
  )
  parser.add_argument(
    'checkpoint',
    nargs='?',
    type=pathlib.Path,
    help='SEDD: folder of a training run, or a file of `train` or `convert`',
  )
  parser.add_argument(
    '--system',
    choices=('sedd', *sample.SYSTEMS),
    default='sedd',
    help='what is sampled from (default: %(default)s)',
  )
  parser.add_argument(
    '--mode',
    choices=sedd_dual_track.MODES,
    default='joint',
    help='what is generated from what (default: %(default)s)',
  )
  parser.add_argument(
    '--protein',
    help='sequence: the context, or a template with <mask> for residues to be '
    'filled in',
  )
  parser.add_argument('--ligand', help='SMILES, likewise')
  parser.add_argument(
    '--num', type=int, default=16, help='samples (default: %(default)s)'
  )
  parser.add_argument(
    '--protein-length',
    type=int,
    help='residues (default: as in the training set)',
  )
  parser.add_argument(
    '--ligand-length',
    type=int,
    help='SMILES tokens (default: as the model has learned)',
  )
  sampler = discrete_diffusion.SamplerConfig()
  parser.add_argument(
    '--steps', type=int, help='steps (default: as the system is released)'
  )
  parser.add_argument(
    '--predictor', choices=('analytic', 'euler'), default=sampler.predictor
  )
  parser.add_argument('--temperature', type=float, default=sampler.temperature)
  parser.add_argument('--top-p', type=float, default=sampler.top_p)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--vocabulary',
    type=pathlib.Path,
    help='SMILES vocabulary of a checkpoint without one',
  )
  parser.add_argument(
    '--training',
    type=pathlib.Path,
    help='CSV or Parquet table for the novelty (default: that of the run)',
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=pathlib.Path('out/samples'),
    help='folder for the samples (default: %(default)s)',
  )
  structures = parser.add_argument_group('structures (--system boltz1, boltz2)')
  structures.add_argument(
    '--weights',
    type=pathlib.Path,
    help='file of `structattn convert CHECKPOINT FILE --part diffusion`',
  )
  structures.add_argument(
    '--structure',
    type=pathlib.Path,
    help='mmCIF or PDB file with the atoms to be placed',
  )
  structures.add_argument(
    '--embeddings',
    type=pathlib.Path,
    help=f'npz or safetensors file with {", ".join(sample.NAMES)} of the trunk',
  )
  structures.add_argument(
    '--samples', type=int, default=5, help='samples (default: %(default)s)'
  )
  parser.add_argument(
    '--json', action='store_true', help='print the metrics as JSON'
  )
  parser.set_defaults(function=_sample)


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
    help='npz file, published checkpoint, or folder that is searched for both',
  )
  parser.add_argument(
    '--json', action='store_true', help='print JSON instead of a table'
  )
  parser.add_argument(
    '--float64',
    action='store_true',
    help='replay in float64: recorded float64 runs must agree to 1e-9',
  )
  parser.set_defaults(function=_verify)


def _convert(options: argparse.Namespace) -> int:
  try:
    checkpoint.check_suffix(options.output)
  except ValueError as error:
    raise checkpoint.CheckpointError(str(error)) from None
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', convert.DeadParametersWarning)
    written = convert.convert_file(
      options.input,
      options.output,
      options.part,
      weights=options.weights,
      allow_nan=options.allow_nan,
    )
  for warning in caught:
    print(f'structattn: warning: {warning.message}', file=sys.stderr)
  print(f'{options.output}: {convert.describe(written)}')
  return 0


def _info(options: argparse.Namespace) -> int:
  if options.file is None:
    print(_installation())
    return 0
  content = checkpoint.load(options.file, allow_nan=True)
  print(f'{options.file}: {convert.describe(content)}')
  return 0


def _installation() -> str:
  """What there is to work with, a line each."""
  devices = collections.Counter(d.device_kind for d in jax.devices())
  lines = [
    f'structattn-jax {__version__}, Python {platform.python_version()}, '
    + ', '.join(f'{n} {_version(n)}' for n in ('jax', 'dm-haiku', 'numpy')),
    f'devices ({jax.default_backend()}): '
    + ', '.join(f'{count} x {kind}' for kind, count in devices.items()),
    'systems: ' + ', '.join(network.__all__),
    'published checkpoints: '
    + ', '.join(kind.title for kind in convert.FORMATS.values()),
  ]
  for extra, (packages, use) in _EXTRAS.items():
    found = {name: _version(name) for name in packages}
    missing = [name for name, version in found.items() if version is None]
    have = ', '.join(f'{name} {v}' for name, v in found.items() if v)
    state = f'missing {", ".join(missing)}' if missing else have
    lines.append(f'extra {extra:<11} ({use}): {state}')
  return '\n'.join(lines)


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _train(options: argparse.Namespace) -> int:
  def report(message: str) -> None:
    print(f'structattn: {message}', file=sys.stderr, flush=True)

  if options.coordinator is not None:
    jax.distributed.initialize(
      options.coordinator, options.num_processes, options.process_id
    )
  try:
    config = training.TrainConfig.from_toml(options.config)
    if options.steps is not None:
      config = dataclasses.replace(config, steps=options.steps)
  except (TypeError, ValueError) as error:
    raise training.RunError(str(error)) from None
  folder = options.out or pathlib.Path('out') / options.config.stem
  result = training.train(
    config, folder, report=report, progress=not options.quiet
  )
  if result.interrupted:
    report(f'stopped at step {result.step}; the same command goes on')
    return _STOPPED
  if jax.process_index() == 0:
    print(f'{folder}: {result.step} steps; perplexity bounds per token:')
    for mode, bound in result.bounds.items():
      print(f'  {mode:22} {bound:8.3f}')
  return 0


def _sample_structures(options: argparse.Namespace) -> int:
  names = ('weights', 'structure', 'embeddings')
  missing = [f'--{name}' for name in names if getattr(options, name) is None]
  if missing or options.checkpoint is not None:
    raise sample.SampleError(
      f'--system {options.system} takes --weights, --structure and '
      '--embeddings and no other file'
      + (f'; missing: {", ".join(missing)}' if missing else '')
    )

  def progress(done: int, steps: int) -> None:
    print(f'... step {done} of {steps}', file=sys.stderr, flush=True)

  config, params = sample.load_weights(options.weights, options.system)
  samples = sample.sample_structures(
    config,
    params,
    data.load_structure(options.structure),
    sample.load_embeddings(options.embeddings),
    num_samples=options.samples,
    sampler=sample.sampler_of(options.system, options.steps),
    key=jax.random.key(options.seed),
    progress=progress,
  )
  files = sample.write(options.out, samples)
  if options.json:
    print(json.dumps({'files': [str(file) for file in files]}, indent=2))
  else:
    print('files: ' + ', '.join(str(file) for file in files))
  return 0


def _sample(options: argparse.Namespace) -> int:
  if options.system != 'sedd':
    return _sample_structures(options)
  if options.checkpoint is None:
    raise generate.GenerateError(
      'checkpoint: expected a folder or file to sample from'
    )
  model = generate.load_model(options.checkpoint, vocabulary=options.vocabulary)
  try:
    sampler = discrete_diffusion.SamplerConfig(
      steps=discrete_diffusion.SamplerConfig().steps
      if options.steps is None
      else options.steps,
      predictor=options.predictor,
      temperature=options.temperature,
      top_p=options.top_p,
    )
  except ValueError as error:
    raise generate.GenerateError(str(error)) from None
  if options.training is not None:
    known = data.read_pairs(
      options.training, lone_proteins=True, lone_ligands=True
    )
  elif model.settings is not None:
    known = training.read_pairs(model.settings)
  else:
    known = None
  samples = generate.generate(
    model,
    jax.random.key(options.seed),
    mode=options.mode,
    num=options.num,
    protein=options.protein,
    ligand=options.ligand,
    protein_length=options.protein_length,
    ligand_length=options.ligand_length,
    sampler=sampler,
  )
  metrics = generate.measure(samples, known)
  files = generate.write(options.out, samples, metrics)
  if options.json:
    print(json.dumps(metrics, indent=2))
    return 0
  for track in samples.generated:
    shown = {
      name: value
      for name, value in metrics[track].items()
      if name not in ('canonical', 'composition')
    }
    print(
      f'{track}: '
      + ', '.join(
        f'{name.replace("_", " ")} '
        + (f'{value:.3g}' if isinstance(value, float) else str(value))
        for name, value in shown.items()
      )
    )
    for text in (getattr(samples, track) or ())[:4]:
      print(f'  {text}')
  print('files: ' + ', '.join(str(file) for file in files))
  return 0


def _verify(options: argparse.Namespace) -> int:
  def progress(message: str) -> None:
    print(f'... {message}', file=sys.stderr, flush=True)

  report = verify.verify(
    options.path, float64=options.float64, progress=progress
  )
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
  from structattn_jax.apps import figures

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
  progress('weights')
  params = demo.init_params(chosen, options.seed)
  reports = list(demo.run(chosen, params, seed=options.seed, progress=progress))
  progress('figures')
  options.out.mkdir(parents=True, exist_ok=True)
  written = figures.draw_all(features, chosen, params, options.out)

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
    checks = [
      f'{name}: {check.error:.1e}'
      + ('' if check.ok else f' OVER {check.tolerance:.0e}')
      for name, check in report.checks.items()
    ]
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
