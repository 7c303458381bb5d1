"""Plans and configs: each file in configs/ can be read, what is wrong is named, variants are what each alone is."""

import dataclasses
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import cli, plans, sources, sweeping
from sqjax.objective import Problem, proxy_loss
from sqjax.quantizer import Recipe, _shaped
from sqjax.run import InputError
from sqjax.search_space import Space
from sqjax.settings import build, overridden, read_settings, to_toml
from sqjax.variants import shape_of, shaped_problems

CONFIGS = sorted(sources.CONFIGS[0].rglob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_of_one_kind_and_can_be_read(path):
    kinds = {"sweep": sweeping.read_sweep, "plan": plans.read_plan, "recipe": lambda p: read_settings(Recipe, p)}
    kinds["refinement"] = lambda p: read_settings(plans.Refining, p)
    found = [kind for kind in kinds if _is(path.stem, kind)]
    assert len(found) == 1 and kinds[found[0]](path)


def _is(name, kind):
    try:
        return bool(sources.find_config(name, kind))
    except InputError:
        return False


def test_the_kinds_of_configs_are_told_apart():
    with pytest.raises(InputError, match=r"there is no recipe best; give one of gptq, imatrix, rtn, spectral, or") as e:
        sources.find_config("best")
    assert "refine" not in str(e.value) and "nano34" not in str(e.value)
    with pytest.raises(InputError, match="spectral is no plan but a recipe"):
        sources.find_config("spectral", "plan")


def test_a_plan_written_as_toml_is_the_same_plan(tmp_path):
    settings = ["recipe.gamma_in=0.5", 'calibration.text=["a \\"quoted\\" name", "b"]', "refine.tokens=7", "seed=3"]
    plan = plans.read_plan("demo", settings)
    assert (plan.recipe.gamma_in, plan.calibration.text[0], plan.seed) == (0.5, 'a "quoted" name', 3)
    assert plan.refine.is_wanted and not plans.read_plan("demo", ["refine.tokens=0"]).refine.is_wanted
    text = to_toml(dataclasses.asdict(plan))
    assert plans.plan_of(tomllib.loads(text), "x") == plan
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(dataclasses.asdict(plan.recipe)))
    assert read_settings(Recipe, path) == plan.recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("recipe.gama_in=1", "no setting gama_in"),
        ("recipes.gamma_in=1", "no setting recipes"),
        ("calibration.tokens=many", "tokens is 'many'; it must be a int"),
        ("seed.x=1", "no setting seed.x: seed is no table"),
        ("recipe.base=best", "no recipe best"),
        ("refine.codes_rat=1", "no setting codes_rat"),
    ],
)
def test_what_a_plan_gets_wrong_is_named(setting, message):
    with pytest.raises(InputError, match=message):
        plans.read_plan("demo", [setting])


def test_what_a_sweep_searches_must_exist(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text("[search]\nrecipe.gama_in = [1.0]\n[recipe]\nbase = 'gptq'\n")
    with pytest.raises(InputError, match="no setting gama_in"):
        sweeping.read_sweep(path)
    path.write_text(
        "[search]\nrecipe.gamma_in = {low = 0.1, high = 1.0}\n[recipe]\nbase = 'gptq'\n[watch]\nin = ['a']\n"
    )
    with pytest.raises(InputError, match=r"watch in sweep.toml has no setting in;"):
        sweeping.read_sweep(path)
    path.write_text("[search]\nrecipe.gamma_in = {low = 0.1, high = 1.0}\n[recipe]\nbase = 'gptq'\n")
    with pytest.raises(InputError, match="is a range"):
        sweeping.sweep(path, out=tmp_path, workers=1)
    assert cli.main(["sweep", str(tmp_path / "missing.toml")]) == 1


def test_a_space_names_settings_by_their_dotted_path():
    space = Space.read({"seed": [0, 1], "recipe": {"steps": [["nearest"], ["feedback"]], "gamma_in": [0.5]}})
    points = [space.settings(point) for point in space.points()]
    assert len(points) == 4 and points[3] == {"seed": 1, "recipe.steps": ["feedback"], "recipe.gamma_in": 0.5}
    assert overridden({"recipe": {"a": 1}}, points[0])["recipe"] == {"a": 1, "steps": ["nearest"], "gamma_in": 0.5}


@pytest.mark.parametrize("gamma_out", [0.0, 0.5])
def test_problems_of_several_strengths_are_those_of_each(gamma_out):
    rng = np.random.default_rng(0)
    weight, a, g = (jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in ((8, 32), (40, 32), (40, 8)))
    base = Recipe(steps=("feedback",), gamma_out=gamma_out, rank_in=20)
    recipes = [dataclasses.replace(base, gamma_in=gamma, damping_out=0.1 * gamma) for gamma in (0.0, 0.5, 1.0)]
    together = shaped_problems(weight, a.T @ a, g.T @ g, recipes)
    error = 1.01 * weight
    for recipe, problem in zip(recipes, together):
        raw = jax.tree.map(lambda leaf: leaf[None], Problem(weight, a.T @ a, g.T @ g))
        alone = jax.tree.map(lambda leaf: leaf[0], _shaped(raw, recipe))
        assert (problem.gram_out_OO is None) == (alone.gram_out_OO is None) == (gamma_out == 0.0)
        np.testing.assert_allclose(proxy_loss(problem, error), proxy_loss(alone, error), rtol=1e-4)
        for name in ("gram_in_II", "gram_out_OO") if gamma_out else ("gram_in_II",):
            np.testing.assert_allclose(getattr(problem, name), getattr(alone, name), rtol=1e-3, atol=1e-3)
    assert isinstance(together[0], Problem)


def test_recipes_go_together_when_only_their_strengths_differ():
    base = Recipe(steps=("feedback",), gamma_in=0.5, gamma_out=0.5)
    change = lambda **values: shape_of(dataclasses.replace(base, **values))  # noqa: E731
    assert change(gamma_in=1.0, damping_in=0.1, damping_out=0.2) == change() == change(gamma_out=1.0)
    assert change(sweeps=3) != change() != change(gamma_out=0.0)
    assert change(equalize=True, damping_in=0.1) != change(equalize=True)
    assert change(sequential=True) is None and shape_of(Recipe(steps=("nearest",))) is None
    with pytest.raises(InputError, match="lacks the setting steps"):
        build(Recipe, {}, "x")
