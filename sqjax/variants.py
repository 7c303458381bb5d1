"""One model rounded at several shaping strengths at once: Grams are decomposed once, matrices solved side by side.

Letters: K variants, V vocabulary, D model width, O out features, I in features.

Recipes that differ in nothing but shaping strength and damping pose problems of the same shapes, so that all of them
are solved as the matrices of one shape are: stacked. What `quantizer.quantize` would give for each alone comes out, up
to the order of sums.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sqjax.config import ModelConfig, is_matrix
from sqjax.folding import equalize
from sqjax.objective import Problem, shape_gram, truncate_gram
from sqjax.q4_k import Q4K, SUPER_BLOCK
from sqjax.quantizer import ROOM, Recipe, groups_of_one_shape, solve_shaped, table_problems, table_roles
from sqjax.statistics import Statistics

SHAPING = ("gamma_in", "gamma_out", "damping_in", "damping_out")


def shape_of(recipe: Recipe) -> Recipe | None:
    """Returns what recipes of one batch have in common, or None where a recipe can only be rounded alone."""
    if recipe.sequential or not recipe.needs_statistics:
        return None
    common = dict.fromkeys(SHAPING, 1.0)
    if recipe.equalize:
        # The channel scales are searched under the damped Gram.
        common["damping_in"] = recipe.damping_in
    # Without an output Gram the steps take another way.
    common["gamma_out"] = float(recipe.gamma_out != 0)
    return dataclasses.replace(recipe, **common)


def quantize_variants(
    config: ModelConfig,
    tensors: Mapping[str, Array],
    statistics: Statistics,
    recipes: Sequence[Recipe],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Array | Q4K]]:
    """Rounds a model by K recipes of one `shape_of`; returns what `quantizer.quantize` does, K times.

    Raises:
      ValueError: the recipes cannot be rounded together.
    """
    shapes = {shape_of(recipe) for recipe in recipes}
    if len(shapes) != 1 or None in shapes:
        raise ValueError("these recipes differ in more than shaping strength and damping")
    recipe = recipes[0]
    tensors = {name: jnp.asarray(tensors[name]).astype(jnp.float32) for name in config.tensor_shapes()}
    if recipe.equalize:
        tensors, statistics = equalize(config, tensors, statistics, recipe.damping_in)
    shapes = config.tensor_shapes().items()
    matrices = [name for name, shape in shapes if is_matrix(name, shape) and shape[1] % SUPER_BLOCK == 0]
    results = [dict(tensors) for _ in recipes]
    tables = ([name] for name in matrices if not name.startswith("blk."))
    groups = groups_of_one_shape(config, matrices, ROOM[jax.default_backend()] // len(recipes))
    done = 0
    for names in (*tables, *groups):
        if names[0].startswith("blk."):
            problems = [
                problem
                for name in names
                for problem in shaped_problems(tensors[name], *statistics.grams(name), recipes)
            ]
            solutions = solve_shaped(problems, recipe.steps, recipe.sweeps)
        else:
            solutions = _round_tables(tensors[names[0]], table_roles(names[0], config, statistics), recipes)
        for index, solution in enumerate(solutions):
            results[index % len(recipes)][names[index // len(recipes)]] = solution
        done += len(names)
        progress(done, len(matrices))
    return results


def shaped_problems(
    weight_OI: Float[Array, "O I"], gram_in_II: Array, gram_out_OO: Array | None, recipes: Sequence[Recipe]
) -> list[Problem]:
    """Returns the problem of a matrix under each recipe's shaping; each Gram is decomposed once."""
    first = recipes[0]
    under = lambda name: jnp.asarray([getattr(recipe, name) for recipe in recipes], jnp.float32)  # noqa: E731
    shaped_KII = _shape_grams(truncate_gram(gram_in_II, first.rank_in), under("gamma_in"), under("damping_in"))
    if gram_out_OO is None or first.gamma_out == 0:
        return [Problem(weight_OI, gram_II) for gram_II in shaped_KII]
    gram_out_OO = truncate_gram(gram_out_OO, first.rank_out)
    shaped_KOO = _shape_grams(gram_out_OO, under("gamma_out"), under("damping_out"))
    return [Problem(weight_OI, *grams) for grams in zip(shaped_KII, shaped_KOO)]


# The Gram is the same for all, and so is its decomposition, which therefore is not repeated.
_shape_grams = jax.jit(jax.vmap(shape_gram, in_axes=(None, 0, 0)))


def _round_tables(weight_VD: Array, roles: Sequence[tuple[Array, Array]], recipes: Sequence[Recipe]) -> list[Q4K]:
    first = recipes[0]
    problems, join = table_problems(weight_VD, roles)
    solutions = []
    for problem in problems:
        shaped = shaped_problems(problem.weight_OI, problem.gram_in_II, None, recipes)
        solutions.append(solve_shaped(shaped, first.embedding_steps or first.steps, first.sweeps))
    return [join(variant) for variant in zip(*solutions)]
