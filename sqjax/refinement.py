"""Distillation into the format: how a file is refined, and the loss that refinement lowers.

Letters: B batch, T time, N tokens (B T), C tokens of a chunk, K chunks, D model width, V vocabulary, R repeats of the
period.

The loss is KL(teacher || student), and for a share of it the error of the residual stream after every block, in parts
of the stream's size, under the Gram of the gradients there: the same divergence by a quadratic form, seen where it
arises, with less noise.

References:
  Romero et al., FitNets: Hints for Thin Deep Nets, 2015 (errors inside the network). https://arxiv.org/abs/1412.6550
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int

from sqjax.delta_rule import product
from sqjax.mesh import whole
from sqjax.model import Qwen35
from sqjax.run import InputError

# What is trained at a rate of its own; mins go with the scales and dmin with d.
KINDS = ("codes", "scales", "d", "vectors")
# Rates suit batches of 32 windows where there are thousands of updates. Fewer tokens ask for larger rates or, which is
# the same, for smaller batches (experiments/refinement).
_MOST_WINDOWS, _MANY_UPDATES = 32, 400
SCHEDULES: Mapping[str, Callable[[int], optax.Schedule]] = {
    "linear": lambda updates: optax.linear_schedule(1.0, 0.0, updates),
    "cosine": lambda updates: optax.cosine_decay_schedule(1.0, updates),
    "constant": lambda updates: optax.constant_schedule(1.0),
}
# Entries of the vocabulary whose logits say how large they all are.
_FIRST = 8192
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# Arguments of `Qwen35.trunk`.
REMATS: Mapping[str, Mapping[str, bool]] = {
    "blocks": {"remat": True, "keep": False},
    "between": {"remat": True, "keep": True},
    "none": {"remat": False, "keep": False},
}


def dtype_of(asked: str) -> str:
    """Returns the name of a dtype of matrices on this machine's devices: auto takes f32 on CPU, else bf16."""
    return asked if asked != "auto" else "f32" if jax.default_backend() == "cpu" else "bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """How a file is refined; every field can be set in a TOML file.

    Attributes:
      codes_rate, scales_rate: Adam's rates, in quantization steps an update.
      d_rate: the same for d and dmin, in units of their size.
      vectors_rate: the same for the F32 tensors, in units of their root mean square.
      train_vectors: whether F32 tensors are trained at all.
      beta1, beta2: decay of Adam's moments.
      residual_share: share of the loss that compares the residual stream after every block, not the logits, at first.
      residual_share_end: the same in the last update; it changes evenly.
      schedule: linear, cosine or constant, after the warm-up.
      warmup: updates over which rates rise from zero.
      softness: temperature of the stair at first; 0 for hard codes all along.
      softness_end: temperature at the end of the soft part.
      soft_share: share of the updates in which codes are soft.
      displacement: how far u starts from the code towards the weight that was rounded, 1 being all of the way.
      concavity: share of the loss's curvature in each code that it is robbed of in the last update; it rises evenly.
      updates: number of updates; 0 for as many as the tokens that were asked for.
      length: tokens of a window.
      batch: windows of an update; 0 for 32, or where tokens are few for as few as leave 400 updates.
      accumulate: micro-batches that an update is summed over; 0 for as few as the device's memory allows.
      chunk: tokens whose logits exist at a time; 0 for as many as a share of the device's memory holds.
      remat: what the backward pass computes anew: `blocks`, what lies `between` their matrix products, or `none`; auto
        keeps the products where there is room for them.
      shard: devices that share one copy of the weights, the latent values and the optimizer's state.
      dtype: bf16 or f32 for matrices and products; auto takes f32 on CPU, else bf16. State is float32 in either.
      watch: suite or text whose KL chooses the best state; `heldout` takes windows of the calibration text.
      watch_every: updates between two looks at it.
      watch_windows: windows held out, or windows and conversations read of another text; 0 for all of that.
      patience: looks without a new best before the run stops; 0 never stops.
      divergence: multiple of the best KL beyond which the run is rolled back.
      keep_best: write the best state, not the last.
      checkpoint_every: updates between two checkpoints, or more where they would take over a tenth of the time.
      checkpoints: how many are kept.
    """

    codes_rate: float = 0.012
    scales_rate: float = 0.0
    d_rate: float = 0.0005
    vectors_rate: float = 0.0005
    train_vectors: bool = True
    beta1: float = 0.9
    beta2: float = 0.9
    residual_share: float = 0.95
    residual_share_end: float = 0.6
    schedule: str = "cosine"
    warmup: int = 20
    softness: float = 0.3
    softness_end: float = 0.002
    soft_share: float = 0.9
    displacement: float = 0.6
    concavity: float = 0.3
    updates: int = 0
    length: int = 512
    batch: int = 0
    accumulate: int = 0
    chunk: int = 0
    remat: str = "auto"
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
        choices = {"schedule": tuple(SCHEDULES), "dtype": ("auto", *DTYPES), "remat": ("auto", *REMATS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"the setting {name} is {getattr(self, name)!r}; choose {', '.join(allowed)}")
        for name in ("length", "watch_every", "checkpoint_every", "checkpoints", "shard"):
            if getattr(self, name) < 1:
                raise InputError(f"the setting {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("batch", "updates", "concavity"):
            if getattr(self, name) < 0:
                raise InputError(f"the setting {name} is {getattr(self, name)}; it must not be negative")
        if self.softness and not 0 < self.softness_end <= self.softness:
            raise InputError(f"softness falls from {self.softness} to {self.softness_end}; set softness_end below it")
        for name in ("residual_share", "residual_share_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"the setting {name} is {getattr(self, name)}; it must be from 0 to 1")
        if not any(self.rates.values()):
            raise InputError("all rates are zero, so that nothing would be refined; set one of them")

    @property
    def rates(self) -> dict[str, float]:
        """Rate of each kind of latent value."""
        return {kind: getattr(self, f"{kind}_rate") * (kind != "vectors" or self.train_vectors) for kind in KINDS}

    @property
    def compute_dtype(self) -> Any:
        """Dtype of matrices and products on this machine's devices."""
        return DTYPES[dtype_of(self.dtype)]

    @property
    def reads_stream(self) -> bool:
        """Whether the residual stream is ever in the loss."""
        return bool(self.residual_share or self.residual_share_end)

    @property
    def reads_curvature(self) -> bool:
        """Whether the loss is robbed of curvature in soft codes."""
        return bool(self.concavity and self.softness and self.codes_rate)

    def planned(self, tokens: int) -> "Refinement":
        """Returns the same with its batch and its number of updates stated, as they follow from the tokens."""
        batch, devices = self.batch, jax.device_count()
        if not batch:
            windows = _MOST_WINDOWS if self.updates else tokens // (self.length * _MANY_UPDATES)
            # A power of two, so that few sizes are ever compiled.
            batch = 1 << max(min(windows, _MOST_WINDOWS), 1).bit_length() - 1
            batch = -(-batch // devices) * devices
        updates = self.updates or max(1, -(-tokens // (batch * self.length)))
        return dataclasses.replace(self, batch=batch, updates=updates)

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

    def shares(self, updates: int) -> Float32[np.ndarray, "U"]:
        """Share of the residual stream in the loss of each update."""
        return np.linspace(self.residual_share, self.residual_share_end, updates, dtype=np.float32)

    def concavities(self, updates: int) -> Float32[np.ndarray, "U"]:
        """Share of its curvature in each code that the loss is robbed of in each update."""
        return np.linspace(0.0, self.concavity, updates, dtype=np.float32)


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
        ideal_CV = product("cd,vd->cv", teacher_CD, teacher_table_VD)
        logits_CV = product("cd,vd->cv", student_CD, table_VD)
        # Logits are read as seldom as can be, since that is what a large vocabulary costs: for all three sums at once,
        # and for the slopes. What is subtracted before the exponential need not be the largest: no logit is 88 above
        # the best of thousands, where float32 would end. Nothing of this cancels but numbers of the size of these
        # distances, so that KL is good to some 1e-6 nats.
        top_C1, ideal_top_C1 = (x_CV[:, :_FIRST].max(axis=-1, keepdims=True) for x_CV in (logits_CV, ideal_CV))
        exponential_CV, ideal_exponential_CV = jnp.exp(logits_CV - top_C1), jnp.exp(ideal_CV - ideal_top_C1)
        sum_C1, ideal_sum_C1 = (x_CV.sum(axis=-1, keepdims=True) for x_CV in (exponential_CV, ideal_exponential_CV))
        off_CV = (ideal_CV - ideal_top_C1) - (logits_CV - top_C1)
        off_C1 = jnp.sum(ideal_exponential_CV * off_CV, axis=-1, keepdims=True)
        kl_C1 = off_C1 / ideal_sum_C1 - jnp.log(ideal_sum_C1) + jnp.log(sum_C1)
        loss += jnp.sum(weight_C * kl_C1[:, 0])
        slope_CV = exponential_CV / sum_C1 - ideal_exponential_CV / ideal_sum_C1
        slope_CV = (slope_CV * weight_C[:, None]).astype(dtype)
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


@jax.custom_vjp
def residual_loss(
    off_BTD: Float32[Array, "B T D"], gram_DD: Float[Array, "D D"], weight_BT: Float32[Array, "B T"]
) -> Float32[Array, ""]:
    """Sum over tokens of weight_BT 1/2 e^T G e for errors e of the residual stream after a block, in nats.

    G is the Gram of the gradients there of log-likelihoods of labels that the model itself draws, in a run that of the
    file at its start: its Fisher information. KL(teacher || student) begins as this form. Its gradient, G e, is formed
    with it, in the type of G; G and the weights have none.
    """
    return _residual_forward(off_BTD, gram_DD, weight_BT)[0]


def _residual_forward(off_BTD, gram_DD, weight_BT):
    pulled_BTD = weight_BT[..., None] * product("BTD,DE->BTE", off_BTD.astype(gram_DD.dtype), gram_DD, jnp.float32)
    return 0.5 * jnp.sum(off_BTD * pulled_BTD), pulled_BTD.astype(gram_DD.dtype)


def _residual_backward(pulled_BTD, cotangent):
    return cotangent * pulled_BTD.astype(jnp.float32), None, None


residual_loss.defvjp(_residual_forward, _residual_backward)


def by_size(weight_BT: Float32[Array, "B T"], stream_BTD: Float[Array, "B T D"], eps: float) -> Float32[Array, "B T"]:
    """Weights of tokens over the mean square of their stream, no less than the norm's eps, each window's sum kept.

    What reads the stream divides it by its size first, so that an error counts as a share of that. Sums are kept by
    window, so that no weight depends on how a batch is divided.
    """
    share_BT = weight_BT / jnp.maximum(jnp.mean(jnp.square(stream_BTD), axis=-1), eps)
    sum_B1, share_B1 = (jnp.sum(x_BT, axis=-1, keepdims=True) for x_BT in (weight_BT, share_BT))
    # A window of padding has no weight.
    return share_BT * sum_B1 / jnp.where(sum_B1 > 0, share_B1, 1.0)


def model_loss(
    student: Qwen35,
    teacher: Qwen35,
    grams: Sequence[Float[Array, "R D D"]],
    tokens_BT: Int[Array, "B T"],
    weight_BT: Float32[Array, "B T"],
    *,
    share: Float32[Array, ""] | float,
    chunk: int,
    remat: str = "blocks",
) -> tuple[Float32[Array, ""], ...]:
    """Returns (1 - share) KL + share times the mean of the blocks' `residual_loss` by size, and KL.

    KL is the sum over tokens of weight_BT KL(teacher || student) in nats, each token with what both say of its
    successor. `grams` are those of the residual stream, a stack for each position in the period; without them the loss
    is KL.
    """
    table_VD, teacher_table_VD = student.head(), teacher.head()
    embedded_BTD, teacher_BTD = student.embed(tokens_BT), teacher.embed(tokens_BT)
    losses = []
    if grams:
        teacher_BTD, streams = teacher.trunk(teacher_BTD, after=lambda x_BTD, _: x_BTD)
        given = jax.lax.stop_gradient(list(zip(streams, grams, strict=True)))

        def compare(x_BTD, given):
            ideal_BTD, gram_DD = given
            sized_BT = by_size(weight_BT, ideal_BTD, teacher.config.rms_norm_eps)
            return residual_loss(x_BTD - ideal_BTD, whole(gram_DD, x_BTD.shape[-1]), sized_BT)

        student_BTD, losses = student.trunk(embedded_BTD, after=compare, given=given, **REMATS[remat])
    else:
        teacher_BTD, student_BTD = teacher.trunk(teacher_BTD), student.trunk(embedded_BTD, **REMATS[remat])
    student_ND, teacher_ND = (x_BTD.reshape(-1, x_BTD.shape[-1]) for x_BTD in (student_BTD, teacher_BTD))
    sides = (student_ND, table_VD, teacher_ND, teacher_table_VD)
    kl = distillation_loss(*sides, weight_BT.reshape(-1), min(chunk, weight_BT.size))
    return ((1.0 - share) * kl + share * jnp.mean(jnp.concatenate(losses)) if grams else kl), kl
