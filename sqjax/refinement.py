"""Distillation into the format, its array and model part: what is trained is exactly what a Q4_K file holds.

Letters: B batch, T time, N tokens (B T), C tokens of a chunk, K chunks, D model width, V vocabulary, R repeats of the
period, O out features, I in features, S super-blocks in a row, G sub-blocks in a super-block.

Latent values lie near the integers that rounding chose, u near a code:

    weight = fp16(d (1 + a)) round(s) round(u) - fp16(dmin (1 + b)) round(m).

The forward pass uses the rounded values, those of the file; gradients pass through the rounding as if it were not
there. A move of a scale thus moves values and flips no code.

Codes begin soft: round(u) is a stair whose steps have a slope, at first nearly u itself, and u starts on its way from
the code to the weight that was rounded. The temperature falls until the stair is that of the file; each code that
settles is made good by those that have not. Then gradients pass straight through, at the rates that are left.

References:
  Gong et al., Differentiable Soft Quantization, 2019. https://arxiv.org/abs/1908.05033
  Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013 (straight-through).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from sqjax.config import ModelConfig, tensor_name
from sqjax.model import BLOCKS, Qwen35
from sqjax.q4_k import MAX_CODE, MAX_SCALE, Q4K, SUB_BLOCK, steps
from sqjax.run import InputError

# What is trained at a rate of its own; mins go with the scales and dmin with d.
KINDS = ("codes", "scales", "d", "vectors")
SCHEDULES: Mapping[str, Callable[[int], optax.Schedule]] = {
    "linear": lambda updates: optax.linear_schedule(1.0, 0.0, updates),
    "cosine": lambda updates: optax.cosine_decay_schedule(1.0, updates),
    "constant": lambda updates: optax.constant_schedule(1.0),
}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """How a file is refined; every field can be set in a TOML file.

    Attributes:
      codes_rate, scales_rate: Adam's rates, in quantization steps an update.
      d_rate: the same for d and dmin, in units of their size.
      vectors_rate: the same for the F32 tensors, in units of their root mean square.
      train_vectors: whether F32 tensors are trained at all.
      beta1, beta2: decay of Adam's moments.
      schedule: linear, cosine or constant, after the warm-up.
      warmup: updates over which rates rise from zero.
      softness: temperature of the stair at first; 0 for hard codes all along.
      softness_end: temperature at the end of the soft part.
      soft_share: share of the updates in which codes are soft.
      displacement: how far u starts from the code towards the weight that was rounded, 1 being all of the way.
      updates: number of updates; 0 for as many as the tokens that were asked for.
      length: tokens of a window.
      batch: windows of an update.
      accumulate: micro-batches that an update is summed over; 0 for as few as the device's memory allows.
      chunk: tokens whose logits exist at a time.
      remat: recompute blocks in the backward pass.
      shard: devices that share one copy of the weights, the latent values and the optimizer's state.
      dtype: bf16 or f32 for matrices and products; auto takes f32 on CPU, else bf16. State is float32 in either.
      watch: suite or text whose KL chooses the best state; `heldout` takes windows of the calibration text.
      watch_every: updates between two looks at it.
      watch_windows: windows held out, or windows and conversations read of another text; 0 for all of that.
      patience: looks without a new best before the run stops; 0 never stops.
      divergence: multiple of the best KL beyond which the run is rolled back.
      keep_best: write the best state, not the last.
      checkpoint_every: updates between two checkpoints.
      checkpoints: how many are kept.
    """

    codes_rate: float = 0.009
    scales_rate: float = 0.0
    d_rate: float = 0.0005
    vectors_rate: float = 0.0005
    train_vectors: bool = True
    beta1: float = 0.9
    beta2: float = 0.99
    schedule: str = "linear"
    warmup: int = 20
    softness: float = 0.3
    softness_end: float = 0.002
    soft_share: float = 0.9
    displacement: float = 0.6
    updates: int = 0
    length: int = 512
    batch: int = 32
    accumulate: int = 0
    chunk: int = 1024
    remat: bool = True
    shard: int = 1
    dtype: str = "auto"
    watch: str = "convergence60"
    watch_every: int = 50
    watch_windows: int = 0
    patience: int = 10
    divergence: float = 2.0
    keep_best: bool = True
    checkpoint_every: int = 100
    checkpoints: int = 2

    def __post_init__(self):
        choices = {"schedule": tuple(SCHEDULES), "dtype": ("auto", *DTYPES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"the setting {name} is {getattr(self, name)!r}; choose {', '.join(allowed)}")
        for name in ("length", "batch", "chunk", "watch_every", "checkpoint_every", "checkpoints", "shard"):
            if getattr(self, name) < 1:
                raise InputError(f"the setting {name} is {getattr(self, name)}; it must be at least 1")
        if self.softness and not 0 < self.softness_end <= self.softness:
            raise InputError(f"softness falls from {self.softness} to {self.softness_end}; set softness_end below it")
        if not any(self.rates.values()):
            raise InputError("all rates are zero, so that nothing would be refined; set one of them")

    @property
    def rates(self) -> dict[str, float]:
        """Rate of each kind of latent value."""
        return {kind: getattr(self, f"{kind}_rate") * (kind != "vectors" or self.train_vectors) for kind in KINDS}

    @property
    def compute_dtype(self) -> Any:
        """Dtype of matrices and products on this machine's devices."""
        automatic = "f32" if jax.default_backend() == "cpu" else "bf16"
        return DTYPES[automatic if self.dtype == "auto" else self.dtype]

    def multipliers(self, updates: int) -> Float32[np.ndarray, "U"]:
        """What the rates are multiplied by in each update of a run; the warm-up takes a fifth of it at most."""
        warmup = min(self.warmup, updates // 5)
        warm = optax.linear_schedule(1 / (warmup + 1), 1.0, max(warmup, 1))
        schedule = optax.join_schedules([warm, SCHEDULES[self.schedule](updates - warmup)], [warmup])
        return np.asarray(schedule(jnp.arange(updates, dtype=jnp.float32)), np.float32)

    def temperatures(self, updates: int) -> Float32[np.ndarray, "U"]:
        """Temperature of the codes in each update: falling by a constant factor, then zero."""
        soft = int(self.soft_share * updates) if self.softness and self.codes_rate else 0
        falling = np.geomspace(self.softness or 1.0, self.softness_end, max(soft, 1), dtype=np.float32)[:soft]
        return np.concatenate([falling, np.zeros(updates - soft, np.float32)])


# ---------------------------------------------------------------------------------------------------------------------
# One matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """Continuous stand-ins for the leaves of a Q4K, each in units of one step of its own grid, or of its own size.

    Attributes:
      codes_OI: near the integers 0..15.
      scales_OSG, mins_OSG: near the integers 0..63.
      d_OS, dmin_OS: relative changes of the starting d and dmin.
    """

    codes_OI: Float32[Array, "*O I"]
    scales_OSG: Float32[Array, "*O S 8"]
    mins_OSG: Float32[Array, "*O S 8"]
    d_OS: Float32[Array, "*O S"]
    dmin_OS: Float32[Array, "*O S"]


@jax.custom_jvp
def straight_through(value: Array, rounded: Array) -> Array:
    """Returns `rounded` to the bit, with the derivative of `value`."""
    del value
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def latent(solution: Q4K, weight_OI: Float[Array, "*O I"] | None = None, displacement: float = 0.0) -> Latent:
    """Returns the centres of the cells that a solution chose, or points of them displaced towards the weights."""
    codes_OSGN = jnp.asarray(solution.codes_OSGN).astype(jnp.float32)
    if weight_OI is not None:
        step_OSG, offset_OSG = steps(solution)
        ideal_OSGN = (weight_OI.reshape(codes_OSGN.shape) + offset_OSG[..., None]) / jnp.where(
            step_OSG == 0, jnp.inf, step_OSG
        )[..., None]
        # The cell is not left: hardened, the latent values are the solution still.
        codes_OSGN += displacement * jnp.clip(ideal_OSGN - codes_OSGN, -0.49, 0.49)
    return Latent(
        codes_OSGN.reshape(solution.shape),
        jnp.asarray(solution.scales_OSG).astype(jnp.float32),
        jnp.asarray(solution.mins_OSG).astype(jnp.float32),
        jnp.zeros(solution.d_OS.shape, jnp.float32),
        jnp.zeros(solution.dmin_OS.shape, jnp.float32),
    )


def _nearest(value: Array, top: int) -> Array:
    return jnp.clip(jnp.round(value), 0, top)


def _half(start_OS: Array, change_OS: Array) -> tuple[Array, Array]:
    """A changed d or dmin in float32, and the same in float16; one sum and one product round alike in every program."""
    value_OS = start_OS.astype(jnp.float32) * jnp.maximum(1.0 + change_OS, 0.0)
    return value_OS, value_OS.astype(jnp.float16)


def harden(values: Latent, start: Q4K) -> Q4K:
    """Returns what latent values stand for, as it is written to the file."""
    return Q4K(
        _half(jnp.asarray(start.d_OS), values.d_OS)[1],
        _half(jnp.asarray(start.dmin_OS), values.dmin_OS)[1],
        _nearest(values.scales_OSG, MAX_SCALE).astype(jnp.uint8),
        _nearest(values.mins_OSG, MAX_SCALE).astype(jnp.uint8),
        _nearest(values.codes_OI, MAX_CODE).astype(jnp.uint8).reshape(start.codes_OSGN.shape),
    )


def stair(value: Array, temperature: Array) -> Array:
    """Returns floor(u) + (f(u - floor(u)) - f(0)) / (f(1) - f(0)), f(x) = sigmoid((x - 1/2) / temperature).

    Continuous; u where the temperature is high, round(u) where it is low.
    """
    low = jnp.floor(value)
    edge = jax.nn.sigmoid(-0.5 / temperature)
    return low + (jax.nn.sigmoid((value - low - 0.5) / temperature) - edge) / (1.0 - 2.0 * edge)


def weights(values: Latent, start: Q4K, temperature: Array | None = None) -> Float32[Array, "*O I"]:
    """Returns the weights of the hardened values, differentiable in the latent ones.

    The derivative of a weight is that of d s u - dmin m at the rounded values of the other factors. Where the
    `temperature` is above zero codes are soft, and have the derivative of their stair.
    """

    def half(start_OS, change_OS):
        value_OS, half_OS = _half(jnp.asarray(start_OS), change_OS)
        return straight_through(value_OS, half_OS.astype(jnp.float32))[..., None]

    def integer(value, top):
        return straight_through(value, _nearest(value, top))

    step_OSG = half(start.d_OS, values.d_OS) * integer(values.scales_OSG, MAX_SCALE)
    offset_OSG = half(start.dmin_OS, values.dmin_OS) * integer(values.mins_OSG, MAX_SCALE)
    codes_OI = integer(values.codes_OI, MAX_CODE)
    if temperature is not None:
        soft_OI = jnp.clip(stair(values.codes_OI, jnp.where(temperature > 0, temperature, 1.0)), 0, MAX_CODE)
        codes_OI = jnp.where(temperature > 0, soft_OI, codes_OI)
    codes_OSGN = codes_OI.reshape(*step_OSG.shape, SUB_BLOCK)
    return (step_OSG[..., None] * codes_OSGN - offset_OSG[..., None]).reshape(values.codes_OI.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The loss, without an array of tokens by vocabulary


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def distillation_loss(
    student_ND: Float[Array, "N D"],
    table_VD: Float[Array, "V D"],
    teacher_ND: Float[Array, "N D"],
    teacher_table_VD: Float[Array, "V D"],
    weight_N: Float32[Array, "N"],
    chunk: int,
) -> Float32[Array, ""]:
    """Sum over tokens of weight_N KL(teacher || student) in nats, from final hidden states and output matrices.

    Logits of `chunk` tokens exist at a time. Their gradients with respect to the student's hidden states and output
    matrix are formed in the forward pass, when the logits are at hand, and only scaled in the backward pass. Logits and
    sums are float32, products have the dtype of the matrices; the teacher's side and the weights have no gradient.
    """
    return _loss_forward(student_ND, table_VD, teacher_ND, teacher_table_VD, weight_N, chunk)[0]


def _loss_forward(student_ND, table_VD, teacher_ND, teacher_table_VD, weight_N, chunk):
    count, width = student_ND.shape
    dtype = table_VD.dtype
    precision = "highest" if dtype == jnp.float32 else "default"
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def split(x):
        # A chunk takes every K-th token, so that rows sharded over devices stay so within each chunk.
        padded = jnp.pad(x, ((0, -count % chunk), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1)

    def body(state, inputs):
        loss, gradient_VD = state
        student_CD, teacher_CD, weight_C = inputs
        log_p_CV = jax.nn.log_softmax(product("cd,vd->cv", teacher_CD, teacher_table_VD))
        log_q_CV = jax.nn.log_softmax(product("cd,vd->cv", student_CD, table_VD))
        p_CV = jnp.exp(log_p_CV)
        loss += jnp.sum(weight_C * jnp.sum(p_CV * (log_p_CV - log_q_CV), axis=-1))
        slope_CV = ((jnp.exp(log_q_CV) - p_CV) * weight_C[:, None]).astype(dtype)
        gradient_VD += product("cv,cd->vd", slope_CV, student_CD)
        return (loss, gradient_VD), product("cv,vd->cd", slope_CV, table_VD)

    inputs = (split(student_ND.astype(dtype)), split(teacher_ND.astype(teacher_table_VD.dtype)), split(weight_N))
    start = (jnp.float32(0.0), jnp.zeros(table_VD.shape, jnp.float32))
    (loss, gradient_VD), gradient_KCD = jax.lax.scan(body, start, inputs)
    gradient_ND = gradient_KCD.swapaxes(0, 1).reshape(-1, width)[:count].astype(student_ND.dtype)
    return loss, (gradient_ND, gradient_VD.astype(dtype))


def _loss_backward(chunk, residuals, cotangent):
    return *(cotangent.astype(gradient.dtype) * gradient for gradient in residuals), None, None, None


distillation_loss.defvjp(_loss_forward, _loss_backward)


def model_loss(
    student: Qwen35,
    teacher: Qwen35,
    tokens_BT: Int[Array, "B T"],
    weight_BT: Float32[Array, "B T"],
    *,
    chunk: int,
    remat: bool = True,
) -> Float32[Array, ""]:
    """Sum over tokens of weight_BT KL(teacher || student) in nats, each token with what both say of its successor."""
    pairs = []
    for model, again in ((student, remat), (teacher, False)):
        hidden_BTD = model.hidden(tokens_BT, remat=again)
        pairs += [hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), model.head()]
    return distillation_loss(*pairs, weight_BT.reshape(-1), min(chunk, weight_BT.size))


# ---------------------------------------------------------------------------------------------------------------------
# The student


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Student:
    """A model's tensors in the layout of the model: of latent values, or of the Q4K and float32 leaves they began as.

    `blocks[p][name]` holds the stack [R, ...] of layers p, p + period, ... A vector's latent value is its shift in
    units of its root mean square; that of `ssm_a`, which must stay negative, is the logarithm of a factor.
    """

    token_embd: Any
    blocks: list[dict[str, Any]]
    output_norm: Any
    output: Any


def start_of(config: ModelConfig, tensors: Mapping[str, Any]) -> Student:
    """Returns what refinement starts from: Q4K and float32 tensors in the layout of a student."""

    def stack(names):
        parts = [jax.tree.map(jnp.asarray, tensors[name]) for name in names]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    blocks = []
    for position, kind in enumerate(config.layer_types[: config.period]):
        layers = range(position, config.num_hidden_layers, config.period)
        members = {name: [tensor_name(layer, name) for layer in layers] for name in config.block_shapes(kind)}
        blocks.append({name: stack(names) for name, names in members.items()})
    names = ["token_embd.weight", "output_norm.weight"] + ["output.weight"] * (not config.tie_word_embeddings)
    token_embd, output_norm, *output = (jax.tree.map(jnp.asarray, tensors[name]) for name in names)
    return Student(token_embd, blocks, output_norm, output[0] if output else None)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda leaf: isinstance(leaf, kind)


def initial(start: Student, target: Student | None = None, displacement: float = 0.0) -> Student:
    """Returns the student whose hardened values are `start`, its codes displaced towards the weights of `target`."""

    def begin(leaf, weight=None):
        return latent(leaf, weight, displacement) if isinstance(leaf, Q4K) else jnp.zeros_like(leaf)

    return jax.tree.map(begin, *((start,) if target is None else (start, target)), is_leaf=_is(Q4K))


def kinds(student: Student) -> Student:
    """Returns the kind, one of KINDS, of every leaf of a student."""
    matrix = Latent("codes", "scales", "scales", "d", "d")
    return jax.tree.map(lambda leaf: matrix if isinstance(leaf, Latent) else "vectors", student, is_leaf=_is(Latent))


def _values(matrix: Callable[[Latent, Q4K], Any], student: Student, start: Student) -> Student:
    """Applies `matrix` to every matrix, and gives every vector its value."""

    def value(path, leaf, start_leaf):
        if isinstance(leaf, Latent):
            return matrix(leaf, start_leaf)
        if getattr(path[-1], "key", None) == "ssm_a":
            return start_leaf * jnp.exp(leaf)
        return start_leaf + jnp.sqrt(jnp.mean(jnp.square(start_leaf), axis=-1, keepdims=True)) * leaf

    return jax.tree_util.tree_map_with_path(value, student, start, is_leaf=_is(Latent))


def model_of(
    config: ModelConfig, student: Student, start: Student, dtype=jnp.float32, temperature: Array | None = None
) -> Qwen35:
    """Returns the model that the file would hold, its matrices in `dtype`, differentiable in the student."""
    tree = _values(lambda leaf, start_leaf: weights(leaf, start_leaf, temperature).astype(dtype), student, start)
    blocks = [BLOCKS[kind](config, stacked) for kind, stacked in zip(config.layer_types[: config.period], tree.blocks)]
    return Qwen35(config, tree.token_embd, blocks, tree.output_norm, tree.output)


def harden_student(config: ModelConfig, student: Student, start: Student) -> dict[str, Array | Q4K]:
    """Returns the tensors of the file: every matrix as Q4K, every vector as float32."""
    tree = _values(harden, student, start)
    tensors = {"token_embd.weight": tree.token_embd, "output_norm.weight": tree.output_norm}
    if tree.output is not None:
        tensors["output.weight"] = tree.output
    for layer in range(config.num_hidden_layers):
        repeat = layer // config.period
        for name, stacked in tree.blocks[layer % config.period].items():
            tensors[tensor_name(layer, name)] = jax.tree.map(lambda leaf: leaf[repeat], stacked)  # noqa: B023
    return tensors
