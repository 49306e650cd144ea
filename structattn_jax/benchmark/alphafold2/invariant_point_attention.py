"""Invariant point attention of AF2's monomer at its released sizes.

384 single and 128 pair channels, 12 heads, translations in units of 10 A.
Candidates:
  blocked, dense: the implementations of `sa.alphafold2`.
  published: the released computation written out: point distances and point
    sums elementwise over [n_head, n_res, n_res, n_point], an additive mask.
  alphafold: DeepMind's own class, where the package `alphafold-colabfold` can
    be imported (`make peers`). The baseline, else 'published' is.
  lucidrains: the torch module of the package `invariant-point-attention`, where
    it can be imported, with the same weights. It has no biases of queries, keys
    and values, so all candidates have zeros there, and it turns points by the
    transposed rotation, which it therefore gets. Its gradients are timed, not
    compared.

'forward+backward' returns the value of a scalar and its gradient with respect
to parameters, single, pair and frames. 'published' and 'alphafold' are timed up
to the size whose temporaries stay below the limit.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.benchmark import harness
from structattn_jax.network.alphafold2 import invariant_point_attention as ipa

Mode = Literal['forward', 'forward+backward']
MODES: tuple[Mode, ...] = ('forward', 'forward+backward')
SIZES = (64, 256, 512, 1024, 2048)
QUICK_SIZES = (32, 64)

_C_S, _C_Z = 384, 128
_HEAD, _QK, _V, _P_QK, _P_V = 12, 16, 16, 4, 8
# float64 references of larger pairs would not fit beside the candidates.
_LARGEST_CHECKED = 512


def candidates() -> tuple[str, ...]:
  """Names of what can run here; the last is the baseline."""
  found = ['blocked', 'dense', 'published']
  # Only whether they are there: importing them is left to `function`.
  if _can_import('torch', 'einops', 'invariant_point_attention'):
    found.insert(0, 'lucidrains')
  if has_alphafold():
    found.append('alphafold')
  return tuple(found)


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures forward and forward+backward; arguments as `segment.run`.

  Args:
    quick: small sizes, few repeats.
    rss: also measure the peak resident set, a new process for each row.
      Skipped off CPU, where arrays are not in host memory.
    report: called with each table as soon as it is there.

  Returns:
    One table per mode.
  """
  rss = rss and jax.default_backend() == 'cpu'
  names = candidates()
  tables = []
  for mode in MODES:
    rows: list[harness.Measurement] = []
    for n_res in QUICK_SIZES if quick else SIZES:
      args = inputs(n_res)
      want = expected(mode, args) if n_res <= _LARGEST_CHECKED else None
      measured = harness.compare(
        {name: _candidate(mode, name) for name in names},
        args,
        case=f'{n_res} residues',
        want=want,
        repeats=3 if quick else 20,
        budget_seconds=6.0,
      )
      del args, want
      if rss:
        measured = [
          harness.with_peak_rss(row, build, mode, n_res, row.candidate)
          for row in measured
        ]
      rows += measured
    tables.append(
      harness.Table(title=f'IPA, {mode}', baseline=names[-1], rows=tuple(rows))
    )
    report(tables[-1])
  return tables


def build(
  mode: Mode, n_res: int, candidate: str
) -> tuple[Callable[..., Any] | harness.External, Sequence[Any]]:
  """The function of a candidate and its arguments, for a new process."""
  return _candidate(mode, candidate), inputs(n_res)


def inputs(n_res: int) -> tuple[Any, ...]:
  """params, single, pair, rotation, translation, mask: same for all."""
  rng = np.random.default_rng(0)
  rotation, _ = np.linalg.qr(rng.standard_normal((n_res, 3, 3)))
  rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
  arrays = (
    jnp.asarray(rng.standard_normal((n_res, _C_S), np.float32)),
    jnp.asarray(rng.standard_normal((n_res, n_res, _C_Z), np.float32)),
    jnp.asarray(rotation, jnp.float32),
    jnp.asarray(1.6 * rng.standard_normal((n_res, 3)), jnp.float32),
    jnp.arange(n_res) < n_res - n_res // 16,
  )
  shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
  init = ipa.transform_ipa(_config('dense')).init
  made = jax.eval_shape(init, jax.random.key(0), *shapes)
  params = jax.tree.map(
    lambda x: jnp.asarray(
      rng.standard_normal(x.shape, np.float32)
      * (x.shape[0] ** -0.5 if len(x.shape) > 1 else 0.1)
    ),
    made,
  )
  for path, values in params.items():
    if path.endswith(('_scalar', '_local')):
      values['bias'] = jnp.zeros_like(values['bias'])
  return (params, *arrays)


def expected(mode: Mode, args: Sequence[Any]) -> Any:
  """The result of 'dense' in float64, of the float32 arguments."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: (
        np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x)
      ),
      tuple(args),
    )
    return jax.tree.map(np.asarray, jax.jit(function(mode, 'dense'))(*wide))


def _candidate(mode: Mode, name: str) -> Callable[..., Any] | harness.External:
  if name == 'lucidrains':
    return harness.External(functools.partial(_lucidrains, mode))
  return function(mode, name)


def function(mode: Mode, candidate: str) -> Callable[..., Any]:
  """A JAX candidate as a function of `inputs`."""
  if candidate == 'published':
    apply = _transform(published)
  elif candidate == 'alphafold':
    apply = _transform(_alphafold)
  else:
    apply = ipa.transform_ipa(_config(candidate)).apply

  def forward(params, single, pair, rotation, translation, mask):
    out = apply(params, single, pair, rotation, translation, mask)
    # AF2 leaves garbage in masked rows.
    return jnp.where(mask[:, None], out, 0)

  if mode == 'forward':
    return forward

  def forward_backward(params, single, pair, rotation, translation, mask):
    def loss(*floats):
      return jnp.mean(jnp.sin(forward(*floats, mask)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(
      params, single, pair, rotation, translation
    )

  return forward_backward


def _config(implementation: Any) -> ipa.InvariantPointAttentionConfig:
  return ipa.InvariantPointAttentionConfig(
    zero_init=False, implementation=implementation
  )


def _transform(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  return hk.without_apply_rng(hk.transform(fn)).apply


def published(
  single, pair, rotation, translation, mask, scope='invariant_point_attention'
):
  """AF2's monomer as released, tensors and all, as a Haiku function."""
  n_res = single.shape[0]
  params = functools.partial(linear, scope)

  def to_global(local: jax.Array) -> list[jax.Array]:
    points = jnp.split(local, 3, -1)
    points = [p.reshape(n_res, _HEAD, -1) for p in points]
    return [
      sum(rotation[:, i, j, None, None] * points[j] for j in range(3))
      + translation[:, i, None, None]
      for i in range(3)
    ]

  def heads(x: jax.Array) -> jax.Array:
    return x.reshape(n_res, _HEAD, -1)

  q = heads(params('q_scalar', single, _HEAD * _QK))
  kv = heads(params('kv_scalar', single, _HEAD * (_QK + _V)))
  k, v = jnp.split(kv, [_QK], -1)
  q_point = to_global(params('q_point_local', single, _HEAD * 3 * _P_QK))
  kv_point = to_global(
    params('kv_point_local', single, _HEAD * 3 * (_P_QK + _P_V))
  )
  k_point = [x[..., :_P_QK] for x in kv_point]
  v_point = [x[..., _P_QK:] for x in kv_point]

  head_weights = jax.nn.softplus(
    parameter(scope, 'trainable_point_weights', (_HEAD,))
  )
  point_weights = np.sqrt(1 / (3 * _P_QK * 9 / 2)) * head_weights
  squared = sum(
    jnp.square(
      jnp.swapaxes(q, 0, 1)[:, :, None] - jnp.swapaxes(k, 0, 1)[:, None]
    )
    for q, k in zip(q_point, k_point, strict=True)
  )
  logits = -0.5 * jnp.sum(point_weights[:, None, None, None] * squared, -1)
  logits += jnp.einsum('qhc,khc->hqk', np.sqrt(1 / (3 * _QK)) * q, k)
  bias = params('attention_2d', pair, _HEAD)
  logits += np.sqrt(1 / 3) * jnp.transpose(bias, (2, 0, 1))
  real = mask.astype(single.dtype)
  logits -= 1e5 * (1 - real[:, None] * real)
  attention = jax.nn.softmax(logits)

  result = [jnp.einsum('hqk,khc->qhc', attention, v).reshape(n_res, -1)]
  point = [
    jnp.sum(attention[..., None] * jnp.swapaxes(x, 0, 1)[:, None], -2)
    for x in v_point
  ]
  point = [
    jnp.swapaxes(x, 0, 1) - translation[:, i, None, None]
    for i, x in enumerate(point)
  ]
  local = [
    sum(rotation[:, j, i, None, None] * point[j] for j in range(3))
    for i in range(3)
  ]
  result += [x.reshape(n_res, -1) for x in local]
  norm = jnp.sqrt(1e-8 + sum(jnp.square(x) for x in local))
  result.append(norm.reshape(n_res, -1))
  result.append(jnp.einsum('hij,ijc->ihc', attention, pair).reshape(n_res, -1))
  return params('output_projection', jnp.concatenate(result, -1), _C_S)


def linear(scope: str, name: str, x: jax.Array, size: int) -> jax.Array:
  """A `Linear` of another module by its path."""
  weights = parameter(f'{scope}/{name}', 'weights', (x.shape[-1], size))
  return x @ weights + parameter(f'{scope}/{name}', 'bias', (size,))


def parameter(path: str, name: str, shape: tuple[int, ...]) -> jax.Array:
  """A parameter under a full path, from a function without modules."""
  return _Scope(path)(name, shape)


class _Scope(hk.Module):
  """Reads a parameter of another module by its path."""

  def __init__(self, path: str):
    super().__init__(name=path.rsplit('/', 1)[-1])
    self.module_name = path

  def __call__(self, name: str, shape: tuple[int, ...]) -> jax.Array:
    return hk.get_parameter(name, shape, init=jnp.zeros)


def has_alphafold() -> bool:
  """Whether DeepMind's classes can be imported."""
  return _can_import('alphafold', 'ml_collections', 'tree')


def _can_import(*names: str) -> bool:
  return all(importlib.util.find_spec(name) is not None for name in names)


def _alphafold(single, pair, rotation, translation, mask):
  """DeepMind's class, from the package that distributes it."""
  ml_collections: Any = importlib.import_module('ml_collections')
  folding: Any = importlib.import_module('alphafold.model.folding')
  quat_affine: Any = importlib.import_module('alphafold.model.quat_affine')
  config = ml_collections.ConfigDict(
    {
      'num_head': _HEAD,
      'num_scalar_qk': _QK,
      'num_scalar_v': _V,
      'num_point_qk': _P_QK,
      'num_point_v': _P_V,
      'num_channel': _C_S,
    }
  )
  shared = ml_collections.ConfigDict({'zero_init': True, 'deterministic': True})
  affine = quat_affine.QuatAffine(
    jnp.zeros((single.shape[0], 4)),
    [translation[:, i] for i in range(3)],
    rotation=[[rotation[:, i, j] for j in range(3)] for i in range(3)],
    normalize=False,
  )
  return folding.InvariantPointAttention(config, shared)(
    inputs_1d=single,
    inputs_2d=pair,
    mask=mask[:, None].astype(single.dtype),
    affine=affine,
  )


def _lucidrains(
  mode: Mode, params, single, pair, rotation, translation, mask
) -> Callable[[], Any]:
  """The torch module with our weights, ready to be called."""
  torch: Any = importlib.import_module('torch')
  package: Any = importlib.import_module('invariant_point_attention')
  module = package.InvariantPointAttention(
    dim=_C_S,
    heads=_HEAD,
    scalar_key_dim=_QK,
    scalar_value_dim=_V,
    point_key_dim=_P_QK,
    point_value_dim=_P_V,
    pairwise_repr_dim=_C_Z,
  )
  names = {
    path.rpartition('/')[2]: {n: np.asarray(x) for n, x in values.items()}
    for path, values in params.items()
  }

  def points(weights: np.ndarray) -> np.ndarray:
    """From all x, all y, all z to x, y, z of each point."""
    return np.moveaxis(weights, 1, -1).reshape(len(weights), -1).T

  k, v = np.split(
    names['kv_scalar']['weights'].reshape(_C_S, _HEAD, -1), [_QK], -1
  )
  q_point = names['q_point_local']['weights'].reshape(_C_S, 3, _HEAD, -1)
  kv_point = names['kv_point_local']['weights'].reshape(_C_S, 3, _HEAD, -1)
  sizes = np.cumsum([_HEAD * _V] + 3 * [_HEAD * _P_V])
  scalar, x, y, z, rest = np.split(names['output_projection']['weights'], sizes)
  local = np.stack([x, y, z], 1).reshape(-1, _C_S)
  outer = names['invariant_point_attention']
  state = {
    'to_scalar_q.weight': names['q_scalar']['weights'].T,
    'to_scalar_k.weight': k.reshape(_C_S, -1).T,
    'to_scalar_v.weight': v.reshape(_C_S, -1).T,
    'to_point_q.weight': points(q_point),
    'to_point_k.weight': points(kv_point[..., :_P_QK]),
    'to_point_v.weight': points(kv_point[..., _P_QK:]),
    'point_weights': outer['trainable_point_weights'],
    'to_pairwise_attn_bias.0.weight': names['attention_2d']['weights'].T,
    'to_pairwise_attn_bias.0.bias': names['attention_2d']['bias'],
    'to_out.weight': np.concatenate([scalar, local, rest]).T,
    'to_out.bias': names['output_projection']['bias'],
  }
  module.load_state_dict(
    {name: torch.tensor(np.array(value)) for name, value in state.items()}
  )
  arrays = (single, pair, np.swapaxes(rotation, 1, 2), translation)
  floats = [torch.tensor(np.array(x))[None] for x in arrays]
  real = torch.tensor(np.array(mask))[None]

  def forward() -> Any:
    s, z, r, t = floats
    out = module(s, z, rotations=r, translations=t, mask=real)[0]
    return out * real[0, :, None]

  def forward_alone() -> Any:
    with torch.no_grad():
      return forward().numpy()

  def forward_backward() -> None:
    leaves = [x.requires_grad_() for x in floats]
    torch.autograd.grad(
      torch.sin(forward()).mean(), [*module.parameters(), *leaves]
    )

  return forward_alone if mode == 'forward' else forward_backward
