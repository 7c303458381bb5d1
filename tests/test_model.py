"""The forward pass against transformers, sub-layer by sub-layer and whole, and against what must hold of any model.

tests/data holds transformers' results, written by make_goldens.py. Trained models other than the embedded one are
looked for in the folder that SQJAX_REFERENCE names.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest

import sqjax
from sqjax import mesh
from sqjax import model as model_module
from sqjax.checkpoint import huggingface_name, load_checkpoint
from sqjax.config import ModelConfig, is_matrix
from sqjax.model import Qwen35, abstract, attention, rms_norm
from sqjax.run import InputError

DATA = Path(__file__).parent / "data"
DEMO8 = Path(sqjax.__file__).parent / "demo8"
TOLERANCE = 1e-4
PROJECTIONS = {
    "linear_attention": {"attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"},
    "full_attention": {"attn_q", "attn_k", "attn_v", "attn_output"},
}
MLP = {"ffn_gate", "ffn_up", "ffn_down"}

# Compiled once a shape for all tests.
logits_of = jax.jit(lambda model, tokens_BT: model.logits(model.hidden(tokens_BT)))
run_part = {
    "attn_norm": jax.jit(lambda block, x_BTD: block.norm("attn_norm", x_BTD)),
    "mixer": jax.jit(lambda block, x_BTD: block.mixer(x_BTD)),
    "post_attention_norm": jax.jit(lambda block, x_BTD: block.norm("post_attention_norm", x_BTD)),
    "mlp": jax.jit(lambda block, x_BTD: block.mlp(x_BTD)),
    "block": jax.jit(lambda block, x_BTD: block(x_BTD)),
}


@functools.cache
def goldens(name):
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def tiny_tensors():
    config, weights = ModelConfig.from_huggingface(make_goldens.TINY_CONFIG), make_goldens.tiny_weights()
    tensors = {}
    for name in config.tensor_shapes():
        source, transform = huggingface_name(name)
        tensors[name] = transform(weights[source], config)
    return config, tensors


@functools.cache
def tiny(dtype=jnp.float32):
    return Qwen35.from_tensors(*tiny_tensors(), dtype=dtype)


@functools.cache
def demo8_logits(dtype):
    checkpoint = load_checkpoint(DEMO8)
    model = Qwen35.from_tensors(checkpoint.config, checkpoint.tensors, dtype=dtype)
    return logits_of(model, goldens("demo8")["tokens"])


def tiny_tokens():
    return jnp.asarray(make_goldens.tiny_tokens(), jnp.int32)


def assert_golden_logits(logits_BTV, golden):
    thinned = logits_BTV[0, :: make_goldens.POSITION_STEP, :: make_goldens.VOCABULARY_STEP]
    np.testing.assert_allclose(thinned, golden["logits"], atol=TOLERANCE, rtol=0)
    log_normalizer = jax.nn.logsumexp(logits_BTV[0], axis=-1)
    np.testing.assert_allclose(log_normalizer, golden["log_normalizer"], atol=TOLERANCE, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def test_random_model_with_shared_key_heads_gives_transformers_logits():
    logits_BTV = logits_of(tiny(), tiny_tokens())
    np.testing.assert_allclose(logits_BTV[:, ::3], goldens("tiny")["logits"], atol=TOLERANCE, rtol=0)


def test_embedded_model_gives_transformers_logits():
    assert_golden_logits(demo8_logits(jnp.float32), goldens("demo8"))


def test_larger_trained_model_gives_transformers_logits():
    folder = os.environ.get("SQJAX_REFERENCE")
    if not folder or not Path(folder, "nano34").is_dir():
        pytest.skip("SQJAX_REFERENCE names no folder with nano34")
    checkpoint, golden = load_checkpoint(Path(folder, "nano34")), goldens("nano34")
    model = Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)
    assert_golden_logits(logits_of(model, golden["tokens"]), golden)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", run_part)
def test_each_sublayer_gives_transformers_result(layer, part):
    golden, block = goldens("tiny"), tiny().block(layer)
    entry = {
        "attn_norm": golden[f"{layer}.block.in"],
        "mixer": golden[f"{layer}.attn_norm"],
        "post_attention_norm": golden[f"{layer}.block.in"] + golden[f"{layer}.mixer"],
        "mlp": golden[f"{layer}.post_attention_norm"],
        "block": golden[f"{layer}.block.in"],
    }[part]
    found_BTD = run_part[part](block, jnp.asarray(entry)[None])
    np.testing.assert_allclose(found_BTD[0], golden[f"{layer}.{part}"], atol=2e-5, rtol=0)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tiny", "demo8"])
def test_every_logit_is_that_of_transformers(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if name == "tiny":
        reference = make_goldens.build(make_goldens.TINY_CONFIG, make_goldens.tiny_weights())
        tokens_BT, found_BTV = make_goldens.tiny_tokens(), logits_of(tiny(), tiny_tokens())
    else:
        reference, tokens_BT = make_goldens.load(DEMO8), goldens("demo8")["tokens"]
        found_BTV = demo8_logits(jnp.float32)
    np.testing.assert_allclose(found_BTV, make_goldens.logits(reference, tokens_BT), atol=TOLERANCE, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold of any model


def test_bfloat16_stays_close():
    # Nats of divergence a token; plain Q4_K rounding of this model costs about 0.03.
    exact_TV, narrow_TV = (jax.nn.log_softmax(demo8_logits(dtype)[0]) for dtype in (jnp.float32, jnp.bfloat16))
    divergence_T = jnp.sum(jnp.exp(exact_TV) * (exact_TV - narrow_TV), axis=-1)
    assert float(jnp.mean(divergence_T)) < 1e-3
    assert float(jnp.mean(exact_TV.argmax(-1) == narrow_TV.argmax(-1))) > 0.97


@pytest.mark.parametrize("types", ["lflf", "lfff"])
def test_stacking_loses_nothing(types):
    kinds = {"l": "linear_attention", "f": "full_attention"}
    layer_types = {"layer_types": [kinds[letter] for letter in types]}
    config = ModelConfig.from_huggingface(make_goldens.TINY_CONFIG | layer_types)
    tensors = {n: make_goldens.uniform(i, s) for i, (n, s) in enumerate(config.tensor_shapes().items())}
    model = Qwen35.from_tensors(config, tensors)
    assert len(model.blocks) == config.period
    back = model.to_tensors()
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_matrices_alone_take_the_dtype():
    for name, tensor in tiny(jnp.bfloat16).to_tensors().items():
        assert tensor.dtype == (jnp.bfloat16 if is_matrix(name, tensor.shape) else jnp.float32), name


def test_device_arrays_and_tracers_build_the_same_model():
    config, tensors = tiny_tensors()
    on_device = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    built = jax.jit(lambda tensors: Qwen35.from_tensors(config, tensors))(on_device)
    jax.tree.map(np.testing.assert_array_equal, built, tiny())


def test_blocks_alone_make_the_trunk():
    model, tokens_BT = tiny(), tiny_tokens()
    x_BTD = model.embed(tokens_BT[:1])
    for layer in range(model.config.num_hidden_layers):
        x_BTD = run_part["block"](model.block(layer), x_BTD)
    hidden_BTD = rms_norm(x_BTD, model.output_norm[...], model.config.rms_norm_eps)
    np.testing.assert_allclose(model.logits(hidden_BTD), logits_of(model, tokens_BT)[:1], atol=1e-5)
    # One executable for each kind of layer, whatever its index.
    assert run_part["block"]._cache_size() == 2


def test_no_position_sees_what_follows():
    tokens_BT = tiny_tokens()
    before, after = logits_of(tiny(), tokens_BT), logits_of(tiny(), tokens_BT.at[:, 100:].set(0))
    np.testing.assert_array_equal(before[:, :100], after[:, :100])
    assert float(jnp.abs(before - after)[:, 100:].max()) > 0.1


def test_every_position_sees_the_first():
    tokens_BT = tiny_tokens()
    before, after = logits_of(tiny(), tokens_BT), logits_of(tiny(), tokens_BT.at[:, 0].add(-1))
    assert float(jnp.abs(before - after).max(axis=-1).min()) > 1e-5


@pytest.mark.parametrize("time", [96, 100])
def test_attention_in_blocks_is_softmax_attention(monkeypatch, time):
    monkeypatch.setattr(model_module, "_QUERY_BLOCK", 32)
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (2, time, 4 if i in (0, 3) else 2, 16)) for i in range(4))

    def plain(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bqhe,bthe->bhqt", q, k) / 4.0
        scores = jnp.where(jnp.tri(time, dtype=bool)[None, None], scores, -jnp.inf)
        return jnp.einsum("bhqt,bthe->bqhe", jax.nn.softmax(scores, axis=-1), v)

    np.testing.assert_allclose(jax.jit(attention)(q, k, v), plain(q, k, v), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda function, *qkv: jnp.sum(function(*qkv) * weight), (1, 2, 3)), static_argnums=0)
    for found, expected in zip(gradient(attention, q, k, v), gradient(plain, q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention needs an NVIDIA GPU")
@pytest.mark.parametrize("time, dim", [(512, 256), (700, 256), (2048, 128)])
def test_fused_attention_is_the_plain_one(monkeypatch, time, dim):
    shapes = [(2, time, heads, dim) for heads in (8, 2, 2, 8)]
    q, k, v, weight = (
        jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes)
    )

    def everything(fused):
        if not fused:
            monkeypatch.setattr(model_module, "_fused", lambda q: False)
        total = lambda *qkv: jnp.sum(attention(*qkv) * weight.astype(jnp.float32))  # noqa: E731
        both = lambda *qkv: (attention(*qkv), *jax.grad(total, (0, 1, 2))(*qkv))  # noqa: E731
        return jax.jit(both, compiler_options=mesh.one_order())(q, k, v)

    assert model_module._fused(q)
    for found, expected in zip(everything(True), everything(False), strict=True):
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def loss(logits_BTV, tokens_BT):
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.mean(jnp.take_along_axis(log_p_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1))


@functools.cache
def tiny_gradient(dtype, remat=False):
    """Gradients of the loss: by the model's tensors, and by a factor on each projection's output in each layer."""
    tokens_BT = tiny_tokens()[:, :40]
    ones = [dict.fromkeys(PROJECTIONS[block.layer_type] | MLP, jnp.ones(2)) for block in tiny().blocks]

    def scaled_loss(model, factors):
        scale = lambda factor, x_BTI, y_BTO: y_BTO * factor.astype(y_BTO.dtype)  # noqa: E731
        hidden_BTD = model.hidden(tokens_BT, observe=scale, probes=factors, remat=remat)
        return loss(model.logits(hidden_BTD), tokens_BT)

    by_model, by_factor = jax.jit(jax.grad(scaled_loss, (0, 1)))(tiny(dtype), ones)
    return by_model.to_tensors(), by_factor


def test_what_is_seen_after_each_block_is_what_it_returns():
    model, tokens_BT = tiny(jnp.float32), tiny_tokens()[:, :40]
    keep = jax.jit(lambda model, x_BTD: model.trunk(x_BTD, after=lambda x_BTD, _: x_BTD))
    hidden_BTD, streams = keep(model, model.embed(tokens_BT))
    np.testing.assert_allclose(hidden_BTD, jax.jit(Qwen35.hidden)(model, tokens_BT), atol=1e-5)
    x_BTD = model.embed(tokens_BT)
    for layer in range(model.config.num_hidden_layers):
        x_BTD = model.block(layer)(x_BTD)
        kept_BTD = streams[layer % model.config.period][layer // model.config.period]
        np.testing.assert_allclose(kept_BTD, x_BTD, atol=1e-4 * float(jnp.abs(x_BTD).max()), err_msg=f"{layer}")


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient():
    for name, expected in tiny_gradient(jnp.float32)[0].items():
        found = tiny_gradient(jnp.float32, remat=True)[0][name]
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()), err_msg=name)


@pytest.mark.slow
def test_bfloat16_gradients_point_the_same_way():
    for name, found in tiny_gradient(jnp.bfloat16)[0].items():
        if is_matrix(name, found.shape):
            a, b = (np.asarray(x, np.float64).ravel() for x in (found, tiny_gradient(jnp.float32)[0][name]))
            assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b) > 0, name


def test_gradient_is_the_slope_of_the_loss():
    # The derivative along a random direction in all tensors at once, against a central difference.
    model, gradient = tiny(), tiny_gradient(jnp.float32)[0]
    direction = {name: jnp.asarray(make_goldens.uniform(7, g.shape)) for name, g in gradient.items()}
    slope = sum(float(jnp.sum(gradient[name] * direction[name])) for name in gradient)

    def moved(step):
        tensors = {name: tensor + step * direction[name] for name, tensor in model.to_tensors().items()}
        tokens_BT = tiny_tokens()
        # What comes later changes nothing, so the whole window's executable serves for its first 40 tokens.
        logits_BTV = logits_of(Qwen35.from_tensors(model.config, tensors), tokens_BT)
        return float(loss(logits_BTV[:, :40], tokens_BT[:, :40]))

    np.testing.assert_allclose((moved(1e-3) - moved(-1e-3)) / 2e-3, slope, rtol=2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Probes


@pytest.mark.parametrize("layer", [0, 1])
def test_probe_sees_every_projection(layer):
    block = tiny().block(layer)
    x_BTD = tiny().embed(tiny_tokens()[:1])

    @jax.jit
    def observed(block, x_BTD):
        seen = {}

        def probe(name, x_BTI, y_BTO):
            assert name not in seen
            seen[name] = (x_BTI, y_BTO)
            return y_BTO

        out_BTD = block(x_BTD, probe)
        assert seen["ffn_gate"][0] is seen["ffn_up"][0]
        return out_BTD, seen

    out_BTD, seen = observed(block, x_BTD)
    np.testing.assert_allclose(out_BTD, run_part["block"](block, x_BTD), atol=1e-6)
    assert seen.keys() == PROJECTIONS[block.layer_type] | MLP
    for name, (x_BTI, y_BTO) in seen.items():
        np.testing.assert_allclose(y_BTO, x_BTI @ getattr(block, name)[...].T, atol=1e-5, err_msg=name)


def test_accumulators_belong_to_their_own_layer():
    # Scaling a projection's output or its matrix is the same: d loss / d factor = <W, d loss / d W> in every layer.
    tensors, (by_tensor, by_factor) = tiny().to_tensors(), tiny_gradient(jnp.float32)
    for layer in range(tiny().config.num_hidden_layers):
        for name, by_repeat in by_factor[layer % 2].items():
            tensor = f"blk.{layer}.{name}.weight"
            expected = float(jnp.sum(tensors[tensor] * by_tensor[tensor]))
            np.testing.assert_allclose(by_repeat[layer // 2], expected, rtol=1e-3, atol=1e-6, err_msg=tensor)


# ---------------------------------------------------------------------------------------------------------------------
# Building


def test_abstract_model_compiles_without_weights():
    config, _ = tiny_tensors()
    shapes = abstract(config, jnp.bfloat16)
    described, real = (jax.tree.map(lambda a: (a.shape, a.dtype), m) for m in (shapes, tiny(jnp.bfloat16)))
    assert jax.tree.leaves(described) == jax.tree.leaves(real)
    lowered = jax.jit(lambda model, tokens_BT: model.hidden(tokens_BT)).lower(shapes, tiny_tokens())
    assert lowered.out_info.shape == (*tiny_tokens().shape, config.hidden_size)


def test_missing_and_misshapen_tensors_are_named():
    config, tensors = tiny_tensors()
    with pytest.raises(InputError, match=r"blk\.1\.attn_k\.weight"):
        Qwen35.from_tensors(config, {name: tensor for name, tensor in tensors.items() if name != "blk.1.attn_k.weight"})
    with pytest.raises(InputError, match=r"blk\.0\.ssm_a .*\(3,\)"):
        Qwen35.from_tensors(config, tensors | {"blk.0.ssm_a": np.zeros(3, np.float32)})
