"""A model rounded to Q4_K, matrix by matrix, under a recipe.

Letters: B batch, T time, W windows, D model width, V vocabulary, O out features, I in features.

    tensors, statistics -> equalize -> per matrix: Problem -> steps -> Q4K

A matrix's problem is its weight and its two shaped Grams. With `sequential` the Grams of its input are measured again
on the partly quantized model x^ and the target becomes the matrix that best maps x^ to what the original gives on x.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sqjax import mesh as meshes
from sqjax import rounding
from sqjax.config import READERS, ModelConfig, is_matrix, tensor_name
from sqjax.folding import equalize
from sqjax.model import Block, Qwen35
from sqjax.objective import Problem, cholesky, damp, matmul, shape_gram, truncate_gram
from sqjax.q4_k import Q4K, SUPER_BLOCK, dequantize
from sqjax.run import InputError
from sqjax.statistics import Statistics

# Numbers of the weights and Grams that are worked on at once: a step of descent moves all of them through memory.
ROOM = {"cpu": 1 << 25, "gpu": 1 << 28, "tpu": 1 << 28}

# Memory of a device for each of several at a time.
_BYTES_AT_ONCE = 24 << 30

Step = Callable[[Problem, Q4K | None], Q4K]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How codes and scales are chosen; every field can be set in a recipe's TOML file.

    Attributes:
      steps: names of the steps, in order: `nearest`, `importance`, `search`, `feedback`, `two_sided_feedback`,
        `descend_codes`, `descend_scales`.
      embedding_steps: the same for the embedding and the output matrix; empty means `steps`.
      sweeps: sweeps of each descent.
      equalize: fold channel scales into norm gains and neighbouring rows first.
      gamma_in, gamma_out: shaping strengths, the powers of the eigenvalues of the input and output Grams; 0 takes the
        identity.
      damping_in, damping_out: added to the eigenvalues, in units of their mean.
      rank_in, rank_out: eigenvalues that are kept, the others being replaced by their mean; 0 keeps all.
      sequential: measure inputs again on the partly quantized model, and match what the original gives. Costs four more
        passes of every block, of the original and of the quantized model, over `sequential_windows`.
      sequential_windows: calibration windows that sequential rounding reads.
      correction_damping: ridge of the regression that finds the matched target, in units of the mean eigenvalue.
    """

    steps: tuple[str, ...]
    embedding_steps: tuple[str, ...] = ()
    sweeps: int = 2
    equalize: bool = False
    gamma_in: float = 1.0
    gamma_out: float = 0.0
    damping_in: float = 0.01
    damping_out: float = 0.01
    rank_in: int = 0
    rank_out: int = 0
    sequential: bool = False
    sequential_windows: int = 1024
    correction_damping: float = 0.01

    def __post_init__(self):
        for name in (*self.steps, *self.embedding_steps):
            if name not in STEPS:
                raise InputError(f"a recipe has no step {name!r}; the steps are {', '.join(STEPS)}")
        for names in (self.steps, self.embedding_steps or self.steps):
            if not names or names[0].startswith(("descend", "two_sided")):
                raise InputError("a recipe starts with nearest, importance, search or feedback")

    @property
    def needs_statistics(self) -> bool:
        """Whether any step looks at the Grams."""
        return set((*self.steps, *self.embedding_steps)) != {"nearest"}


STEPS: Mapping[str, Step] = {
    "nearest": lambda problem, _: rounding.to_nearest(problem),
    "importance": lambda problem, _: rounding.by_importance(problem),
    "search": lambda problem, _: rounding.search_scales(problem),
    "feedback": rounding.feedback,
    "two_sided_feedback": rounding.two_sided_feedback,
    "descend_codes": rounding.descend_codes,
    "descend_scales": rounding.descend_scales,
}


def solve(problems: Sequence[Problem], recipe: Recipe, names: Sequence[str] = ()) -> list[Q4K]:
    """Shapes the Grams of matrices of one shape as the recipe says and chains its steps on all of them at once.

    The matrices are shared by all devices of all hosts, and every host gets every solution.

    Args:
      problems: matrices and their Grams as they were measured.
      names: the steps, those of the recipe unless given.
    """
    return _chained(_shaped(_spread(problems), recipe), names or recipe.steps, recipe.sweeps, len(problems))


def solve_shaped(problems: Sequence[Problem], names: Sequence[str], sweeps: int) -> list[Q4K]:
    """Chains steps on problems whose Grams are shaped already, as `solve` does."""
    return _chained(_spread(problems), names, sweeps, len(problems))


def _chained(stacked: Problem, names: Sequence[str], sweeps: int, count: int) -> list[Q4K]:
    solution = None
    for name in names:
        if name in ("nearest", "importance"):
            # These are llama.cpp's bit for bit, by programs of their own that take one matrix.
            host = stacked if len(jax.devices()) == 1 else jax.tree.map(jnp.asarray, meshes.to_host(stacked))
            each = [jax.tree.map(lambda leaf: leaf[i], host) for i in range(len(host.weight_OI))]  # noqa: B023
            solution = _spread([STEPS[name](problem, None) for problem in each])
        elif name in ("search", "feedback"):
            solution = STEPS[name](stacked, solution)
        else:
            options = {"sweeps": sweeps} if name.startswith("descend") else {}
            solution = jax.vmap(functools.partial(STEPS[name], **options))(stacked, solution)
    if len(jax.devices()) > 1:
        solution = jax.tree.map(jnp.asarray, meshes.to_host(solution))
    return [jax.tree.map(lambda leaf: leaf[index], solution) for index in range(count)]  # noqa: B023


def _spread(problems: Sequence[Any]) -> Any:
    """Stacks problems or solutions; several devices get as many each, the last of them filled up with copies."""
    mesh = meshes.create()
    if mesh.size == 1:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    problems = [*problems, *[problems[0]] * (-len(problems) % mesh.size)]
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *problems)
    return meshes.place(stacked, mesh, meshes.BY_BATCH)


def _shaped(stacked: Problem, recipe: Recipe) -> Problem:
    """Returns stacked problems under the recipe's shaping."""
    gram_in_MII, gram_out_MOO = stacked.gram_in_II, None
    gram_in_MII = shape_gram(truncate_gram(gram_in_MII, recipe.rank_in), recipe.gamma_in, recipe.damping_in)
    if recipe.gamma_out and stacked.gram_out_OO is not None:
        gram_out_MOO = truncate_gram(stacked.gram_out_OO, recipe.rank_out)
        gram_out_MOO = shape_gram(gram_out_MOO, recipe.gamma_out, recipe.damping_out)
    return Problem(stacked.weight_OI.astype(jnp.float32), gram_in_MII, gram_out_MOO)


# ---- one matrix


def table_problems(
    weight_VD: Float[Array, "V D"],
    roles: Sequence[tuple[Float[Array, " V"], Float[Array, "D D"]]],
    buckets: int = 16,
) -> tuple[list[Problem], Callable[[Sequence[Q4K]], Q4K]]:
    """Returns problems for a matrix whose rows cost differently in several roles, and what joins their solutions.

    Where row v errs by e it costs sum_r w_rv e^T M_r e. The tied embedding has two roles: as the head, with the Gram of
    final hidden states and the softmax's weight; as the table, with the Gram of gradients and the token's frequency.
    Rows are sorted by the share of the last role, into buckets that share one Gram.
    """
    rows = weight_VD.shape[0]
    traces = [jnp.trace(gram_DD) for _, gram_DD in roles]
    costs_VR = jnp.stack([weight_V * trace for (weight_V, _), trace in zip(roles, traces)], axis=1)
    shares_VR = costs_VR / jnp.sum(costs_VR, axis=1, keepdims=True)
    order_V = jnp.argsort(shares_VR[:, -1])
    if len(roles) > 1:
        count = next(count for count in range(buckets, 0, -1) if rows % count == 0)
    else:
        # Rows of one role share their Gram; they come in parts only where the whole would not fit a device.
        least = max(1, weight_VD.size >> 27)
        count = next(count for count in range(least, rows + 1) if rows % count == 0)
    problems = []
    for rows_R in order_V.reshape(count, -1):
        share_R = jnp.mean(shares_VR[rows_R], axis=0)
        gram_DD = sum(share * gram_DD / trace for share, (_, gram_DD), trace in zip(share_R, roles, traces))
        problems.append(Problem(weight_VD[rows_R], gram_DD))
    inverse_V = jnp.argsort(order_V)
    return problems, lambda solutions: jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[inverse_V], *solutions)


def _round_table(weight_VD: Float[Array, "V D"], roles: Sequence[tuple[Array, Array]], recipe: Recipe) -> Q4K:
    problems, join = table_problems(weight_VD, roles)
    # As many buckets at once as there are devices.
    size = len(jax.devices())
    groups = (problems[start : start + size] for start in range(0, len(problems), size))
    return join([solution for group in groups for solution in solve(group, recipe, recipe.embedding_steps)])


def table_roles(name: str, config: ModelConfig, statistics: Statistics) -> list[tuple[Array, Array]]:
    """Returns the roles of the embedding or of a separate output matrix, head first."""
    # A row that the text never met still matters a little: as if it had been met a tenth of a time.
    floor = 0.1 / statistics.tokens
    head = (statistics.head_weight_V + floor, statistics.head_gram_DD)
    lookup = (statistics.lookup_frequency_V + floor, statistics.lookup_gram_DD)
    if name == "output.weight":
        return [head]
    return [head, lookup] if config.tie_word_embeddings else [lookup]


# ---- a model


def quantize(
    config: ModelConfig,
    tensors: Mapping[str, Array],
    statistics: Statistics | None,
    recipe: Recipe,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Array | Q4K]:
    """Rounds every matrix of a model; vectors come back as float32, matrices as Q4K.

    Raises:
      InputError: the recipe needs statistics and there are none.
    """
    # Rows that are no multiple of a super-block stay as they are: the writer falls back to other types for them.
    shapes = config.tensor_shapes().items()
    matrices = [name for name, shape in shapes if is_matrix(name, shape) and shape[1] % SUPER_BLOCK == 0]
    result: dict[str, Array | Q4K] = {name: tensors[name] for name in config.tensor_shapes()}
    report = _counter(len(matrices), progress)
    if not recipe.needs_statistics:
        for name in matrices:
            result[name] = rounding.to_nearest(Problem(jnp.asarray(tensors[name]).astype(jnp.float32)))
            report(1)
        return result
    if statistics is None:
        raise InputError("this recipe needs statistics; give --statistics DIR, or --text and --tokens to measure them")
    load = lambda name: jnp.asarray(tensors[name]).astype(jnp.float32)  # noqa: E731
    if recipe.equalize or recipe.sequential:
        tensors = {name: load(name) for name in config.tensor_shapes()}
    if recipe.equalize:
        tensors, statistics = equalize(config, tensors, statistics, recipe.damping_in)
    # Matrices that are rounded one by one come to the device one by one: a large model need not fit it whole.
    whole = set() if recipe.sequential else set(matrices)
    result = {name: load(name) for name in config.tensor_shapes() if name not in whole}

    def round_table(name: str) -> dict[str, Q4K]:
        return {name: _round_table(load(name), table_roles(name, config, statistics), recipe)}

    def round_group(names: Sequence[str]) -> dict[str, Q4K]:
        problems = [Problem(load(n), *map(jnp.asarray, statistics.grams(n))) for n in names]
        return dict(zip(names, solve(problems, recipe)))

    tables = (name for name in ("token_embd.weight", "output.weight") if name in matrices)
    tasks = [functools.partial(round_table, name) for name in tables]
    if not recipe.sequential:
        groups = groups_of_one_shape(config, matrices, ROOM[jax.default_backend()] * len(jax.devices()))
        tasks += [functools.partial(round_group, group) for group in groups]
    for solutions in _side_by_side(tasks, _at_once()):
        result |= solutions
        report(len(solutions))
    if recipe.sequential:
        return _round_sequentially(config, tensors, statistics, recipe, result, report)
    return {name: result[name] for name in config.tensor_shapes()}


def _at_once() -> int:
    """Matrices, or groups of them, that are worked on at once: while one is compiled for, the device has another."""
    # Several devices meet in each program, and must do so in one order. On a CPU an interruption should be heeded soon.
    if len(jax.devices()) > 1 or jax.default_backend() == "cpu":
        return 1
    return int(np.clip((meshes.device_memory() or 0) // _BYTES_AT_ONCE, 1, 3))


def _side_by_side(tasks: Sequence[Callable[[], Any]], count: int) -> Iterator[Any]:
    """Yields what tasks return, in their order, `count` of them running at a time."""
    if count == 1:
        yield from (task() for task in tasks)
        return
    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(lambda task: task(), tasks)


def groups_of_one_shape(config: ModelConfig, matrices: Sequence[str], room: int) -> Iterator[list[str]]:
    """Cuts the blocks' matrices into groups of one shape, whose weights and Grams are `room` numbers at most."""
    shapes = config.tensor_shapes()
    for names in _of_one_shape({name: shapes[name] for name in matrices if name.startswith("blk.")}):
        rows, columns = shapes[names[0]]
        most = max(1, room // (rows * columns + rows**2 + columns**2))
        # Groups of one size share one program.
        size = -(-len(names) // -(-len(names) // most))
        yield from (names[start : start + size] for start in range(0, len(names), size))


def _of_one_shape(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    names: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        names.setdefault(shape, []).append(name)
    return list(names.values())


def _counter(total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return report


def dequantized(tensors: Mapping[str, Array | Q4K]) -> dict[str, Array]:
    """Returns the tensors with every Q4K replaced by the weights that it stands for."""
    return {name: dequantize(value) if isinstance(value, Q4K) else value for name, value in tensors.items()}


def _round_sequentially(config, tensors, statistics, recipe, result, report):
    teacher = Qwen35.from_tensors(config, tensors)
    windows_WT = _full_windows(statistics.windows_WT, recipe.sequential_windows)
    teacher_WTD = teacher.embed(windows_WT)
    student_WTD = jnp.take(dequantized(result)["token_embd.weight"], windows_WT, axis=0)
    for layer, kind in enumerate(config.layer_types):
        original, student = teacher.block(layer), teacher.block(layer)
        for attributes in READERS[kind]:
            own_II, cross_II = paired_grams(original, student, teacher_WTD, student_WTD, attributes[0])
            problems = {}
            for attribute in attributes:
                name = tensor_name(layer, attribute)
                if tensors[name].shape[1] % SUPER_BLOCK:
                    continue
                target_OI = matched_target(tensors[name], own_II, cross_II, recipe.correction_damping)
                problems[attribute] = Problem(target_OI, own_II, jnp.asarray(statistics.outputs[name]))
            for group in _of_one_shape({name: problem.weight_OI.shape for name, problem in problems.items()}):
                solutions = solve([problems[attribute] for attribute in group], recipe)
                for attribute, solution in zip(group, solutions):
                    result[tensor_name(layer, attribute)] = solution
                    setattr(student, attribute, nnx.Param(dequantize(solution)))
                    report(1)
        teacher_WTD, student_WTD = run_block(original, teacher_WTD), run_block(student, student_WTD)
    return result


def _full_windows(windows_WT: np.ndarray, count: int) -> Int[Array, "W T"]:
    """Windows without padding where there are any; else padding is read as token 0, which no earlier token sees."""
    full = windows_WT[np.all(windows_WT >= 0, axis=1)]
    return jnp.asarray(np.maximum(full if len(full) else windows_WT, 0)[:count])


def matched_target(weight_OI: Array, own_II: Array, cross_II: Array, damping: float) -> Float[Array, "O I"]:
    """Returns the matrix W' whose output on the quantized model's input x^ is nearest to W x.

    W' = W + W (E[x x^^T] - E[x^ x^^T]) (E[x^ x^^T] + damping)^-1: ridge regression that shrinks towards W.

    References:
      Li et al., GPTAQ, 2025. https://arxiv.org/abs/2504.02692
      Zhang et al., Qronos, 2025. https://arxiv.org/abs/2505.11695
    """
    shift_OI = matmul(weight_OI, cross_II - own_II)
    return weight_OI + _solve_damped(own_II, shift_OI, damping)


@jax.jit
def _solve_damped(gram_II, rows_OI, damping):
    return jax.scipy.linalg.cho_solve((cholesky(damp(gram_II, damping)), True), rows_OI.T).T


@functools.partial(jax.jit, static_argnames="attribute")
def paired_grams(
    original: Block,
    student: Block,
    teacher_WTD: Float[Array, "W T D"],
    student_WTD: Float[Array, "W T D"],
    attribute: str,
) -> tuple[Float[Array, "I I"], Float[Array, "I I"]]:
    """Means over tokens of x^ x^^T and x x^^T, x and x^ the inputs of the named projection in either block."""

    def capture(block, x_BTD):
        inputs = {}

        def probe(name, x_BTI, y_BTO):
            inputs[name] = x_BTI
            return y_BTO

        block(x_BTD, probe)
        x_BTI = inputs[attribute]
        return x_BTI.reshape(-1, x_BTI.shape[-1]).astype(jnp.float32)

    def add(sums, pair):
        x_NI, student_NI = (capture(block, x_BTD) for block, x_BTD in zip((original, student), pair))
        new = matmul(student_NI.T, student_NI), matmul(x_NI.T, student_NI)
        return jax.tree.map(jnp.add, sums, new), None

    width = getattr(original, attribute)[...].shape[1]
    zeros = (jnp.zeros((width, width), jnp.float32),) * 2
    batched = lambda x_WTD: x_WTD.reshape(-1, math.gcd(8, x_WTD.shape[0]), *x_WTD.shape[1:])  # noqa: E731
    sums, _ = jax.lax.scan(add, zeros, (batched(teacher_WTD), batched(student_WTD)))
    tokens = teacher_WTD.shape[0] * teacher_WTD.shape[1]
    return tuple(total / tokens for total in sums)


@functools.partial(jax.jit, donate_argnums=1)
def run_block(block: Block, x_WTD: Float[Array, "W T D"]) -> Float[Array, "W T D"]:
    """Runs one block over many windows, a few at a time, into the memory of what it is given."""
    return jax.lax.map(lambda x_TD: block(x_TD[None])[0], x_WTD, batch_size=8)
