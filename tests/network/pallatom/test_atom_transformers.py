"""Pallatom's encoder and decoder: goldens, oracle, both implementations."""

import dataclasses
import functools
import json
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax.network.pallatom import neighbour_plan
from structattn_jax.reference import pallatom as reference
from structattn_jax.verification import systems, torch_names

GOLDENS = (
  pathlib.Path(__file__).parents[2] / 'goldens' / 'pallatom_atom_transformers'
)
# Compiles in half the time.
QUICK = {'xla_backend_optimization_level': 0}
WINDOW = 6
ENCODER, DECODER = 'atom_feature_encoder', 'atom_attention_decoder'

# 24 atoms of 8 tokens: uneven, token 4 without atoms.
TOKENS = np.repeat(
  np.array([0, 1, 2, 3, 5, 6, 7], np.int32), [2, 5, 3, 4, 6, 1, 3]
)
N_TOKEN = 8
ENCODER_CONFIG = sa.pallatom.AtomFeatureEncoderConfig(
  c_atom=8, c_pair=4, c_out=6, num_block=2, num_head=2, window_size=WINDOW
)
DECODER_CONFIG = sa.pallatom.AtomAttentionDecoderConfig(
  num_block=2, num_head=2, window_size=WINDOW
)

each_dtype = pytest.mark.parametrize('dtype', ['float32', 'float64'])
each_implementation = pytest.mark.parametrize('form', ['blocked', 'published'])


def encoder_inputs(n_atom=24, dtype='float32', seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.standard_normal(shape).astype(dtype)

  return {
    'ref_pos': normal(n_atom, 3),
    'ref_element': normal(n_atom, 2),
    'ref_space_uid': np.arange(n_atom, dtype=np.int32) // 13,
    's_input': normal(N_TOKEN, 10),
    'z_input': normal(N_TOKEN, N_TOKEN, 7),
    'r_scaled': normal(n_atom, 3),
  }


def decoder_inputs(n_atom=24, dtype='float32', seed=0):
  rng = np.random.default_rng(seed)
  n_nbr = sa.pallatom.required_neighbours(TOKENS, WINDOW)

  def normal(*shape):
    return rng.standard_normal(shape).astype(dtype)

  return {
    'q_skip': normal(n_atom, 8),
    'p_skip': normal(n_atom, n_nbr, 4),
    'c_skip': normal(n_atom, 8),
    'c': normal(n_atom, 8),
    's': normal(N_TOKEN, 10),
    'z': normal(N_TOKEN, N_TOKEN, 7),
  }


def apply_of(kind, **changes):
  if kind == 'encoder':
    config = dataclasses.replace(ENCODER_CONFIG, **changes)
    return sa.pallatom.transform_atom_feature_encoder(config)
  config = dataclasses.replace(DECODER_CONFIG, **changes)
  return sa.pallatom.transform_atom_attention_decoder(config)


INPUTS = {'encoder': encoder_inputs, 'decoder': decoder_inputs}
each_kind = pytest.mark.parametrize('kind', INPUTS)


@functools.cache
def params_of(kind):
  """Parameters without any zero or one left by an initialiser."""
  inputs = INPUTS[kind]()
  init = apply_of(kind).init
  made = jax.eval_shape(
    lambda: init(jax.random.key(0), **inputs, tok_idx=TOKENS)
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: (
      rng.standard_normal(x.shape) * (x.shape[0] ** -0.5)
      if len(x.shape) > 1
      else 1 + 0.3 * rng.standard_normal(x.shape)
    ).astype('float32'),
    made,
  )


def cast(tree, dtype):
  return jax.tree.map(
    lambda x: x.astype(dtype) if x.dtype.kind == 'f' else x, tree
  )


def dense_output(out, tok_idx=TOKENS):
  if not isinstance(out, sa.pallatom.PairSkip) and hasattr(out, 'p_skip'):
    pairs = sa.pallatom.build_sparse_pairs(tok_idx, WINDOW)
    if isinstance(out.p_skip, sa.pallatom.PairSkip):
      out = out._replace(p_skip=out.p_skip.dense(*pairs))
  return out


@functools.cache
def forward(kind, form, n_arguments=0):
  """Jitted; 'published' takes traced indices, 'blocked' a traced plan."""
  del n_arguments
  changes = {'implementation': form}
  if form == 'published' and kind == 'encoder':
    changes['max_neighbours'] = sa.pallatom.required_neighbours(TOKENS, WINDOW)
  apply = apply_of(kind, **changes).apply

  def fn(params, inputs, tok_idx, extra):
    out = apply(params, **inputs, tok_idx=tok_idx, **extra)
    return dense_output(out)

  return jax.jit(fn, compiler_options=QUICK)


def run(kind, form, inputs, tok_idx=TOKENS, params=None, **extra):
  if form == 'blocked' and 'plan' not in extra:
    shared = tok_idx[0] if tok_idx.ndim == 2 else tok_idx
    extra['plan'] = sa.pallatom.plan_neighbours(shared, WINDOW)
  params = params_of(kind) if params is None else params
  return forward(kind, form)(params, inputs, tok_idx, extra)


def oracle(kind, inputs, tok_idx=TOKENS, atom_mask=None, window_size=WINDOW):
  scope = ENCODER if kind == 'encoder' else DECODER
  fn = getattr(reference, scope)
  return fn(
    systems.torch_names(params_of(kind), scope),
    **cast(inputs, 'float64'),
    tok_idx=tok_idx,
    atom_mask=atom_mask,
    num_block=2,
    num_head=2,
    window_size=window_size,
  )


def assert_close(got, want, bound):
  got, want = jax.tree.leaves(tuple(got)), jax.tree.leaves(tuple(want))
  for g, w in zip(got, want, strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    assert g.shape == w.shape
    assert np.abs(g - w).max() <= bound * max(np.abs(w).max(), 1)


# Goldens. `tests/test_verify.py` replays all files in float32.


def golden_values(name, dtype):
  with np.load(GOLDENS / f'{name}.npz', allow_pickle=False) as file:
    arrays = dict(file)
  parts = {}
  for key, value in arrays.items():
    part, _, rest = key.partition('/')
    if value.dtype.kind == 'f':
      value = value.astype(dtype if part in ('inputs', 'params') else 'float64')
    parts.setdefault(part, {})[rest] = value
  return json.loads(arrays['meta'].item())['config'], parts


@pytest.mark.parametrize(
  'form', ['blocked', pytest.param('published', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  'name', ['encoder_small', 'encoder_uneven_absolute', 'decoder_uneven']
)
def test_golden_float64_matches(name, form):
  config, parts = golden_values(name, 'float64')
  shared = {
    'num_block': config['n_blocks'],
    'num_head': config['n_heads'],
    'window_size': config['window_size'],
    'implementation': form,
  }
  if name.startswith('encoder'):
    sizes = {'c_atom': config['m'], 'c_pair': config['d'], 'c_out': config['c']}
    transformed = sa.pallatom.transform_atom_feature_encoder(
      sa.pallatom.AtomFeatureEncoderConfig(**sizes, **shared)
    )
    scope = ENCODER
  else:
    transformed = sa.pallatom.transform_atom_attention_decoder(
      sa.pallatom.AtomAttentionDecoderConfig(**shared)
    )
    scope = DECODER
  inputs = parts['inputs']
  tok_idx = inputs.pop('tok_idx')
  pairs = sa.pallatom.build_sparse_pairs(tok_idx[0], config['window_size'])

  @functools.partial(jax.jit, compiler_options=QUICK)
  def fn(params, inputs):
    out = transformed.apply(params, **inputs, tok_idx=tok_idx)._asdict()
    if isinstance(out.get('p_skip'), sa.pallatom.PairSkip):
      out['p_skip'] = out['p_skip'].dense(*pairs)
    return out

  with jax.enable_x64(True):
    out = fn(torch_names.haiku_params(parts['params'], scope), inputs)
  assert out.keys() == parts['outputs64'].keys()
  for key, want in parts['outputs64'].items():
    assert out[key].dtype == np.float64
    assert np.abs(out[key] - want).max() < 1e-9 * np.abs(want).max(), key


@pytest.mark.parametrize(
  'name', ['encoder_small', 'encoder_uneven_absolute', 'decoder_uneven']
)
def test_golden_oracle_matches(name):
  config, parts = golden_values(name, 'float64')
  fn = getattr(reference, ENCODER if name.startswith('enc') else DECODER)
  for item in range(config['B']):
    inputs = {key: value[item] for key, value in parts['inputs'].items()}
    out = fn(
      parts['params'],
      **inputs,
      num_block=config['n_blocks'],
      num_head=config['n_heads'],
      window_size=config['window_size'],
    )
    for got, want in zip(out, parts['outputs64'].values(), strict=True):
      assert np.abs(got - want[item]).max() < 1e-11 * np.abs(want).max()


# Both implementations against the oracle and each other.


@each_dtype
@each_implementation
@each_kind
def test_values_match_oracle(kind, form, dtype):
  inputs = INPUTS[kind](dtype=dtype)
  with jax.enable_x64(dtype == 'float64'):
    got = run(kind, form, inputs, params=cast(params_of(kind), dtype))
    assert {str(x.dtype) for x in got} == {dtype}
  want = oracle(kind, inputs)
  assert_close(got, want, {'float32': 5e-6, 'float64': 1e-12}[dtype])


@functools.cache
def gradients(kind, form):
  """Of a generic scalar, in float64, to parameters and float inputs."""
  inputs = INPUTS[kind](dtype='float64')
  floats = {k: v for k, v in inputs.items() if v.dtype.kind == 'f'}
  rng = np.random.default_rng(2)
  weights = [rng.standard_normal(x.shape) for x in oracle(kind, inputs)]
  apply = apply_of(kind, implementation=form).apply

  def loss(params, floats):
    out = dense_output(apply(params, **inputs | floats, tok_idx=TOKENS))
    return sum(jnp.sum(w * y) for w, y in zip(weights, out, strict=True))

  with jax.enable_x64(True):
    fn = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)
    return jax.tree.map(
      np.asarray, fn(cast(params_of(kind), 'float64'), floats)
    )


@each_kind
def test_gradients_of_blocked_equal_those_of_published(kind):
  blocked, published = gradients(kind, 'blocked'), gradients(kind, 'published')
  assert jax.tree.structure(blocked) == jax.tree.structure(published)
  for g, w in zip(
    jax.tree.leaves(blocked), jax.tree.leaves(published), strict=True
  ):
    assert np.abs(g - w).max() <= 1e-10 * max(np.abs(w).max(), 1)
  # Adds the same to all logits of a row.
  for path, values in blocked[0].items():
    if path.endswith('norm_pair'):
      assert not values['offset'].any()
      assert values['scale'].any()


@each_kind
def test_float64_gradient_matches_differences_of_the_oracle(kind):
  inputs = INPUTS[kind](dtype='float64')
  own = gradients(kind, 'blocked')[1]
  rng = np.random.default_rng(2)
  weights = [rng.standard_normal(x.shape) for x in oracle(kind, inputs)]
  for name, gradient in own.items():
    direction = rng.standard_normal(gradient.shape)

    def at(step, name=name, direction=direction):
      out = oracle(kind, inputs | {name: inputs[name] + step * direction})
      return sum(np.sum(w * y) for w, y in zip(weights, out, strict=True))

    h = 2e-5
    slope = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-6), name


@each_kind
def test_implementations_have_the_same_parameters(kind):
  trees = [
    jax.eval_shape(
      lambda form=form: apply_of(kind, implementation=form).init(
        jax.random.key(0), **INPUTS[kind](), tok_idx=TOKENS
      )
    )
    for form in ('blocked', 'published')
  ]
  assert trees[0] == trees[1]


def test_parameter_counts_and_names_are_upstreams():
  """Main trunk defaults: 473,360 and 662,944 parameters."""
  n_token, n_atom = 4, 20
  shapes = {
    'ref_pos': jnp.zeros((n_atom, 3)),
    'ref_element': jnp.zeros((n_atom, 4)),
    'ref_space_uid': jnp.zeros(n_atom, int),
    's_input': jnp.zeros((n_token, 256)),
    'z_input': jnp.zeros((n_token, n_token, 128)),
    'r_scaled': jnp.zeros((n_atom, 3)),
  }
  tok_idx = np.repeat(np.arange(n_token), 5)
  encoder = sa.pallatom.transform_atom_feature_encoder()
  made = jax.eval_shape(
    lambda: encoder.init(jax.random.key(0), **shapes, tok_idx=tok_idx)
  )
  assert sum(x.size for x in jax.tree.leaves(made)) == 473_360
  assert 'atom_feature_encoder/mlp_p_6' in made
  assert 'atom_feature_encoder/transformer/blocks_1/norm_pair' in made
  decoder = sa.pallatom.transform_atom_attention_decoder()
  made = jax.eval_shape(
    lambda: decoder.init(
      jax.random.key(0),
      q_skip=jnp.zeros((n_atom, 128)),
      p_skip=jnp.zeros((n_atom, n_atom, 16)),
      c_skip=jnp.zeros((n_atom, 128)),
      c=jnp.zeros((n_atom, 128)),
      s=shapes['s_input'],
      z=shapes['z_input'],
      tok_idx=tok_idx,
    )
  )
  assert sum(x.size for x in jax.tree.leaves(made)) == 662_944
  assert 'atom_attention_decoder/transformer/blocks_2/to_out' in made


@each_implementation
def test_decoder_takes_the_separable_p_skip(form):
  """The same numbers from the factors as from their dense form."""
  skip = (
    apply_of('encoder')
    .apply(params_of('encoder'), **encoder_inputs(), tok_idx=TOKENS)
    .p_skip
  )
  inputs = decoder_inputs()
  inputs['p_skip'] = skip.dense(*sa.pallatom.build_sparse_pairs(TOKENS, WINDOW))
  want = oracle('decoder', jax.tree.map(np.asarray, inputs))
  inputs['p_skip'] = skip
  apply = apply_of('decoder', implementation=form).apply

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(inputs):
    return [
      apply(
        params_of('decoder'), **inputs, tok_idx=TOKENS, return_pair=return_pair
      )
      for return_pair in (True, None)
    ]

  with_pair, without = both(inputs)
  assert_close(with_pair, want, 5e-6)
  assert without.p is None
  assert_close([without.q, without.r_update], [want[0], want[2]], 5e-6)


@each_implementation
@each_kind
def test_batch_equals_items_with_the_indices_of_the_first(kind, form):
  items = [INPUTS[kind](seed=seed) for seed in (3, 4)]
  batch = jax.tree.map(lambda *x: np.stack(x), *items)
  other = np.sort((TOKENS + 2) % N_TOKEN)
  tok_idx = np.stack([TOKENS, other])
  got = run(kind, form, batch, tok_idx)
  for i, item in enumerate(items):
    want = list(oracle(kind, item))
    if kind == 'encoder':  # Step 17 alone reads the second row.
      assert got.s_i.shape == (2, N_TOKEN, 6)
      pooled = np.maximum(
        np.asarray(want[1]) @ params_of(kind)[f'{ENCODER}/proj_agg']['weights'],
        0,
      )
      for token in range(N_TOKEN):
        own = tok_idx[i] == token
        want[0][token] = pooled[own].sum(0) / max(own.sum(), 1)
    assert_close([x[i] for x in got], want, 5e-6)


@each_kind
def test_unsorted_tokens_are_right_without_asking(kind):
  order = np.random.default_rng(5).permutation(24)
  inputs = INPUTS[kind]()
  # The oracle sorts neighbours by atom, as upstream does.
  tok_idx = TOKENS[order]
  out = apply_of(kind).apply(params_of(kind), **inputs, tok_idx=tok_idx)
  assert_close(out, oracle(kind, inputs, tok_idx), 5e-6)


@pytest.mark.parametrize('query_block', [1, 4, 64])
def test_query_blocks_give_the_same_numbers(query_block):
  inputs = decoder_inputs()
  plan = sa.pallatom.plan_neighbours(TOKENS, WINDOW, query_block=query_block)
  assert plan.sizes.n_query == min(query_block, 24)
  got = run('decoder', 'blocked', inputs, plan=plan)
  assert_close(got, oracle('decoder', inputs), 5e-6)


def test_proteins_padded_to_the_same_sizes_share_one_compilation():
  others = [np.arange(24) // 3, np.sort(np.arange(24) % N_TOKEN) // 2 * 2]
  tokens = [TOKENS, *others]
  first, *rest = [sa.pallatom.plan_neighbours(t, WINDOW).sizes for t in tokens]
  sizes = first.union(*rest)
  assert sizes != first
  n_nbr = sizes.n_nbr
  inputs = decoder_inputs()
  inputs['p_skip'] = (
    np.random.default_rng(0).standard_normal((24, n_nbr, 4)).astype('float32')
  )
  traces = []
  apply = apply_of('decoder').apply

  @functools.partial(jax.jit, compiler_options=QUICK)
  def fn(params, tok_idx, plan):
    traces.append(1)
    return apply(params, **inputs, tok_idx=tok_idx, plan=plan)

  plans = [sa.pallatom.plan_neighbours(t, WINDOW, sizes=sizes) for t in tokens]
  for tok_idx, plan in zip(tokens, plans, strict=True):
    got = fn(params_of('decoder'), tok_idx, plan)
    needed = sa.pallatom.required_neighbours(tok_idx, WINDOW)
    cut = inputs | {'p_skip': inputs['p_skip'][:, :needed]}
    want = oracle('decoder', cut, tok_idx)
    assert not np.any(got.p[:, needed:])
    assert_close(got._replace(p=got.p[:, :needed]), want, 5e-6)
  assert len(traces) == 1
  # Plans are data: a batch of proteins, each with its own.
  stacked = jax.tree.map(lambda *x: np.stack(x), *plans)
  mapped = jax.vmap(fn, (None, 0, 0))(
    params_of('decoder'), np.stack(tokens), stacked
  )
  want = fn(params_of('decoder'), tokens[1], plans[1])
  assert_close([x[1] for x in mapped], want, 5e-6)


# Masks.


@each_implementation
@each_kind
def test_masked_atoms_reach_nothing(kind, form):
  mask = np.arange(24) % 5 != 2
  inputs = INPUTS[kind]()
  got = run(kind, form, inputs, atom_mask=mask)
  want = oracle(kind, inputs, atom_mask=mask)
  if kind == 'encoder':
    names = ('ref_pos', 'ref_element', 'r_scaled')
  else:
    names = ('q_skip', 'c', 'p_skip')
  assert_close(got, want, 5e-6)
  garbage = dict(inputs)
  for name in names:
    garbage[name] = inputs[name].copy()
    garbage[name][~mask] = 1e4
  again = run(kind, form, garbage, atom_mask=mask)
  for x, y in zip(got, again, strict=True):
    if len(x) == 24:
      x, y = x[mask], y[mask]
    np.testing.assert_array_equal(x, y)


@each_kind
def test_padding_atoms_change_no_real_atom(kind):
  inputs = INPUTS[kind]()
  want = oracle(kind, inputs)
  padded = {}
  for name, value in inputs.items():
    if len(value) == 24:
      value = np.concatenate([value, 100 + value[:6]])
    padded[name] = value
  tok_idx = np.append(TOKENS, [7] * 6)
  n_nbr = sa.pallatom.required_neighbours(tok_idx, WINDOW)
  if kind == 'decoder':
    extra = n_nbr - padded['p_skip'].shape[1]
    padded['p_skip'] = np.pad(padded['p_skip'], ((0, 0), (0, extra), (0, 0)))
  out = apply_of(kind).apply(
    params_of(kind), **padded, tok_idx=tok_idx, atom_mask=np.arange(30) < 24
  )
  for name, got, expected in zip(out._fields, out, want, strict=True):
    if name == 'p_skip':
      got = got.dense(*sa.pallatom.build_sparse_pairs(tok_idx, WINDOW))
    if name in ('p', 'p_skip'):
      got = got[:, : expected.shape[1]]
    got = got if name == 's_i' else got[:24]
    assert_close([got], [expected], 5e-6)


@each_implementation
@each_kind
def test_all_masked_gives_zeros_and_finite_gradients(kind, form):
  inputs = INPUTS[kind]()
  mask = np.zeros(24, bool)
  apply = apply_of(kind, implementation=form).apply

  @functools.partial(jax.jit, compiler_options=QUICK)
  def fn(params):
    def loss(params):
      out = apply(params, **inputs, tok_idx=TOKENS, atom_mask=mask)
      out = dense_output(out)
      return sum(jnp.sum(jnp.sin(x)) for x in out), out

    return jax.grad(loss, has_aux=True)(params)

  gradient, out = fn(params_of(kind))
  assert not np.any(out[0 if kind == 'decoder' else 1])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradient, out)))


@each_implementation
@each_kind
@pytest.mark.parametrize('window_size', [0, 2, 100])
def test_extreme_windows_match_oracle(window_size, kind, form):
  """No neighbours at all, the own token only, everything."""
  inputs = INPUTS[kind]()
  if kind == 'decoder':
    n_nbr = sa.pallatom.required_neighbours(TOKENS, window_size)
    inputs['p_skip'] = np.ones((24, n_nbr, 4), np.float32)
  apply = apply_of(kind, window_size=window_size, implementation=form).apply

  @functools.partial(jax.jit, compiler_options=QUICK)
  def fn(params):
    out = apply(params, **inputs, tok_idx=TOKENS)._asdict()
    if isinstance(out.get('p_skip'), sa.pallatom.PairSkip):
      pairs = sa.pallatom.build_sparse_pairs(TOKENS, window_size)
      out['p_skip'] = out['p_skip'].dense(*pairs)
    return list(out.values())

  want = oracle(kind, inputs, window_size=window_size)
  for got, expected in zip(fn(params_of(kind)), want, strict=True):
    assert got.shape == expected.shape
    if got.size:
      assert_close([got], [expected], 5e-6)


def test_noise_of_other_atoms_reaches_an_atom_only_through_the_mean():
  """As published: no attention to queries."""
  inputs = encoder_inputs()
  moved = inputs | {'r_scaled': inputs['r_scaled'].copy()}
  moved['r_scaled'][3] += 1
  first, second = (run('encoder', 'blocked', x) for x in (inputs, moved))
  changed = np.any(first.q_skip != second.q_skip, -1)
  assert np.flatnonzero(changed).tolist() == [3]
  assert np.flatnonzero(np.any(first.s_i != second.s_i, -1)).tolist() == [1]


# Transformations, memory and dtypes.


def test_scan_and_remat_of_a_chain_equal_calls():
  features = run('encoder', 'published', encoder_inputs())
  base = decoder_inputs() | {'p_skip': features.p_skip}
  base = {name: x for name, x in base.items() if name != 'c'}

  def step(c):
    return sa.pallatom.AtomAttentionDecoder(DECODER_CONFIG)(
      **base, c=c, tok_idx=TOKENS
    ).c_out

  plain = hk.without_apply_rng(hk.transform(step)).apply
  remat = hk.without_apply_rng(hk.transform(lambda c: hk.remat(step)(c))).apply
  params = params_of('decoder')

  def scanned(apply, c):
    return jax.lax.scan(lambda c, _: (apply(params, c), None), c, length=2)[0]

  @functools.partial(jax.jit, compiler_options=QUICK)
  def all_forms(c):
    direct = plain(params, plain(params, c))
    gradient = [
      jax.grad(lambda c, f=f: jnp.sum(jnp.sin(scanned(f, c))))(c)
      for f in (plain, remat)
    ]
    return direct, scanned(remat, c), gradient

  direct, through_scan, gradient = all_forms(features.c_l)
  assert_close([through_scan], [direct], 1e-6)
  assert_close([gradient[0]], [gradient[1]], 1e-6)


def largest_array(jaxpr) -> int:
  sizes = [
    np.prod(v.aval.shape, dtype=int)
    for eqn in jaxpr.eqns
    for v in eqn.outvars
    if hasattr(v.aval, 'shape')
  ]
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(
      eqn.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        sizes.append(largest_array(inner))
  return max(sizes, default=0)


def test_no_array_over_atoms_and_neighbours_exists():
  """Neither forward nor backward, by the sizes in the traced program."""
  tok_idx = np.repeat(np.arange(100), 7)
  n_atom, n_token = 700, 100
  inputs = {
    'ref_pos': jnp.zeros((n_atom, 3)),
    'ref_element': jnp.zeros((n_atom, 2)),
    'ref_space_uid': jnp.zeros(n_atom, int),
    's_input': jnp.zeros((n_token, 10)),
    'z_input': jnp.zeros((n_token, n_token, 2)),
    'r_scaled': jnp.zeros((n_atom, 3)),
  }
  floats = {k: v for k, v in inputs.items() if k != 'ref_space_uid'}

  def largest(form):
    config = sa.pallatom.AtomFeatureEncoderConfig(
      c_atom=8, c_pair=4, c_out=6, num_head=2, implementation=form
    )
    transformed = sa.pallatom.transform_atom_feature_encoder(config)
    params = jax.eval_shape(
      lambda: transformed.init(jax.random.key(0), **inputs, tok_idx=tok_idx)
    )

    def loss(params, floats):
      out = transformed.apply(params, **inputs | floats, tok_idx=tok_idx)
      return jnp.sum(out.s_i) + jnp.sum(out.q_skip)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, floats)
    return largest_array(jaxpr.jaxpr)

  per_pair = n_atom * sa.pallatom.required_neighbours(tok_idx)
  assert largest('published') >= 4 * per_pair
  assert largest('blocked') < per_pair / 4


@each_kind
def test_bfloat16_activations_stay_close(kind):
  inputs = INPUTS[kind]()
  low = {
    name: jnp.asarray(x, jnp.bfloat16)
    if x.dtype == np.float32 and name not in ('ref_pos', 'r_scaled')
    else x
    for name, x in inputs.items()
  }
  out = run(kind, 'blocked', low)
  for name, got, want in zip(
    out._fields, out, oracle(kind, inputs), strict=True
  ):
    wide = name in ('p', 'p_skip', 'r_update')
    assert got.dtype == (np.float32 if wide else jnp.bfloat16), name
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error < 8e-2 * np.abs(want).max(), name


# Errors.


def test_traced_indices_without_a_plan_name_what_is_missing():
  inputs = encoder_inputs()

  def trace(**changes):
    apply = apply_of('encoder', **changes).apply
    jax.eval_shape(
      lambda tok_idx: apply(params_of('encoder'), **inputs, tok_idx=tok_idx),
      TOKENS,
    )

  with pytest.raises(ValueError, match=r'plan: needed where.*max_neighbours'):
    trace()
  with pytest.raises(
    ValueError, match="plan: needed by implementation='blocked'"
  ):
    trace(implementation='blocked')
  trace(max_neighbours=24)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tok_idx': TOKENS + 1}, r'tok_idx: expected ids in \[0, 8\), got 8'),
    ({'r_scaled': np.zeros((23, 3), 'f4')}, 'r_scaled: expected shape'),
    ({'s_input': np.zeros((7, 10), 'f4')}, 'z_input: expected shape'),
    (
      {
        's_input': np.zeros((25, 10), 'f4'),
        'z_input': np.zeros((25, 25, 7), 'f4'),
      },
      'ref_pos: atoms are grouped',
    ),
    (
      {'plan': sa.pallatom.plan_neighbours(TOKENS[1:], WINDOW)},
      'plan: made for 23',
    ),
  ],
)
def test_wrong_encoder_input_raises_and_names_it(change, message):
  inputs = encoder_inputs() | {'tok_idx': TOKENS} | change
  with pytest.raises(ValueError, match=message):
    apply_of('encoder').apply(params_of('encoder'), **inputs)


def test_wrong_decoder_input_raises_and_names_it():
  apply = apply_of('decoder').apply
  inputs = decoder_inputs()
  short = inputs | {'p_skip': inputs['p_skip'][:, 1:]}
  with pytest.raises(ValueError, match=r'p_skip: the plan needs n_nbr=1\d'):
    apply(params_of('decoder'), **short, tok_idx=TOKENS)
  published = apply_of('decoder', implementation='published').apply
  with pytest.raises(ValueError, match=r'give max_neighbours=1\d'):
    published(params_of('decoder'), **short, tok_idx=TOKENS)
  plan = sa.pallatom.plan_neighbours(TOKENS, WINDOW)
  with pytest.raises(ValueError, match='plan: expected none with'):
    published(params_of('decoder'), **inputs, tok_idx=TOKENS, plan=plan)
  with pytest.raises(TypeError, match='c: expected floating'):
    apply(
      params_of('decoder'),
      **inputs | {'c': TOKENS[:, None] + np.zeros(8, int)},
      tok_idx=TOKENS,
    )
  with pytest.raises(
    ValueError, match='c_atom=8 must be divisible by num_head=3'
  ):
    apply_of('decoder', num_head=3).init(
      jax.random.key(0), **inputs, tok_idx=TOKENS
    )


def test_plan_rejects_what_it_cannot_serve():
  with pytest.raises(ValueError, match='tok_idx: promised sorted, but 7'):
    sa.pallatom.plan_neighbours(TOKENS[::-1], WINDOW)
  with pytest.raises(ValueError, match='tok_idx: plan_neighbours runs on the'):
    jax.jit(lambda t: sa.pallatom.plan_neighbours(t).row)(TOKENS)
  sizes = sa.pallatom.plan_neighbours(TOKENS, WINDOW).sizes
  with pytest.raises(ValueError, match=rf'give n_key={sizes.n_key} or more'):
    sa.pallatom.plan_neighbours(TOKENS, WINDOW, sizes=sizes._replace(n_key=3))
  with pytest.raises(ValueError, match='must not exceed n_atom=24'):
    sa.pallatom.plan_neighbours(TOKENS, WINDOW, sizes=sizes._replace(n_key=25))
  with pytest.raises(ValueError, match='query_block: expected at least 1'):
    sa.pallatom.plan_neighbours(TOKENS, WINDOW, query_block=0)


@pytest.mark.parametrize('seed', range(4))
def test_plan_covers_every_pair_once(seed):
  """Windows and masks of a random plan against the definition."""
  rng = np.random.default_rng(seed)
  tok_idx = np.sort(rng.integers(0, 40, 30) * rng.integers(1, 3))
  window = int(rng.integers(0, 12))
  plan = sa.pallatom.plan_neighbours(
    tok_idx, window, query_block=int(rng.integers(1, 9))
  )
  near = np.abs(tok_idx[:, None] - tok_idx) < window // 2
  for atom, row in enumerate(plan.row):
    block, i = divmod(int(row), plan.sizes.n_query)
    assert plan.atom_start[block] + i == atom
    slots = np.arange(plan.low[block, i], plan.high[block, i])
    keys = plan.key_start[block] + slots
    np.testing.assert_array_equal(keys, np.flatnonzero(near[atom]))
    own = plan.query_token_start[block] + plan.query_token[block, i]
    assert own == tok_idx[atom]
    others = plan.key_token_start[block] + plan.key_token[block, slots]
    np.testing.assert_array_equal(others, tok_idx[keys])
  assert isinstance(plan, neighbour_plan.NeighbourPlan)


def test_build_sparse_pairs_on_the_host_is_upstreams():
  index, valid = sa.pallatom.build_sparse_pairs(np.array([5, 0, 5, 9]), 8)
  assert isinstance(index, np.ndarray)
  assert index.dtype == np.int64
  assert valid.dtype == bool
  np.testing.assert_array_equal(index, [[0, 2], [1, 3], [0, 2], [3, 3]])
  np.testing.assert_array_equal(valid, [[1, 1], [1, 0], [1, 1], [1, 0]])


def test_build_sparse_pairs_too_small_raises_the_number_under_jit():
  build = jax.jit(
    lambda t: sa.pallatom.build_sparse_pairs(t, WINDOW, max_neighbours=5)
  )
  needed = sa.pallatom.required_neighbours(TOKENS, WINDOW)
  with pytest.raises(
    jax.errors.JaxRuntimeError, match=f'give max_neighbours={needed}'
  ):
    jax.block_until_ready(build(TOKENS))
  fits = np.arange(24)
  index, valid = build(fits)
  want = sa.pallatom.build_sparse_pairs(fits, WINDOW)
  np.testing.assert_array_equal(index, want[0])
  np.testing.assert_array_equal(valid, want[1])
