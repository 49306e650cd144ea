"""Pallatom's atom encoder and decoder with its main trunk's channels.

128 atom, 16 atom pair, 256 token and 128 token pair channels, 2 blocks in the
encoder and 3 in the decoder, 4 heads, a window of 32 residues; 5 atoms per
residue as its featuriser makes them, and 14. Candidates:
  blocked: `network.pallatom` with a plan made before, p_skip in factors and no
    p as output.
  published: the published formulation as a plain port: gathered keys and pairs.
  torch: the same in PyTorch where that is installed; it also builds its index
    in each call, as published. The baseline, else 'published' is. As many
    threads as torch chooses.

'forward+backward' is the mean square of all outputs and its gradient with
respect to parameters and float inputs. What would take most of the memory is
left out of the published formulations. 'index' builds the neighbour lists:
on the host (`build_sparse_pairs`, and the plan of 'blocked') or under jit.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.benchmark import harness
from structattn_jax.benchmark.pallatom import published
from structattn_jax.network import pallatom
from structattn_jax.network.pallatom import neighbour_plan

Mode = Literal[
  'encoder, forward',
  'decoder, forward',
  'encoder, forward+backward',
  'decoder, forward+backward',
]
MODES: tuple[Mode, ...] = (
  'encoder, forward',
  'decoder, forward',
  'encoder, forward+backward',
  'decoder, forward+backward',
)

# Pairs of atoms and neighbours up to which the published formulations run.
_MOST_PAIRS = {'forward': 3_600_000, 'forward+backward': 900_000}
# Atoms up to which results are compared with float64.
_LARGEST_CHECKED = 1025
# The pair input alone has 6 GB there.
_MOST_TOKEN_PAIRS = 11_000_000

# Of the n x n comparison, which takes 45 bytes per pair.
_MOST_COMPARED_ATOMS = 8192

_BLOCKS = {'encoder': 2, 'decoder': 3}


@dataclasses.dataclass(frozen=True)
class Case:
  """A protein, or a batch of them."""

  n_atom: int
  atoms_per_residue: int
  n_batch: int = 1

  @property
  def n_token(self) -> int:
    """Residues."""
    return round(self.n_atom / self.atoms_per_residue)

  @property
  def tok_idx(self) -> np.ndarray:
    """[n_atom] int32."""
    tokens = np.arange(self.n_token, dtype=np.int32)
    return np.repeat(tokens, self.atoms_per_residue)

  def __str__(self) -> str:
    text = f'{len(self.tok_idx)} atoms, {self.atoms_per_residue} per residue'
    return f'{text}, batch {self.n_batch}'


_SIZES = (256, 1024, 2048, 8192)
CASES = (
  *(
    case
    for n_atom in _SIZES
    for atoms_per_residue in (5, 14)
    for n_batch in (1, 4)
    if (case := Case(n_atom, atoms_per_residue, n_batch)).n_token ** 2 * n_batch
    <= _MOST_TOKEN_PAIRS
  ),
  Case(20_912, 16),
)
QUICK_CASES = (Case(120, 5), Case(120, 5, 2))


def candidates(mode: Mode, case: Case) -> tuple[str, ...]:
  """What is measured; the last is the baseline."""
  pairs = pallatom.required_neighbours(case.tok_idx) * len(case.tok_idx)
  if pairs * case.n_batch > _MOST_PAIRS[mode.partition(', ')[2]]:
    return ('blocked',)
  return (
    ('blocked', 'published', 'torch')
    if has_torch()
    else ('blocked', 'published')
  )


def has_torch() -> bool:
  """Whether PyTorch can be imported."""
  return importlib.util.find_spec('torch') is not None


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures all modes and the index; arguments as `segment.run`.

  Args:
    quick: two small sizes, few repeats.
    rss: also measure the peak resident set, a new process for each row.
      Skipped off CPU, where arrays are not in host memory.
    report: called with each table as soon as it is there.

  Returns:
    One table per mode, and one of the index.
  """
  rss = rss and jax.default_backend() == 'cpu'
  cases = QUICK_CASES if quick else CASES
  baseline = 'torch' if has_torch() else 'published'
  tables = []

  def add(title: str, rows: list[harness.Measurement]) -> None:
    table = harness.Table(
      title=f'Pallatom, {title}', baseline=baseline, rows=tuple(rows)
    )
    tables.append(table)
    report(table)

  for mode in MODES:
    rows: list[harness.Measurement] = []
    for case in cases:
      rows += _measure(mode, case, quick=quick, rss=rss)
    add(mode, rows)
  rows = []
  for case in cases:
    if case.n_batch == 1:
      rows += harness.compare(
        index_candidates(case),
        (case.tok_idx,),
        case=str(case),
        repeats=3 if quick else 20,
      )
  add('index', rows)
  return tables


def _measure(
  mode: Mode, case: Case, *, quick: bool, rss: bool
) -> list[harness.Measurement]:
  args = inputs(mode, case)
  # A ReLU that flips moves gradients by more than rounding.
  checked = case.n_atom <= _LARGEST_CHECKED and mode.endswith('forward')
  measured = harness.compare(
    {name: candidate(mode, case, name) for name in candidates(mode, case)},
    args,
    case=str(case),
    want=expected(mode, case, args) if checked else None,
    repeats=3 if quick else 20,
    budget_seconds=6.0,
  )
  del args
  if rss:
    measured = [
      harness.with_peak_rss(row, build, mode, case, row.candidate)
      for row in measured
    ]
  return measured


def build(
  mode: Mode, case: Case, name: str
) -> tuple[Callable[..., Any] | harness.External, Sequence[Any]]:
  """A candidate and its arguments, for a new process."""
  return candidate(mode, case, name), inputs(mode, case)


def inputs(mode: Mode, case: Case) -> tuple[Any, ...]:
  """Parameters, float inputs, other inputs, and the plan."""
  rng = np.random.default_rng(0)
  n_atom, n_token = len(case.tok_idx), case.n_token
  lead = () if case.n_batch == 1 else (case.n_batch,)

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((*lead, *shape), np.float32))

  uid = jnp.zeros((*lead, n_atom), jnp.int32)
  z = normal(n_token, n_token, 128)
  if mode.startswith('encoder'):
    floats = {
      'ref_pos': normal(n_atom, 3),
      'ref_element': normal(n_atom, 4),
      's_input': normal(n_token, 256),
      'z_input': z,
      'r_scaled': normal(n_atom, 3),
    }
    others: dict[str, Any] = {'ref_space_uid': uid}
  else:
    skip = pallatom.PairSkip(
      query=normal(n_atom, 16),
      key=normal(n_atom, 16),
      position=normal(n_atom, 3),
      space_uid=uid,
      inverse_square=jnp.ones(16),
    )
    floats = {
      'q_skip': normal(n_atom, 128),
      'c_skip': normal(n_atom, 128),
      'c': normal(n_atom, 128),
      's': normal(n_token, 256),
      'z': z,
      'skip': dataclasses.replace(skip, space_uid=None),
    }
    others = {'space_uid': uid}
  made = jax.eval_shape(
    lambda: _transformed(mode).init(
      jax.random.key(0),
      **_arguments(mode, *_first(floats, others, lead)),
      tok_idx=case.tok_idx,
    )
  )
  params = jax.tree.map(
    lambda x: jnp.asarray(
      rng.standard_normal(x.shape, np.float32) * x.shape[0] ** -0.5
      if len(x.shape) > 1
      else 1 + 0.1 * rng.standard_normal(x.shape, np.float32)
    ),
    made,
  )
  plan = neighbour_plan.plan_neighbours(case.tok_idx)
  return params, floats, others, jax.tree.map(jnp.asarray, plan)


def _first(floats: Any, others: Any, lead: tuple[int, ...]) -> tuple[Any, Any]:
  """One item; the shared vector stays."""
  if not lead:
    return floats, others
  return jax.tree.map(lambda x: x[0] if x.ndim > 1 else x, (floats, others))


def _arguments(mode: Mode, floats: Any, others: Any) -> dict[str, Any]:
  """Of the library's functions."""
  if mode.startswith('encoder'):
    return {**floats, **others}
  rest = {name: x for name, x in floats.items() if name != 'skip'}
  return {**rest, 'p_skip': dataclasses.replace(floats['skip'], **others)}


def _transformed(mode: Mode) -> Any:
  if mode.startswith('encoder'):
    return pallatom.transform_atom_feature_encoder()
  return pallatom.transform_atom_attention_decoder()


def candidate(
  mode: Mode, case: Case, name: str
) -> Callable[..., Any] | harness.External:
  """A candidate as a function of `inputs`."""
  if name == 'torch':
    return harness.External(lambda *args: _torch(mode, case, *args))
  return function(mode, case, name)


def function(mode: Mode, case: Case, name: str) -> Callable[..., Any]:
  """A candidate in JAX."""
  forward = {'blocked': _blocked, 'published': _published}[name]

  def outputs(params, floats, others, plan):
    return forward(mode, case, params, floats, others, plan)

  if mode.endswith(', forward'):
    return outputs

  def forward_backward(params, floats, others, plan):
    def loss(params, floats):
      found = outputs(params, floats, others, plan)
      return sum(jnp.mean(jnp.square(x)) for x in found)

    return jax.value_and_grad(loss, argnums=(0, 1))(params, floats)

  return forward_backward


def expected(mode: Mode, case: Case, args: Sequence[Any]) -> Any:
  """The result of 'published' in float64, of the float32 arguments."""
  return harness.in_float64(function(mode, case, 'published'), args)


def _blocked(
  mode: Mode, case: Case, params: Any, floats: Any, others: Any, plan: Any
) -> tuple[jax.Array, ...]:
  tok_idx = jnp.asarray(case.tok_idx)
  if case.n_batch > 1:
    tok_idx = jnp.broadcast_to(tok_idx, (case.n_batch, len(tok_idx)))
  out = _transformed(mode).apply(
    params, **_arguments(mode, floats, others), tok_idx=tok_idx, plan=plan
  )
  if mode.startswith('encoder'):
    return out.s_i, out.q_skip, out.c_skip, out.c_l
  return out.q, out.r_update, out.c_out


def _published(
  mode: Mode, case: Case, params: Any, floats: Any, others: Any, plan: Any
) -> tuple[jax.Array, ...]:
  del plan
  neighbours, valid = pallatom.build_sparse_pairs(case.tok_idx)
  pairs = jnp.asarray(neighbours, jnp.int32), jnp.asarray(valid)
  arrays = _arguments(mode, floats, others)
  if mode.startswith('decoder'):
    arrays['p_skip'] = arrays['p_skip'].dense(*pairs)
  if case.n_batch == 1:
    arrays = jax.tree.map(lambda x: x[None], arrays)
  kind = mode.partition(',')[0]
  fn = {'encoder': published.encoder, 'decoder': published.decoder}[kind]
  found = fn(
    published.jax_library(),
    _state(params, kind),
    arrays,
    jnp.asarray(case.tok_idx),
    pairs,
    _BLOCKS[kind],
    4,
  )
  return found if case.n_batch > 1 else tuple(x[0] for x in found)


def _state(params: Any, kind: str) -> Any:
  """Parameters without the scope of the module."""
  scope = {'encoder': 'atom_feature_encoder/'}.get(
    kind, 'atom_attention_decoder/'
  )
  return {name.removeprefix(scope): x for name, x in params.items()}


def _torch(
  mode: Mode, case: Case, params: Any, floats: Any, others: Any, plan: Any
) -> Callable[[], Any]:
  """The published formulation, its p_skip given as a tensor."""
  del plan
  torch: Any = importlib.import_module('torch')

  def tensor(x: Any) -> Any:
    return torch.from_numpy(np.array(x))

  kind = mode.partition(',')[0]
  state = jax.tree.map(tensor, _state(params, kind))
  arrays = _arguments(mode, floats, others)
  if mode.startswith('decoder'):
    pairs = pallatom.build_sparse_pairs(case.tok_idx)
    arrays['p_skip'] = arrays['p_skip'].dense(*pairs)
  arrays = {
    name: tensor(x)[None] if case.n_batch == 1 else tensor(x)
    for name, x in arrays.items()
  }
  tok = tensor(case.tok_idx).long()
  library = published.torch_library(torch)
  fn = {'encoder': published.encoder, 'decoder': published.decoder}[kind]

  def forward() -> tuple[Any, ...]:
    pairs = published.torch_pairs(torch, tok, neighbour_plan.WINDOW_SIZE)
    return fn(library, state, arrays, tok, pairs, _BLOCKS[kind], 4)

  if mode.endswith(', forward'):

    def outputs() -> Any:
      with torch.no_grad():
        found = tuple(x.numpy() for x in forward())
      return found if case.n_batch > 1 else tuple(x[0] for x in found)

    return outputs

  leaves = [
    x.requires_grad_()
    for x in (*jax.tree.leaves(state), *arrays.values())
    if x.is_floating_point()
  ]

  def forward_backward() -> None:
    loss = sum(x.square().mean() for x in forward())
    torch.autograd.grad(loss, leaves, allow_unused=True)

  return forward_backward


def index_candidates(
  case: Case,
) -> Mapping[str, Callable[..., Any] | harness.External]:
  """Ways to build the neighbour lists from [n_atom] int32."""
  needed = pallatom.required_neighbours(case.tok_idx)

  def host(build: Callable[[np.ndarray], Any]) -> harness.External:
    def prepare(tok: np.ndarray) -> Callable[[], None]:
      def call() -> None:
        build(tok)

      return call

    return harness.External(prepare)

  def compiled(tok: jax.Array) -> Any:
    return pallatom.build_sparse_pairs(tok, max_neighbours=needed)

  def compared(tok: jax.Array) -> Any:
    near = jnp.abs(tok[:, None] - tok) < neighbour_plan.WINDOW_SIZE // 2
    ordered = jnp.where(near, jnp.arange(len(tok)), len(tok))
    ordered = jnp.sort(ordered, 1)[:, :needed]
    valid = ordered < len(tok)
    return jnp.where(valid, ordered, len(tok) - 1), valid

  found: dict[str, Callable[..., Any] | harness.External] = {
    'plan': host(neighbour_plan.plan_neighbours),
    'lists': host(pallatom.build_sparse_pairs),
    'lists, jit': compiled,
  }
  if case.n_atom > _MOST_COMPARED_ATOMS:
    return found
  found['published'] = compared
  if has_torch():
    torch: Any = importlib.import_module('torch')
    found['torch'] = host(
      lambda tok: published.torch_pairs(
        torch, torch.from_numpy(tok).long(), neighbour_plan.WINDOW_SIZE
      )
    )
  return found
