"""AF2's structure module at its released sizes: 8 iterations, 12 heads.

384 single and 128 pair channels. Every candidate returns the final single
representation, the backbone frames of all iterations and the final atoms.
Candidates:
  ours: `sa.alphafold2.StructureModule` as it is by default, side chains of the
    last iteration.
  published: the released loop written out: the pair projected to logits, and
    side chains built, in every iteration; attention as 'published' in `ipa`.
  alphafold: DeepMind's own class, where the package `alphafold-colabfold` can
    be imported (`make peers`). The baseline, else 'published' is.

'forward+backward' returns the value of a scalar and its gradient with respect
to parameters, single and pair.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import geometry
from structattn_jax.benchmark import harness
from structattn_jax.benchmark.alphafold2 import invariant_point_attention as ipa
from structattn_jax.components import haiku_modules as hm
from structattn_jax.network.alphafold2 import all_atom, residue_constants
from structattn_jax.network.alphafold2 import structure_module as lib

SIZES = (64, 128, 256, 512)
QUICK_SIZES = (16,)
_C_S, _C_Z = 384, 128
_LARGEST_CHECKED = 256
# Gradients through eight iterations; the published code is off by as much.
_TOLERANCE = {'forward': 1e-5, 'forward+backward': 2e-4}


def candidates() -> tuple[str, ...]:
  """Names of what can run here; the last is the baseline."""
  found = ('ours', 'published')
  return (*found, 'alphafold') if ipa.has_alphafold() else found


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures forward and forward+backward; arguments as `ipa.run`."""
  rss = rss and jax.default_backend() == 'cpu'
  names = candidates()
  tables = []
  for mode in ipa.MODES:
    rows: list[harness.Measurement] = []
    for n_res in QUICK_SIZES if quick else SIZES:
      args = inputs(n_res)
      want = expected(mode, args) if n_res <= _LARGEST_CHECKED else None
      measured = harness.compare(
        {name: function(mode, name) for name in names},
        args,
        case=f'{n_res} residues',
        want=want,
        repeats=3 if quick else 12,
        budget_seconds=10.0,
        tolerance=_TOLERANCE[mode],
      )
      del args, want
      if rss:
        measured = [
          harness.with_peak_rss(row, build, mode, n_res, row.candidate)
          for row in measured
        ]
      rows += measured
    tables.append(
      harness.Table(
        title=f'structure module, {mode}', baseline=names[-1], rows=tuple(rows)
      )
    )
    report(tables[-1])
  return tables


def build(
  mode: ipa.Mode, n_res: int, candidate: str
) -> tuple[Callable[..., Any], Sequence[Any]]:
  """The function of a candidate and its arguments, for a new process."""
  return function(mode, candidate), inputs(n_res)


def inputs(n_res: int) -> tuple[Any, ...]:
  """params, single, pair, aatype, mask: the same for all candidates."""
  rng = np.random.default_rng(0)
  arrays = (
    jnp.asarray(rng.standard_normal((n_res, _C_S), np.float32)),
    jnp.asarray(rng.standard_normal((n_res, n_res, _C_Z), np.float32)),
    jnp.asarray(rng.integers(0, 20, n_res), jnp.int32),
    jnp.arange(n_res) < n_res - n_res // 16,
  )
  shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
  init = lib.transform_structure_module(_config()).init
  made = jax.eval_shape(init, jax.random.key(0), *shapes)
  params = jax.tree.map(
    lambda x: jnp.asarray(
      rng.standard_normal(x.shape, np.float32)
      * (0.3 * x.shape[0] ** -0.5 if len(x.shape) > 1 else 0.1)
    ),
    made,
  )
  return (params, *arrays)


def expected(mode: ipa.Mode, args: Sequence[Any]) -> Any:
  """The result of 'ours' in float64, of the float32 arguments."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: (
        np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x)
      ),
      tuple(args),
    )
    return jax.tree.map(np.asarray, jax.jit(function(mode, 'ours'))(*wide))


def function(mode: ipa.Mode, candidate: str) -> Callable[..., Any]:
  """A candidate as a function of `inputs`."""
  functions = {
    'ours': _ours,
    'published': _published,
    'alphafold': _alphafold,
  }
  transformed = hk.transform(functions[candidate])

  def forward(params, single, pair, aatype, mask):
    out = transformed.apply(
      params, jax.random.key(0), single, pair, aatype, mask
    )
    act, traj, atoms = out
    # AF2 leaves garbage in masked rows.
    return (
      jnp.where(mask[:, None], act, 0),
      jnp.where(mask[:, None], traj, 0),
      jnp.where(mask[:, None, None], atoms, 0),
    )

  if mode == 'forward':
    return forward

  def forward_backward(params, single, pair, aatype, mask):
    def loss(*floats):
      results = forward(*floats, aatype, mask)
      return sum(jnp.mean(jnp.sin(x)) for x in results)

    return jax.value_and_grad(loss, (0, 1, 2))(params, single, pair)

  return forward_backward


def _config() -> lib.StructureModuleConfig:
  return lib.StructureModuleConfig(
    zero_init=False, sidechain_iterations='last', dropout=0.0
  )


def _ours(single, pair, aatype, mask):
  out = lib.StructureModule(_config())(single, pair, aatype, mask)
  return out.act, out.traj, out.final_atom_positions


class _PublishedIteration(lib.FoldIteration):
  """The iteration with attention as released, its pair logits included."""

  @hk.transparent
  def _attention(self) -> Any:
    scope = f'{self.module_name}/invariant_point_attention'

    def attend(act, pair, rotation, translation, mask, **shared):
      del shared
      return ipa.published(act, pair, rotation, translation, mask, scope)

    return attend


def _published(single, pair, aatype, mask):
  """The released loop, over the modules of the library."""
  config = _config()
  with hk.name_scope('structure_module'):
    single = hm.LayerNorm(name='single_layer_norm')(single)
    act = hm.Linear(config.num_channel, name='initial_projection')(single)
    pair = hm.LayerNorm(name='pair_layer_norm')(pair)
    iteration = _PublishedIteration(config, name='fold_iteration')
    frames = geometry.QuatAffine.identity(aatype.shape, act.dtype)

    def iterate(carry, _):
      act, frames = iteration(*carry, pair, mask)
      scaled = frames.translation * config.position_scale
      angles = iteration.torsion_angles(act, single)
      angles *= jax.lax.rsqrt(
        jnp.maximum(jnp.sum(jnp.square(angles), -1, keepdims=True), 1e-12)
      )
      groups = all_atom.torsion_angles_to_frames(
        geometry.Rigid(frames.rotation, scaled), angles, aatype
      )
      atoms = all_atom.frames_to_atom14(groups, aatype)
      traj = jnp.concatenate([frames.quaternion, scaled], -1)
      return (act, frames.stop_rotation_gradient()), (traj, atoms)

    (act, _), (traj, atoms) = hk.scan(
      iterate, (act, frames), None, length=config.num_layer
    )
  return act, traj, _atom37(atoms[-1], aatype, mask)


def _atom37(atom14: jax.Array, aatype: jax.Array, mask: jax.Array) -> jax.Array:
  atoms = all_atom.atom14_to_atom37(atom14, aatype)
  exists = jnp.asarray(residue_constants.residue_tables().atom37_mask)[aatype]
  return jnp.where((exists & mask[:, None])[..., None], atoms, 0)


def _alphafold(single, pair, aatype, mask):
  """DeepMind's class, from the package that distributes it."""
  folding: Any = importlib.import_module('alphafold.model.folding')
  ml_collections: Any = importlib.import_module('ml_collections')
  tables = residue_constants.residue_tables()
  ours = _config()
  names = (
    'num_layer',
    'num_channel',
    'num_head',
    'num_layer_in_transition',
    'num_point_qk',
    'num_point_v',
    'num_scalar_qk',
    'num_scalar_v',
    'position_scale',
    'dropout',
  )
  config = ml_collections.ConfigDict(
    {
      **{name: getattr(ours, name) for name in names},
      'sidechain': {
        'num_channel': ours.sidechain.num_channel,
        'num_residual_block': ours.sidechain.num_residual_block,
        'length_scale': ours.position_scale,
      },
    }
  )
  shared = ml_collections.ConfigDict({'zero_init': True, 'deterministic': True})
  real = mask.astype(single.dtype)
  batch = {
    'aatype': aatype,
    'seq_mask': real,
    'atom14_atom_exists': jnp.asarray(tables.atom14_mask)[aatype]
    * real[:, None],
    'atom37_atom_exists': jnp.asarray(tables.atom37_mask)[aatype]
    * real[:, None],
    'residx_atom37_to_atom14': jnp.asarray(tables.atom37_to_atom14)[aatype],
  }
  module = folding.StructureModule(config, shared, compute_loss=True)
  out = module({'single': single, 'pair': pair}, batch, is_training=False)
  act = out['representations']['structure_module']
  return act, out['traj'], out['final_atom_positions']
