"""What only invariant point attention promises."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry

import structattn_jax as sa
from structattn_jax import data, testing
from structattn_jax.common import numerics

CASE = registry.CASES['af2_ipa']


def of_frames(inputs, params=CASE.params):
  rest = {k: v for k, v in inputs.items() if k not in FRAMES}

  @jax.jit
  def apply(rotation, translation):
    return CASE.apply(
      params, {**rest, 'rotation': rotation, 'translation': translation}
    )

  return apply


FRAMES = ('rotation', 'translation')


@pytest.mark.parametrize(('shift', 'bound'), [(100, 1e-5), (10_000, 1e-3)])
def test_moving_all_frames_changes_nothing(shift, bound):
  testing.assert_se3_invariant(
    of_frames(CASE.inputs),
    *(CASE.inputs[name] for name in FRAMES),
    key=jax.random.key(0),
    shift=shift,
    tolerance=bound,
    num_samples=5,
  )


def test_a_frame_that_stays_behind_is_noticed():
  """Negative control of the test above."""
  apply = of_frames(CASE.inputs)
  rotation, translation = (CASE.inputs[name] for name in FRAMES)
  with pytest.raises(AssertionError, match='assert_se3_invariant'):
    testing.assert_se3_invariant(
      lambda r, t: apply(r, jnp.asarray(t).at[0].set(translation[0])),
      rotation,
      translation,
      key=jax.random.key(0),
    )


@pytest.fixture(scope='module')
def complex_1s3v():
  structure_path, ligand = data.example('1s3v')
  return data.featurise(data.load_structure(structure_path, ligand=ligand))


@pytest.mark.parametrize(('shift', 'bound'), [(100, 1e-5), (10_000, 1e-3)])
def test_moving_a_real_protein_changes_nothing(complex_1s3v, shift, bound):
  protein = data.protein_only(complex_1s3v)
  n_res = len(protein.mask)
  rng = np.random.default_rng(0)
  single = rng.standard_normal((n_res, 32), np.float32)
  pair = rng.standard_normal((n_res, n_res, 16), np.float32)
  frames = (protein.rotation, protein.translation)
  init, apply = sa.alphafold2.transform_ipa(
    sa.alphafold2.InvariantPointAttentionConfig.seed(num_head=4)
  )
  params = init(jax.random.key(0), single, pair, *frames)
  testing.assert_se3_invariant(
    jax.jit(lambda r, t: apply(params, single, pair, r, t)),
    *frames,
    key=jax.random.key(1),
    shift=shift,
    tolerance=bound,
  )


def test_accuracy_does_not_depend_on_the_distance_from_the_origin():
  """Translations are exact in float32 here, so only the algorithm can err."""
  inputs = dict(CASE.inputs)
  grid = np.round(inputs['translation'] * 4) / 4
  for offset in (0.0, 1024.0, 65536.0):
    inputs['translation'] = (grid + offset).astype(np.float32)
    got = CASE.jitted(CASE.params, inputs)
    want = CASE.system.oracle(CASE.params, inputs)
    assert np.abs(got - want).max() / np.abs(want).max() < 5e-6


@pytest.mark.parametrize('parameterisation', ['monomer', 'multimer', 'seed'])
def test_error_at_10000_angstrom_is_at_most_twice_that_at_the_origin(
  parameterisation,
):
  """Against float64 on the same, rounded translations."""
  config = sa.alphafold2.InvariantPointAttentionConfig(
    parameterisation=parameterisation, zero_init=False
  )
  init, apply = sa.alphafold2.transform_ipa(config)
  rng = np.random.default_rng(0)
  n_res = 64
  rotation, _ = np.linalg.qr(rng.standard_normal((n_res, 3, 3)))
  rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
  inputs = [
    rng.standard_normal((n_res, 32)),
    rng.standard_normal((n_res, n_res, 16)),
    rotation,
    16 * rng.standard_normal((n_res, 3)),
  ]
  inputs = [x.astype(np.float32) for x in inputs]
  params = jax.jit(init)(jax.random.key(0), *inputs)
  jitted = jax.jit(apply)

  def error(offset):
    moved = [*inputs[:3], inputs[3] + np.float32(offset)]
    got = jitted(params, *moved)
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, moved))
      want = jitted(wide[0], *wide[1])
    return np.abs(np.asarray(got) - np.asarray(want)).max()

  assert error(10_000) <= 2 * error(0)


def test_poses_by_vmap_over_frames_equal_single_calls():
  rotation, translation = (CASE.inputs[name] for name in FRAMES)
  factors = np.array([0.5, 1.0, 2.0], np.float32)
  translations = translation * factors[:, None, None]
  apply = of_frames(CASE.inputs)
  got = jax.vmap(apply, in_axes=(None, 0))(rotation, translations)
  want = np.stack([apply(rotation, t) for t in translations])
  np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
  assert np.abs(want[0] - want[1]).max() > 1e-3


def test_vmap_over_frames_projects_single_and_pair_once():
  """No product of the jaxpr with weights grows with the number of poses."""
  rotation, translation = (CASE.inputs[name] for name in FRAMES)
  poses = np.broadcast_to(translation, (7, *translation.shape))
  jaxpr = jax.make_jaxpr(jax.vmap(of_frames(CASE.inputs), in_axes=(None, 0)))(
    rotation, poses
  )
  c_s = CASE.inputs['single'].shape[-1]
  projections = [
    equation
    for equation in equations(jaxpr.jaxpr)
    if equation.primitive.name == 'dot_general'
    and any(v.aval.shape[:1] == (c_s,) for v in equation.invars)
  ]
  assert len(projections) >= 5
  # The output projection depends on the pose; the five of `single` do not.
  batched = [e for e in projections if 7 in e.outvars[0].aval.shape]
  assert not batched


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


def test_unit_head_weights_equal_freshly_learned_ones():
  sizes = {'num_head': 3, 'num_point_qk': 2, 'num_point_v': 3}
  unit = sa.alphafold2.InvariantPointAttentionConfig.seed(**sizes)
  learned = dataclasses.replace(unit, head_weights='learned')
  inputs = dict(CASE.inputs)
  params = sa.alphafold2.transform_ipa(learned).init(
    jax.random.key(0), **inputs
  )
  got = sa.alphafold2.transform_ipa(learned).apply(params, **inputs)
  scope = 'invariant_point_attention'
  weights = params[scope].pop('trainable_point_weights')
  np.testing.assert_allclose(weights, np.log(np.e - 1), rtol=1e-6)
  del params[scope]
  want = sa.alphafold2.transform_ipa(unit).apply(params, **inputs)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_attention_rows_sum_to_one_over_real_keys():
  inputs = dict(CASE.inputs)
  output = CASE.system.transformed.apply(
    CASE.params, **inputs, return_attention=True
  )
  mask = inputs['mask']
  np.testing.assert_array_equal(output.attention[:, :, ~mask], 0)
  np.testing.assert_array_equal(output.attention[:, ~mask], 0)
  np.testing.assert_allclose(output.attention.sum(-1)[:, mask], 1, rtol=1e-6)
  want = CASE.apply(CASE.params, inputs)
  np.testing.assert_allclose(output.single, want, atol=1e-5)


def test_no_array_holds_all_point_distances():
  """The published form makes [n_head, n_res, n_res, n_point] differences."""
  n_res, n_head, p_qk, p_v = 256, 2, 4, 8
  config = sa.alphafold2.InvariantPointAttentionConfig.seed(
    num_head=n_head, num_point_qk=p_qk, num_point_v=p_v, num_scalar_v=2
  )
  transformed = sa.alphafold2.transform_ipa(config)
  inputs = (
    jnp.zeros((n_res, 8)),
    None,
    jnp.zeros((n_res, 3, 3)),
    jnp.zeros((n_res, 3)),
  )
  params = jax.eval_shape(transformed.init, jax.random.key(0), *inputs)

  def loss(params, *inputs):
    return jnp.sum(transformed.apply(params, *inputs) ** 2)

  jaxpr = jax.make_jaxpr(jax.grad(loss))(params, *inputs)
  largest = max(
    int(np.prod(v.aval.shape))
    for equation in equations(jaxpr.jaxpr)
    for v in equation.outvars
  )
  assert largest <= max(n_head, 3) * n_res * n_res


def low_rank(rng, n_res, rank, c_z):
  return sa.alphafold2.LowRankPair(
    *rng.standard_normal((2, n_res, rank, c_z)).astype(np.float32)
  )


def multiplied_out(pair):
  return jnp.einsum('irc,jrc->ijc', pair.query, pair.key)


def variants():
  """Pair inputs with their form as one array, and masks."""
  rng = np.random.default_rng(3)
  n_res = 13
  rotation, translation = registry.random_frames(rng, n_res)
  full = rng.standard_normal((n_res, n_res, 6), np.float32)
  return {
    'single': rng.standard_normal((n_res, 8), np.float32),
    'rotation': rotation,
    'translation': translation,
    'mask': np.arange(n_res) % 5 != 3,
  }, {'full': full, 'low_rank': low_rank(rng, n_res, 2, 6), 'none': None}


INPUTS, PAIRS = variants()


def transformed(**options):
  return sa.alphafold2.transform_ipa(
    sa.alphafold2.InvariantPointAttentionConfig(
      num_head=3,
      num_point_qk=2,
      num_point_v=3,
      num_scalar_v=5,
      zero_init=False,
      **options,
    )
  )


def value_and_gradient(apply, params, pair, **options):
  def loss(params, pair, inputs):
    floats = {**INPUTS, **inputs}
    return jnp.sum(jnp.sin(apply(params, pair=pair, **floats, **options)))

  inputs = {k: v for k, v in INPUTS.items() if k != 'mask'}
  value = jax.jit(lambda *a: apply(a[0], pair=a[1], **INPUTS, **options))
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  return value(params, pair), gradient(params, pair, inputs)


def assert_close(got, want, bound=2e-5):
  largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(g - w).max() <= bound * max(np.abs(w).max(), 0.01 * largest)


@pytest.mark.parametrize(
  ('kind', 'block'),
  [('full', 4), ('low_rank', 4), ('none', 4), ('full', 1), ('full', 64)],
)
def test_blocked_equals_dense_values_and_gradients(kind, block):
  pair = PAIRS[kind]
  init, dense = transformed(implementation='dense')
  params = init(jax.random.key(0), pair=pair, **INPUTS)
  _, blocked = transformed(implementation='blocked', query_block=block)
  want = value_and_gradient(dense, params, pair)
  assert_close(value_and_gradient(blocked, params, pair), want)


@pytest.mark.parametrize('implementation', ['dense', 'blocked'])
def test_low_rank_pair_equals_the_multiplied_out_one(implementation):
  pair = PAIRS['low_rank']
  init, apply = transformed(implementation=implementation, query_block=4)
  params = init(jax.random.key(0), pair=pair, **INPUTS)
  got, (got_params, got_pair, got_inputs) = value_and_gradient(
    apply, params, pair
  )
  full, spread = jax.vjp(multiplied_out, pair)
  want, (want_params, want_pair, want_inputs) = value_and_gradient(
    apply, params, full
  )
  (want_pair,) = spread(want_pair)
  assert_close(
    (got, got_params, got_pair, got_inputs),
    (want, want_params, want_pair, want_inputs),
  )


def test_low_rank_pair_needs_nothing_of_full_size():
  n_res, c_z = 256, 32
  init, apply = sa.alphafold2.transform_ipa(
    sa.alphafold2.InvariantPointAttentionConfig(num_head=2)
  )
  inputs = (
    jnp.zeros((n_res, 8)),
    sa.alphafold2.LowRankPair(*jnp.zeros((2, n_res, 2, c_z))),
    jnp.zeros((n_res, 3, 3)),
    jnp.zeros((n_res, 3)),
  )
  params = jax.eval_shape(init, jax.random.key(0), *inputs)
  jaxpr = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(apply(*a))))(
    params, *inputs
  )
  sizes = [
    int(np.prod(v.aval.shape))
    for equation in equations(jaxpr.jaxpr)
    for v in equation.outvars
  ]
  assert max(sizes) < n_res * n_res * 2  # Not even logits of all heads.


@pytest.mark.parametrize('implementation', ['dense', 'blocked'])
def test_shared_pair_bias_changes_nothing(implementation):
  pair = PAIRS['full']
  options = {'implementation': implementation, 'query_block': 4}
  init, apply = transformed(**options)
  params = init(jax.random.key(0), pair=pair, **INPUTS)
  config = sa.alphafold2.InvariantPointAttentionConfig(
    num_head=3,
    num_point_qk=2,
    num_point_v=3,
    num_scalar_v=5,
    zero_init=False,
    **options,
  )

  def twice(pair, **inputs):
    ipa = sa.alphafold2.InvariantPointAttention(config)
    bias = ipa.pair_bias(pair)
    return ipa(pair=pair, pair_bias=bias, **inputs)

  shared = hk.without_apply_rng(hk.transform(twice))
  made = shared.init(jax.random.key(0), pair=pair, **INPUTS)
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
  want = value_and_gradient(apply, params, pair)
  assert_close(value_and_gradient(shared.apply, params, pair), want)


@pytest.mark.parametrize('has_layer_norm', [False, True])
@pytest.mark.parametrize(
  ('implementation', 'query_block'),
  [('dense', None), ('blocked', 4), ('blocked', 3), ('blocked', None)],
)
def test_pair_shared_by_scanned_calls_changes_nothing(
  implementation, query_block, has_layer_norm
):
  config = sa.alphafold2.InvariantPointAttentionConfig(
    num_head=3,
    zero_init=False,
    implementation=implementation,
    query_block=query_block,
  )
  # Rows of various size, and far from a mean of zero.
  rng = np.random.default_rng(3)
  pair = PAIRS['full'] * rng.uniform(0.1, 4, PAIRS['full'].shape[:2])[..., None]
  pair = pair.astype(np.float32) + 3
  channels = pair.shape[-1]
  norm = {
    'scale': rng.uniform(0.5, 2, channels).astype(np.float32),
    'offset': rng.standard_normal(channels).astype(np.float32),
  }

  def calls(pair, norm, is_shared, single, **inputs):
    ipa = sa.alphafold2.InvariantPointAttention(config)
    slots = None
    if is_shared:
      given = (norm['scale'], norm['offset']) if has_layer_norm else None
      pair, slots = ipa.share_pair(pair, 3, given)
    elif has_layer_norm:
      pair = numerics.layer_norm(pair) * norm['scale'] + norm['offset']

    def step(single, slots):
      update = ipa(single, pair, pair_gradient=slots, **inputs)
      return single + update, None

    return hk.scan(step, single, slots, length=3)[0]

  fn = hk.without_apply_rng(hk.transform(calls))
  params = fn.init(jax.random.key(0), pair, norm, False, **INPUTS)
  shared = fn.init(jax.random.key(0), pair, norm, True, **INPUTS)
  assert jax.tree.map(np.shape, shared) == jax.tree.map(np.shape, params)

  def of(is_shared):
    def apply(params, *, pair, **inputs):
      params, norm = params
      return fn.apply(params, pair, norm, is_shared, **inputs)

    return value_and_gradient(apply, (params, norm), pair)

  assert_close(of(True), of(False))


def test_a_shared_pair_needs_its_gradient():
  config = sa.alphafold2.InvariantPointAttentionConfig(
    num_head=3, implementation='blocked', query_block=4
  )
  pair = PAIRS['full']

  def call(with_pair, with_slots, **options):
    def forward(**inputs):
      ipa = sa.alphafold2.InvariantPointAttention(config)
      shared, slots = ipa.share_pair(pair, 1)
      slots = jax.tree.map(lambda x: x[0], slots)
      return ipa(
        pair=shared if with_pair else pair,
        pair_gradient=slots if with_slots else None,
        **options,
        **inputs,
      )

    return hk.transform(forward).init(jax.random.key(0), **INPUTS)

  call(True, True)
  with pytest.raises(ValueError, match='pair_gradient: expected'):
    call(True, False)
  with pytest.raises(ValueError, match='pair: expected the SharedPair'):
    call(False, True)
  with pytest.raises(ValueError, match=r'return_attention: .* num_calls=None'):
    call(True, True, return_attention=True)


@pytest.mark.parametrize('implementation', ['dense', 'blocked'])
@pytest.mark.parametrize('return_attention', [False, True])
def test_pair_shared_without_slots_changes_nothing(
  implementation, return_attention
):
  config = sa.alphafold2.InvariantPointAttentionConfig(
    num_head=3, zero_init=False, implementation=implementation, query_block=4
  )

  def call(is_shared, pair, **inputs):
    ipa = sa.alphafold2.InvariantPointAttention(config)
    norm = (jnp.arange(1.0, 7), jnp.arange(6.0))
    if is_shared:
      pair, slots = ipa.share_pair(pair, None, norm, mask=inputs['mask'])
      assert slots is None
    else:
      pair = numerics.layer_norm(pair) * norm[0] + norm[1]
    found = ipa(pair=pair, return_attention=return_attention, **inputs)
    return found.features if return_attention else found

  plain, shared = (
    hk.without_apply_rng(hk.transform(functools.partial(call, is_shared)))
    for is_shared in (False, True)
  )
  params = plain.init(jax.random.key(0), pair=PAIRS['full'], **INPUTS)
  want = value_and_gradient(plain.apply, params, PAIRS['full'])
  assert_close(value_and_gradient(shared.apply, params, PAIRS['full']), want)


def test_pair_of_poses_by_vmap_is_shared():
  config = sa.alphafold2.InvariantPointAttentionConfig(
    num_head=3, zero_init=False, implementation='blocked', query_block=4
  )
  moved = (
    INPUTS['translation'] * np.array([1, 2, 0.5], np.float32)[:, None, None]
  )
  rest = {k: v for k, v in INPUTS.items() if k != 'translation'}

  def call(is_shared, pair):
    ipa = sa.alphafold2.InvariantPointAttention(config)
    slots = None
    if is_shared:
      pair, slots = ipa.share_pair(pair, len(moved), mask=rest['mask'])
    return hk.vmap(
      lambda t, own: ipa(pair=pair, translation=t, pair_gradient=own, **rest),
      split_rng=False,
    )(moved, slots)

  plain, shared = (
    hk.without_apply_rng(hk.transform(functools.partial(call, is_shared)))
    for is_shared in (False, True)
  )
  params = plain.init(jax.random.key(0), PAIRS['full'])

  def of(transformed):
    return jax.jit(
      jax.value_and_grad(
        lambda *a: jnp.sum(jnp.sin(transformed.apply(*a))), argnums=(0, 1)
      )
    )(params, PAIRS['full'])

  assert_close(of(shared), of(plain))


@pytest.mark.parametrize('kind', ['full', 'low_rank'])
def test_pure_pair_bias_serves_many_calls(kind):
  init, apply = transformed()
  params = init(jax.random.key(0), pair=PAIRS[kind], **INPUTS)
  config = sa.alphafold2.InvariantPointAttentionConfig(num_head=3)
  precompute = sa.alphafold2.cached_ipa(config).precompute
  pair_bias = precompute(params, PAIRS[kind])
  assert pair_bias.shape == (13, 3, 13)
  got = apply(params, pair=PAIRS[kind], pair_bias=pair_bias, **INPUTS)
  assert_close(got, apply(params, pair=PAIRS[kind], **INPUTS))
  # It is what is taken.
  other = apply(params, pair=PAIRS[kind], pair_bias=2 * pair_bias, **INPUTS)
  assert np.abs(other - got).max() > 1e-3


def test_low_rank_pair_has_no_shared_gradient():
  def forward(pair):
    return sa.alphafold2.InvariantPointAttention(
      sa.alphafold2.InvariantPointAttentionConfig()
    ).share_pair(pair, 2)

  with pytest.raises(TypeError, match='pair: expected an array, got LowRank'):
    hk.transform(forward).init(jax.random.key(0), PAIRS['low_rank'])


def test_no_residues_raise():
  init, _ = transformed()
  none = {k: v[:0] for k, v in INPUTS.items()}
  with pytest.raises(ValueError, match='single: expected at least one'):
    init(jax.random.key(0), pair=None, **none)


@pytest.mark.parametrize('kind', ['full', 'low_rank', 'shared'])
@pytest.mark.parametrize('implementation', ['dense', 'blocked'])
def test_masked_content_reaches_neither_values_nor_gradients(
  implementation, kind
):
  config = sa.alphafold2.InvariantPointAttentionConfig(
    num_head=3, zero_init=False, implementation=implementation, query_block=4
  )
  mask = INPUTS['mask']

  def call(pair, **inputs):
    ipa = sa.alphafold2.InvariantPointAttention(config)
    slots = None
    if kind == 'shared':
      norm = (jnp.ones(6), jnp.zeros(6))
      pair, slots = ipa.share_pair(pair, 1, norm, mask=mask)
      slots = jax.tree.map(lambda x: x[0], slots)
    return ipa(pair=pair, pair_gradient=slots, **inputs)

  init, apply = hk.without_apply_rng(hk.transform(call))
  pair = PAIRS['low_rank' if kind == 'low_rank' else 'full']
  params = init(jax.random.key(0), pair=pair, **INPUTS)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def run(params, pair, inputs):
    out = apply(params, pair=pair, mask=mask, **inputs)
    return jnp.sum(jnp.sin(out)), out

  def spoil(x, axes):
    for axis in range(axes):
      own = mask.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))
      x = np.where(own, x, np.nan).astype(np.float32)
    return x

  floats = {k: v for k, v in INPUTS.items() if k != 'mask'}
  want = run(params, pair, floats)
  axes = 1 if kind == 'low_rank' else 2
  got = run(
    params,
    jax.tree.map(lambda x: spoil(x, axes), pair),
    {k: spoil(v, 1) for k, v in floats.items()},
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_blocked_holds_no_logits_of_all_queries():
  n_res, n_head = 256, 6
  init, apply = sa.alphafold2.transform_ipa(
    sa.alphafold2.InvariantPointAttentionConfig(
      num_head=n_head, implementation='blocked', query_block=8
    )
  )
  inputs = (
    jnp.zeros((n_res, 8)),
    jnp.zeros((n_res, n_res, 3)),
    jnp.zeros((n_res, 3, 3)),
    jnp.zeros((n_res, 3)),
  )
  params = jax.eval_shape(init, jax.random.key(0), *inputs)

  def largest(apply):
    jaxpr = jax.make_jaxpr(
      jax.grad(lambda *a: jnp.sum(apply(*a) ** 2), argnums=(0, 2))
    )(params, *inputs)
    return max(
      int(np.prod(v.aval.shape))
      for equation in equations(jaxpr.jaxpr)
      for v in equation.outvars
    )

  assert largest(apply) <= n_res * n_res * 3  # The gradient of the pair.
  _, dense = sa.alphafold2.transform_ipa(
    sa.alphafold2.InvariantPointAttentionConfig(
      num_head=n_head, implementation='dense'
    )
  )
  assert largest(dense) >= n_res * n_res * n_head  # The check can fail.


@pytest.mark.parametrize(
  'field', ['num_head', 'num_scalar_qk', 'num_point_qk', 'num_point_v']
)
def test_config_without_channels_is_refused(field):
  with pytest.raises(ValueError, match=f'{field}: expected at least 1, got 0'):
    sa.alphafold2.InvariantPointAttentionConfig(**{field: 0})
