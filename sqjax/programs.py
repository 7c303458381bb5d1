"""Every jitted program of every stage, with shapes for arguments: to compile without weights, devices or text.

Letters: A micro-batches, B windows, T tokens of a window, M matrices rounded at once, O out features, I in features,
D model width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sqjax import evaluation, quantizer, rounding, statistics, updates
from sqjax import mesh as meshes
from sqjax.config import ModelConfig, is_matrix
from sqjax.equalize import equalizing_scale
from sqjax.mesh import BY_BATCH, COPIED
from sqjax.model import BLOCKS, Qwen35, abstract
from sqjax.objective import Problem
from sqjax.q4_k import Q4K, SUB_BLOCK, SUPER_BLOCK
from sqjax.refinement import Refinement
from sqjax.scales import search_super_blocks
from sqjax.student import Student, initial, model_of, settled, start_of
from sqjax.updates import BY_WINDOW, State


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function and the shapes, dtypes and placement of its arguments.

    Attributes:
      stage: forward, statistics, rounding, refinement or evaluation.
      name: which of the stage's programs.
      function: what `jax.jit` returned.
      arguments, options: abstract arrays, and static values.
    """

    stage: str
    name: str
    function: Callable[..., Any]
    arguments: Sequence[Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def compile(self, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """Compiles for the devices of the mesh that the arguments are placed on, by the compiler's own options."""
        return self.function.lower(*self.arguments, **self.options).compile(compiler_options=options)


def placed(tree: Any, mesh: Mesh, specs: Any = COPIED) -> Any:
    """Returns abstract arrays as `mesh.place` would place them."""
    if isinstance(specs, jax.sharding.PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    put = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(put, tree, specs)


def _array(mesh: Mesh, shape: Sequence[int], dtype=jnp.float32, spec=COPIED) -> jax.ShapeDtypeStruct:
    return placed(jax.ShapeDtypeStruct(tuple(shape), dtype), mesh, spec)


def _model(config: ModelConfig, mesh: Mesh, dtype) -> Qwen35:
    model = abstract(config, dtype)
    return placed(model, mesh, meshes.rows(model, mesh))


def forward(config: ModelConfig, mesh: Mesh, batch: int, length: int, dtype=jnp.bfloat16) -> Program:
    """The network on a batch of windows, to its final hidden states."""
    tokens_BT = _array(mesh, (batch, length), jnp.int32, BY_BATCH)
    return Program("forward", "hidden", evaluation._hidden, (_model(config, mesh, dtype), tokens_BT), {"mesh": mesh})


def score(config: ModelConfig, mesh: Mesh, batch: int, length: int, chunk: int = 256, dtype=jnp.bfloat16) -> Program:
    """Scores of one batch from the hidden states of two models."""
    model = _model(config, mesh, dtype)
    hidden_BTD = _array(mesh, (batch, length, config.hidden_size), jnp.float32, BY_BATCH)
    arguments = (model, model, hidden_BTD, hidden_BTD, _array(mesh, (batch, length), jnp.int32, BY_BATCH))
    return Program("evaluation", "score", evaluation._score_batch, arguments, {"chunk": chunk, "mesh": mesh})


def statistics_of(
    config: ModelConfig,
    mesh: Mesh,
    batch: int,
    length: int,
    dtype=jnp.bfloat16,
    names: Sequence[str] = statistics.PROJECTIONS,
    chunk: int = 1024,
) -> Iterator[Program]:
    """One batch added to the Grams of the named projections, and what devices have of them added up in the end."""
    model = abstract(config, dtype)
    sums = jax.eval_shape(functools.partial(statistics.empty, names=tuple(names)), model)
    wide = jax.eval_shape(functools.partial(statistics.spread, mesh=mesh), sums)
    wide = placed(wide, mesh, statistics.spread_specs(sums, mesh))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    tokens_BT, mask_BT = (_array(mesh, (batch, length), kind, BY_BATCH) for kind in (jnp.int32, jnp.float32))
    arguments = (_model(config, mesh, dtype), wide, tokens_BT, mask_BT, key)
    yield Program("statistics", "accumulate", statistics.accumulator(), arguments, {"mesh": mesh, "chunk": chunk})
    yield Program("statistics", "folded", statistics.folded, (wide,), {"mesh": mesh})


def abstract_start(config: ModelConfig) -> Student:
    """Returns what refinement starts from, without values."""
    tensors: dict[str, Any] = {}
    for name, shape in config.tensor_shapes().items():
        tensors[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        if is_matrix(name, shape):
            tensors[name] = solution(shape)
    return jax.eval_shape(functools.partial(start_of, config), tensors)


def abstract_curvature(start: Student) -> Student:
    """Returns the second derivatives by `updates.local_forms`, without values."""

    def pairs(leaf, count=1):
        if not isinstance(leaf, Q4K):
            return None
        *stack, rows, columns = leaf.shape
        sides = (*stack, rows, 1), (*stack, 1, columns)
        return [tuple(jax.ShapeDtypeStruct(side, jnp.float32) for side in sides)] * count

    blocks = [{name: pairs(leaf) for name, leaf in block.items()} for block in start.blocks]
    return Student(pairs(start.token_embd, 1 + (start.output is None)), blocks, None, pairs(start.output))


def solution(shape: Sequence[int]) -> Q4K:
    """Returns a quantized matrix [..., O, I] without values."""
    *rows, columns = shape
    blocks = (*rows, -(-columns // SUPER_BLOCK))
    groups = (*blocks, SUPER_BLOCK // SUB_BLOCK)
    shapes = [(blocks, jnp.float16)] * 2 + [(groups, jnp.uint8)] * 2 + [((*groups, SUB_BLOCK), jnp.uint8)]
    return Q4K(*(jax.ShapeDtypeStruct(*each) for each in shapes))


def update(config: ModelConfig, mesh: Mesh, settings: Refinement) -> Program:
    """One update of refinement; the settings are fitted to a device."""
    start = abstract_start(config)
    optimizer = updates.optimizer_of(settings)
    state = jax.eval_shape(lambda start: (student := initial(start), State(student, optimizer.init(student)))[1], start)
    state, start = (placed(tree, mesh, meshes.rows(tree, mesh)) for tree in (state, start))
    shape = (settings.accumulate, settings.batch // settings.accumulate, settings.length)
    batches = (_array(mesh, shape, kind, BY_WINDOW) for kind in (jnp.int32, jnp.float32))
    teacher = _model(config, mesh, settings.compute_dtype)
    count, width = config.num_hidden_layers // config.period, config.hidden_size
    grams = [jax.ShapeDtypeStruct((count, width, width), settings.compute_dtype)] * config.period
    grams = placed(grams, mesh, updates.gram_rows(grams, mesh)) if settings.reads_stream else []
    curvature = abstract_curvature(start) if settings.reads_curvature else None
    curvature = placed(curvature, mesh, meshes.rows(curvature, mesh))
    arguments = (state, teacher, start, grams, curvature, *batches, *[_array(mesh, ())] * 4)
    return Program("refinement", "update", updates.make_update(config, settings, mesh), arguments)


def refinement(config: ModelConfig, mesh: Mesh, settings: Refinement) -> Iterator[Program]:
    """How refinement starts, one update, and the model that is watched; the settings state micro-batches and dtype."""
    step = update(config, mesh, settings)
    state, _, start, *_ = step.arguments
    yield Program("refinement", "initial student", jax.jit(initial), (start,))
    yield Program("refinement", "settled student", jax.jit(settled), (state.student,))
    yield step
    model = jax.jit(lambda student, start: model_of(config, student, start, settings.compute_dtype))
    yield Program("refinement", "student's model", model, (state.student, start))


def matrix_steps(mesh: Mesh, shape: tuple[int, int], count: int = 1) -> Iterator[Program]:
    """The programs that round `count` matrices of one shape on each device, and those that measure their inputs."""
    rows, columns = shape
    many = count * mesh.size
    array = functools.partial(_array, mesh, spec=BY_BATCH)
    weight_MOI, gram_MII, gram_MOO = (array((many, *s)) for s in (shape, (columns, columns), (rows, rows)))
    problem = Problem(weight_MOI, gram_MII, gram_MOO)
    start = placed(solution((many, *shape)), mesh, BY_BATCH)
    block = placed(solution((many, rows, SUPER_BLOCK)), mesh, BY_BATCH)
    target_MON, number = array((many, rows, SUPER_BLOCK)), _array(mesh, (), jnp.int32)
    name = f"{rows}x{columns}"
    make = functools.partial(Program, "rounding")
    yield make(f"factors of {columns}", jax.jit(jax.vmap(rounding._feedback_factors)), (gram_MII,))
    shifted = (weight_MOI, weight_MOI, gram_MII, array((many, columns)), number)
    yield make(f"target of {name}", rounding._shifted_target, shifted)
    rounded = (weight_MOI, weight_MOI, gram_MII, target_MON, block, number)
    yield make(f"feedback in {name}", rounding._round_super_block, rounded)
    for step, options in (
        (rounding.two_sided_feedback, {}),
        (rounding.descend_codes, {"sweeps": 2}),
        (rounding.descend_scales, {"sweeps": 2}),
    ):
        function = jax.jit(jax.vmap(functools.partial(step, **options)))
        yield make(f"{step.__name__} of {name}", function, (problem, start))
    one = functools.partial(_array, mesh)
    solved = (one((columns, columns)), one(shape), one(()))
    yield make(f"matched target of {name}", quantizer._solve_damped, solved)
    reader = [(one(shape), one((rows,)))]
    scaled = (reader, one((columns,)), one((columns,), jnp.int32))
    yield make(f"channel scales of {name}", equalizing_scale, scaled)


def search(mesh: Mesh, count: int) -> Program:
    """The search of scales of `count` super-blocks."""
    arrays = [_array(mesh, (count, SUPER_BLOCK), spec=BY_BATCH)] * 2
    return Program("rounding", "search of scales", jax.jit(search_super_blocks), arrays)


def sequential(config: ModelConfig, mesh: Mesh, batch: int, length: int) -> Iterator[Program]:
    """What rounding layer by layer runs beside the steps: each kind of block, and the Grams before its last matrix."""
    x_WTD = _array(mesh, (batch, length, config.hidden_size))
    for kind in dict.fromkeys(config.layer_types):
        tensors = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in config.block_shapes(kind).items()}
        block = placed(jax.eval_shape(functools.partial(BLOCKS[kind], config), tensors), mesh)
        grams = (block, block, x_WTD, x_WTD)
        yield Program("rounding", f"Grams in a {kind} block", quantizer.paired_grams, grams, {"attribute": "ffn_down"})
        yield Program("rounding", f"a {kind} block", quantizer.run_block, (block, x_WTD))
