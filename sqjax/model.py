"""Qwen3.5's text model in Flax NNX, on tensors in GGUF layout.

Let B denote batch, T time, D model width, F MLP width, H query (or value) heads, K key/value (or key) heads, E head
dim, V vocabulary, O out features, I in features, C convolution channels.

Layers repeat with a period (three linear-attention blocks and one full-attention block). The model holds one Block for
each position in the period, its leaves stacked over the repeats, and scans over the repeats, so that each kind of layer
is compiled once however deep the model is.

Matrices have the dtype of the computation. The residual stream, norms, gates, rotary embedding, softmax and the state
of the delta rule are float32. Products of float32 matrices have the highest precision on every backend.

Text is padded on the right: attention is causal and so are the convolution and the delta rule, hence no position sees
the padding after it and no mask is needed.

References:
  Qwen3.5 in transformers (models/qwen3_5) and in llama.cpp (src/models/qwen35.cpp).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sqjax import conv_kernels, delta_rule
from sqjax.config import FULL, LINEAR, ModelConfig, is_matrix, tensor_name
from sqjax.delta_kernels import capability, serve_heads
from sqjax.delta_rule import product
from sqjax.mesh import whole
from sqjax.run import InputError

# (name of the projection, its input x_BTI, its output y_BTO) -> the output that the model goes on with
Probe = Callable[[str, Array, Array], Array]
# (accumulator, x_BTI, y_BTO) -> y_BTO
Observe = Callable[[Any, Array, Array], Array]
# (x_BTD, what is given) -> any pytree
After = Callable[[Array, Any], Any]

# Longer windows attend in blocks of this many queries, so that no T x T array of scores is ever held.
_QUERY_BLOCK = 512
# What `trunk` may keep of a block that it recomputes.
_PROJECTED = "projected"


class Block(nnx.Module):
    """One decoder layer: x + mixer(norm(x)), then x + MLP(norm(x)); its parameters carry their bare GGUF names.

    Args:
      config: the model's dimensions.
      tensors: bare name (`attn_norm`, `ffn_up`) -> array; stacked [repeats, ...] inside Qwen35, plain when called.
    """

    layer_type: str

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Array]):
        self.config = config
        for attribute in config.block_shapes(self.layer_type):
            setattr(self, attribute, nnx.Param(tensors[attribute]))

    def __call__(self, x_BTD: Float[Array, "B T D"], probe: Probe | None = None) -> Float[Array, "B T D"]:
        """Adds the mixer's and the MLP's output to the float32 residual stream.

        A probe is called as probe(name, x_BTI, y_BTO) for every projection, with its bare name, its input as the matrix
        product sees it (projections of one input get the same array) and its output; what it returns goes on.
        """
        x_BTD = x_BTD + self.mixer(self.norm("attn_norm", x_BTD), probe)
        return x_BTD + self.mlp(self.norm("post_attention_norm", x_BTD), probe)

    def norm(self, name: str, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the named RMSNorm of the residual stream, in the dtype of the matrices."""
        return rms_norm(x_BTD, getattr(self, name)[...], self.config.rms_norm_eps).astype(self.dtype)

    def mixer(self, x_BTD: Float[Array, "B T D"], probe: Probe | None = None) -> Float[Array, "B T D"]:
        """Mixes over time; x_BTD is normalised, the result float32."""
        raise NotImplementedError

    def mlp(self, x_BTD: Float[Array, "B T D"], probe: Probe | None = None) -> Float[Array, "B T D"]:
        """Returns down(silu(gate(x)) * up(x)) in float32; x_BTD is normalised."""
        gate_BTF = self.project("ffn_gate", x_BTD, probe).astype(jnp.float32)
        up_BTF = self.project("ffn_up", x_BTD, probe).astype(jnp.float32)
        return self.project("ffn_down", jax.nn.silu(gate_BTF) * up_BTF, probe, jnp.float32)

    def project(self, name: str, x_BTI: Array, probe: Probe | None = None, dtype=None) -> Float[Array, "B T O"]:
        """Multiplies by the named matrix; `dtype` of the result, that of the matrix unless given."""
        x_BTI = x_BTI.astype(self.dtype)
        weight_OI = whole(getattr(self, name)[...], self.config.block_shapes(self.layer_type)[name][0])
        y_BTO = product("BTI,OI->BTO", x_BTI, weight_OI, self.dtype if dtype is None else dtype)
        y_BTO = checkpoint_name(y_BTO, _PROJECTED)
        return y_BTO if probe is None else probe(name, x_BTI, y_BTO)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the matrices, in which products are computed."""
        return self.ffn_down[...].dtype


class LinearBlock(Block):
    """A block whose mixer is Gated DeltaNet: a short causal convolution, then the gated delta rule."""

    layer_type = LINEAR

    def mixer(self, x_BTD: Float[Array, "B T D"], probe: Probe | None = None) -> Float[Array, "B T D"]:
        """Mixes over time with the gated delta rule."""
        config = self.config
        batch, time, _ = x_BTD.shape
        keys, values = config.linear_num_key_heads, config.linear_num_value_heads
        qkv_BTC = self.project("attn_qkv", x_BTD, probe)
        gate_BTHE = self.project("attn_gate", x_BTD, probe).reshape(batch, time, values, -1)
        alpha_BTH = self.project("ssm_alpha", x_BTD, probe, jnp.float32)
        beta_BTH = jax.nn.sigmoid(self.project("ssm_beta", x_BTD, probe, jnp.float32))
        log_decay_BTH = self.ssm_a[...][None, None] * jax.nn.softplus(alpha_BTH + self.ssm_dt[...][None, None])

        # One array until it is narrow: what the kernels of the delta rule read without copies.
        qkv_BTHE = qkv_BTC.reshape(batch, time, 2 * keys + values, -1)
        weight_WHE = self.ssm_conv1d[...].T.reshape(-1, *qkv_BTHE.shape[2:])
        mixed = conv_kernels.heads if serve_heads(qkv_BTHE.shape[-1], qkv_BTHE.dtype) else plain_heads
        qkv_BTHE = mixed(qkv_BTHE, weight_WHE, 2 * keys, config.rms_norm_eps)
        q, k, v = jnp.split(qkv_BTHE, (keys, 2 * keys), axis=2)
        out_BTHE, _ = delta_rule.chunked(q, k, v, log_decay_BTH, beta_BTH, dtype=self.dtype)
        out_BTHE = rms_norm(out_BTHE, self.ssm_norm[...], config.rms_norm_eps)
        out_BTHE = out_BTHE * jax.nn.silu(gate_BTHE.astype(jnp.float32))
        return self.project("ssm_out", out_BTHE.reshape(batch, time, -1), probe, jnp.float32)


class AttentionBlock(Block):
    """A block whose mixer is gated grouped-query attention with a partial rotary embedding."""

    layer_type = FULL

    def mixer(self, x_BTD: Float[Array, "B T D"], probe: Probe | None = None) -> Float[Array, "B T D"]:
        """Mixes over time with causal softmax attention."""
        config = self.config
        batch, time, _ = x_BTD.shape
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        # Each head's rows hold the query and then the output gate.
        query = self.project("attn_q", x_BTD, probe).reshape(batch, time, heads, 2, config.head_dim)
        q_BTHE, gate_BTHE = query[:, :, :, 0], query[:, :, :, 1]
        k_BTKE = self.project("attn_k", x_BTD, probe).reshape(batch, time, key_heads, -1)
        v_BTKE = self.project("attn_v", x_BTD, probe).reshape(batch, time, key_heads, -1)
        q_BTHE = _rotate(rms_norm(q_BTHE, self.attn_q_norm[...], config.rms_norm_eps), config).astype(self.dtype)
        k_BTKE = _rotate(rms_norm(k_BTKE, self.attn_k_norm[...], config.rms_norm_eps), config).astype(self.dtype)
        out_BTHE = attention(q_BTHE, k_BTKE, v_BTKE)
        out_BTHE = out_BTHE * jax.nn.sigmoid(gate_BTHE.astype(jnp.float32))
        return self.project("attn_output", out_BTHE.reshape(batch, time, -1), probe, jnp.float32)


BLOCKS = {LINEAR: LinearBlock, FULL: AttentionBlock}


class Qwen35(nnx.Module):
    """A Qwen3.5 language model on text.

    `blocks[p]` holds layers p, p + period, p + 2 period, ... with every leaf stacked [repeats, ...]; `output` is None
    when the embedding is also the output matrix. Modules are pytrees: jit, grad, scan and checkpoint apply directly.
    """

    def __init__(self, config: ModelConfig, token_embd, blocks: Sequence[Block], output_norm, output=None):
        self.config = config
        self.token_embd = nnx.Param(token_embd)
        self.blocks = nnx.List(blocks)
        self.output_norm = nnx.Param(output_norm)
        self.output = None if output is None else nnx.Param(output)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Any], *, dtype=jnp.float32) -> "Qwen35":
        """Builds the model from tensors in GGUF layout; matrices get `dtype`, all else float32.

        Each tensor is read once and reaches the device once, stacked; NumPy and JAX arrays will do, tracers included.

        Raises:
          InputError: tensors are missing or have another shape than the config implies.
        """
        shapes = config.tensor_shapes()
        missing = [name for name in shapes if name not in tensors]
        if missing:
            raise InputError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}; give a complete one")

        def load(names: Sequence[str], stack: bool):
            target = dtype if is_matrix(names[0], shapes[names[0]]) else jnp.float32
            arrays = (_checked(name, tensors[name], shapes[name]) for name in names)
            return _stack(arrays, len(names), target) if stack else _stack(arrays, 1, target)[0]

        blocks = []
        for position, layer_type in enumerate(config.layer_types[: config.period]):
            layers = range(position, config.num_hidden_layers, config.period)
            attributes = config.block_shapes(layer_type)
            stacked = {name: load([tensor_name(layer, name) for layer in layers], stack=True) for name in attributes}
            blocks.append(BLOCKS[layer_type](config, stacked))
        output = None if config.tie_word_embeddings else load(["output.weight"], stack=False)
        token_embd, output_norm = (load([f"{name}.weight"], stack=False) for name in ("token_embd", "output_norm"))
        return cls(config, token_embd, blocks, output_norm, output)

    def to_tensors(self) -> dict[str, Array]:
        """Returns every tensor under its GGUF name, in the order of `ModelConfig.tensor_shapes`."""
        period = self.config.period
        tensors = {"token_embd.weight": self.token_embd[...]}
        for layer, layer_type in enumerate(self.config.layer_types):
            for attribute in self.config.block_shapes(layer_type):
                stacked = getattr(self.blocks[layer % period], attribute)[...]
                tensors[tensor_name(layer, attribute)] = stacked[layer // period]
        tensors["output_norm.weight"] = self.output_norm[...]
        if self.output is not None:
            tensors["output.weight"] = self.output[...]
        return tensors

    def block(self, layer: int) -> Block:
        """Returns layer `layer` alone, its leaves unstacked, to be called as block(x_BTD, probe)."""
        period = self.config.period
        return jax.tree.map(lambda leaf: leaf[layer // period], self.blocks[layer % period])

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up: the float32 residual stream that enters the first block."""
        table_VD = whole(self.token_embd[...], self.config.vocab_size)
        return jnp.take(table_VD, tokens_BT, axis=0, mode="clip").astype(jnp.float32)

    def head(self) -> Float[Array, "V D"]:
        """Returns the output matrix, which is the embedding where they are tied."""
        return whole((self.token_embd if self.output is None else self.output)[...], self.config.vocab_size)

    def trunk(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        observe: Observe | None = None,
        probes: Sequence[Mapping[str, Any]] | None = None,
        remat: bool = False,
        keep: bool = False,
        after: After | None = None,
        given: Sequence[Any] | None = None,
    ) -> Any:
        """Runs all blocks and the final norm, in float32, scanning over the repeats of the period.

        Args:
          x_BTD: the residual stream that `embed` returns.
          observe: observe(accumulator, x_BTI, y_BTO) -> y_BTO, called for every projection that has an accumulator.
          probes: for each position in the period, bare projection name -> accumulator, a pytree whose leaves are
            stacked [repeats, ...]; each repeat sees its slice. Gradients with respect to them have the same form.
          remat: recompute each block in the backward pass; only the residual stream between blocks is then kept.
          keep: with `remat`, keep what the projections gave, too, and recompute only what lies between them.
          after: called as after(x_BTD, given) with the residual stream after each block.
          given: for each position in the period what `after` is given beside the stream, leaves stacked [repeats, ...].

        Returns the normalised last hidden state [B, T, D]; with `after` also a list, for each position in the period,
        of what it returned, stacked [repeats, ...].
        """

        def run_block(block, x_BTD, accumulators):
            def probe(name, x_BTI, y_BTO):
                return observe(accumulators[name], x_BTI, y_BTO) if name in accumulators else y_BTO

            return block(x_BTD, probe if accumulators else None)

        if remat:
            # Inside a scan nothing can undo the recomputation, so the barrier against that would only cost speed.
            policy = jax.checkpoint_policies.save_only_these_names(_PROJECTED) if keep else None
            run_block = jax.checkpoint(run_block, prevent_cse=False, policy=policy)

        def run_period(x_BTD, repeat):
            found = []
            for block, accumulators, beside in zip(*repeat, strict=True):
                x_BTD = run_block(block, x_BTD, accumulators)
                found.append(None if after is None else after(x_BTD, beside))
            return x_BTD, found

        accumulators = [{} for _ in self.blocks] if probes is None else [dict(probe) for probe in probes]
        given = [None] * len(self.blocks) if given is None else list(given)
        x_BTD, found = jax.lax.scan(run_period, x_BTD, (self.blocks, accumulators, given))
        hidden_BTD = rms_norm(x_BTD, self.output_norm[...], self.config.rms_norm_eps)
        return hidden_BTD if after is None else (hidden_BTD, found)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        observe: Observe | None = None,
        probes: Sequence[Mapping[str, Any]] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised last hidden state of each token; arguments as for `trunk`."""
        return self.trunk(self.embed(tokens_BT), observe=observe, probes=probes, remat=remat)

    def logits(self, hidden_BTD: Float[Array, "B T D"], head_VD: Array | None = None) -> Float[Array, "B T V"]:
        """Returns float32 logits of hidden states; give it chunks of tokens where B T V floats are too many.

        `head_VD` is what `head` returned, where one call of it serves many chunks.
        """
        weight_VD = self.head() if head_VD is None else head_VD
        return product("BTD,VD->BTV", hidden_BTD.astype(weight_VD.dtype), weight_VD, jnp.float32)


def abstract(config: ModelConfig, dtype=jnp.float32) -> Qwen35:
    """Returns the model with shapes and dtypes for leaves, to compile without weights."""
    tensors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in config.tensor_shapes().items()}
    return jax.eval_shape(lambda tensors: Qwen35.from_tensors(config, tensors, dtype=dtype), tensors)


def rms_norm(x: Float[Array, "*any D"], weight_D: Float[Array, "D"], eps: float) -> Float[Array, "*any D"]:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * jnp.expand_dims(weight_D, range(x.ndim - 1))


def attention(
    q_BTHE: Float[Array, "B T H E"], k_BTKE: Float[Array, "B T K E"], v_BTKE: Float[Array, "B T K E"]
) -> Float[Array, "B T H E"]:
    """Causal softmax attention, H / K query heads reading each key/value head; scores and result are float32.

    Beyond 512 tokens the queries come in blocks, recomputed in the backward pass: memory grows with T, not T^2. Where
    cuDNN's fused attention can be had it takes both places; its products, sums and softmax have the same types.
    """
    batch, time, heads, dim = q_BTHE.shape
    if _fused(q_BTHE):
        return jax.nn.dot_product_attention(q_BTHE, k_BTKE, v_BTKE, is_causal=True, implementation="cudnn").astype(
            jnp.float32
        )
    size = min(time, _QUERY_BLOCK)

    def attend(block):
        first, q_BQKRE = block
        scores_BKRQT = product("BQKRE,BTKE->BKRQT", q_BQKRE, k_BTKE, jnp.float32) * dim**-0.5
        # The first key is never masked, so the maximum is finite and so is every gradient.
        causal_QT = jnp.arange(time)[None, :] <= (first + jnp.arange(size))[:, None]
        weights_BKRQT = jax.nn.softmax(jnp.where(causal_QT[None, None, None], scores_BKRQT, -jnp.inf), axis=-1)
        return product("BKRQT,BTKE->BQKRE", weights_BKRQT.astype(v_BTKE.dtype), v_BTKE, jnp.float32)

    # Query head h reads key head h // R: [B, T, K R, E], unlike the linear mixer's order.
    grouped = (heads // k_BTKE.shape[2], dim)
    if time == size:
        return attend((0, q_BTHE.reshape(batch, time, -1, *grouped))).reshape(q_BTHE.shape)
    q_BTHE = jnp.pad(q_BTHE, ((0, 0), (0, -time % size), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(q_BTHE.reshape(batch, -1, size, k_BTKE.shape[2], *grouped), 1, 0)
    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), (jnp.arange(len(blocks)) * size, blocks))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, dim)[:, :time]


def _fused(q_BTHE: Array) -> bool:
    """Whether cuDNN's attention takes these queries; before Hopper it wants heads of at most 128 dimensions."""
    # Short windows would gain nothing.
    if q_BTHE.dtype != jnp.bfloat16 or q_BTHE.shape[1] < 128 or q_BTHE.shape[-1] % 8:
        return False
    return q_BTHE.shape[-1] <= (256 if capability() >= 9 else 128 if capability() >= 8 else 0)


def _rotate(x_BTHE: Float[Array, "B T H E"], config: ModelConfig) -> Float[Array, "B T H E"]:
    """Turns pairs (i, i + rope_dim / 2) of the leading dimensions by position * theta^(-2 i / rope_dim).

    The other dimensions pass. The sections of multimodal positions coincide on text, which leaves this plain form.
    """
    size = config.rope_dim
    frequencies = (config.rope_theta ** -(np.arange(0, size, 2) / size)).astype(np.float32)
    angles_TE = jnp.arange(x_BTHE.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles_TE)[None, :, None], jnp.sin(angles_TE)[None, :, None]
    first, second, rest = jnp.split(x_BTHE, (size // 2, size), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def plain_heads(
    x_BTHE: Float[Array, "B T H E"], weight_WHE: Float[Array, "W H E"], unit: int, eps: float
) -> Float[Array, "B T H E"]:
    """Convolves each channel over time, applies SiLU and scales the first `unit` heads to unit norm, in float32.

    Each channel has its own few weights, the last of which meets the present token; the result has the dtype of x.
    """
    time, width = x_BTHE.shape[1], len(weight_WHE)
    padded_BTHE = jnp.pad(x_BTHE.astype(jnp.float32), ((0, 0), (width - 1, 0), (0, 0), (0, 0)))
    # A sum of shifted products fuses into one pass on every backend; a grouped convolution does not.
    s_BTHE = jax.nn.silu(sum(padded_BTHE[:, lag : lag + time] * weight_WHE[lag][None, None] for lag in range(width)))
    scale_BTH1 = jax.lax.rsqrt(jnp.sum(jnp.square(s_BTHE), axis=-1, keepdims=True) + eps)
    first_H = jnp.arange(x_BTHE.shape[2]) < unit
    return (s_BTHE * jnp.where(first_H[None, None, :, None], scale_BTH1, 1.0)).astype(x_BTHE.dtype)


def _checked(name: str, array, shape: tuple[int, ...]):
    if tuple(array.shape) != shape:
        raise InputError(f"tensor {name} has shape {tuple(array.shape)}, its config says {shape}; one of them is wrong")
    return array


def _stack(arrays, count: int, dtype) -> Array:
    """Stacks `count` arrays as they come: on the host if they are NumPy's, so that one transfer takes them all."""
    first, *rest = arrays if count > 1 else (next(iter(arrays)),)
    if isinstance(first, jax.Array):
        return jnp.stack([array.astype(dtype) for array in (first, *rest)])
    stacked = np.empty((count, *first.shape), jnp.dtype(dtype))
    for index, array in enumerate((first, *rest)):
        stacked[index] = array.astype(stacked.dtype)
    return jnp.asarray(stacked)
