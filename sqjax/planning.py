"""What each stage needs of a device: bytes, whether that fits, the batch to take, and the least time.

Letters: D model width, V vocabulary, L layers, W weights of all matrices, G elements of all Grams, C tokens of a chunk.

Two sources for the bytes: an analytic model, below, for every device; and the TPU's own compiler, where it is installed
and asked for, whose figure then replaces the model's. Times are lower bounds: operations over the peak of the chip's
matrix units, bytes over the bandwidth of its memory, gathered weights over its links; the largest of the three counts.
Operations are those of the programs as they are, recomputation included.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqjax import aot
from sqjax.config import LINEAR, ModelConfig, is_matrix
from sqjax.run import InputError
from sqjax.sources import open_model
from sqjax.statistics import gram_sizes, parts

GB = 10**9
# Of a device's memory; the rest is the runtime's, and what the allocator cannot use.
USABLE = 0.9
# Tokens whose logits exist at a time: as the stages have it, and what is left where memory is short.
CHUNKS = (1024, 256)
_DELTA_CHUNK = 64
_MOST_PASSES = 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device: bf16 and float32 FLOP/s, bytes/s of memory and of its links, bytes of memory."""

    bf16: float
    float32: float
    bandwidth: float
    links: float
    memory: int


# TPUs compute float32 products of the highest precision as six bf16 products. Sources: cloud.google.com/tpu/docs (v5e,
# v5p, v6e: system architecture), NVIDIA's data sheets of H100 SXM and H200 SXM (dense figures, float32 without TF32).
CHIPS = {
    "v5e": Chip(197e12, 197e12 / 6, 819e9, 200e9, 16 * GB),
    "v5p": Chip(459e12, 459e12 / 6, 2765e9, 600e9, 95 * GB),
    "v6e": Chip(918e12, 918e12 / 6, 1640e9, 448e9, 32 * GB),
    "h100": Chip(989e12, 67e12, 3350e9, 450e9, 80 * GB),
    "h200": Chip(989e12, 67e12, 4800e9, 450e9, 141 * GB),
}

TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1", "h100:8", "h200:1")

_SHARED = {"vocab_size": 248320, "head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128}
_SHARED |= {"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "architectures": None}
_SHARED |= {"full_attention_interval": 4, "max_position_embeddings": 262144}


def _named(hidden, mlp, layers, heads, key_heads, value_heads, tied) -> dict[str, Any]:
    own = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    own |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "linear_num_value_heads": value_heads}
    return _SHARED | own | {"architectures": ["Qwen3_5ForCausalLM"]}


# 0.8B: the released file's sizes follow from these to the byte. 4B: config.json of fine-tuned copies on the hub
# (huggingface.co/halen214/st01), heads from apxml.com/models/qwen35-4b; tied because 4.2 billion weights then result.
# 9B: model card; untied because the release has 8.95 billion weights. 27B: model card, config.json of copies on the hub
# (huggingface.co/EclipseMist/hababa), heads and untied from github.com/THUDM/slime, scripts/models/qwen3.5-27B.sh; its
# 48 value heads from docs.modular.com (max.pipelines.architectures.qwen3_5). 2B: the width is public; layers, MLP and
# heads could NOT be verified in a config.json: they are what makes a released Q4_K_M file's 1,280,835,840 bytes 5.45
# bits per weight, as the 0.8B's is 5.52.
MODELS = {
    "qwen3.5-0.8b": _named(1024, 3584, 24, 8, 2, 16, True),
    "qwen3.5-2b": _named(2048, 6144, 24, 8, 2, 16, True),
    "qwen3.5-4b": _named(2560, 9216, 32, 16, 4, 32, True),
    "qwen3.5-9b": _named(4096, 12288, 32, 16, 4, 32, False),
    "qwen3.5-27b": _named(5120, 17408, 64, 24, 4, 48, False),
}


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of a model


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of elements that the stages' needs follow from.

    Attributes:
      weights, table, block: of all matrices, of the embedding, of the largest block.
      largest: rows of the largest Gram.
      wide: features of the widest arrays of a block, for a token.
      attention, delta: operations a token of softmax attention (a token of context) and of the delta rule.
    """

    weights: int
    table: int
    block: int
    largest: int
    wide: int
    attention: int
    delta: int


def sizes_of(config: ModelConfig) -> Sizes:
    """Counts what a model has."""
    matrices = {name: shape for name, shape in config.tensor_shapes().items() if is_matrix(name, shape)}
    blocks: dict[str, int] = {}
    for name, (rows, columns) in matrices.items():
        if name.startswith("blk."):
            layer = name.split(".")[1]
            blocks[layer] = blocks.get(layer, 0) + rows * columns
    full = sum(kind != LINEAR for kind in config.layer_types)
    dim, chunk = config.linear_key_head_dim, _DELTA_CHUNK
    delta = config.linear_num_value_heads * (12 * chunk * dim + 2 * chunk**2 + 6 * dim**2)
    return Sizes(
        weights=sum(rows * columns for rows, columns in matrices.values()),
        table=config.vocab_size * config.hidden_size,
        block=max(blocks.values()),
        largest=max(max(shape) for name, shape in matrices.items() if name.startswith("blk.")),
        wide=config.intermediate_size + config.hidden_size + config.conv_channels,
        attention=full * 2 * config.num_attention_heads * config.head_dim,
        delta=(config.num_hidden_layers - full) * delta,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Needs of the stages


@dataclasses.dataclass(frozen=True)
class Need:
    """What a device holds and does in one step of a stage.

    Attributes:
      held: bytes from the beginning of a step to its end, and for each token of the device's share of the batch.
      phases: the same of what exists one after the other: gathered weights, logits, the arrays of a block.
      flops, flops32: operations a token in bf16 and in float32.
      moved: bytes a token that memory must move at least; `moved_a_step` those of a step.
      linked: bytes a step that come over the links.
    """

    held: tuple[float, float]
    phases: tuple[tuple[float, float], ...]
    flops: float
    flops32: float
    moved: float
    moved_a_step: float
    linked: float

    def size(self, tokens: int) -> float:
        """Returns the bytes at the fullest moment of a step with so many tokens on the device."""
        held, *phases = (fixed + each * tokens for fixed, each in (self.held, *self.phases))
        return held + max(phases)


def need(config: ModelConfig, stage: str, length: int, shard: int, grams: int = 0, chunk: int = CHUNKS[0]) -> Need:
    """Returns what a stage needs of a device, `shard` of which share one copy of weights, Grams and state.

    Args:
      stage: forward, evaluation, statistics or refinement.
      length: tokens of a window.
      grams: elements of the Grams that are summed in one pass.
      chunk: tokens whose logits exist at a time; evaluation takes the smallest always.
    """
    s, d, layers = sizes_of(config), config.hidden_size, config.num_hidden_layers
    inner = s.weights - s.table * (1 if config.tie_word_embeddings else 2)
    mixing = s.attention * length + s.delta
    weights, shared = s.weights / shard, shard > 1
    # Where weights are shared, a block and the next one, or a table, are whole while they are at work.
    blocks, table = 4 * s.block * shared, 2 * s.table * shared
    passing = 2 * s.weights * (1 - 1 / shard)
    logits = 4 * min(CHUNKS[-1] if stage == "evaluation" else chunk, length) * config.vocab_size
    # What the widest block holds in float32: some eight arrays of its width, three times that with their gradients.
    forward, backward, stream = 32 * s.wide + 16 * d, 96 * s.wide + 16 * d, 4 * d * layers
    moved = 2 * layers * (2 * s.wide) + 16 * d * layers
    if stage == "forward":
        phases = ((table, 0.0), (blocks, forward))
        return Need((2 * weights, 4 * d), phases, 2 * inner + mixing, 0, moved, 2 * s.weights, passing)
    if stage == "evaluation":
        phases = ((2 * table + 6 * logits, 0.0), (blocks + table, forward))
        flops = 2 * (2 * (inner + s.table) + mixing)
        return Need((4 * weights, 12 * d), phases, flops, 0, 2 * moved, 4 * s.weights, 2 * passing)
    if stage == "statistics":
        sums = 4 * grams / shard
        phases = ((table + 5 * logits, 0.0), (blocks + sums + 8 * s.largest**2 * shared, backward))
        flops, moved_a_step = 6 * (inner + s.table) + 3 * mixing, 6 * s.weights + 3 * sums
        return Need((2 * weights + sums, stream), phases, flops, 2 * grams, 3 * moved, moved_a_step, 3 * passing)
    if stage == "refinement":
        # Latent values and two moments, where they started, both models, sums of gradients, the stream's Grams; then
        # the loss, the blocks with the output matrix's gradient and their own, and the changes of the latent values.
        phases = ((4 * s.table + 2 * table + 3 * logits, 0.0), (2 * s.table + 2 * blocks + 2 * weights, backward))
        phases += ((8 * weights, 0.0),)
        grams = layers * d**2
        flops = 2 * inner + 8 * inner + 8 * s.table + 5 * mixing + 6 * grams
        own = 21.5 * weights + 2 * grams / shard
        return Need((own, 2 * stream), phases, flops, 0, 5 * moved, 60 * weights, 6 * passing)
    raise ValueError(stage)


def rounding_cost(shape: tuple[int, int]) -> tuple[float, float]:
    """Float32 operations and bytes of one matrix: shaping, both feedbacks, three descents of two sweeps each."""
    rows, columns = shape
    shaping = 12 * (rows**3 + columns**3)
    feedback = 2 * rows * columns**2 + columns**3
    groups, sweeps = 8, 2
    # Every move of a column, of a sub-block's scale or min, meets the output Gram once for each group of rows.
    moves = sweeps * (2 * columns + 2 * columns // 32 + 2 * columns // 256)
    descent = sweeps * groups * 2 * rows**2 * (2 * columns + 4 * columns) + moves * 2 * rows * columns
    moved = 4 * (moves * (groups * rows**2 + rows * columns) + (rows + columns) * 2 * (rows * columns + rows**2))
    return shaping + feedback + descent, moved


def rounding_bytes(config: ModelConfig) -> float:
    """Bytes of the largest group of matrices that are rounded at once, with what the steps keep beside them."""
    shapes = [shape for name, shape in config.tensor_shapes().items() if is_matrix(name, shape)]
    # The embedding and the output matrix have no Gram of outputs, and come in parts of at most 2^28 weights.
    elements = [r * c + c**2 + r**2 if r < config.vocab_size else min(r * c, 1 << 28) + c**2 for r, c in shapes]
    # Stacked as measured, shaped, factored, and the pull of the descents; at least the group that fills a device.
    return 4 * 5 * max(1 << 26, *elements)


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def parse(topology: str) -> tuple[str, Chip, int]:
    """Returns the kind of chip and the number of devices that `v5e:2x4` or `h100:8` names.

    Raises:
      InputError: it names none.
    """
    kind, _, shape = topology.lower().partition(":")
    if kind not in CHIPS or not all(part.isdigit() and int(part) for part in shape.split("x")):
        raise InputError(f"{topology} is no topology; give one of {', '.join(CHIPS)} and a shape, as v5e:2x4 or h100:8")
    return kind, CHIPS[kind], math.prod(int(part) for part in shape.split("x"))


def plan(
    model: str | Path, *, topology: str | Sequence[str] = TOPOLOGIES, length: int = 2048, compile: bool = False
) -> dict[str, Any]:
    """Plans every stage of a model on each topology.

    Args:
      model: a config.json, a Hugging Face folder, a hub id, a GGUF file, or a name in MODELS.
      topology: kinds and shapes of devices, as v5e:2x4 or h100:8.
      length: tokens of a window.
      compile: take the bytes from the TPU's own compiler, for TPUs; takes minutes.

    Returns `model`, `parameters` of its matrices, and `plans`: for each topology what `stages` says.

    Raises:
      InputError: no such model or topology, or the compiler is asked for and not there.
    """
    config = read_config(model)
    topologies = [topology] if isinstance(topology, str) else list(topology)
    plans = {name: stages(config, name, length=length, compile=compile) for name in topologies}
    return {"model": str(model), "parameters": sizes_of(config).weights, "length": length, "plans": plans}


def read_config(model: str | Path) -> ModelConfig:
    """Returns the dimensions of a model: by name, from a config.json, or from whatever `open_model` opens.

    Raises:
      InputError: there is no such model.
    """
    if str(model).lower() in MODELS:
        return ModelConfig.from_huggingface(MODELS[str(model).lower()])
    path = Path(model)
    if path.suffix == ".json":
        try:
            return ModelConfig.from_huggingface(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    return open_model(model).config


def stages(
    config: ModelConfig,
    topology: str,
    *,
    length: int = 2048,
    statistics_tokens: int = 1_000_000,
    refinement_tokens: int = 16_000_000,
    compile: bool = False,
) -> list[dict[str, Any]]:
    """Returns for every stage what a device holds, whether it fits, how to share it out, and the least seconds.

    Keys: stage, fits, shard (devices that share one copy), batch (windows a step, over all devices), passes (over the
    text, for statistics), chunk (tokens whose logits exist at a time), bytes, source (model or compiler), tokens,
    seconds, bound (operations, memory or links) and, where it does not fit, needs (from how many such devices it does).

    Raises:
      InputError: no such topology, or the compiler is asked for and not there.
    """
    kind, chip, devices = parse(topology)
    tokens = {"forward": statistics_tokens, "evaluation": statistics_tokens, "statistics": statistics_tokens}
    tokens["refinement"] = refinement_tokens
    rows = [_stage(config, chip, devices, stage, length, count) for stage, count in tokens.items()]
    rows.insert(3, _rounding(config, chip, devices))
    if compile and not kind.startswith("h"):
        for row in rows:
            _compiled(config, topology, chip, row, length)
    return rows


def _stage(config: ModelConfig, chip: Chip, devices: int, stage: str, length: int, tokens: int) -> dict[str, Any]:
    found = next(_fitting(config, chip, devices, stage, length), None)
    if found is None:
        more = (2**power for power in range(1, 13) if 2**power > devices)
        enough = next((count for count in more if any(_fitting(config, chip, count, stage, length))), None)
        least = need(config, stage, length, devices, _largest(config, stage, _MOST_PASSES), CHUNKS[-1])
        return {
            "stage": stage,
            "fits": False,
            "bytes": least.size(length),
            "source": "model",
            "needs": enough,
            "shard": devices,
        }
    shard, passes, chunk, batch = found
    one = need(config, stage, length, shard, _largest(config, stage, passes), chunk)
    steps = passes * math.ceil(tokens / (batch * devices * length))
    own = passes * tokens / devices
    times = {
        "operations": own * (one.flops / chip.bf16 + one.flops32 / chip.float32),
        "memory": (own * one.moved + steps * one.moved_a_step) / chip.bandwidth,
        "links": steps * one.linked / chip.links,
    }
    result = {"stage": stage, "fits": True, "shard": shard, "batch": batch * devices, "passes": passes, "chunk": chunk}
    result |= {"bytes": one.size(batch * length), "source": "model", "tokens": tokens}
    return result | {"seconds": max(times.values()), "bound": max(times, key=times.get)}


def _fitting(config, chip, devices, stage, length) -> Iterator[tuple[int, int, int, int]]:
    """Yields (shard, passes, chunk, windows a device) that fit: the fewest passes first, then the fewest sharers."""
    for passes in range(1, _MOST_PASSES + 1) if stage == "statistics" else (1,):
        part = _largest(config, stage, passes)
        shards = [divisor for divisor in range(1, devices + 1) if devices % divisor == 0]
        for shard, chunk in itertools.product(shards, CHUNKS):
            one = need(config, stage, length, shard, part, chunk)
            windows = [count for count in (16, 8, 4, 2, 1) if one.size(count * length) <= USABLE * chip.memory]
            if windows:
                yield shard, passes, chunk, windows[0]


def _largest(config: ModelConfig, stage: str, passes: int) -> int:
    """Elements of the Grams of the pass that has most of them."""
    if stage != "statistics":
        return 0
    sizes = gram_sizes(config)
    return sum(sizes[name] for name in parts(config, passes)[0])


def _rounding(config: ModelConfig, chip: Chip, devices: int) -> dict[str, Any]:
    size = rounding_bytes(config)
    shapes = [shape for name, shape in config.tensor_shapes().items() if is_matrix(name, shape)]
    costs = [rounding_cost(shape) for shape in shapes if shape[0] < config.vocab_size]
    times = {
        "operations": sum(flops for flops, _ in costs) / chip.float32 / devices,
        "memory": sum(moved for _, moved in costs) / chip.bandwidth / devices,
    }
    result = {"stage": "rounding", "fits": size <= USABLE * chip.memory, "shard": 1, "bytes": size, "source": "model"}
    return result | {"seconds": max(times.values()), "bound": max(times, key=times.get)}


def _compiled(config: ModelConfig, topology: str, chip: Chip, row: dict[str, Any], length: int) -> None:
    """Replaces the model's bytes by the compiler's, with the batch that the model chose."""
    wanted = {"stage": row["stage"], "batch": row.get("batch"), "length": length}
    if row["stage"] == "rounding":
        shapes = {s for name, s in config.tensor_shapes().items() if name.startswith("blk.") and is_matrix(name, s)}
        wanted = {"stage": "rounding", "shape": max(shapes, key=lambda shape: shape[0] ** 2 + shape[1] ** 2)}
    elif row["stage"] == "refinement":
        settings = {"batch": row.get("batch"), "chunk": row.get("chunk"), "length": length, "dtype": "bf16"}
        wanted = {"stage": "refinement", "settings": settings | {"shard": row["shard"], "accumulate": 1}}
    elif row["stage"] == "statistics" and row["fits"]:
        wanted |= {"names": parts(config, row["passes"])[0], "chunk": row["chunk"]}
    if not row["fits"]:
        return
    found = list(aot.compiled(config, topology, [wanted], shard=row["shard"]))
    errors = [program["error"] for program in found if "error" in program]
    if errors:
        row |= {"fits": False, "source": "compiler", "error": errors[0][:200]}
        return
    size = max(program["bytes"] for program in found)
    row |= {"bytes": size, "source": "compiler", "fits": size <= chip.memory}
    row["compile_seconds"] = sum(program["seconds"] for program in found)
