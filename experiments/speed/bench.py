"""Measures every stage at a real shape on one or more GPUs, beside the device's own peak and beside transformers.

    python experiments/speed/bench.py --out bench.jsonl --seconds 520
    python experiments/speed/bench.py --only statistics,refinement --devices 1,2 --out two.jsonl
    python experiments/speed/bench.py --shape tiny --out tiny.jsonl --seconds 1200                # anywhere

Weights, text and Grams are random: what is measured does not depend on their values. Each section is a process of its
own, so that its peak memory is its own and its failure or time limit costs no other section; each prints JSON lines as
soon as it knows something, which go to --out and to the screen. Sections: peak, forward, statistics, rounding,
refinement, delta, evaluation, pipeline (all stages by their own functions, on a checkpoint that is written first or
given by --model), flags (compilation and speed under three settings of XLA) and torch (needs torch and transformers;
--torch-python runs them in another environment).

Model FLOPs are 2 a weight and token forward (the output matrix counted, the table not), 4 backward, recomputation not
counted; attention scores and the delta rule are left out, so that utilisations are slightly low.
"""

import argparse
import collections
import glob
import json
import os
import statistics as averages
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "0.8b": {"vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256}
    | {"linear_num_key_heads": 16, "linear_num_value_heads": 16},
    "nano34": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 8}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "tiny": {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2},
}
COMMON = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6}
COMMON |= {"tie_word_embeddings": True, "max_position_embeddings": 4096, "full_attention_interval": 4}
# Tokens of a window, windows of a forward batch, of a statistics batch, and of an update.
SIZES = {"0.8b": (2048, 4, 8, 32), "nano34": (512, 64, 64, 256), "tiny": (128, 2, 2, 4)}
# The largest share of the time left that a section may take.
SHARES = {
    "peak": 0.2,
    "forward": 0.3,
    "refinement": 0.4,
    "statistics": 0.5,
    "delta": 0.5,
    "evaluation": 0.5,
    "rounding": 0.6,
    "torch": 1.0,
}
# What JAX does by itself, what takes cuBLAS for every product, and what takes it without asking which of its kernels.
FLAGS = {
    "default": "",
    "cuBLAS": "--xla_gpu_enable_triton_gemm=false",
    "cuBLAS, untuned": "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0",
}
UNDER_FLAGS = ("forward", "statistics", "refinement")
SCALING = ("statistics", "refinement")
TWO_SIDED = ("feedback", "two_sided_feedback", "descend_codes", "descend_scales", "descend_codes")


def report(arguments, **values) -> None:
    """Prints one JSON line; figures keep four digits."""
    short = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    head = {"section": arguments.section, "shape": arguments.shape}
    print(json.dumps(head | short), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Clock:
    """Seconds that a block took, and how many of them the compiler did."""

    compiling = 0.0

    @classmethod
    def listen(cls) -> None:
        """Adds up what JAX says of its compilations from now on."""
        import jax

        def note(event, seconds, **_):
            if event.startswith("/jax/core/compile/"):
                cls.compiling += seconds

        jax.monitoring.register_event_duration_secs_listener(note)

    def __enter__(self):
        self.start, self.compiled = time.perf_counter(), Clock.compiling
        return self

    def __exit__(self, *_):
        self.seconds, self.compile_seconds = time.perf_counter() - self.start, Clock.compiling - self.compiled


def repeat(call, seconds: float, at_least: int = 3, at_most: int = 30) -> float:
    """Median seconds of a call that waits for its result; the first one, which compiles, is the caller's."""
    times, start = [], time.perf_counter()
    while len(times) < at_least or (time.perf_counter() - start < seconds and len(times) < at_most):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return averages.median(times)


def memory() -> dict:
    """Memory of this process at its fullest, in GiB: on its first device so far, on its host since the last call."""
    import jax

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    host = {"peak_host_gib": int(status["VmHWM"].split()[0]) / (1 << 20)}
    Path("/proc/self/clear_refs").write_text("5")
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return host if peak is None else host | {"peak_gib": peak / (1 << 30)}


def profile(arguments, name: str, call, top: int = 20) -> None:
    """Reports the kernels that cost most in one call, as shares of the time that the device was busy."""
    import jax

    if jax.default_backend() != "gpu" or arguments.brief:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                call()
            total = collections.Counter()
            for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
                for plane in jax.profiler.ProfileData.from_file(path).planes:
                    lines = [line for line in plane.lines if "Stream" in line.name] if "GPU:0" in plane.name else []
                    for event in (event for line in lines for event in line.events):
                        total[event.name] += event.duration_ns
        busy = sum(total.values())
        kernels = [[kernel[:90], round(time_ns / busy, 4)] for kernel, time_ns in total.most_common(top)]
        report(arguments, what=f"profile of {name}", busy_ms=busy / 1e6, kernels=kernels)
    except Exception as error:  # a profile that fails must not cost the section
        report(arguments, what=f"profile of {name}", error=repr(error)[:300])


def config_of(shape: str):
    """The configuration of one of SHAPES."""
    from sqjax.config import ModelConfig

    return ModelConfig.from_huggingface({"architectures": ["Qwen3_5ForCausalLM"]} | COMMON | SHAPES[shape])


def random_model(config, dtype):
    """A model on the device whose values neither die nor explode."""
    import jax
    import jax.numpy as jnp

    from sqjax.model import Qwen35

    # Not in one jitted function: it would hold a generator for each tensor, and take minutes to compile.
    tensors = {}
    for index, (name, shape) in enumerate(config.tensor_shapes().items()):
        value = jax.random.normal(jax.random.key(index), shape, dtype) * shape[-1] ** -0.5
        ones = -jnp.ones(shape) if name.endswith("ssm_a") else jnp.ones(shape)
        tensors[name] = value if len(shape) > 1 else ones
    return jax.block_until_ready(Qwen35.from_tensors(config, tensors, dtype=dtype))


def matrix_weights(config) -> int:
    """Weights that multiply every token: all matrices, of which one is the output matrix."""
    from sqjax.config import is_matrix

    shapes = {name: shape for name, shape in config.tensor_shapes().items() if is_matrix(name, shape)}
    if not config.tie_word_embeddings:
        del shapes["token_embd.weight"]
    return sum(rows * columns for rows, columns in shapes.values())


def random_tokens(config, *shape):
    """Tokens of no text."""
    import jax

    return jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def peak(arguments) -> None:
    """The device's own limits: a bfloat16 matrix product and a copy."""
    import jax
    import jax.numpy as jnp

    size = 8192 if jax.default_backend() == "gpu" else 512
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul).lower(a, b).compile()

    def ten():
        for _ in range(9):
            product(a, b)
        product(a, b).block_until_ready()

    ten()
    seconds = repeat(ten, 4.0, at_most=100) / 10
    report(arguments, what=f"bf16 product of {size}", tflops=2 * size**3 / seconds / 1e12, ms=seconds * 1e3)
    x = jnp.ones(size * size * 8, jnp.float32)
    add = jax.jit(lambda x: x + 1).lower(x).compile()
    add(x).block_until_ready()
    seconds = repeat(lambda: add(x).block_until_ready(), 2.0, at_most=50)
    report(arguments, what="copy", tb_per_second=2 * x.nbytes / seconds / 1e12)


def forward(arguments) -> None:
    """The network alone, with all logits in bfloat16, and with logits in chunks that are reduced at once."""
    import jax
    import jax.numpy as jnp

    from sqjax.delta_rule import product

    config = config_of(arguments.shape)
    length, batch, _, _ = SIZES[arguments.shape]
    model, tokens = random_model(config, jnp.bfloat16), random_tokens(config, batch, length)
    head = config.vocab_size * config.hidden_size

    def scored(model, tokens):
        rows = model.hidden(tokens).reshape(-1, min(2048, batch * length), config.hidden_size)
        return jax.lax.map(lambda rows: jax.nn.logsumexp(model.logits(rows[None])[0], axis=-1), rows)

    def all_logits(model, tokens):
        # As transformers has them; `model.logits` gives float32.
        return product("BTD,VD->BTV", model.hidden(tokens).astype(jnp.bfloat16), model.head(), jnp.bfloat16)

    variants = {
        "hidden states": (lambda model, tokens: model.hidden(tokens), matrix_weights(config) - head),
        "all logits": (all_logits, matrix_weights(config)),
        "log normalizers": (scored, matrix_weights(config)),
    }
    for name, (function, weights) in list(variants.items())[-1 if arguments.brief else 0 :]:
        with Clock() as clock:
            program = jax.jit(function).lower(model, tokens).compile()
        call = lambda program=program: jax.block_until_ready(program(model, tokens))  # noqa: E731
        call()
        seconds = repeat(call, 2.0 if arguments.brief else 5.0)
        rate = batch * length / seconds
        values = {"tokens_per_second": rate, "ms": seconds * 1e3, "batch": batch, "length": length}
        values |= utilisation(arguments, rate, 2 * weights) | {"compile_seconds": clock.seconds} | memory()
        report(arguments, what=name, temp_gib=program.memory_analysis().temp_size_in_bytes / (1 << 30), **values)
        profile(arguments, name, call)


def utilisation(arguments, rate: float, flops: float) -> dict:
    """Model FLOPs a second and their share of the measured peak of all devices in use."""
    achieved = rate * flops / 1e12
    share = {"utilisation": achieved / (arguments.peak * arguments.devices_in_use)} if arguments.peak else {}
    return {"model_tflops": achieved} | share


def statistics(arguments) -> None:
    """Both Grams of every matrix, by the stage's own program."""
    import jax
    import jax.numpy as jnp

    from sqjax import mesh as meshes
    from sqjax.statistics import accumulator, empty, spread

    config = config_of(arguments.shape)
    length, _, batch, _ = SIZES[arguments.shape]
    batch *= len(jax.devices())
    mesh = meshes.create()
    model = meshes.place(random_model(config, jnp.dtype(arguments.dtype)), mesh)
    state = {"sums": spread(empty(model), mesh)}
    text = (random_tokens(config, batch, length), jnp.ones((batch, length)))
    text = (*meshes.place(text, mesh, meshes.BY_BATCH), jax.random.key(0))

    def call():
        state["sums"] = jax.block_until_ready(accumulator()(model, state["sums"], *text, mesh=mesh))

    with Clock() as clock:
        call()
    # A million tokens where there is time for them: what is measured is then what a run of statistics takes.
    within = 3.0 if arguments.brief else 0.4 * arguments.seconds
    seconds = repeat(call, within, at_most=max(3, arguments.tokens // (batch * length)))
    rate = batch * length / seconds
    grams = sum(2 * (rows**2 + columns**2) for rows, columns in blocks_of(config))
    values = {"tokens_per_second": rate, "seconds_per_million": 1e6 / rate, "batch": batch, "length": length}
    values |= {"gram_flops_per_token": grams, "dtype": arguments.dtype, "compile_seconds": clock.compile_seconds}
    report(arguments, what="Grams", **values, **utilisation(arguments, rate, 4 * matrix_weights(config)), **memory())
    profile(arguments, "statistics", call)


def blocks_of(config) -> list:
    """Shapes of the matrices of all blocks."""
    from sqjax.config import is_matrix

    return [s for name, s in config.tensor_shapes().items() if name.startswith("blk.") and is_matrix(name, s)]


def rounding(arguments) -> None:
    """Every matrix under a two-sided recipe with descent, on random Grams with a wide spectrum."""
    import jax
    import jax.numpy as jnp

    from sqjax.quantizer import Recipe, quantize
    from sqjax.statistics import Statistics, input_name

    config = config_of(arguments.shape)
    sizes = {size for shape in blocks_of(config) for size in shape} | {config.hidden_size}

    @jax.jit
    def wide(rows):
        return jnp.matmul(rows.T, rows, precision="highest") / rows.shape[0]

    grams = {}
    for size in sizes:
        spread = jnp.arange(1, size + 1, dtype=jnp.float32)[None] ** -0.5
        grams[size] = wide(jax.random.normal(jax.random.key(size), (2 * size, size)) * spread)
    shapes = {name: shape for name, shape in config.tensor_shapes().items() if name.startswith("blk.")}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "conv1d" not in name}
    inputs = {input_name(name): grams[shape[1]] for name, shape in matrices.items()}
    outputs = {name: grams[shape[0]] for name, shape in matrices.items()}
    often = jnp.full(config.vocab_size, 1.0 / config.vocab_size)
    square = grams[config.hidden_size]
    windows = jax.device_get(random_tokens(config, 4, 128))
    measured = Statistics(inputs, outputs, square, often, square, often, 1 << 20, windows)
    recipe = Recipe(steps=TWO_SIDED, embedding_steps=("feedback", "descend_codes"), gamma_in=0.75, gamma_out=0.5)
    tensors = random_model(config, jnp.float32).to_tensors()
    for pass_name in ("first pass, with compilation", "second pass"):
        marks = []

        def note(done, total, marks=marks, begin=time.perf_counter()):  # noqa: B008
            marks.append([done, round(time.perf_counter() - begin, 2), total])

        with Clock() as clock:
            written = jax.block_until_ready(quantize(config, tensors, measured, recipe, note))
        values = {"seconds": clock.seconds, "compile_seconds": clock.compile_seconds, "tensors": marks[-1][-1]}
        report(arguments, what=pass_name, **values, done_at=[mark[:2] for mark in marks], **memory())
        del written


def refinement(arguments) -> None:
    """One update: teacher forward, student forward and backward, Adam on latent values."""
    import jax
    import jax.numpy as jnp

    from sqjax import mesh as meshes
    from sqjax.programs import abstract_curvature
    from sqjax.refinement import Refinement
    from sqjax.settings import build, parse_overrides
    from sqjax.student import initial
    from sqjax.updates import BY_WINDOW, State, fitted, make_update, optimizer_of

    config = config_of(arguments.shape)
    length, _, _, batch = SIZES[arguments.shape]
    asked = {"length": length, "batch": batch} | parse_overrides(arguments.settings)
    settings = fitted(config, build(Refinement, asked, "--settings"))
    mesh = meshes.create()
    start = meshes.place(random_start(config, jax.random.key(2)), mesh)
    student = jax.jit(initial)(start)
    state = {"state": meshes.place(State(student, optimizer_of(settings).init(student)), mesh)}
    teacher = meshes.place(random_model(config, settings.compute_dtype), mesh)
    tokens = random_tokens(config, settings.accumulate, batch // settings.accumulate, length)
    weight = jnp.full(tokens.shape, 1.0 / tokens.size)
    rest = (*meshes.place((tokens, weight), mesh, BY_WINDOW), *map(jnp.float32, (1.0, 0.3, 0.8, 0.2)))
    update = make_update(config, settings, mesh)
    count, width = config.num_hidden_layers // config.period, config.hidden_size
    gram_RDD = jnp.broadcast_to(jnp.eye(width, dtype=settings.compute_dtype), (count, width, width))
    curvature = abstract_curvature(start) if settings.reads_curvature else None
    curvature = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), curvature)
    forms = meshes.place(([gram_RDD] * config.period, curvature), mesh)

    def call():
        state["state"], loss = update(state["state"], teacher, start, *forms, *rest)
        loss.block_until_ready()

    with Clock() as clock:
        call()
    seconds = repeat(call, 3.0 if arguments.brief else 0.4 * arguments.seconds, at_most=10)
    rate = batch * length / seconds
    values = {"tokens_per_second": rate, "ms": seconds * 1e3, "batch": batch, "length": length}
    chosen = {"micro_batches": settings.accumulate, "remat": settings.remat, "chunk": settings.chunk}
    values |= chosen | {"compile_seconds": clock.compile_seconds}
    values |= {"minutes_for_16m": 16e6 / rate / 60, "dtype": str(jnp.dtype(settings.compute_dtype))}
    report(arguments, what="update", **values, **utilisation(arguments, rate, 8 * matrix_weights(config)), **memory())
    profile(arguments, "update", call)


def random_start(config, key):
    """A student's start with random codes and scales of a usual size."""
    import jax
    import jax.numpy as jnp

    from sqjax.config import is_matrix
    from sqjax.q4_k import Q4K
    from sqjax.student import start_of

    tensors = {}
    for index, (name, shape) in enumerate(config.tensor_shapes().items()):
        if not is_matrix(name, shape):
            tensors[name] = jnp.ones(shape) * (-1.0 if name.endswith("ssm_a") else 1.0)
            continue
        rows, blocks = shape[0], shape[1] // 256
        d = jnp.full((rows, blocks), shape[1] ** -0.5 / 48 / 5, jnp.float16)
        scales = jnp.full((rows, blocks, 8), 48, jnp.uint8)
        code_key = jax.random.fold_in(key, index)
        codes = jax.random.randint(code_key, (rows, blocks, 8, 32), 0, 16, jnp.uint8)
        tensors[name] = Q4K(d, d * jnp.float16(7.5), scales, scales, codes)
    return start_of(config, tensors)


def delta(arguments) -> None:
    """The gated delta rule in chunks against its definition, and against what its bytes and operations need."""
    import jax
    import jax.numpy as jnp

    from sqjax import delta_kernels, delta_rule

    config = config_of(arguments.shape)
    length, _, batch, _ = SIZES[arguments.shape]
    keys, heads, dim = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim
    random = [jax.random.key(i) for i in range(5)]
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k = (unit(0.3 * i + jax.random.normal(random[i], (batch, length, keys, dim))) for i in range(2))
    v = jax.random.normal(random[2], (batch, length, heads, dim))
    log_decay = -0.1 * jax.random.uniform(random[3], (batch, length, heads))
    inputs = (q, k, v, log_decay, jax.random.uniform(random[4], (batch, length, heads)))
    exact = jax.jit(lambda *inputs: delta_rule.recurrent(*inputs)[0])(*inputs)
    # In one array, as the model has them: kernels read it where it is.
    half = jnp.concatenate([x.astype(jnp.bfloat16) for x in inputs[:3]], axis=2)
    chunk = 64
    flops = batch * length * heads * (12 * chunk * dim + 2 * chunk * chunk + 6 * dim * dim)
    moved = batch * length * dim * (2 * (2 * keys + heads) + 4 * heads)

    def run(name, function, *operands, scale=1.0):
        with Clock() as clock:
            program = jax.jit(function).lower(*operands).compile()
        result = jax.block_until_ready(program(*operands))
        seconds = repeat(lambda: jax.block_until_ready(program(*operands)), 3.0)
        values = {"ms": seconds * 1e3, "tflops": scale * flops / seconds / 1e12, "compile_seconds": clock.seconds}
        values |= {"gb_least": scale * moved / 1e9, "gflop": scale * flops / 1e9}
        if arguments.peak and arguments.copy:
            # The longer of what the bytes and what the products take at the rates that this device was seen to reach.
            bounds = {"bytes": scale * moved / arguments.copy / 1e9, "products": scale * flops / arguments.peak / 1e9}
            values |= {"bound_ms": max(bounds.values()), "bound_by": max(bounds, key=bounds.__getitem__)}
        if not isinstance(result, tuple):
            values["relative_error"] = float(jnp.linalg.norm(result - exact) / jnp.linalg.norm(exact))
        report(arguments, what=name, batch=batch, length=length, **values)
        profile(arguments, name, lambda: jax.block_until_ready(program(*operands)))

    def chunked(dtype, kernels=False):
        return lambda *x: delta_rule.chunked(*x, dtype=dtype, kernels=kernels)[0]

    run("chunked, f32", chunked(jnp.float32), *inputs)
    forms = {"chunked": False}
    if delta_kernels.serve(dim, chunk, jnp.bfloat16):
        forms["kernels"] = True
    for name, kernels in forms.items():
        rule = chunked(jnp.bfloat16, kernels)
        function = lambda qkv, *x, rule=rule: rule(*jnp.split(qkv, (keys, 2 * keys), axis=2), *x)  # noqa: E731
        gradient = jax.grad(lambda *x: jnp.sum(function(*x) * v), argnums=(0, 1, 2))  # noqa: B023
        run(f"{name}, bf16", function, half, *inputs[3:])
        run(f"{name}, bf16, with gradient", gradient, half, *inputs[3:], scale=3.0)
    run("recurrent, f32", lambda *x: delta_rule.recurrent(*x)[0], *inputs)


def evaluation(arguments) -> None:
    """Scores of windows of 512 tokens under two models, as `sqjax evaluate` makes them; bfloat16 for comparison."""
    import jax
    import jax.numpy as jnp

    from sqjax import evaluation

    config = config_of(arguments.shape)
    length = min(512, SIZES[arguments.shape][0])
    for dtype, windows in (("bfloat16", 256), ("float32", 128)):
        count = windows if arguments.shape != "tiny" else 4
        text = evaluation.Sequences.of_windows(jax.device_get(random_tokens(config, count, length)))
        reference = random_model(config, jnp.dtype(dtype))
        student = jax.tree.map(lambda leaf: leaf * jnp.ones((), leaf.dtype), reference)
        with Clock() as clock:
            evaluation.score(reference, student, text)
        seconds = repeat(lambda: evaluation.score(reference, student, text), 5.0, at_least=1, at_most=5)  # noqa: B023
        rate = count * length / seconds
        values = {"tokens_per_second": rate, "seconds_per_million": 1e6 / rate, "windows": count, "length": length}
        values |= utilisation(arguments, rate, 4 * matrix_weights(config)) | {"compile_seconds": clock.compile_seconds}
        report(arguments, what=f"scores, {dtype}", **values, **memory())


def pipeline(arguments) -> None:
    """From a checkpoint to a verified file by the package's own functions: seconds and peak memory after each stage."""
    from sqjax import making, measuring, sources
    from sqjax.gguf_file import inspect

    with tempfile.TemporaryDirectory() as scratch:
        folder, begin = Path(scratch), time.perf_counter()
        model, refined = (
            arguments.model or checkpoint_of(arguments.shape, folder / "checkpoint"),
            folder / "refined.gguf",
        )
        tokens = {"tokens": arguments.pipeline_tokens}
        tokens |= {"text": [arguments.pipeline_text]} if arguments.pipeline_text else {}
        length = min(512, SIZES[arguments.shape][0])
        batch = 4 if arguments.shape == "tiny" else 32
        settings = [f"length={length}", f"batch={batch}", "watch_windows=8", "watch_every=100000"]
        settings += ["checkpoint_every=100000"]
        distilled = tokens | {"tokens": arguments.updates * batch * length}
        stages = {
            "load": lambda: sources.load_model(sources.open_model(model)),
            "statistics": lambda: making.calibrate(model, folder / "statistics", length=length, batch=8, **tokens),
            "spectral": lambda: making.quantize(
                model, folder / "spectral.gguf", statistics=folder / "statistics", settings=arguments.recipe
            ),
            "refinement": lambda: making.refine(
                model, folder / "spectral.gguf", refined, settings=settings, **distilled
            ),
            "verification": lambda: measuring.evaluate(
                refined, reference=model, length=length, windows=8, dtype="bf16"
            ),
        }
        total, host = 0.0, []
        for name, stage in stages.items():
            with Clock() as clock:
                result = stage()
            total += clock.seconds
            values = {"seconds": clock.seconds, "compile_seconds": clock.compile_seconds, "total_seconds": total}
            if name == "refinement":
                lines = (folder / "refined.gguf.run" / "metrics.jsonl").read_text().splitlines()
                values |= {"tokens_per_second": json.loads(lines[-1])["tokens_per_second"]}
            host.append(memory())
            report(arguments, what=name, **values, **host[-1])
            del result
        whole = {"seconds": total, "seconds_with_checkpoint": time.perf_counter() - begin}
        whole |= {key: max(stage[key] for stage in host) for key in host[0]}
        # To compare with; no part of the way.
        making.convert(model, folder / "plain.gguf")
        same = refined.stat().st_size == (folder / "plain.gguf").stat().st_size
        whole |= {"bytes": refined.stat().st_size, "same_size_as_plain": same, "types": inspect(refined)["types"]}
        report(arguments, what="all", **whole, tokens=tokens["tokens"], updates=arguments.updates)


def checkpoint_of(shape: str, folder: Path) -> Path:
    """A checkpoint of a shape: the embedded model for the smallest, random weights for the real one."""
    if shape == "tiny":
        return ROOT / "sqjax" / "demo8"
    if shape != "0.8b":
        raise SystemExit(f"the shape {shape} needs --model")
    script = ROOT / "experiments" / "real_size" / "make_checkpoint.py"
    subprocess.run([sys.executable, script, folder], check=True)
    return folder


def torch_forward(arguments) -> None:
    """The same forward pass in transformers: eager, everything compiled, layers compiled."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Qwen3_5TextConfig(**COMMON, **SHAPES[arguments.shape], dtype="bfloat16")
    length, batch, _, _ = SIZES[arguments.shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3_5ForCausalLM(config).to(torch.bfloat16).eval()
        tokens = torch.randint(0, config.vocab_size, (batch, length))
    head = config.vocab_size * config.hidden_size
    weights = head + sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.no_grad()
    def measure(name, function, flops):
        start = time.perf_counter()
        function()
        wait()
        first = time.perf_counter() - start
        seconds = repeat(lambda: (function(), wait()), 5.0)
        rate = batch * length / seconds
        values = {"tokens_per_second": rate, "ms": seconds * 1e3, "batch": batch, "length": length}
        if device == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
        report(arguments, what=name, first_call_seconds=first, **values, **utilisation(arguments, rate, flops))

    full = lambda: model(input_ids=tokens, use_cache=False).logits  # noqa: E731
    trunk = lambda: model.model(input_ids=tokens, use_cache=False).last_hidden_state  # noqa: E731
    measure("eager, hidden states", trunk, 2 * (weights - head))
    measure("eager, all logits", full, 2 * weights)
    compiled = torch.compile(model, dynamic=False)
    measure("compiled, all logits", lambda: compiled(input_ids=tokens, use_cache=False).logits, 2 * weights)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    measure("compiled layers, all logits", full, 2 * weights)
    measure("compiled layers, hidden states", trunk, 2 * (weights - head))


SECTIONS = {"peak": peak, "forward": forward, "statistics": statistics, "refinement": refinement, "delta": delta}
SECTIONS |= {"evaluation": evaluation, "rounding": rounding, "pipeline": pipeline, "torch": torch_forward}


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def run_section(arguments, name: str, devices: int, limit: float, found: dict, out, flags: str | None = None) -> None:
    """Runs a section in a process of its own until its limit, and adds the device's rates to what was `found`.

    With a key of FLAGS it is run under those flags alone, briefly, and compiles everything anew.
    """
    python = arguments.torch_python if name == "torch" else sys.executable
    command = [python, __file__, "--section", name, "--seconds", f"{limit:.0f}"]
    for option in ("shape", "tokens", "dtype", "pipeline-tokens", "updates"):
        command += [f"--{option}", str(getattr(arguments, option.replace("-", "_")))]
    command += ["--pipeline-text", str(arguments.pipeline_text)] * (arguments.pipeline_text is not None)
    command += [text for rate, value in found.items() for text in (f"--{rate}", str(value))]
    command += ["--model", str(arguments.model)] * (arguments.model is not None) + ["--brief"] * (flags is not None)
    for option in ("recipe", "settings"):
        given = getattr(arguments, option)
        command += [f"--{option}", *given] * bool(given)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))} if devices else {}
    environment = os.environ | visible | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    head = {"devices": devices or 1}
    if flags is not None:
        environment |= {"XLA_FLAGS": FLAGS[flags], "JAX_ENABLE_COMPILATION_CACHE": "false"}
        head |= {"flags": flags}
    process = subprocess.Popen(
        [*command, "--devices", str(devices or 1)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip
    killer = threading.Timer(limit, process.kill)
    killer.start()
    begin, tail = time.monotonic(), collections.deque(maxlen=15)
    for line in process.stdout:
        if not line.startswith('{"section"'):
            tail.append(line.rstrip())
            continue
        record = json.loads(line) | head
        if name == "peak":
            found |= {"peak": record["tflops"]} if "tflops" in record else {"copy": record["tb_per_second"]}
        write(out, record)
    code = process.wait()
    killer.cancel()
    end = {"section": name, "what": "end", "code": code, "seconds": round(time.monotonic() - begin, 1)} | head
    if code:
        end["error"] = ["out of time"] * (time.monotonic() - begin >= limit) + list(tail)
    write(out, end)


def write(out, record) -> None:
    line = json.dumps(record)
    out.write(line + "\n")
    out.flush()
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--shape", choices=SHAPES, default="0.8b")
    parser.add_argument("--only", default="peak,forward,refinement,statistics,delta,evaluation,rounding,torch")
    parser.add_argument("--devices", default="0", help="numbers of GPUs, as in 1,2; 0 for all that are there")
    parser.add_argument("--seconds", type=float, default=520.0, help="after which no section goes on")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="most tokens of the statistics")
    parser.add_argument("--settings", nargs="+", default=[], help="of an update, as in accumulate=4 chunk=2048")
    parser.add_argument("--dtype", default="bfloat16", help="of the matrices in the statistics")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s, where it is known")
    parser.add_argument("--copy", type=float, default=0.0, help="TB/s, where it is known")
    parser.add_argument("--model", type=Path, help="checkpoint of the section pipeline; the shape's own unless given")
    parser.add_argument("--pipeline-tokens", type=int, default=1 << 17, help="tokens of its statistics")
    parser.add_argument("--pipeline-text", type=Path, help="its text; the package's own prompts unless given")
    parser.add_argument("--updates", type=int, default=50, help="of its refinement")
    parser.add_argument("--recipe", nargs="+", default=[], help="overrides of its recipe, `spectral`")
    parser.add_argument("--brief", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        arguments.devices_in_use = int(arguments.devices)
        if arguments.section != "torch":
            Clock.listen()
        SECTIONS[arguments.section](arguments)
        return
    start, found = time.monotonic(), {"peak": arguments.peak, "copy": arguments.copy}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w") as out:
        sections = planned(arguments)
        for number, (name, devices, flags) in enumerate(sections):
            left = arguments.seconds - (time.monotonic() - start)
            if left < 15:
                write(out, {"section": name, "what": "not run: no time left"})
                continue
            share = 1.0 if number == len(sections) - 1 else SHARES.get(name, 1.0)
            run_section(arguments, name, devices, left * share, found, out, flags)


def planned(arguments) -> list[tuple[str, int, str | None]]:
    """Sections in order, each with its number of devices (0 for all) and its flags (None for the environment's)."""
    found = []
    for name in arguments.only.split(","):
        if name == "flags":
            found += [(section, 0, flags) for flags in FLAGS for section in UNDER_FLAGS]
        else:
            counts = [int(n) for n in arguments.devices.split(",")] if name in SCALING else [0]
            found += [(name, devices, None) for devices in counts]
    return found


if __name__ == "__main__":
    main()
