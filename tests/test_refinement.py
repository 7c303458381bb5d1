"""Distillation into the format: its loss, its gradients and the identity of what is trained with what is written."""

import dataclasses
import functools
import json
import os
import signal
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_checkpoint import RUNNABLE, write
from scipy.special import logsumexp

import sqjax
from sqjax import calibration, distillation, latent, programs, refinement, run_folder, scales, sources, updates
from sqjax.checkpoint import load_checkpoint
from sqjax.evaluation import Sequences
from sqjax.gguf_file import read_gguf, write_gguf
from sqjax.model import Qwen35, rms_norm
from sqjax.q4_k import Q4K, dequantize, valid
from sqjax.refinement import Refinement
from sqjax.settings import read_settings
from sqjax.student import Student, harden_student, indecision, initial, model_of, start_of

SMALL = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "intermediate_size": 256,
}
# One update sees every window, in two micro-batches; the watched text is that of training, less what is held out.
SETTINGS = {"length": 32, "batch": 4, "accumulate": 2, "chunk": 48, "warmup": 2, "watch": "heldout", "watch_windows": 2}
SETTINGS |= {"watch_every": 3, "checkpoint_every": 2, "updates": 12, "softness": 0.0}


def random_q4k(rows=6, columns=512, seed=0):
    weight_OI = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return jax.tree.map(jnp.asarray, scales.round_to_nearest(weight_OI))


def moved(values, spread, seed=1):
    """Latent values away from the centres of their cells."""
    generator = np.random.default_rng(seed)
    unit = {"codes_OI": 1.0, "scales_OSG": 1.0, "mins_OSG": 1.0, "d_OS": 0.05, "dmin_OS": 0.05}
    return dataclasses.replace(
        values,
        **{
            name: leaf + (spread * unit[name] * generator.standard_normal(leaf.shape)).astype(np.float32)
            for name in unit
            for leaf in (getattr(values, name),)
        },
    )


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def teacher(model):
    checkpoint = load_checkpoint(model)
    return Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)


@pytest.fixture(scope="module")
def windows():
    return jnp.asarray(np.random.default_rng(5).integers(0, 512, (128, 32)), jnp.int32)


# ---- one matrix


def test_the_centres_of_cells_harden_to_the_solution():
    q = random_q4k()
    assert equal(latent.harden(latent.latent(q), q), q)


@pytest.mark.parametrize("spread", [0.0, 0.4, 30.0])
def test_weights_are_those_of_the_hardened_values_to_the_bit(spread):
    q = random_q4k()
    values = moved(latent.latent(q), spread)
    hard = latent.harden(values, q)
    assert valid(hard) and equal(hard, q) == (spread == 0.0)
    np.testing.assert_array_equal(jax.jit(latent.weights)(values, q), dequantize(hard))


def test_the_stair_is_the_identity_when_hot_and_rounding_when_cold():
    value = jnp.linspace(-0.9, 15.9, 1009)
    np.testing.assert_allclose(latent.stair(value, 50.0), value, atol=1e-4)
    away = jnp.abs(value - jnp.floor(value) - 0.5) > 0.05
    np.testing.assert_allclose(latent.stair(value, 1e-3)[away], jnp.round(value)[away], atol=1e-6)
    assert (np.diff(latent.stair(value, 0.1)) >= -1e-5).all()


def test_displaced_codes_harden_to_the_solution_and_are_nearer_to_the_weights_while_soft():
    weight_OI = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    q = random_q4k()
    values = latent.latent(q, jnp.asarray(weight_OI), 1.0)
    assert equal(latent.harden(values, q), q)
    soft, hard = (jnp.abs(latent.weights(values, q, jnp.float32(t)) - weight_OI) for t in (50.0, 0.0))
    np.testing.assert_array_equal(latent.weights(values, q, jnp.float32(0.0)), dequantize(q))
    # What is left are weights beyond the ends of their grid and a hundredth of each cell.
    assert float(jnp.mean(soft)) < 0.1 * float(jnp.mean(hard))


def test_gradients_are_those_of_the_equation_at_the_rounded_values():
    q = random_q4k()
    values = moved(latent.latent(q), 0.3)
    hard = latent.harden(values, q)
    slope_OI = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    found = jax.grad(lambda values: jnp.vdot(jnp.asarray(slope_OI), latent.weights(values, q)))(values)
    slope = slope_OI.reshape(hard.codes_OSGN.shape)
    d, dmin, s, m, u = (np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(hard))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    close(found.codes_OI, (slope * (d[..., None] * s)[..., None]).reshape(q.shape))
    close(found.scales_OSG, d[..., None] * (slope * u).sum(-1))
    close(found.mins_OSG, -dmin[..., None] * slope.sum(-1))
    close(found.d_OS, np.asarray(q.d_OS, np.float32) * (s * (slope * u).sum(-1)).sum(-1))
    close(found.dmin_OS, -np.asarray(q.dmin_OS, np.float32) * (m * slope.sum(-1)).sum(-1))


def alone(leaf):
    """A student of one matrix, or what belongs to it."""
    return Student(leaf, [], None, None)


def test_along_a_code_the_loss_and_its_indecision_are_a_straight_line():
    q, rng = random_q4k(), np.random.default_rng(3)
    row_O, column_I = (jnp.asarray(rng.uniform(0.5, 2.0, size), jnp.float32) for size in q.shape)
    values = latent.latent(q)
    target_OI = dequantize(q) + 0.1 * jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    pairs = [(0.25 * row_O[:, None], column_I[None, :]), (0.75 * row_O[:, None], column_I[None, :])]

    def both(temperature, u):
        moved = dataclasses.replace(values, codes_OI=values.codes_OI.at[2, 100].set(u))
        off_OI = latent.weights(moved, q, temperature) - target_OI
        loss = 0.5 * jnp.sum(row_O[:, None] * column_I[None, :] * jnp.square(off_OI))
        part = latent.stair(u, temperature) - jnp.floor(u)
        return part, loss, indecision(alone(moved), alone(q), alone(pairs), temperature)

    for temperature in (jnp.float32(0.3), jnp.float32(0.05)):
        part, loss, penalty = jax.vmap(functools.partial(both, temperature))(5.0 + jnp.linspace(0.0, 0.999, 9))
        line = np.polyfit(part, loss + penalty - loss[0], 1)
        scale = float(jnp.max(penalty))
        assert scale > 0 and penalty[0] == 0
        np.testing.assert_allclose(np.polyval(line, part), loss + penalty - loss[0], atol=1e-2 * scale)
    assert indecision(alone(values), alone(q), alone(pairs), jnp.float32(0.3)) == 0
    slopes = jax.grad(indecision)(alone(moved(values, 0.3)), alone(q), alone(pairs), jnp.float32(0.0))
    assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(slopes))


def test_codes_that_must_take_sides_make_good_for_each_other():
    """Under a known Gram, with its exact gradients: the hardened error falls by a twentieth at least."""
    rng = np.random.default_rng(4)
    weight_OI = jnp.asarray(rng.standard_normal((16, 256)), jnp.float32)
    turn_II = np.linalg.qr(rng.standard_normal((256, 256)))[0]
    gram_II = jnp.asarray((turn_II * np.arange(1.0, 257.0) ** -0.7) @ turn_II.T, jnp.float32)
    start = jax.tree.map(jnp.asarray, scales.round_to_nearest(np.asarray(weight_OI)))
    settings = Refinement(concavity=1.0)
    pairs = [(jnp.full((16, 1), 2.0), jnp.diagonal(gram_II)[None, :])]
    cost = lambda off_OI: jnp.sum((off_OI @ gram_II) * off_OI)  # noqa: E731
    paces = [schedule(400) for schedule in (settings.multipliers, settings.temperatures, settings.concavities)]

    @jax.jit
    def refined(concavity):
        def loss(values, temperature, share):
            off_OI = latent.weights(values, start, temperature) - weight_OI
            between = indecision(*map(alone, (values, start, pairs)), temperature)
            return cost(off_OI) + concavity * share * between

        def update(state, pace):
            values, moments = state
            slopes = jax.grad(loss)(values, *pace[1:])
            changes, moments = adam.update(slopes, moments)
            codes_OI = values.codes_OI - 0.003 * pace[0] * changes.codes_OI
            return (dataclasses.replace(values, codes_OI=codes_OI), moments), None

        values, adam = latent.latent(start, weight_OI, 0.6), optax.scale_by_adam(0.5, 0.99)
        (values, _), _ = jax.lax.scan(update, (values, adam.init(values)), tuple(paces))
        return cost(dequantize(latent.harden(values, start)) - weight_OI)

    with jax.numpy_dtype_promotion("standard"):
        without, robbed = refined(0.0), refined(1.0)
    assert robbed < 0.95 * without < 0.95 * cost(dequantize(start) - weight_OI)


# ---- the loss


def direct_loss(student_ND, table_VD, teacher_ND, teacher_table_VD, weight_N):
    logits = [
        jnp.matmul(a, b.T, precision="highest") for a, b in ((student_ND, table_VD), (teacher_ND, teacher_table_VD))
    ]
    log_q, log_p = map(jax.nn.log_softmax, logits)
    return jnp.sum(weight_N * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@pytest.mark.parametrize(("chunk", "first"), [(1, 8192), (7, 8192), (24, 8192), (64, 8192), (24, 3)])
def test_loss_and_gradients_equal_those_of_full_logits(monkeypatch, chunk, first):
    monkeypatch.setattr(refinement, "_FIRST", first)
    generator = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    teacher_ND, teacher_table_VD = draw(24, 16), draw(50, 16)
    student_ND, table_VD = teacher_ND + 0.3 * draw(24, 16), teacher_table_VD + 0.3 * draw(50, 16)
    weight_N = jnp.asarray(generator.random(24), jnp.float32).at[5:9].set(0.0)
    rest = (teacher_ND, teacher_table_VD, weight_N)
    # A cotangent that is not one, as under an outer mean.
    ours = jax.value_and_grad(lambda h, t: 3.0 * refinement.distillation_loss(h, t, *rest, chunk), (0, 1))
    direct = jax.value_and_grad(lambda h, t: 3.0 * direct_loss(h, t, *rest), (0, 1))
    for found, expected in zip(
        jax.tree.leaves(ours(student_ND, table_VD)), jax.tree.leaves(direct(student_ND, table_VD))
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def stream(x_BTD, _):
    return x_BTD


def test_residual_loss_is_where_the_divergence_of_a_disturbed_stream_begins(teacher, windows):
    """KL(teacher || disturbed) -> 1/2 e^T G e for one small e at every token after the last block."""
    grams, _ = updates.local_forms(teacher, windows, Refinement(chunk=64))
    hidden_BTD, streams = teacher.trunk(teacher.embed(windows), after=stream)
    stream_BTD = streams[-1][-1]
    error_D = 1e-3 * jnp.asarray(np.random.default_rng(6).standard_normal(stream_BTD.shape[-1]), jnp.float32)
    disturbed_BTD = rms_norm(stream_BTD + error_D[None, None], teacher.output_norm[...], teacher.config.rms_norm_eps)
    weight_BT = jnp.full(windows.shape, 1.0 / windows.size)
    # In float32 so small a divergence is off by a tenth of itself.
    logits_BTV = [np.float64(x_BTD) @ np.float64(teacher.head()).T for x_BTD in (hidden_BTD, disturbed_BTD)]
    ideal_BTV, own_BTV = (x_BTV - logsumexp(x_BTV, axis=-1, keepdims=True) for x_BTV in logits_BTV)
    kl = np.mean(np.sum(np.exp(ideal_BTV) * (ideal_BTV - own_BTV), axis=-1))
    off_BTD = jnp.broadcast_to(error_D[None, None], stream_BTD.shape)
    # The Gram is of labels that were drawn, once for each of 4,096 tokens.
    np.testing.assert_allclose(refinement.residual_loss(off_BTD, grams[-1][-1], weight_BT), kl, rtol=0.1)


def test_second_derivatives_are_the_diagonals_of_both_grams(teacher, windows):
    _, curvature = updates.local_forms(teacher, windows[:16], Refinement(chunk=64))
    sums = calibration.collect(teacher, windows[:16], chunk=64)
    tokens = float(sums.tokens)
    kinds = sums.blocks[0]
    for name, reads in (("attn_gate", "attn_qkv"), ("ffn_up", "ffn_gate"), ("ffn_down", "ffn_down")):
        ((row, column),) = curvature.blocks[0][name]
        expected = [np.diagonal(x, axis1=-2, axis2=-1) / tokens for x in (kinds[name]["output"], kinds[reads]["input"])]
        np.testing.assert_allclose(row[..., 0], expected[0], rtol=1e-4)
        np.testing.assert_allclose(column[..., 0, :], expected[1], rtol=1e-4)
    assert curvature.blocks[0]["attn_norm"] is None and len(curvature.token_embd) == 2
    assert programs.abstract_curvature(programs.abstract_start(teacher.config)) == jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), curvature
    )


def test_the_gradient_of_residual_loss_is_that_of_the_form():
    rng = np.random.default_rng(8)
    off_BTD, root_DD = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), (8, 8)))
    weight_BT = jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)
    gram_DD = root_DD @ root_DD.T
    form = lambda off_BTD: 0.5 * jnp.einsum("bt,btd,de,bte", weight_BT, off_BTD, gram_DD, off_BTD)  # noqa: E731
    ours = lambda off_BTD: refinement.residual_loss(off_BTD, gram_DD, weight_BT)  # noqa: E731
    np.testing.assert_allclose(ours(off_BTD), form(off_BTD), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(off_BTD), jax.grad(form)(off_BTD), rtol=1e-4, atol=1e-5)


def test_errors_of_the_stream_count_as_a_share_of_its_size():
    """A stream three times as large weighs a ninth beside the others of its window; other windows do not notice."""
    rng = np.random.default_rng(9)
    stream_BTD = jnp.asarray(rng.standard_normal((3, 4, 8)), jnp.float32)
    weight_BT = jnp.asarray(rng.uniform(size=(3, 4)), jnp.float32).at[2].set(0.0)
    found_BT = refinement.by_size(weight_BT, stream_BTD, 1e-6)
    np.testing.assert_allclose(found_BT.sum(axis=1), weight_BT.sum(axis=1), rtol=1e-6)
    grown_BT = refinement.by_size(weight_BT, stream_BTD.at[0, 1].multiply(3.0), 1e-6)
    ratio_BT = np.asarray(grown_BT / found_BT)[:2]
    np.testing.assert_allclose(ratio_BT[0, 1] / ratio_BT[0, [0, 2, 3]], 1 / 9, rtol=1e-5)
    np.testing.assert_array_equal(ratio_BT[1], 1.0)
    np.testing.assert_array_equal(found_BT[2], 0.0)
    # A token that the model embeds as zeros.
    assert np.isfinite(refinement.by_size(weight_BT, stream_BTD.at[0, 1].set(0.0), 1e-6)).all()


def test_the_share_mixes_the_two_losses(teacher, windows):
    student = jax.tree.map(lambda leaf: 1.01 * leaf, teacher)
    grams, _ = updates.local_forms(teacher, windows[:8], Refinement(chunk=64))
    loss_of = functools.partial(refinement.model_loss, student, teacher, grams, windows[:4], chunk=48)
    weight_BT = jnp.full((4, windows.shape[1]), 0.01)
    losses, kls = np.transpose([loss_of(weight_BT, share=share) for share in (0.0, 0.25, 1.0)])
    np.testing.assert_allclose(kls, losses[0], rtol=1e-6)
    np.testing.assert_allclose(losses[1], 0.75 * losses[0] + 0.25 * losses[2], rtol=1e-5)
    streams = [model.trunk(model.embed(windows[:4]), after=stream)[1] for model in (student, teacher)]
    direct = []
    for own, ideal, stack in zip(*streams, grams):
        for x, y, gram in zip(*map(np.asarray, (own, ideal, stack))):
            inverse = 1.0 / np.mean(y**2, axis=-1)
            weight = 0.01 * inverse / inverse.mean(axis=1, keepdims=True)
            direct.append(0.5 * np.einsum("bt,btd,de,bte->", weight, x - y, gram, x - y))
    np.testing.assert_allclose(losses[2], np.mean(direct), rtol=1e-4)
    assert float(refinement.model_loss(teacher, teacher, grams, windows[:4], weight_BT, share=0.5, chunk=48)[0]) == 0.0


def test_what_the_backward_pass_recomputes_changes_its_work_and_not_the_gradient(teacher, windows):
    student = jax.tree.map(lambda leaf: 1.01 * leaf, teacher)
    weight_BT = jnp.full((2, windows.shape[1]), 0.01)
    flops, found = {}, {}
    for remat in refinement.REMATS:
        loss = functools.partial(refinement.model_loss, share=0.0, chunk=64, remat=remat)
        gradient = jax.grad(lambda student, loss=loss: loss(student, teacher, [], windows[:2], weight_BT)[0])
        compiled = jax.jit(gradient).lower(student).compile()
        flops[remat], found[remat] = compiled.cost_analysis()["flops"], jax.tree.leaves(compiled(student))
    assert flops["none"] < flops["between"] < 0.95 * flops["blocks"]
    for remat in ("between", "none"):
        for one, other in zip(found[remat], found["blocks"]):
            # Sums of float32 in another order.
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(other))))


# ---- the student


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write(folder, **(RUNNABLE | SMALL))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}, and so on; " for i in range(200)))
    return path


@pytest.fixture(scope="module")
def q4_k(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "start.gguf"
    sqjax.convert(model, path)
    return path


def prepared(model, file, **changes):
    """A run on eight random windows, one of them padded, which are also watched."""
    windows_WT = np.random.default_rng(4).integers(0, 512, (8, 32)).astype(np.int32)
    settings = Refinement(**(SETTINGS | changes))
    padded_WT = windows_WT.copy()
    padded_WT[0, 20:] = distillation.PADDING
    watched = Sequences.of_windows(windows_WT)
    return distillation.prepare(load_checkpoint(model), read_gguf(file), padded_WT, watched, settings=settings)


@pytest.fixture(scope="module")
def run(model, q4_k):
    return prepared(model, q4_k)


def test_the_student_begins_as_the_file(run, q4_k):
    file = read_gguf(q4_k)
    tensors = harden_student(run.config, initial(run.start), run.start)
    assert tensors.keys() == run.config.tensor_shapes().keys()
    for name, tensor in tensors.items():
        assert equal(tensor, file.tensors.codes(name) if isinstance(tensor, Q4K) else file.tensors[name]), name
    model = model_of(run.config, initial(run.start), run.start).to_tensors()
    assert all(np.array_equal(model[name], file.tensors[name]) for name in model)


def test_micro_batches_sum_to_the_batch(tmp_path):
    """The gradient, which moments of the first update are in proportion to, does not depend on the split."""
    single = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "full_attention_interval": 1}
    write(tmp_path / "single", **(RUNNABLE | SMALL | single))
    sqjax.convert(tmp_path / "single", tmp_path / "single.gguf")
    results = []
    for accumulate in (1, 2):
        run = prepared(tmp_path / "single", tmp_path / "single.gguf", accumulate=accumulate)
        state, loss = run.update(
            run.state_of(initial(run.start)), *run.batch(0), *map(jnp.float32, (0.0, 0.0, 0.8, 0.2))
        )
        results.append((loss, jax.tree.leaves(state.moments)))
    for two, one in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(two, one, rtol=2e-3, atol=1e-4 * float(jnp.max(jnp.abs(one))) + 1e-12)


@pytest.mark.parametrize(
    ("room", "asked", "expected"),
    [
        ({"between": 16384}, {}, ("between", 1)),
        # Too few tokens at a time for what less recomputation would save.
        ({"between": 8192}, {}, ("blocks", 1)),
        ({"between": 8192, "blocks": 8192}, {}, ("blocks", 2)),
        ({"between": 4096}, {"remat": "between"}, ("between", 4)),
        ({"between": 4096}, {"accumulate": 8}, ("blocks", 8)),
        ({"between": 0, "blocks": 0}, {}, ("blocks", 32)),
    ],
)
def test_memory_decides_on_micro_batches_and_what_is_kept(monkeypatch, room, asked, expected):
    rooms = {"blocks": 65536, "none": 0} | room
    monkeypatch.setattr(updates, "_room", lambda config, settings, remat: rooms[remat])
    settings = updates.fitted(None, Refinement(batch=32, length=512, **asked))
    assert (settings.remat, settings.accumulate) == expected


@pytest.mark.parametrize(("gib", "expected"), [(None, 1024), (141, 2048), (80, 2048), (32, 1024), (16, 512), (4, 256)])
def test_memory_decides_on_chunks_of_logits(monkeypatch, gib, expected):
    monkeypatch.setattr(updates.meshes, "device_memory", lambda: gib and gib << 30)
    config = dataclasses.make_dataclass("Config", ["vocab_size"])(248320)
    assert updates._chunk(config) == expected


def test_every_pass_reads_every_window_once_in_an_order_of_its_own():
    rows = [updates.rows_of_update(5, step, 4, 6) for step in range(6)]
    passes = np.concatenate(rows).reshape(4, 6)
    assert (np.sort(passes, axis=1) == np.arange(6)).all() and len(np.unique(passes, axis=0)) > 1
    assert np.array_equal(rows[3], updates.rows_of_update(5, 3, 4, 6))
    assert not np.array_equal(passes, np.concatenate([updates.rows_of_update(6, s, 4, 6) for s in range(6)]))


@pytest.mark.parametrize("schedule", sorted(refinement.SCHEDULES))
def test_rates_rise_and_then_do_not(schedule):
    rates = Refinement(schedule=schedule, warmup=10).multipliers(100)
    assert len(rates) == 100 and rates.max() == 1.0 and rates.argmax() == 10 and (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) <= 0).all() and (schedule == "constant" or 0 < rates[-1] < 0.02)


# ---- the loop


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return *distillation.distill(run, folder), folder


def test_a_run_lowers_the_divergence_and_writes_what_it_watched(model, q4_k, run, finished, tmp_path):
    tensors, position, folder = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert position.start_kl == run.watch(initial(run.start))
    watched = {line["step"]: line["watched_kl"] for line in lines if "watched_kl" in line}
    assert watched.keys() == {3, 6, 9, 12} and min(watched.values()) == position.best_kl < 0.95 * position.start_kl
    # Read back, the tensors that were returned have the KL that was watched.
    write_gguf(tmp_path / "out.gguf", read_gguf(q4_k), tensors, file_type="q4_k")
    again = prepared(model, tmp_path / "out.gguf")
    assert again.watch(initial(again.start)) == pytest.approx(position.best_kl, rel=1e-5)


def test_a_run_with_soft_codes_lowers_the_divergence_and_is_resumed_to_the_same_bits(model, q4_k, tmp_path):
    run = prepared(model, q4_k, softness=0.3, soft_share=0.5)
    assert (run.temperature_U[:6] > 0).all() and not run.temperature_U[6:].any()
    # Half way to the weights the model is nearer to its teacher than any file of these scales could be.
    _, loss = run.update(run.state_of(run.begin()), *run.batch(0), *map(jnp.float32, (0.0, 0.3, 0.8, 0.2)))
    assert float(loss) < 0.5 * run.watch(initial(run.start))

    def kill(done, total, note=""):
        if done == 5:
            raise Killed

    expected, position = distillation.distill(run, tmp_path / "whole")
    assert position.best_kl < position.start_kl and position.rollbacks == 0
    with pytest.raises(Killed):
        distillation.distill(run, tmp_path / "killed", progress=kill)
    tensors, again = distillation.distill(run, tmp_path / "killed", resume=True)
    assert again == position and all(equal(tensors[name], expected[name]) for name in expected)


class Killed(Exception):
    """Stands for kill -9: nothing of the loop's own runs after it."""


@pytest.mark.parametrize("last", [1, 5, 12])
def test_a_killed_run_goes_on_to_the_same_bits(run, finished, last, tmp_path):
    def kill(done, total, note=""):
        if done == last:
            raise Killed

    with pytest.raises(Killed):
        distillation.distill(run, tmp_path, progress=kill)
    tensors, position = distillation.distill(run, tmp_path, resume=True)
    expected, expected_position, folder = finished
    assert position == expected_position and all(equal(tensors[name], expected[name]) for name in expected)
    kept = ("step", "kl", "watched_kl", "multiplier")
    curves = [
        [[json.loads(line).get(key) for key in kept] for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, tmp_path)
    ]
    assert curves[0] == curves[1]


def test_an_interruption_completes_and_keeps_the_update(run, finished, tmp_path, capsys):
    def interrupt(done, total, note=""):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distillation.distill(run, tmp_path, progress=interrupt)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name == "4"]
    assert "stopped after 4 of 12" in capsys.readouterr().err
    tensors, position = distillation.distill(run, tmp_path, resume=True)
    assert position == finished[1] and all(equal(tensors[name], finished[0][name]) for name in tensors)


def test_a_state_that_is_not_finite_is_rolled_back_with_half_the_rates(run, tmp_path, capsys):
    calls = []

    def poison(state):
        return dataclasses.replace(state, student=jax.tree.map(lambda leaf: leaf * jnp.nan, state.student))

    def poisoned(state, *rest):
        calls.append(rest)
        state, loss = run.update(state, *rest)
        return (poison(state) if len(calls) == 5 else state), loss

    _, position = distillation.distill(dataclasses.replace(run, update=poisoned), tmp_path)
    assert (position.rollbacks, position.factor, position.step, len(calls)) == (1, 0.5, 12, 12)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("rolled_back_to") is not None] == [6] and lines[5]["kl"] is None
    assert lines[5]["rolled_back_to"] == 3 and "half the rates" in capsys.readouterr().err
    assert lines[11]["multiplier"] == pytest.approx(0.5 * run.multiplier_U[11])
    assert position.best_kl < position.start_kl


def test_a_diverging_run_ends_with_what_was_best(run, tmp_path, capsys):
    def hasty(state, tokens_ABT, weight_ABT, multiplier, *pace):
        return run.update(state, tokens_ABT, weight_ABT, 300.0 * multiplier, *pace)

    wild = dataclasses.replace(run, update=hasty, settings=dataclasses.replace(run.settings, watch_every=1))
    tensors, position = distillation.distill(wild, tmp_path)
    assert position.rollbacks > 1 and "the watched KL" in capsys.readouterr().err
    assert position.best_kl <= run.watch(initial(run.start))
    assert position.best_step > 0 or equal(start_of(run.config, tensors), run.start)


# ---- the command


def test_the_command_writes_a_better_file_of_the_same_size(model, q4_k, text, tmp_path):
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    out = tmp_path / "out.gguf"
    options = {"text": text, "tokens": 1000, "settings": settings}
    result = sqjax.refine(model, q4_k, out, **options)
    assert out.stat().st_size == q4_k.stat().st_size and result["types"] == sqjax.inspect(q4_k)["types"]
    # That distillation works is seen on the text that it saw; whether it helps elsewhere is not the question here.
    measure = {"reference": model, "text": text, "length": 32, "windows": 16, "allow_overlap": True}
    before, after = (sqjax.evaluate(file, **measure)["kl"] for file in (q4_k, out))
    assert after < before
    story, start = json.loads((tmp_path / "out.gguf.json").read_text()), sqjax.inspect(q4_k)
    assert story["start_sha256"] == start["sha256"] and story["start"] == start["provenance"]
    assert story["seconds"] > 0 and story["device"]
    assert sqjax.refine(model, q4_k, out, resume=True, **options)["sha256"] == result["sha256"]
    with pytest.raises(sqjax.InputError, match="another model, text or setting"):
        sqjax.refine(model, q4_k, out, resume=True, **(options | {"tokens": 2000}))


def test_the_update_that_is_compiled_beside_the_text_is_the_one_that_runs(model, q4_k, text, tmp_path, caplog):
    overrides = [
        f"{key}={value}" for key, value in (SETTINGS | {"watch": "'heldout'", "updates": 2, "chunk": 40}).items()
    ]
    updates.make_update.cache_clear()
    # The context manager speaks of the main thread alone.
    jax.config.update("jax_log_compiles", True)
    try:
        sqjax.refine(model, q4_k, tmp_path / "o.gguf", text=text, settings=overrides)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [line.split(" in ")[0] for line in caplog.messages if line.startswith("Finished XLA compilation")]
    assert compiled.count("Finished XLA compilation of jit(update)") == 1


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    run_folder.claim(tmp_path, {"seed": 0}, resume=False)
    run_folder.claim(tmp_path, {"seed": 0}, resume=True)
    with pytest.raises(sqjax.InputError, match="unfinished run"):
        run_folder.claim(tmp_path, {"seed": 0}, resume=False)
    run_folder.finish(tmp_path, {})
    run_folder.claim(tmp_path, {"seed": 1}, resume=False)
    assert not (tmp_path / "result.json").exists()


def test_the_start_is_a_pure_q4_k_file_of_the_model(model, tmp_path):
    sqjax.convert(model, tmp_path / "bf16.gguf", type="bf16")
    with pytest.raises(sqjax.InputError, match="pure Q4_K"):
        prepared(model, tmp_path / "bf16.gguf")
    write(tmp_path / "other", **(RUNNABLE | SMALL | {"intermediate_size": 512}))
    sqjax.convert(tmp_path / "other", tmp_path / "other.gguf")
    with pytest.raises(sqjax.InputError, match="other tensors"):
        prepared(model, tmp_path / "other.gguf")


def test_the_configuration_holds_the_defaults():
    path = sources.find_config("refine", "refinement")
    assert read_settings(Refinement, path) == Refinement()
    assert set(tomllib.loads(path.read_text())) == {field.name for field in dataclasses.fields(Refinement)}


@pytest.mark.parametrize("tokens", [500, 3000, 70_000, 300_000, 900_000, 5_000_000, 80_000_000])
@pytest.mark.parametrize("devices", [1, 8])
def test_few_tokens_are_many_small_updates(monkeypatch, tokens, devices):
    monkeypatch.setattr(refinement.jax, "device_count", lambda: devices)
    settings = Refinement(length=128).planned(tokens)
    assert settings.batch % devices == 0 and settings.batch <= 32
    # All of the text is read, and no update would do without.
    assert (settings.updates - 1) * settings.batch * 128 < tokens <= settings.updates * settings.batch * 128
    assert settings.updates >= 400 or settings.batch == devices
    assert settings.updates < 801 or settings.batch == 32
    assert settings.planned(tokens) == settings


def test_a_batch_and_a_number_of_updates_that_are_stated_stay():
    assert Refinement(length=128, batch=6).planned(12_000).updates == 16
    assert Refinement(batch=6, updates=5).planned(1_000_000) == Refinement(batch=6, updates=5)
    assert Refinement(updates=5).planned(1_000).batch == 32


@pytest.mark.parametrize("wrong", [{"schedule": "step"}, {"dtype": "f16"}, {"batch": -1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(sqjax.InputError, match=next(iter(wrong))):
        Refinement(**wrong)
