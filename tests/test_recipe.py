"""Recipes: what they say about a module, and what is refused with the candidates."""

from dataclasses import replace
from pathlib import Path

import pytest

from qexport.errors import UsageError
from qexport.recipe import (
    Change,
    choose,
    load_recipe,
    parse_recipe,
    recipe_names,
    refuse_idle_patterns,
    with_options,
    with_parts,
    with_transforms,
)

OWN = """
schema = 1
name = "mine"
ignore = ["*.k_proj"]
[method]
name = "gptq"
damp = 0.05
[format]
name = "uniform"
bits = 3
[[modules]]
pattern = "*.down_proj"
bits = 8
[[modules]]
pattern = "*.o_proj"
format = "spqr"
group_size = 32
"""


def test_every_shipped_recipe_resolves_every_module() -> None:
    assert {"rtn", "gptq", "spqr"} <= set(recipe_names())
    for name in recipe_names():
        assert choose(load_recipe(name), "model.layers.0.mlp.up_proj") is not None


def test_own_recipe_decides_module_by_module() -> None:
    recipe = parse_recipe(OWN, "mine.toml")
    assert choose(recipe, "a.k_proj") is None
    up, down, out = (choose(recipe, f"a.{name}") for name in ("up_proj", "down_proj", "o_proj"))
    assert up is not None
    assert (up.method, up.method_options, up.format_options["bits"]) == ("gptq", {"damp": 0.05}, 3)
    assert down is not None
    assert down.format_options["bits"] == 8
    assert out is not None
    assert (out.format, out.format_options) == ("spqr", {"bits": 3, "group_size": 32})


def test_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(OWN)
    assert load_recipe(str(tmp_path / "mine.toml")).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema = 2", "expected schema = 1, found 2"),
        ("scheme = 1", "unknown key 'scheme'.*Did you mean 'schema'"),
        ("schema = ", "Invalid value"),
        (OWN.replace("damp", "dump"), "no option 'method.dump'.*Did you mean 'damp'"),
        (OWN.replace("bits = 3", 'bits = "x"'), "option 'format.bits': expected int, found 'x'"),
        (OWN.replace('pattern = "*.o_proj"', "group = 1"), "needs a pattern"),
        ("schema = 1\n[method]\nname = 'gptq'", r"\[format\] needs a name"),
        (OWN + "[input]\nname = 'tokn'", "there is no input 'tokn'; there are outliers, sdr, tensor, token"),
        (OWN + "[input]\nname = 'token'\nwidth = 3", "no option 'input.width'"),
        (OWN + "[input]\nbits = 8", r"\[input\] needs a name"),
        ('input = "token"\n' + OWN, r"\[input\] must be a table, such as \[input\] with name"),
        (OWN + "[block]\nname = 'lkt'", "there is no block 'lkt'; there are lkd, tune. Did you mean 'lkd'"),
        (OWN + "[block]\nname = 'lkd'\nstep = 3", "no option 'lkd.step'.*Did you mean 'steps'"),
    ],
)
def test_malformed_recipe_is_refused_with_the_key(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipe(text, "mine.toml")


def test_options_are_converted_and_prefixed() -> None:
    recipe = with_options(
        load_recipe("gptq"), [("damp", "0.1"), ("format.symmetric", "yes"), ("recipe.lm_head", "true")]
    )
    assert recipe.method_options["damp"] == 0.1
    assert recipe.format_options["symmetric"] is True
    assert recipe.lm_head is True


@pytest.mark.parametrize(
    ("line", "expected"), [("true", True), ("false", 0), ("6", 6), ("0", 0)], ids=["true", "false", "6", "0"]
)
def test_the_head_in_a_recipe_is_bits_or_as_in_older_ones_true_or_false(line: str, expected: int) -> None:
    recipe = parse_recipe(f"lm_head = {line}\nembeddings = 8\n{OWN}", "mine.toml")
    assert (recipe.lm_head, type(recipe.lm_head)) == (expected, type(expected))
    assert recipe.embeddings == 8


def test_changing_the_format_keeps_the_options_that_both_have_but_the_group_size() -> None:
    recipe = with_parts(with_options(load_recipe("gptq"), [("bits", 3), ("symmetric", True)]), format="spqr")
    assert recipe.format_options == {"bits": 3}


def test_pattern_that_matches_nothing_lists_what_there_is() -> None:
    recipe = replace(load_recipe("rtn"), changes=(Change("*.downproj", "bits", 8),))
    with pytest.raises(UsageError, match=r"'\*.downproj' matches no linear; try one of \*.down_proj"):
        refuse_idle_patterns(recipe, ["model.layers.0.mlp.down_proj"])


def test_at_most_four_recipes_are_recommended_and_the_readme_says_what_for() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    recommended = [r.name for r in recipes if r.tier == "recommended"]
    assert 1 <= len(recommended) <= 4
    goals = (Path(__file__).parents[1] / "README.md").read_text().split("Bits are *stored* bits")[0]
    assert all(f"`--method {name}`" in goals for name in recommended)


def test_a_tier_is_one_of_three() -> None:
    with pytest.raises(UsageError, match="tier must be recommended, paper, experimental, found 'best'"):
        parse_recipe(OWN.replace('name = "mine"', 'name = "mine"\ntier = "best"'), "mine.toml")


def test_transforms_and_block_options_come_from_a_file_and_from_options() -> None:
    tables = "\n[[transforms]]\nname = 'awq'\ngrid = 5\n[block]\nsteps = 3\n"
    recipe = parse_recipe(OWN + tables, "mine.toml")
    assert recipe.transforms == (("awq", {"grid": 5}),)
    assert recipe.block_options == {"steps": 3}
    changed = with_options(with_transforms(recipe, ["awq", "rotation"]), [("grid", "7"), ("tune.rate", "0.01")])
    assert changed.transforms == (("awq", {"grid": 7}), ("rotation", {}))
    assert changed.block_options == {"steps": 3, "rate": 0.01}
    with pytest.raises(UsageError, match="no transform 'awk'; there are awq, rotation, smoothquant. Did you mean"):
        with_transforms(recipe, ["awk"])
    with pytest.raises(UsageError, match="no option 'grit' .* after transform 'awq'"):
        with_options(recipe, [("grit", 1)])
    with pytest.raises(UsageError, match="is for all modules; -s grid="):
        refuse_idle_patterns(replace(recipe, changes=(Change("*", "grid", 3),)), ["a.q_proj"])


def test_the_rounding_of_inputs_comes_from_a_file_and_from_patterns() -> None:
    tables = "[[modules]]\npattern = '*.up_proj'\ninput = 'none'\n[input]\nname = 'sdr'\nbits = 4\n"
    recipe = parse_recipe(OWN + tables, "mine.toml")
    assert (recipe.input, recipe.input_options) == ("sdr", {"bits": 4})
    changed = replace(recipe, changes=(*recipe.changes, Change("*.q_proj", "input.bits", "6")))
    changed = replace(changed, changes=(*changed.changes, Change("*.v_proj", "input", "token")))
    found = {n: choose(changed, f"a.{n}") for n in ("q_proj", "v_proj", "up_proj", "gate_proj")}
    assert {n: (c.input, c.input_options) for n, c in found.items() if c} == {
        "q_proj": ("sdr", {"bits": 6}),
        "v_proj": ("token", {}),
        "up_proj": ("", {}),
        "gate_proj": ("sdr", {"bits": 4}),
    }
    with pytest.raises(UsageError, match="'bits' belongs to format and input; write format.bits or input.bits"):
        with_options(recipe, [("bits", 8)])
    assert with_options(with_parts(recipe, input="none"), [("bits", 8)]).format_options["bits"] == 8


def test_options_of_an_input_are_left_out_where_a_pattern_says_none() -> None:
    changes = (Change("*.0.*", "input.bits", 6), Change("*.down_proj", "input", "none"))
    for order in (changes, changes[::-1]):
        recipe = replace(load_recipe("zeroquant-w8a8"), changes=order)
        assert choose(recipe, "layers.0.down_proj").input == ""  # type: ignore[union-attr]
        assert choose(recipe, "layers.0.up_proj").input_options["bits"] == 6  # type: ignore[union-attr]
        assert choose(recipe, "layers.1.up_proj").input_options["bits"] == 8  # type: ignore[union-attr]
