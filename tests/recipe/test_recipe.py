"""Recipes: every problem at once, with file and line, and never a traceback."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mim_framework.base.errors import MimError, PluginError, RecipeError
from mim_framework.base.section import Choice
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.recipe.schema import recipe_schema
from mim_framework.recipe.writing import dump_recipe
from mim_framework.recipe.yaml import read_yaml
from mim_framework.registry.registry import Registry, known_packages

GOOD = """\
# A tiny recipe.
name: tiny
data: {source: digits, workers: 0}
masker: {type: random, mask_ratio: 0.5}
encoder:
  type: timm
  model: vit_tiny_patch16_224
target: pixels
decoder: linear
loss: mse
optim:
  lr: 1e-3
train:
  total_batch_size: 8
  steps: 3
"""

REGISTRY = Registry(only=())


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes r.yaml into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        path = Path("r.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def problems(*arguments) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(*arguments, registry=REGISTRY)
    return [line.strip() for line in str(error.value).splitlines()]


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_recipe_is_read_and_its_defaults_are_written_out(write):
    recipe = load_recipe(write(GOOD), registry=REGISTRY)
    assert recipe.masker.type == "random"
    assert recipe.masker.options["mask_ratio"] == 0.5
    assert recipe.masker.options["shared"] is False
    assert recipe.optim.lr == 0.001
    assert recipe.views.type == "image"
    assert list(recipe.named_heads()) == list(recipe.named_optimizers()) == recipe.phase_names() == ["main"]
    assert recipe.named_phases()[0].optimizers == ("main",)
    assert load_recipe(write(GOOD), registry=REGISTRY, complete=False).masker.options == {"mask_ratio": 0.5}


def test_a_recipe_survives_the_way_to_a_file_and_back(write):
    recipe = load_recipe(write(GOOD), ["description='1e-3'", "evaluate.knn=null"], REGISTRY)
    again = load_recipe(write(dump_recipe(recipe)), registry=REGISTRY)
    assert again == recipe
    assert again.description == "1e-3"
    assert again.evaluate == ()
    assert dump_recipe(again) == dump_recipe(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@settings(deadline=None)
@example("\x85\u2028", 1e-5, 1)
@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 2**62))
def test_any_text_and_number_survives_dumping(tmp_path_factory, description, ratio, seed):
    options = {"type": "any", "text": description, "ratio": ratio}
    slots = {"encoder": "e", "target": "t", "decoder": "d", "loss": "l", "masker": options, "data": {"source": options}}
    length = {"train": {"total_batch_size": 1, "steps": 1}, "optim": {"lr": 1}}
    base = Recipe.model_validate({"name": "x", "description": description, "seed": seed, **slots, **length})
    try:
        data = read_yaml(dump_recipe(base), "r.yaml").data
    except RecipeError as error:  # control characters and the like, which no recipe can hold
        assert "is not allowed" in str(error)  # noqa: PT017
        return
    assert Recipe.model_validate(data) == base


def test_places_of_keys_are_kept(write):
    recipe = load_recipe(write(GOOD), ["masker.shared=true"], REGISTRY)
    assert recipe.location("encoder.model") == "r.yaml:7:3: encoder.model"
    assert recipe.location("encoder.depth") == "r.yaml:5:1: encoder.depth"
    assert recipe.location("masker.shared") == "override 'masker.shared=true': masker.shared"
    assert recipe.location("views") == "r.yaml: views"
    assert recipe.location("") == "r.yaml"
    assert pickle.loads(pickle.dumps(recipe)).location("loss") == "r.yaml:10:1: loss"
    assert Recipe.model_validate(recipe.model_dump()).location("loss") == "recipe: loss"


# case -> (text of GOOD, what replaces it, how the only line of the error begins)
BAD = {
    "unknown key": ("loss: mse", "los: mse\nloss: mse", "r.yaml:10:1: los: unknown key, did you mean 'loss'?"),
    "unknown option": ("mask_ratio", "mask_ration", "r.yaml:4:24: masker.mask_ration: unknown key, did you mean"),
    "wrong type": ("steps: 3", "steps: three", "r.yaml:15:3: train.steps: needs a whole number, got 'three'"),
    "text for a number": ("steps: 3", "steps: '3'", "r.yaml:15:3: train.steps: needs a whole number, got '3'"),
    "true for a number": ("lr: 1e-3", "lr: true", "r.yaml:12:3: optim.lr: needs a number, got true"),
    "out of range": ("0.5", "1.5", "r.yaml:4:24: masker.mask_ratio: must be less than 1.0, got 1.5"),
    "section": ("steps: 3", "steps: 3\nlog: 7", "r.yaml:16:1: log: needs a mapping of keys to values, got 7"),
    "missing": ("  total_batch_size: 8\n", "", "r.yaml:13:1: train.total_batch_size: missing, and has no def"),
    "missing option": ("  model: vit_tiny_patch16_224\n", "", "r.yaml:5:1: encoder.model: missing, and has no d"),
    "missing head": ("loss: mse\n", "", "r.yaml:2:1: loss: missing; a recipe needs 'target', 'decoder' and 'loss', "),
    "missing optim": ("optim:\n  lr: 1e-3\n", "", "r.yaml:2:1: optim: missing; a recipe needs it, or 'optimizers'"),
    "two optims": ("train:", "optimizers: {a: {lr: 1}}\ntrain:", "r.yaml:11:1: optim: stands beside 'optimizers'; u"),
    "two heads": ("train:", "heads: {}\ntrain:", "r.yaml:13:1: heads: stands beside 'target', 'decoder' and 'loss'; "),
    "name": ("name: tiny", "name: ../tiny", "r.yaml:2:1: name: needs letters, digits, '.', '_' and '-', "),
    "teacher name": ("train:", "teachers: {a.b: {copy: [encoder], momentum: 1}}\ntrain:", "r.yaml:13:12: teachers.a.b"),
    "teacher": (
        "train:",
        "teachers: {a: {copy: [encoder], momentum: 1, of_teacher: b}}\ntrain:",
        "r.yaml:13:46: teachers.a.of_teacher: there is no teacher 'b'",
    ),
    "phase": (
        "train:",
        "phases: [{name: a, optimizers: [main, min]}]\ntrain:",
        "r.yaml:13:20: phases.0.optimizers: there is no optimizer 'min'; the recipe has 'main'",
    ),
    "phase without optimizer": (
        "train:",
        "phases: [{name: a, optimizers: []}, {name: b, optimizers: [main]}]\ntrain:",
        "r.yaml:13:20: phases.0.optimizers: must have at least 1 entries, got []",
    ),
    "phase twice": (
        "train:",
        "phases: [{name: a, optimizers: [main]}, {name: a, optimizers: [main]}]\ntrain:",
        "r.yaml:13:42: phases.1.name: there is a phase 'a' already; give each its own name",
    ),
    "teacher of itself": (
        "train:",
        "teachers: {a: {copy: [encoder], momentum: 1, of_teacher: a}}\ntrain:",
        "r.yaml:13:46: teachers.a.of_teacher: teacher 'a' must stand before 'a', which copies it",
    ),
    "teacher of a later one": (
        "train:",
        "teachers: {a: {copy: [encoder], momentum: 1, of_teacher: b}, b: {copy: [encoder], momentum: 1}}\ntrain:",
        "r.yaml:13:46: teachers.a.of_teacher: teacher 'b' must stand before 'a', which copies it",
    ),
    "teacher of a frozen one": (
        "train:",
        "teachers: {b: {encoder: {type: timm, model: x}}, a: {copy: [encoder], momentum: 1, of_teacher: b}}\ntrain:",
        "r.yaml:13:84: teachers.a.of_teacher: teacher 'b' is frozen, not a copy; give 'a' its own 'encoder'",
    ),
    "teacher of another part": (
        "train:",
        "teachers: {b: {copy: [encoder], momentum: 1}, a: {copy: [masker], momentum: 1, of_teacher: b}}\ntrain:",
        "r.yaml:13:51: teachers.a.copy: teacher 'b' holds no copy of 'masker'",
    ),
    "momentum": (
        "train:",
        "teachers: {a: {copy: [encoder], momentum: {from: 0.9, to: 1.1}}}\ntrain:",
        "r.yaml:13:12: teachers.a: 'momentum' must stay between 0 and 1, got 0.9 to 1.1",
    ),
    "plain momentum": (
        "train:",
        "teachers: {a: {copy: [encoder], momentum: -0.5}}\ntrain:",
        "r.yaml:13:12: teachers.a: 'momentum' must stay between 0 and 1, got -0.5",
    ),
    "copy of nothing": (
        "train:",
        "teachers: {a: {copy: [''], momentum: 1}}\ntrain:",
        "r.yaml:13:23: teachers.a.copy.0: must have at least 1 characters, got ''",
    ),
    "option of the section": (
        "lr: 1e-3",
        "lr: 1e-3\n  options: {betas: [0.9, 0.9]}",
        "r.yaml:11:1: optim: 'betas' is a key of this section; write it here and not in 'options'",
    ),
    "component": ("type: random", "type: randon", "r.yaml:4:10: masker.type: no masker 'randon' is installed, did you"),
    "bare component": ("loss: mse", "loss: mze", "r.yaml:10:1: loss: no loss 'mze' is installed, did you mean 'mse'?"),
    "other kind": ("loss: mse", "loss: pixels", "r.yaml:10:1: loss: 'pixels' is a component of kind target, not loss."),
    "known method": ("type: timm", "type: nomae", "r.yaml:6:3: encoder.type: no encoder 'nomae' is installed; pip in"),
    "no component": ("loss: mse", "loss: {}", "r.yaml:10:1: loss: names no component; write 'type: NAME' here"),
    "import path": ("loss: mse", "loss: os.system", "r.yaml:10:1: loss: no loss 'os.system' is installed"),
    "duplicate": ("loss: mse", "loss: mse\nloss: l1", "r.yaml:11:1: key 'loss' stands here a second time, first in "),
    "python tag": ("loss: mse", "loss: !!python/object:os.system {}", "r.yaml:10:7: tag 'tag:yaml.org,2002:python/ob"),
    "alias": ("loss: mse", "loss: &a [*a]", "r.yaml:10:7: anchor '&a': anchors and aliases are not allowed"),
    "NUL": ("tiny recipe", "tiny \0 recipe", "r.yaml:1:10: character U+0000 is not allowed in a recipe"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_line_with_its_place(write, case, monkeypatch):
    monkeypatch.setitem(known_packages(), "nomae", "mim-plugin-nomae")
    old, new, message = BAD[case]
    [line] = problems(write(replaced(old, new)))
    assert line.startswith(message)


@pytest.mark.parametrize(("text", "message"), [("", "got null"), ("- a", "got ['a']"), ("hello", "got 'hello'")])
def test_a_recipe_that_is_no_mapping(write, text, message):
    assert problems(write(text)) == [f"r.yaml: a recipe is a mapping of keys to values, {message}"]


def test_all_problems_are_told_at_once_in_the_order_of_the_file(write):
    text = GOOD.replace("0.5", "7").replace("mse", "mze").replace("steps", "stepz").replace("lr: 1e-3", "lr: fast")
    found = problems(write(text.replace("name: tiny\n", "")), ["seed=-1", "decoder.kernel=3"])
    assert found[0] == "7 problems in r.yaml"
    assert [line.split(": ")[:2] for line in found[1:]] == [
        ["r.yaml:2:1", "name"],
        ["r.yaml:3:24", "masker.mask_ratio"],
        ["r.yaml:9:1", "loss"],
        ["r.yaml:11:3", "optim.lr"],
        ["r.yaml:14:3", "train.stepz"],
        ["override 'decoder.kernel=3'", "decoder.kernel"],
        ["override 'seed=-1'", "seed"],
    ]


def test_components_of_one_missing_plugin_are_one_problem(write, monkeypatch):
    monkeypatch.setitem(known_packages(), "nomae", "mim-plugin-nomae")
    text = replaced("type: timm", "type: nomae_vit").replace("decoder: linear", "decoder: nomae_decoder")
    assert problems(write(text)) == [
        "r.yaml:6:3: encoder.type: encoder 'nomae_vit' and decoder 'nomae_decoder' are not installed; "
        "pip install mim-plugin-nomae brings them"
    ]


def test_heads_teachers_and_phases_are_checked_in_depth(write):
    text = GOOD.replace("target: pixels\ndecoder: linear\nloss: mse\n", "").replace("optim:\n  lr: 1e-3\n", "") + (
        "heads:\n  a: {target: pixels, decoder: linear, loss: mse}\n"
        "  b: {target: {type: pixels, x: 1}, decoder: linear, loss: l3}\n"
        "teachers: {t: {encoder: {type: timm}}}\n"
        "optimizers: {one: {lr: 1}, two: {lr: 1}}\n"
        "phases: [{name: p, optimizers: [one]}, {name: q, optimizers: [two], sign: 2}]\n"
    )
    found = problems(write(text))
    assert found[0] == "4 problems in r.yaml"
    for place, name in zip(
        found[1:], ("heads.b.target.x", "heads.b.loss", "teachers.t.encoder.model", "phases.1.sign"), strict=True
    ):
        assert place.split(": ")[1] == name
    good = (
        text.replace(", x: 1", "")
        .replace("l3", "l1")
        .replace("type: timm}", "type: timm, model: x}")
        .replace("sign: 2", "sign: -1")
    )
    recipe = load_recipe(write(good), registry=REGISTRY)
    assert list(recipe.named_heads()) == ["a", "b"]
    assert recipe.phase_names() == ["p", "q"]
    assert recipe.teachers["t"].encoder.options["pretrained"] is False
    assert load_recipe(write(dump_recipe(recipe)), registry=REGISTRY) == recipe


def test_an_optimizer_that_no_phase_steps_is_refused(write):
    text = replaced("optim:\n  lr: 1e-3\n", "optimizers: {one: {lr: 1}, two: {lr: 1}, three: {lr: 1}}\n")
    assert problems(write(text + "phases: [{name: p, optimizers: [two]}]\n")) == [
        "r.yaml:15:1: phases: no phase steps optimizer 'one' and 'three'; its parameters would never change"
    ]


def test_a_warm_up_that_lasts_the_whole_run_is_doubted(write):
    recipe = load_recipe(write(GOOD), ["optim.warmup_epochs=2"], REGISTRY)
    assert recipe.doubts(epochs=2.5) == []
    [doubt] = recipe.doubts(epochs=2.0)
    assert doubt.startswith("the warm-up of optimizer 'main', 2 epochs, is no shorter than the run of 2: the learning")


def test_a_best_number_that_no_evaluation_gives_is_doubted(write):
    recipe = load_recipe(write(GOOD), ["checkpoint.keep_best=acc", "evaluate=[{type: knn}]"], REGISTRY)
    text = "checkpoint.keep_best is 'acc', which no evaluation gives; those of knn begin with these names: no best"
    assert [doubt.startswith(text) for doubt in recipe.doubts(epochs=2)] == [True]
    [doubt] = load_recipe(write(GOOD), ["checkpoint.keep_best=knn_top1", "evaluate=[]"], REGISTRY).doubts(epochs=2)
    assert "'evaluate' is empty" in doubt
    recipe = load_recipe(write(GOOD), ["checkpoint.keep_best=knn_top1", "evaluate=[{type: knn}]"], REGISTRY)
    assert recipe.doubts(epochs=2) == []


def test_a_frozen_encoder_without_weights_of_an_earlier_run_is_doubted(write):
    recipe = load_recipe(write(GOOD), ["train.frozen=['encoder.*']"], REGISTRY)
    assert recipe.doubts(epochs=2) == [
        "train.frozen holds the whole encoder and no 'init' gives it weights of an earlier run"
    ]
    assert load_recipe(write(GOOD), ["train.frozen=['encoder.*']", "init=runs/a"], REGISTRY).doubts(epochs=2) == []


def test_overrides_change_values_slots_and_lists(write):
    overrides = [
        "masker=none",
        "encoder.pretrained=true",
        "views.img_size=32",
        "data.source.split=test",
        "optim.betas.1=0.5",
    ]
    recipe = load_recipe(write(replaced("lr: 1e-3", "lr: 1\n  betas: [0.1, 0.2]")), overrides, REGISTRY)
    assert recipe.masker.type == "none"
    assert recipe.encoder.options["pretrained"] is True
    assert recipe.views.options["img_size"] == 32
    assert recipe.data.source.options["split"] == "test"
    assert recipe.optim.betas == (0.1, 0.5)
    path = load_recipe(write(GOOD), ["data.source={type: folder, root: /data/imagenet/train}"], REGISTRY)
    assert path.data.source.options["root"] == "/data/imagenet/train"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key, did you mean 'lr'?"),
        ("nothing.at.all=1", "nothing: unknown key"),
        ("qqq=1", "qqq: unknown key; known keys: name, description, seed"),
        ("masker.ratio=1", "masker.ratio: unknown key, did you mean 'mask_ratio'?"),
        ("optim.lr.to=1", "optim.lr: is 0.001, which has no keys"),
        ("optim.lr", "write it as KEY=VALUE, for example optim.lr=1e-3"),
        ("optim..lr=1", "write it as KEY=VALUE"),
        ("=1", "write it as KEY=VALUE"),
        ("masker=blok", "masker: no masker 'blok' is installed"),
        ("optim.lr=-1", "optim.lr: must be greater than 0.0, got -1"),
        ("optim.lr=yes", "optim.lr: needs a number, got 'yes'"),
        ("name=*x", "value:1:1: alias '*x': anchors and aliases are not allowed, write the value out; quote a text"),
        ("name=!!python/name:os", "value:1:1: tag 'tag:yaml.org,2002:python/name:os'"),
        ("name=[", "value:"),
        ("phases.3.name=x", "phases: is a list of 1; '3' is none of its numbers, which begin at 0"),
    ],
)
def test_a_bad_override_is_named(write, override, message):
    text = GOOD + "phases: [{name: x, optimizers: [main]}]\n"
    [line] = problems(write(text), [override])
    assert line.startswith(f"override '{override}': {message}")


def test_a_section_that_an_override_made_contradict_itself_names_both(write):
    [line] = problems(write(GOOD), ["train.epochs=2"])
    assert line.startswith("r.yaml:13:1: train: give the length of the run as 'epochs' or as 'steps'")
    assert line.endswith("(after override 'train.epochs=2')")


def test_recipes_that_cannot_be_found_or_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert problems("gone.yaml") == ["recipe gone.yaml: no such file"]
    assert problems(tmp_path) == [f"recipe {tmp_path}: a folder, not a file"]
    assert problems("x" * 5000)[0].startswith("recipe 'xxx")
    with pytest.raises(PluginError, match="no recipe 'none_such' is installed; installed: none"):
        load_recipe("none_such", registry=REGISTRY)


def test_a_shipped_recipe_is_found_by_name(install_plugin, tmp_path, monkeypatch):
    install_plugin("spiral", "", files={"recipes/swirl.yaml": GOOD})
    monkeypatch.chdir(tmp_path)
    registry = Registry(only=["spiral"])
    assert load_recipe("swirl", registry=registry).name == "tiny"
    with pytest.raises(
        RecipeError, match=r"recipe swirl.yaml: no such file; the shipped recipe of that name is called 'swirl'"
    ):
        load_recipe("swirl.yaml", registry=registry)


def test_a_plugin_that_fails_is_one_problem_of_the_recipe(write, install_plugin):
    source = "from mim_framework import Loss, hookimpl\nclass A(Loss):\n    name = 'spiral_loss'\n"
    hook = "@hookimpl\ndef mim_losses():\n    return [A]\n"
    install_plugin("spiral", source + hook + "raise SystemExit(3)\n")
    with pytest.raises(
        RecipeError, match=r"r.yaml:10:1: loss: plugin 'spiral' \(mim-plugin-spiral\): import failed with Sys"
    ):
        load_recipe(write(replaced("loss: mse", "loss: spiral_loss")), registry=Registry(only=["spiral"]))


def test_recipes_made_in_python_are_checked_for_consistency(write):
    data = load_recipe(write(GOOD), registry=REGISTRY).model_dump()
    with pytest.raises(ValueError, match="loss: missing; a recipe needs 'target', 'decoder' and 'loss', or 'heads'"):
        Recipe.model_validate({**data, "loss": None})
    headless = Recipe.model_validate({**data, "loss": None, "target": None, "decoder": None, "objective": "own"})
    assert headless.named_heads() == {}


def test_the_schema_lists_the_components_of_every_slot():
    schema = recipe_schema(REGISTRY)
    text = json.dumps(schema)
    assert "#/$defs/Choice" not in text
    masker = schema["properties"]["masker"]["anyOf"]
    [described] = [choice for choice in masker if choice.get("const") == "random"]
    assert described["description"].startswith("Hide cells uniformly at random")
    assert {"$ref": "#/$defs/masker.random"} in masker
    component = schema["$defs"]["masker.random"]
    assert component["properties"]["type"] == {"const": "random"}
    assert component["properties"]["mask_ratio"]["description"] == "Share of the cells hidden from the encoder."
    assert component["additionalProperties"] is False
    assert schema["$defs"]["encoder.timm"]["required"] == ["type", "model"]
    assert {"const": "timm"}.items() <= schema["$defs"]["encoder.timm"]["properties"]["type"].items()
    assert {"type": "null"} in schema["properties"]["loss"]["anyOf"]
    assert {"$ref": "#/$defs/source.folder"} in schema["$defs"]["DataSection"]["properties"]["source"]["anyOf"]
    references = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert references <= schema["$defs"].keys()


def test_nested_options_of_a_component_have_definitions_of_their_own(install_plugin):
    source = (
        "from mim_framework import Loss, Schedule, Section, hookimpl\nclass A(Loss):\n    name = 'a'\n"
        "    class Config(Section):\n        weight: Schedule = 1.0\n@hookimpl\ndef mim_losses():\n    return [A]\n"
    )
    install_plugin("spiral", source)
    definitions = recipe_schema(Registry(only=["spiral"]))["$defs"]
    assert definitions["loss.a"]["properties"]["weight"]["anyOf"][1] == {"$ref": "#/$defs/loss.a.Curve"}
    assert "loss.a.Curve" in definitions


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["random", "mse", "image", "main"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "a", "lr", "model"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*Recipe.model_fields, "typo"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=8), st.lists(st.text(max_size=12), max_size=2))
def test_a_recipe_of_random_values_is_read_or_refused(tmp_path, changes, overrides):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**read_yaml(GOOD, "r.yaml").data, **changes}))
    try:
        assert isinstance(load_recipe(path, overrides, REGISTRY), Recipe)
    except RecipeError as error:
        assert str(path) in str(error) or "override" in str(error)  # noqa: PT017


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(GOOD)), st.text(max_size=5), st.integers(0, 20))
def test_a_damaged_recipe_is_read_or_refused(tmp_path, at, inserted, removed):
    path = tmp_path / "r.yaml"
    path.write_bytes((GOOD[:at] + inserted + GOOD[at + removed :]).encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_recipe(path, registry=REGISTRY), Recipe)
    except MimError as error:
        assert isinstance(error, RecipeError)  # noqa: PT017


def test_a_slot_is_a_choice_of_name_and_options():
    assert Choice.model_validate("random") == Choice.model_validate({"type": "random"})
