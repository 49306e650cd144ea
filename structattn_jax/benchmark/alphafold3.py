"""AlphaFold 3's atom encoder and decoder at their released sizes.

128 atom, 16 atom pair, 768 token, 384 trunk single and 128 trunk pair channels,
3 + 3 blocks of 4 heads, windows of 32 x 128 atoms. 'protein' has about 8 atoms
per token, 'ligand' one. From 4096 tokens on there is no trunk pair.
Candidates:
  blocked: `cached_atom_cross_att`, on flat atoms padded to a bucket.
  tight: the published formulation, its flat list padded to the atoms.
  shipped: the published formulation as released, padded to 24 atoms per token.
    The baseline.

'forward' is encoder and decoder of one diffusion step, everything computed.
'cached step' is the same with what is constant over steps and samples given to
'blocked'; the others have nothing of the kind and compute all of it. '5
samples' is a cached step of five samples at once. 'forward+backward' returns
the value of a scalar and its gradient with respect to parameters, positions,
trunk single and pair, and token activations. 'growth' is 'blocked' alone, up to
100,000 atoms.

The notes say by what factor a candidate needs less CPU time than the baseline.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.benchmark import harness
from structattn_jax.network.alphafold3 import atom_cross_attention as af3
from structattn_jax.network.alphafold3 import (
  atom_layout,
  cached_atom_attention,
  dense_atom_attention,
  window_plan,
)

Mode = Literal[
  'forward', 'cached step', '5 samples', 'forward+backward', 'growth'
]
MODES: tuple[Mode, ...] = (
  'forward',
  'cached step',
  '5 samples',
  'forward+backward',
  'growth',
)
CANDIDATES = ('blocked', 'tight', 'shipped')
KINDS = ('protein', 'ligand')
SIZES = (256, 1024, 4096)
# About 12,500 to 100,000 atoms.
GROWTH_SIZES = (1616, 3232, 6464, 12928)
QUICK_SIZES = (32,)

# Heavy atoms of the residues of an average protein: 7.8 per residue.
_ATOMS_PER_RESIDUE = (4, 5, 6, 7, 7, 8, 8, 8, 8, 9, 9, 10, 11, 12)
_TOKENS_PER_LIGAND = 32
_MOST_TOKENS_WITH_PAIR = 2048
_SAMPLES = 5
# Of programs that differentiate the published formulation, larger ones are
# not even compiled.
_MOST_TOKENS_BACKWARD = 1024
# A float64 run of the published formulation has to fit.
_LARGEST_CHECKED = 256

Arguments = tuple[Any, ...]

_CACHED = cached_atom_attention.cached_atom_cross_att()


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures all modes; arguments as `segment.run`.

  Args:
    quick: small sizes, few repeats.
    rss: also measure the peak resident set, a new process for each row.
      Skipped off CPU, where arrays are not in host memory.
    report: called with each table as soon as it is there.

  Returns:
    One table per mode.
  """
  rss = rss and jax.default_backend() == 'cpu'
  tables = []
  for mode in MODES:
    rows: list[harness.Measurement] = []
    kinds = KINDS[:1] if mode == 'growth' else KINDS
    for kind in kinds:
      sizes = GROWTH_SIZES if mode == 'growth' else SIZES
      for n_token in QUICK_SIZES if quick else sizes:
        rows += _case(mode, kind, n_token, quick=quick, rss=rss)
    baseline = 'blocked' if mode == 'growth' else CANDIDATES[-1]
    title = f'AF3 atom cross attention, {mode}'
    tables.append(
      harness.Table(title=title, baseline=baseline, rows=tuple(rows))
    )
    report(tables[-1])
  return tables


def _case(
  mode: Mode, kind: str, n_token: int, *, quick: bool, rss: bool
) -> list[harness.Measurement]:
  args = inputs(mode, kind, n_token)
  num_atoms = int(args[1].plan.num_atoms)
  names = candidates(mode, n_token)
  want = None
  # A ReLU that flips moves gradients by more than rounding.
  if n_token <= _LARGEST_CHECKED and mode != 'forward+backward':
    want = expected(mode, args)
  measured = harness.compare(
    {name: function(mode, name) for name in names},
    args,
    case=f'{kind}, {n_token} tokens, {num_atoms} atoms',
    want=want,
    repeats=3 if quick else 20,
    budget_seconds=6.0,
  )
  del args, want
  if rss:
    measured = [
      harness.with_peak_rss(row, build, mode, kind, n_token, row.candidate)
      for row in measured
    ]
  return _with_cpu_factors(measured)


def candidates(mode: Mode, n_token: int) -> tuple[str, ...]:
  """What is measured at a size."""
  if mode == 'growth':
    return CANDIDATES[:1]
  if mode == 'forward+backward' and n_token > _MOST_TOKENS_BACKWARD:
    return CANDIDATES[:1]
  return CANDIDATES


def build(
  mode: Mode, kind: str, n_token: int, candidate: str
) -> tuple[Callable[..., Any], Sequence[Any]]:
  """The function of a candidate and its arguments, for a new process."""
  return function(mode, candidate), inputs(mode, kind, n_token)


def inputs(mode: Mode, kind: str, n_token: int) -> Arguments:
  """params, batch, tight batch, conditioning, floats: same for all."""
  rng = np.random.default_rng(0)
  with_pair = n_token <= _MOST_TOKENS_WITH_PAIR
  batch = atom_layout.DenseBatch.from_batch(
    features(kind, n_token, rng), token_pairs=with_pair
  )
  mask = np.asarray(batch.pred_dense_atom_mask)
  n_flat = max(-(-int(mask.sum()) // 32) * 32, 128)
  tight = dataclasses.replace(
    batch,
    atom_cross_att=atom_layout.AtomCrossAtt.build(
      mask, padded_num_atoms=n_flat
    ),
  )

  def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)

  samples = (_SAMPLES,) if mode == '5 samples' else ()
  floats = {
    'positions': normal(*samples, *mask.shape, 3) * mask[..., None],
    'token_act': normal(*samples, n_token, 768),
    'single': normal(n_token, 384),
  }
  if with_pair:
    floats['pair'] = normal(n_token, n_token, 128)
  # Nothing is left at zero.
  params = jax.tree.map(
    lambda x: x + 0.05 * normal(*x.shape),
    _CACHED.init(jax.random.key(0), pair_channels=128 if with_pair else None),
  )
  params, batch, tight, floats = jax.tree.map(
    jnp.asarray, (params, batch, tight, floats)
  )
  conditioning = None
  if mode in ('cached step', '5 samples'):
    conditioning = jax.jit(_precompute)(params, batch, floats)
  return params, batch, tight, conditioning, floats


def features(
  kind: str, n_token: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """Upstream's dense features of a made-up complex."""
  mask = np.zeros((n_token, window_plan.NUM_SLOTS), bool)
  uid = np.arange(n_token, dtype=np.int32)
  if kind == 'protein':
    counts = rng.choice(_ATOMS_PER_RESIDUE, n_token)
    mask[:] = np.arange(window_plan.NUM_SLOTS) < counts[:, None]
  else:
    mask[:, 0] = True
    uid //= _TOKENS_PER_LIGAND
  shape = mask.shape
  chars = rng.integers(0, 59, (*shape, 4)) * mask[..., None]
  position = 2 * rng.standard_normal((*shape, 3), np.float32)
  return {
    'pred_dense_atom_mask': mask,
    'ref_space_uid': np.repeat(uid[:, None], shape[1], 1),
    'ref_pos': position * mask[..., None],
    'ref_mask': mask,
    'ref_element': (rng.integers(6, 9, shape) * mask).astype(np.int32),
    'ref_charge': np.zeros(shape, np.float32),
    'ref_atom_name_chars': chars.astype(np.int32),
  }


def expected(mode: Mode, args: Arguments) -> Any:
  """The result of 'tight' in float64, of the float32 arguments."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: (
        np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x)
      ),
      args,
    )
    return jax.tree.map(np.asarray, jax.jit(function(mode, 'tight'))(*wide))


def function(mode: Mode, candidate: str) -> Callable[..., Any]:
  """A candidate as a function of `inputs`."""
  implementation = 'blocked' if candidate == 'blocked' else 'published'
  encode, decode = dense_atom_attention.dense_atom_cross_att(
    af3.AtomCrossAttConfig(implementation=implementation)
  )
  cached = candidate == 'blocked' and mode in ('cached step', '5 samples')

  def forward(params, batch, tight, conditioning, floats):
    own = tight if candidate == 'tight' else batch

    def one(positions, token_act):
      if cached:
        return _step(params, own.plan, conditioning, positions, token_act)
      trunk = (floats['single'], floats.get('pair'))
      encoded = encode(params, own, positions, *trunk)
      return encoded.token_act, decode(params, own, token_act, encoded)

    if mode == '5 samples':
      one = jax.vmap(one)
    return one(floats['positions'], floats['token_act'])

  if mode != 'forward+backward':
    return forward

  def forward_backward(params, batch, tight, conditioning, floats):
    def loss(params, floats):
      found = forward(params, batch, tight, conditioning, floats)
      return sum(jnp.mean(jnp.sin(x)) for x in found)

    return jax.value_and_grad(loss, argnums=(0, 1))(params, floats)

  return forward_backward


def _precompute(params, batch, floats):
  plan = batch.plan
  ref = jax.tree.map(lambda x: atom_layout.atoms_from_dense(plan, x), batch.ref)
  return _CACHED.precompute(
    params, plan, ref, floats['single'], floats.get('pair')
  )


def _step(params, plan, conditioning, positions, token_act):
  positions = atom_layout.atoms_from_dense(plan, positions)
  encoding = _CACHED.encode(params, conditioning, positions)
  update = _CACHED.decode(
    params, conditioning, token_act, encoding.skip_connection
  )
  return encoding.token_act, atom_layout.atoms_to_dense(plan, update)


def _with_cpu_factors(
  rows: list[harness.Measurement],
) -> list[harness.Measurement]:
  """Notes how much less CPU time each takes than the last."""
  baseline = rows[-1].cpu_seconds
  return [
    row
    if row.cpu_seconds is None or baseline is None or row is rows[-1]
    else dataclasses.replace(
      row,
      note='; '.join(
        x for x in (row.note, f'CPU / {baseline / row.cpu_seconds:.1f}') if x
      ),
    )
    for row in rows
  ]
