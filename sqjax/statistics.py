"""Spectral statistics: input and output Grams of every matrix, from one forward and one backward pass over text.

Letters: B batch, T time, N tokens (B T), D model width, V vocabulary, I in features, O out features, R repeats.

For y = W x the input Gram is the sum of x x^T over tokens, the output Gram the sum of g g^T, with g the gradient of the
log-likelihood of labels *drawn from the model*: their Kronecker product estimates the Fisher information, which is the
curvature of the KL divergence. All sums are float32. The tied embedding has two roles: as the head its rows v weigh
sum p_v (1 - p_v) in the Gram of final hidden states (exact for the diagonal of the softmax's Fisher, and bounded in
memory for any vocabulary); as the table its rows weigh the number of times they were read in the Gram of gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sqjax import mesh as meshes
from sqjax.config import READERS, ModelConfig, tensor_name
from sqjax.delta_rule import product
from sqjax.mesh import BATCH, BY_BATCH, COPIED, DATA, MODEL
from sqjax.model import Qwen35
from sqjax.run import InputError

# Projections that read the same input: only the first keeps its Gram.
SHARED_INPUT = {name: names[0] for stages in READERS.values() for names in stages for name in names[1:]}
PROJECTIONS = tuple(dict.fromkeys(name for stages in READERS.values() for names in stages for name in names))


def input_name(tensor: str) -> str:
    """Returns the name of the tensor under which the input Gram of `tensor` is kept."""
    prefix, attribute, suffix = tensor.rsplit(".", 2)
    return f"{prefix}.{SHARED_INPUT.get(attribute, attribute)}.{suffix}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over tokens, in the layout of the model: blocks[p][projection] holds stacks [R, ...] of layers p, p + P, ...

    Attributes:
      blocks: per position in the period, per projection: {"input": [R, I, I] (first of its kind), "output": [R, O, O]};
        [R, I] and [R, O] where only diagonals are summed.
      head_gram_DD: of final hidden states.
      head_weight_V: sum of p_v (1 - p_v).
      lookup_gram_DD: of the gradients with respect to the embedded token.
      lookup_count_V: how often a token was read.
      tokens: number of tokens.
    """

    blocks: list[dict[str, dict[str, Array]]]
    head_gram_DD: Float[Array, "D D"]
    head_weight_V: Float[Array, " V"]
    lookup_gram_DD: Float[Array, "D D"]
    lookup_count_V: Float[Array, " V"]
    tokens: Float[Array, ""]


def empty(model: Qwen35, names: Sequence[str] = PROJECTIONS, full: Collection[tuple[str, str]] | None = None) -> Sums:
    """Returns sums of zero for the named projections of a model, and for its embedding.

    Of what is not in `full`, pairs of a projection and "input" or "output", only the diagonals are kept.
    """
    config = model.config
    width, vocabulary = config.hidden_size, config.vocab_size
    blocks = []
    for block in model.blocks:
        sums = {}
        for name in names:
            if (weight := getattr(block, name, None)) is None:
                continue
            repeats, rows, columns = weight[...].shape
            sizes = {"output": rows} | ({} if name in SHARED_INPUT else {"input": columns})
            orders = {kind: 2 if full is None or (name, kind) in full else 1 for kind in sizes}
            sums[name] = {kind: jnp.zeros((repeats, *[size] * orders[kind])) for kind, size in sizes.items()}
        blocks.append(sums)
    square = lambda: jnp.zeros((width, width), jnp.float32)  # noqa: E731
    vector = lambda: jnp.zeros(vocabulary, jnp.float32)  # noqa: E731
    return Sums(blocks, square(), vector(), square(), vector(), jnp.float32(0.0))


def gram_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns how many elements the Grams of each projection have, over all layers."""
    sizes: dict[str, int] = {}
    for kind in config.layer_types:
        for name, shape in config.block_shapes(kind).items():
            if name in PROJECTIONS:
                own = shape[0] ** 2 + (0 if name in SHARED_INPUT else shape[1] ** 2)
                sizes[name] = sizes.get(name, 0) + own
    return sizes


def parts(config: ModelConfig, passes: int) -> list[tuple[str, ...]]:
    """Deals projections out to passes over the text, so that Grams fit that would not at once; the largest first."""
    sizes = gram_sizes(config)
    dealt: list[list[str]] = [[] for _ in range(passes)]
    total = lambda names: sum(sizes[name] for name in names)  # noqa: E731
    for name in sorted(sizes, key=sizes.get, reverse=True):
        min(dealt, key=total).append(name)
    return [tuple(names) for names in sorted(dealt, key=total, reverse=True) if names]


def spread_specs(sums: Sums, mesh: jax.sharding.Mesh) -> Sums:
    """Returns the specs of sums on a mesh, where each leaf has a leading axis of the devices that keep sums apart.

    Grams of blocks have their rows spread over `model`, and one copy for each place along `data`; what is small, and
    Grams whose rows cannot be shared equally, have one copy on every device. Nothing is added before the end.
    """

    def spec(gram_OO):
        *_, rows, columns = gram_OO.shape
        # Diagonals come in stacks that are not square.
        return BY_BATCH if rows != columns or columns % mesh.shape[MODEL] else jax.P(DATA, None, MODEL)

    return Sums(jax.tree.map(spec, sums.blocks), *(BY_BATCH,) * 5)


@functools.partial(jax.jit, static_argnames="mesh")
def spread(sums: Sums, mesh: jax.sharding.Mesh) -> Sums:
    """Puts sums on a mesh: what there is in the first place of each leading axis, zeros in the others."""

    def widen(leaf, spec):
        count = mesh.shape[DATA] if spec[0] == DATA else mesh.size
        wide = jnp.zeros((count, *leaf.shape), leaf.dtype).at[0].set(leaf)
        if mesh.size == 1:
            # Where a batch's sums come out; the same place by another name would be another program.
            spec = COPIED
        return jax.lax.with_sharding_constraint(wide, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(widen, sums, spread_specs(sums, mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def folded(sums: Sums, mesh: jax.sharding.Mesh) -> Sums:
    """Adds over devices what `spread` keeps apart."""

    def fold(leaf, spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec[1:]))
        return jax.lax.with_sharding_constraint(jnp.sum(leaf, axis=0), sharding)

    return jax.tree.map(fold, sums, spread_specs(sums, mesh))


def gram(rows_ND: Float[Array, "*N D"]) -> Float[Array, "D D"]:
    """Returns the sum of x x^T over the rows x, with float32 products and sums whatever their type."""
    rows_ND = rows_ND.reshape(-1, rows_ND.shape[-1])
    # Products of two bfloat16 numbers are exact in float32, and matrix units form them.
    return product("ni,nj->ij", rows_ND, rows_ND, jnp.float32)


@jax.custom_vjp
def observe(accumulators: Mapping[str, Array], x: Array, y: Array) -> Array:
    """Returns y; the cotangent of `accumulators` is {"input": sum x x^T, "output": sum g g^T}, g the cotangent of y.

    An accumulator that is a vector gets the diagonal alone.
    """
    return y


def _observe_forward(accumulators, x, y):
    # Arrays without elements tell what is to be summed, and how many of its rows are this device's.
    kinds = {kind: jnp.zeros((*total.shape[:-1], 0)) for kind, total in accumulators.items()}
    return y, (kinds, x if "input" in kinds else jnp.zeros((0, *x.shape), x.dtype))


def _observe_backward(residuals, cotangent):
    kinds, x = residuals

    def total(kind, like):
        rows_BTD = x if kind == "input" else cotangent
        if like.ndim == 1:
            return jnp.sum(jnp.square(rows_BTD.astype(jnp.float32)), axis=(0, 1))
        return meshes.share(gram(rows_BTD), len(like))

    sums = {kind: total(kind, like) for kind, like in kinds.items()}
    return sums, jnp.zeros(x.shape if "input" in kinds else x.shape[1:], x.dtype), cotangent


observe.defvjp(_observe_forward, _observe_backward)


@functools.cache
def accumulator() -> Callable[..., Sums]:
    """Returns `accumulate` jitted, which reuses the memory of the sums that it is given."""
    return jax.jit(accumulate, donate_argnums=1, static_argnames=("chunk", "mesh"), compiler_options=meshes.one_order())


def accumulate(
    model: Qwen35,
    sums: Sums,
    tokens_BT: Int[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    key: Array,
    *,
    chunk: int = 1024,
    mesh: jax.sharding.Mesh | None = None,
) -> Sums:
    """Adds one batch to the sums, in one forward and one backward pass.

    Args:
      sums: what `empty` or an earlier batch gave; on a mesh, what `spread` made of it.
      tokens_BT: text, padded on the right; on a mesh, spread as BY_BATCH says.
      mask_BT: 1.0 for a token that counts, 0.0 for padding.
      key: draws the labels, one for every token, the same however the batch is shared among devices.
      chunk: tokens whose logits a device holds at a time.
      mesh: devices that share the batch, or None for one.
    """
    if mesh is None:
        return jax.tree.map(jnp.add, sums, _sums_of(model, sums.blocks, tokens_BT, mask_BT, key, 0, chunk))

    def on_device(model, sums, tokens_BT, mask_BT, key_data):
        own = jax.tree.map(lambda leaf: leaf[0], sums)
        first = 0 if mesh.size == 1 else jax.lax.axis_index(BATCH) * tokens_BT.shape[0]
        key = jax.random.wrap_key_data(key_data)
        batch = _sums_of(model, own.blocks, tokens_BT, mask_BT, key, first, chunk)
        return jax.tree.map(lambda total, new: (total + new)[None], own, batch)

    inputs = (meshes.rows, spread_specs, BY_BATCH, BY_BATCH, COPIED)
    run = meshes.over(mesh, on_device, inputs, lambda specs: specs[1])
    return run(model, sums, tokens_BT, mask_BT, jax.random.key_data(key))


def _sums_of(model, like, tokens_BT, mask_BT, key, first_row, chunk):
    """Sums of one batch, its Grams shaped `like` those that they will be added to."""

    def loss(probes, embedded_BTD):
        # Padding contributes no input; it contributes no gradient either, since no later token counts.
        tap = lambda accumulators, x, y: observe(accumulators, _masked(x, mask_BT), y)  # noqa: E731
        hidden_BTD = model.trunk(embedded_BTD, observe=tap, probes=probes, remat=True)
        value, head_weight_V = _sampled_loss(model, hidden_BTD, mask_BT, key, chunk, first_row)
        return value, (hidden_BTD, head_weight_V)

    embedded_BTD = model.embed(tokens_BT)
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, like)
    (blocks, lookup_BTD), (hidden_BTD, head_weight_V) = gradient(zeros, embedded_BTD)
    counts_V = jnp.zeros(model.config.vocab_size, jnp.float32).at[tokens_BT.reshape(-1)].add(mask_BT.reshape(-1))
    head_gram_DD = gram(_masked(hidden_BTD, mask_BT))
    return Sums(blocks, head_gram_DD, head_weight_V, gram(lookup_BTD), counts_V, jnp.sum(mask_BT))


def _masked(x_BTD, mask_BT):
    return x_BTD * mask_BT[..., None].astype(x_BTD.dtype)


def _sampled_loss(model, hidden_BTD, mask_BT, key, chunk, first_row=0):
    """Negative log-likelihood of labels drawn from the model, summed over tokens, and the sum of p (1 - p)."""
    head_VD = model.head()
    first_token, chunk = first_row * hidden_BTD.shape[1], min(chunk, mask_BT.size)
    width = hidden_BTD.shape[-1]
    hidden_ND, mask_N = hidden_BTD.reshape(-1, width), mask_BT.reshape(-1)
    padding = -hidden_ND.shape[0] % chunk
    hidden_KCD = jnp.pad(hidden_ND, ((0, padding), (0, 0))).reshape(-1, chunk, width)
    mask_KC = jnp.pad(mask_N, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one(hidden_CD, mask_C, number_C):
        logits_CV = model.logits(hidden_CD[None], head_VD)[0]
        # Logits are in nats relative to each other: the labels follow the model's own distribution. Each token has a
        # key of its own, so that its label does not depend on how many devices share the batch.
        key_C = jax.vmap(jax.random.fold_in, (None, 0))(key, number_C)
        label_C = jax.vmap(jax.random.categorical)(key_C, jax.lax.stop_gradient(logits_CV))
        log_normalizer_C = jax.nn.logsumexp(logits_CV, axis=-1)
        taken_C = jnp.take_along_axis(logits_CV, label_C[:, None], axis=-1)[:, 0]
        p_CV = jnp.exp(jax.lax.stop_gradient(logits_CV - log_normalizer_C[:, None]))
        weight_V = jnp.einsum("cv,c->v", p_CV * (1.0 - p_CV), mask_C, precision="highest")
        return jnp.sum((log_normalizer_C - taken_C) * mask_C), weight_V

    def body(total, inputs):
        value, weight_V = one(*inputs)
        return (total[0] + value, total[1] + weight_V), None

    start = (jnp.float32(0.0), jnp.zeros(model.config.vocab_size, jnp.float32))
    number_KC = first_token + jnp.arange(mask_KC.size, dtype=jnp.int32).reshape(mask_KC.shape)
    return jax.lax.scan(body, start, (hidden_KCD, mask_KC, number_KC))[0]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means over calibration tokens, by tensor name; the sums of `Sums` divided by the number of tokens.

    Attributes:
      inputs: input Gram of each tensor that `input_name` names.
      outputs: output Gram of each matrix of the blocks.
      head_gram_DD, head_weight_V, lookup_gram_DD, lookup_frequency_V: the two roles of the embedding.
      tokens: number of tokens seen.
      windows_WT: the calibration text itself, for rounding that measures again on the quantized model; -1 is padding.
    """

    inputs: Mapping[str, Float[Array, "I I"]]
    outputs: Mapping[str, Float[Array, "O O"]]
    head_gram_DD: Float[Array, "D D"]
    head_weight_V: Float[Array, " V"]
    lookup_gram_DD: Float[Array, "D D"]
    lookup_frequency_V: Float[Array, " V"]
    tokens: int
    windows_WT: np.ndarray

    def input_gram(self, tensor: str) -> Float[Array, "I I"]:
        """Returns the Gram of what a matrix multiplies."""
        return self.inputs[input_name(tensor)]

    def grams(self, tensor: str) -> tuple[Float[Array, "I I"], Float[Array, "O O"]]:
        """Returns the Gram of what a matrix multiplies and that of the gradients at its outputs."""
        return self.input_gram(tensor), self.outputs[tensor]


def means(config: ModelConfig, sums: Sums, windows_WT: np.ndarray) -> Statistics:
    """Divides sums by their number of tokens and names them.

    Raises:
      InputError: a matrix has seen no token, or a sum is not finite.
    """
    tokens = float(sums.tokens)
    if tokens == 0:
        raise InputError("the calibration text has no tokens; give --text with more of it")
    inputs, outputs = {}, {}
    for layer in range(config.num_hidden_layers):
        for name, kinds in sums.blocks[layer % config.period].items():
            tensor = tensor_name(layer, name)
            outputs[tensor] = kinds["output"][layer // config.period] / tokens
            if "input" in kinds:
                inputs[tensor] = kinds["input"][layer // config.period] / tokens
    for kind, grams in (("input", inputs), ("output", outputs)):
        for tensor, gram_II in grams.items():
            trace = float(jnp.trace(gram_II))
            if not np.isfinite(trace) or trace <= 0:
                raise InputError(f"the {kind} Gram of {tensor} has trace {trace}; the text or the weights are at fault")
    return Statistics(
        inputs,
        outputs,
        sums.head_gram_DD / tokens,
        sums.head_weight_V / tokens,
        sums.lookup_gram_DD / tokens,
        sums.lookup_count_V / tokens,
        int(tokens),
        windows_WT,
    )
