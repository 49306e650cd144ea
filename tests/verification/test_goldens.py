"""Recorded outputs of published code and of the seeds, replayed.

Files in tests/goldens/<system>/ hold inputs, parameters under the source's own
names, its float32 outputs and `outputs64`, the same run in float64. Bounds are
largest difference over largest value, as measured for the source itself.
"""

import functools
import pathlib
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax.components import segment
from structattn_jax.network.sedd import embeddings
from structattn_jax.reference import alphafold3 as aca_reference
from structattn_jax.reference import boltz as boltz_reference
from structattn_jax.reference import pallatom as pallatom_reference
from structattn_jax.reference import sedd as sedd_reference
from structattn_jax.verification import systems

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'

each_dtype = pytest.mark.parametrize('dtype', ['float32', 'float64'])
# Compiles in half the time; test_systems.py checks optimised code.
QUICK = {'xla_backend_optimization_level': 0}
# Float64 against float64; every formula here is exact.
FLOAT64_BOUND = 1e-12


@functools.cache
def load(path: str) -> dict[str, np.ndarray]:
  with np.load(GOLDENS / f'{path}.npz', allow_pickle=False) as file:
    return dict(file)


def part(golden, prefix: str, dtype: str = 'float64') -> dict[str, np.ndarray]:
  """Entries below `prefix/`, floats as `dtype`, the rest as it is."""
  return {
    name.removeprefix(f'{prefix}/'): (
      value.astype(dtype) if value.dtype.kind == 'f' else value
    )
    for name, value in golden.items()
    if name.startswith(f'{prefix}/')
  }


def error(got, want) -> float:
  """Largest difference over the largest value."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return float(np.abs(got - want).max() / np.abs(want).max())


def run(fn, *arguments, dtype: str, vmap_axes=None):
  """`fn` under jit, in the precision that `dtype` asks for."""
  with jax.enable_x64(dtype == 'float64'):
    if vmap_axes is not None:
      fn = jax.vmap(fn, vmap_axes)
    outputs = jax.jit(fn, compiler_options=QUICK)(*arguments)
    assert {str(y.dtype) for y in jax.tree.leaves(outputs)} == {dtype}
    return jax.tree.map(np.asarray, outputs)


def haiku_params(torch_params, scope: str) -> hk.Params:
  """Torch's names and orientation turned into ours, below `scope`."""
  params = {}
  for name, value in torch_params.items():
    *path, kind = re.sub(r'(blocks|mlp)\.(\d+)', r'\1_\2', name).split('.')
    if path[-1] == 'embedding':
      kind, path = 'embedding', path[:-1]
    elif path[-1].startswith('norm'):
      kind = {'weight': 'scale', 'bias': 'offset'}[kind]
    elif kind == 'weight':
      kind, value = 'weights', value.T
    params.setdefault('/'.join([scope, *path]), {})[kind] = value
  return params


# AF3: the seed's two functions. Its README accepts 2e-6 in float32.

AF3_CASES = ['seed_uniform', 'seed_uneven_empty_tokens', 'seed_unsorted']
each_af3_case = pytest.mark.parametrize('case', AF3_CASES)


@each_dtype
@pytest.mark.parametrize('implementation', segment.IMPLEMENTATIONS)
@each_af3_case
def test_af3_seed_golden_matches(case, implementation, dtype):
  golden = load(f'af3_atom_cross_attention/{case}')
  inputs = part(golden, 'inputs', dtype)
  params = {
    scope: part(golden, f'params/{scope}', dtype)
    for scope in ('to_atoms', 'to_tokens')
  }
  num_head, d_head = params['to_atoms']['W_q'].shape[1:]
  tokens = inputs['s']
  config = sa.seeds.TokenAtomAttentionConfig(
    num_head=num_head,
    d_head=d_head,
    implementation=implementation,
    max_atoms_per_token=sa.max_segment_size(
      inputs['atom_to_token'], len(tokens)
    ),
  )
  got = run(
    sa.seeds.transform_token_atom_attention(config).apply,
    params,
    inputs['q'],
    tokens,
    inputs['atom_to_token'],
    dtype=dtype,
  )
  bound = {'float32': 2e-6, 'float64': FLOAT64_BOUND}[dtype]
  want = part(golden, 'outputs64')
  assert error(got.atoms, want['to_atoms']) < bound
  assert error(got.tokens, want['to_tokens']) < bound


@each_af3_case
def test_af3_seed_golden_oracle_matches(case):
  golden = load(f'af3_atom_cross_attention/{case}')
  inputs, want = part(golden, 'inputs'), part(golden, 'outputs64')
  for direction, oracle in (
    ('to_atoms', aca_reference.token_to_atom),
    ('to_tokens', aca_reference.atom_to_token),
  ):
    weights = part(golden, f'params/{direction}')
    got = oracle(
      inputs['q'],
      inputs['s'],
      inputs['atom_to_token'],
      **{name.lower(): value for name, value in weights.items()},
    )
    assert error(got, want[direction]) < FLOAT64_BOUND


def test_af3_seed_golden_covers_empty_tokens_and_any_order():
  def ids(case):
    golden = load(f'af3_atom_cross_attention/{case}')
    return golden['inputs/atom_to_token'], len(golden['inputs/s'])

  empty, num_tokens = ids('seed_uneven_empty_tokens')
  assert len(np.unique(empty)) < num_tokens
  assert np.any(np.diff(ids('seed_unsorted')[0]) < 0)


# Boltz: the seed's function. Its README: atol 2e-5 + rtol 1e-5 in float32, and
# 4e-7 for the one implementation measured, on values up to about 3.

each_boltz_case = pytest.mark.parametrize(
  'case', ['uniform', 'uneven', 'gaps_shuffled']
)


@each_dtype
@each_boltz_case
def test_boltz_seed_golden_matches(case, dtype):
  golden = load('boltz_atom_encoder/seed_token_attention')
  inputs = part(golden, f'inputs/{case}', dtype)
  want = golden[f'outputs64/{case}/token_features']
  ids = inputs['atom_to_token']
  num_head, d_head = inputs['w_q'].shape[1:]
  config = sa.seeds.TokenAttentionPoolConfig(
    num_head=num_head,
    d_head=d_head,
    max_atoms_per_token=sa.max_segment_size(ids, len(want)),
  )
  weights = {name: inputs[name] for name in ('w_q', 'w_k', 'w_v')}
  got = run(
    sa.seeds.transform_token_attention_pool(config, num_tokens=len(want)).apply,
    {'token_attention_pool': weights},
    inputs['atom_features'],
    ids,
    dtype=dtype,
  )
  if dtype == 'float32':
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
  bound = {'float32': 2e-6, 'float64': FLOAT64_BOUND}[dtype]
  assert error(got, want) < bound


@each_boltz_case
def test_boltz_seed_golden_oracle_matches(case):
  golden = load('boltz_atom_encoder/seed_token_attention')
  want = golden[f'outputs64/{case}/token_features']
  got = boltz_reference.token_attention_pool(
    **part(golden, f'inputs/{case}'), num_tokens=len(want)
  )
  assert error(got, want) < FLOAT64_BOUND


# Pallatom: torch code of the published repository. Its README: pairs exact,
# outputs 3e-6, gradients 1e-5; gradients that are exactly zero 1e-4 absolute.

N_PAIRS = 11
each_pairs = pytest.mark.parametrize('case', range(N_PAIRS))


def pairs_golden(case: int):
  golden = load('pallatom_atom_transformers/pairs')
  return (
    golden[f'inputs/tok_idx_{case}'],
    int(golden[f'inputs/window_size_{case}']),
    golden[f'outputs/neighbor_idx_{case}'],
    golden[f'outputs/valid_mask_{case}'],
  )


def test_pallatom_pairs_golden_is_covered_completely():
  golden = load('pallatom_atom_transformers/pairs')
  assert len(part(golden, 'outputs')) == 2 * N_PAIRS
  assert any(np.any(np.diff(pairs_golden(i)[0]) < 0) for i in range(N_PAIRS))


# Unsorted, no neighbours at all, a single atom: one by one, each shape compiles
# every operation anew.
@pytest.mark.parametrize('case', [4, 7, 9])
def test_pallatom_pairs_golden_matches_eagerly(case):
  tok_idx, window_size, index, valid = pairs_golden(case)
  got_index, got_valid = sa.pallatom.build_sparse_pairs(tok_idx, window_size)
  np.testing.assert_array_equal(got_index, index)
  np.testing.assert_array_equal(got_valid, valid)


@each_pairs
def test_pallatom_pairs_golden_matches_exactly(case):
  """More slots than needed add padding and nothing else."""
  tok_idx, window_size, index, valid = pairs_golden(case)
  n_nbr, last = index.shape[1], len(tok_idx) - 1

  @jax.jit
  def build(traced):
    return [
      # The number of slots found from concrete indices, given, and too large.
      sa.pallatom.build_sparse_pairs(tok_idx, window_size),
      sa.pallatom.build_sparse_pairs(traced, window_size, max_neighbours=n_nbr),
      sa.pallatom.build_sparse_pairs(
        traced, window_size, max_neighbours=n_nbr + 3
      ),
    ]

  for (got_index, got_valid), extra in zip(
    build(tok_idx), (0, 0, 3), strict=True
  ):
    pad = ((0, 0), (0, extra))
    want_index = np.pad(index, pad, constant_values=last)
    np.testing.assert_array_equal(got_index, want_index)
    np.testing.assert_array_equal(got_valid, np.pad(valid, pad))
    assert got_index.shape == got_valid.shape == want_index.shape
  assert sa.pallatom.required_neighbours(tok_idx, window_size) == n_nbr


@each_pairs
def test_pallatom_pairs_golden_oracle_matches_exactly(case):
  tok_idx, window_size, index, valid = pairs_golden(case)
  got = pallatom_reference.build_sparse_pairs(tok_idx, window_size)
  np.testing.assert_array_equal(got[0], index, strict=True)
  np.testing.assert_array_equal(got[1], valid, strict=True)


TRANSFORMER = 'pallatom_atom_transformers/transformer_uneven'
TRANSFORMER_AXES = (None, 0, 0, 0, None, 0)


def transformer_golden(dtype: str):
  """The batched function and its arguments."""
  golden = load(TRANSFORMER)
  config = sa.pallatom.AtomTransformerConfig(num_block=2, num_head=4)
  inputs = part(golden, 'inputs', dtype)
  params = haiku_params(part(golden, 'params', dtype), 'atom_transformer')
  order = ('q', 'c', 'p', 'neighbor_idx', 'valid_mask')
  fn = jax.vmap(
    sa.pallatom.transform_atom_transformer(config).apply, TRANSFORMER_AXES
  )
  return fn, (params, *(inputs[name] for name in order))


@each_dtype
def test_pallatom_transformer_golden_matches(dtype):
  fn, arguments = transformer_golden(dtype)
  bound = {'float32': 3e-6, 'float64': FLOAT64_BOUND}[dtype]
  got = run(fn, *arguments, dtype=dtype)
  assert error(got, load(TRANSFORMER)['outputs64/q']) < bound


@each_dtype
def test_pallatom_transformer_golden_gradients_match(dtype):
  golden = load(TRANSFORMER)
  fn, (params, q, c, p, *rest) = transformer_golden(dtype)
  cotangent = golden['cotangents/q'].astype(dtype)

  def loss(params, q, c, p):
    return jnp.sum(fn(params, q, c, p, *rest) * cotangent)

  gradients = run(
    jax.grad(loss, argnums=(0, 1, 2, 3)), params, q, c, p, dtype=dtype
  )
  got = systems.torch_names(gradients[0], 'atom_transformer')
  got |= dict(zip('qcp', gradients[1:], strict=True))
  want = part(golden, 'grads/params') | part(golden, 'grads/inputs')
  assert got.keys() == want.keys()
  zeros = [name for name in want if np.abs(want[name]).max() < 1e-4]
  assert zeros == ['blocks.0.norm_pair.bias', 'blocks.1.norm_pair.bias']
  for name in want:
    if name in zeros:
      # The softmax over neighbours does not see a shift of all its logits.
      bound = {'float32': 1e-4, 'float64': 1e-12}[dtype]
      assert np.abs(got[name]).max() < bound, name
    else:
      # The stored gradients are upstream's float32.
      assert error(got[name], want[name]) < 1e-5, name


def test_pallatom_transformer_golden_oracle_matches():
  golden = load(TRANSFORMER)
  inputs = part(golden, 'inputs')
  shared = inputs.pop('neighbor_idx')
  for item, want in enumerate(golden['outputs64/q']):
    got = pallatom_reference.atom_transformer(
      part(golden, 'params'),
      **{name: value[item] for name, value in inputs.items()},
      neighbor_idx=shared,
      num_block=2,
      num_head=4,
    )
    assert error(got, want) < FLOAT64_BOUND


# SEDD: torch modules of the published repository with the repairs that make
# them run. Its README: 5e-6 x max(1, largest value) in float32.

SEDD = 'sedd_protein_ligand/dual_components'
SEDD_CONFIG = sa.sedd.DualTrackConfig(
  hidden_size=24, num_head=3, num_block=1, cond_dim=16, protein_vocab=37
)
SEDD_SCOPES = {
  'sigma_map': 'sigma_map',
  'protein_embed': 'protein_embed',
  'block': 'blocks_prot.0',
  'cross_attn': 'blocks_prot.0.cross_attn',
}


def sedd_torch_params(module: str) -> dict[str, np.ndarray]:
  prefix = f'params/transformer.{SEDD_SCOPES[module]}.'
  return {
    name.removeprefix(prefix): value.astype(np.float64)
    for name, value in load(SEDD).items()
    if name.startswith(prefix)
  }


def sedd_run(module: str, make, *arguments: np.ndarray, dtype: str):
  """A module with the golden's parameters, vmapped over the batch."""
  params = haiku_params(sedd_torch_params(module), module)
  params, arguments = jax.tree.map(
    lambda x: x.astype(dtype) if x.dtype.kind == 'f' else x,
    (params, arguments),
  )
  apply = hk.without_apply_rng(hk.transform(lambda *xs: make()(*xs))).apply
  return run(
    apply,
    params,
    *arguments,
    dtype=dtype,
    vmap_axes=(None, *[0] * len(arguments)),
  )


def assert_sedd_close(got, name: str, dtype: str, transform=None) -> None:
  want = load(SEDD)[f'outputs64/{name}']
  if transform is not None:
    want = transform(want)
  scale = max(1, np.abs(want).max())
  assert got.shape == want.shape
  bound = {'float32': 5e-6, 'float64': FLOAT64_BOUND}[dtype]
  assert np.abs(got - want).max() / scale < bound


def silu(x):
  return x / (1 + np.exp(-x))


def sedd_inputs(dtype: str = 'float64') -> dict[str, np.ndarray]:
  return part(load(SEDD), 'inputs', dtype)


@each_dtype
def test_sedd_golden_timestep_matches(dtype):
  sigma = sedd_inputs(dtype)['sigma']
  got = run(embeddings.timestep_embedding, sigma, dtype=dtype, vmap_axes=0)
  assert_sedd_close(got, 'timestep/embedding', dtype)
  got = sedd_run(
    'sigma_map', lambda: sa.sedd.TimestepEmbedder(16), sigma, dtype=dtype
  )
  # Upstream applies the last SiLU outside of the module.
  assert_sedd_close(got, 'timestep/mlp', dtype, silu)


@each_dtype
def test_sedd_golden_token_embedding_matches(dtype):
  got = sedd_run(
    'protein_embed',
    lambda: sa.sedd.TokenEmbedding(37, 24, name='protein_embed'),
    sedd_inputs()['indices'],
    dtype=dtype,
  )
  assert_sedd_close(got, 'embed', dtype)


@each_dtype
def test_sedd_golden_rotary_matches(dtype):
  golden = load(SEDD)
  rotate = functools.partial(
    run, embeddings.rotate_half, dtype=dtype, vmap_axes=0
  )
  # In float32 upstream's own input is slightly another one.
  outputs = {'float32': 'outputs', 'float64': 'outputs64'}[dtype]
  qkv = golden[f'{outputs}/rotary/qkv_in']
  got = np.stack(
    [rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]], axis=2
  )
  assert_sedd_close(got, 'rotary/qkv_out', dtype)
  # Rotating (1, 0) shows the tables themselves.
  unit = np.zeros((1, 7, 1, 8), dtype)
  unit[..., :4] = 1
  tables = rotate(unit)
  for half, name in ((slice(4), 'cos'), (slice(4, 8), 'sin')):
    want = golden[f'outputs64/rotary/{name}'][..., :4]
    bound = {'float32': 1e-7, 'float64': 1e-15}[dtype]
    assert np.abs(tables[..., half] - want).max() < bound


@each_dtype
@pytest.mark.parametrize('masked', [False, True])
def test_sedd_golden_cross_attention_matches(masked, dtype):
  inputs = sedd_inputs(dtype)
  arguments = [inputs['x'], inputs['context']]
  arguments += [inputs['context_mask']] * masked
  got = sedd_run(
    'cross_attn',
    lambda: sa.sedd.CrossAttention(SEDD_CONFIG),
    *arguments,
    dtype=dtype,
  )
  # Upstream's module adds the residual itself.
  name = f'cross_attn/{"mask" if masked else "nomask"}'
  assert_sedd_close(inputs['x'] + got, name, dtype)


SEDD_BLOCKS = {
  'plain': (),
  'cross': ('context', 'context_mask'),
  'cross_selfmask': ('self_mask', 'context', 'context_mask'),
}
each_block = pytest.mark.parametrize('kind', SEDD_BLOCKS)


@each_dtype
@each_block
def test_sedd_golden_block_matches(kind, dtype):
  inputs = sedd_inputs(dtype)
  names = SEDD_BLOCKS[kind]

  def make():
    block = sa.sedd.DDiTBlock(SEDD_CONFIG, name='block')

    def call(x, condition, *rest):
      given = dict(zip(names, rest, strict=True))
      given = {name.replace('self_', ''): y for name, y in given.items()}
      return block(x, condition, **given)

    return call

  arguments = (inputs['x'], inputs['cond'], *(inputs[name] for name in names))
  got = sedd_run('block', make, *arguments, dtype=dtype)
  assert_sedd_close(got, f'block/{kind}', dtype)


def test_sedd_golden_oracle_timestep_and_embedding_match():
  inputs = sedd_inputs()
  for name, transform, fn in (
    ('timestep/embedding', None, sedd_reference.timestep_embedding),
    (
      'timestep/mlp',
      silu,
      functools.partial(
        sedd_reference.timestep_condition, sedd_torch_params('sigma_map')
      ),
    ),
  ):
    got = np.stack([fn(float(sigma)) for sigma in inputs['sigma']])
    assert_sedd_close(got, name, 'float64', transform)
  got = [
    sedd_reference.token_embedding(sedd_torch_params('protein_embed'), row)
    for row in inputs['indices']
  ]
  assert_sedd_close(np.stack(got), 'embed', 'float64')


def test_sedd_golden_oracle_attention_and_rotary_match():
  golden, inputs = load(SEDD), sedd_inputs()
  qkv = golden['outputs64/rotary/qkv_in'].copy()
  for item in qkv:
    item[:, :2] = np.stack(
      [sedd_reference.rotate(item[:, i]) for i in (0, 1)], 1
    )
  assert_sedd_close(qkv, 'rotary/qkv_out', 'float64')
  for name, masks in (
    ('nomask', [None, None]),
    ('mask', inputs['context_mask']),
  ):
    got = [
      sedd_reference.cross_attention(
        sedd_torch_params('cross_attn'), x, context, mask, num_head=3
      )
      for x, context, mask in zip(
        inputs['x'], inputs['context'], masks, strict=True
      )
    ]
    assert_sedd_close(np.stack(got), f'cross_attn/{name}', 'float64')


@each_block
def test_sedd_golden_oracle_block_matches(kind):
  inputs = sedd_inputs()
  got = [
    sedd_reference.ddit_block(
      sedd_torch_params('block'),
      inputs['x'][item],
      inputs['cond'][item],
      num_head=3,
      **{
        name.replace('self_', ''): inputs[name][item]
        for name in SEDD_BLOCKS[kind]
      },
    )
    for item in range(len(inputs['x']))
  ]
  assert_sedd_close(np.stack(got), f'block/{kind}', 'float64')


@pytest.mark.parametrize('module', SEDD_SCOPES)
def test_sedd_golden_parameters_round_trip_through_torch_names(module):
  want = sedd_torch_params(module)
  got = systems.torch_names(haiku_params(want, module), module)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])
