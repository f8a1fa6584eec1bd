"""Two-stage runs: a tokenizer by its run, token ids in every step or stored once, the same either way."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import RECIPE
from torch import nn

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.preflight import make_step, preflight
from mim_framework.base.errors import DataError, MimError, RecipeError
from mim_framework.commands.evaluate import evaluate
from mim_framework.commands.tokenize import tokenize
from mim_framework.contract.components import Encoder
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask, Latent, Sample
from mim_framework.contract.specs import EncoderSpec, ViewSpec
from mim_framework.data.companions import TokenCache
from mim_framework.nn.images import Renormalize
from mim_framework.nn.patches import patchify
from mim_framework.recipe.draft import load_recipe
from mim_framework.runtime.metrics import read_metrics
from mim_framework.testing import RegistryWith
from mim_framework.training.trainer import train


class ToyTokenizer(Encoder):
    """The nearest of some directions for every patch of 4 pixels; drops out a part in training, and counts calls."""

    name = "toy_tokenizer"

    class Config(Encoder.Config):
        vocab_size: int = 8
        """Number of ids."""

    config: Config

    def __init__(self, config, specs):
        super().__init__(config, specs)
        height, width = specs.view("x").img_size
        grid = Grid((height // 4, width // 4))
        self.codes = nn.Linear(48, self.config.vocab_size, bias=False)
        self.drop = nn.Dropout(0.9)
        self.register_buffer("calls", torch.zeros(()))
        self.spec = EncoderSpec(
            self.config.vocab_size, grid, 4, 1, 1, offers=Ask(aux=frozenset({"ids"})),
            accepts=frozenset({"none"}), num_classes=self.config.vocab_size,
        )  # fmt: skip

    def forward(self, view, mask, ask=Ask()):
        if self.training:
            self.calls += 1
        self.seen = view
        logits = self.codes(self.drop(patchify(view, 4)))
        return Latent(logits, self.spec.grid, aux={"ids": logits.argmax(-1)})


REGISTRY = RegistryWith(ToyTokenizer)
STAGE_ONE = {
    **RECIPE,
    "name": "one",
    "views": {"type": "image", "img_size": 16, "mean": [0.0] * 3, "std": [1.0] * 3},
    "masker": "none",
    "encoder": "toy_tokenizer",
    "decoder": "linear",
}
STAGE_TWO = {
    **RECIPE,
    "name": "two",
    "encoder": {"type": "vit", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "target": "token_ids",
    "decoder": "linear",
    "loss": "cross_entropy",
}


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return train(recipe_of(folder, STAGE_ONE), REGISTRY)


def recipe_of(folder: Path, content: dict[str, Any], *overrides: str) -> Any:
    file = folder / "recipe_of_a_test.yaml"
    file.write_text(yaml.safe_dump({**content, "output_dir": str(folder / "runs")}))
    return load_recipe(file, overrides, REGISTRY)


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_built_and_loaded_from_its_run(tmp_path: Path, stage_one: Path):
    model = build_model(recipe_of(tmp_path, STAGE_TWO, f"tokenizer={stage_one}"), REGISTRY)
    tokenizer = model.teachers["tokenizer"].part("encoder")
    trained = build_model(recipe_of(tmp_path, STAGE_ONE, f"init={stage_one}"), REGISTRY).objective.encoder
    assert torch.equal(tokenizer.codes.weight, trained.codes.weight)
    assert model.objective.heads["main"].target.spec.dim == 8


@pytest.mark.parametrize("what", ["checkpoint", "file", "import"])
def test_a_tokenizer_may_be_a_checkpoint_or_what_was_imported(tmp_path: Path, stage_one: Path, what: str):
    [checkpoint] = (stage_one / "checkpoints").iterdir()
    path = checkpoint
    if what != "checkpoint":
        folder = tmp_path / "imported"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
        slots = {name: STAGE_ONE[name] for name in ("views", "encoder")}
        (folder / "slots.yaml").write_text(yaml.safe_dump(slots))
        path = folder / "weights.safetensors" if what == "file" else folder
    model = build_model(recipe_of(tmp_path, STAGE_TWO, f"tokenizer={path}"), REGISTRY)
    expected = build_model(recipe_of(tmp_path, STAGE_TWO, f"tokenizer={stage_one}"), REGISTRY)
    of = lambda each: each.teachers["tokenizer"].part("encoder").codes.weight  # noqa: E731
    assert torch.equal(of(model), of(expected))


def test_a_tokenizer_sees_images_as_in_its_own_training(tmp_path: Path, stage_one: Path):
    """Its run had images in [0, 1], this recipe's are normalised."""
    model = build_model(recipe_of(tmp_path, STAGE_TWO, f"tokenizer={stage_one}"), REGISTRY)
    step = make_step(model.recipe, torch.arange(2), teachers=model.teachers.session())
    batch = model.views.example(2)
    model.objective(step, model.views.prepare(step, batch))
    seen = model.teachers["tokenizer"].part("encoder").seen
    assert torch.allclose(seen, batch["x"].float() / 255, atol=1e-6)


def test_renormalising_to_the_same_is_no_change_at_all():
    view = torch.randn(2, 3, 4, 4)
    spec = ViewSpec("x", size=(4, 4), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert Renormalize(spec, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(view) is view
    assert Renormalize(ViewSpec("x", size=(4, 4)), (0, 0, 0), (1, 1, 1))(view) is view
    unit = Renormalize(spec, (0, 0, 0), (1, 1, 1))(view)
    assert torch.allclose(unit[:, 1], view[:, 1] * 0.3 + 0.4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer=runs/one"], r"tokenizer: runs/one does not exist; train one with `mim run`"),
        (["tokenizer=runs/quickstart"], r"tokenizer: runs/quickstart does not exist; `mim run quickstart` makes it"),
        (["tokenizer={folder}"], r"tokenizer: .* is neither a run nor a folder of `mim import`; train one"),
        (["tokenizer={file}"], r"tokenizer: .*foreign.pth is neither .*; `mim import .*foreign.pth` makes a folder"),
        ([], r"target 'token_ids' needs a teacher 'tokenizer': give tokenizer=RUN"),
        (["tokenizer={one}", "teachers.tokenizer.encoder=vit"], r"tokenizer: stands beside 'teachers.tokenizer'"),
        (["tokenizer={one}", "target.vocab_size=512"], r"the tokenizer has 8 classes, vocab_size says 512"),
        (["tokenizer={one}", "encoder.patch_size=8"], r"decoder 'linear': target grid 4x4, encoder grid 2x2"),
        (["tokenizer={one}", "loss=mse"], r"loss 'mse' takes dense targets, target 'token_ids' gives ids"),
        (["teachers.tokenizer.encoder={{type: vit, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}",
          "teachers.tokenizer.random=true"], r"teacher 'tokenizer' is no tokenizer, its encoder gives no ids"),
        (["tokenizer={one}", "teachers.other.checkpoint={one}", "teachers.other.view=left"], r"no view 'left'"),
    ],
)  # fmt: skip
def test_a_missing_or_wrong_tokenizer_is_refused_with_a_cure(
    tmp_path: Path, stage_one: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
):
    monkeypatch.chdir(tmp_path)  # there is no runs/
    (tmp_path / "foreign.pth").write_bytes(b"x")
    names = {"folder": tmp_path, "file": tmp_path / "foreign.pth", "one": stage_one}
    with pytest.raises(RecipeError, match=message):
        build_model(recipe_of(tmp_path, STAGE_TWO, *[each.format(**names) for each in overrides]), REGISTRY)


def test_a_tokenizer_of_other_sizes_is_refused_by_name(tmp_path: Path, stage_one: Path):
    teachers = f"teachers.tokenizer={{encoder: {{type: toy_tokenizer, vocab_size: 9}}, checkpoint: '{stage_one}'}}"
    with pytest.raises(MimError, match=r"shapes that do not fit the recipe: codes.weight \(8, 48\), needed \(9, 48\)"):
        build_model(recipe_of(tmp_path, STAGE_TWO, teachers), REGISTRY)


def test_a_model_can_be_built_around_a_known_vocabulary_and_not_trained(tmp_path: Path):
    model = build_model(recipe_of(tmp_path, STAGE_TWO, "target.vocab_size=8"), REGISTRY)
    with pytest.raises(RecipeError, match="needs a teacher 'tokenizer'"):
        preflight(model, torch.device("cpu"))


@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_frozen_means_frozen_for_many_steps(tmp_path: Path, stage_one: Path, steps: int):
    seen: dict[str, Any] = {}

    class Spy(ToyTokenizer):
        def forward(self, view, mask, ask=Ask()):
            seen["model"] = self
            return super().forward(view, mask, ask)

    recipe = recipe_of(
        tmp_path, STAGE_TWO, f"tokenizer={stage_one}", f"train.steps={steps}", "train.total_batch_size=2"
    )
    before = build_model(recipe, REGISTRY).teachers["tokenizer"].part("encoder").state_dict()
    train(recipe, RegistryWith(Spy))
    after = seen["model"].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not seen["model"].training


# --- stored ids ------------------------------------------------------------------------------------------------------


def short(folder: Path, stage_one: Path, *overrides: str) -> Any:
    return recipe_of(folder, STAGE_TWO, f"tokenizer={stage_one}", "data.views_per_image=2", *overrides)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, stage_one: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tokenize(short(folder, stage_one), REGISTRY, folder / "ids")
    return folder / "ids"


def test_a_run_with_stored_ids_is_the_run_with_the_tokenizer(tmp_path: Path, stage_one: Path, tokens: Path):
    """Over the end of the first epoch of 1,438 images, where the second view begins."""
    steps = ["train.total_batch_size=128", "train.steps=14"]
    online = train(short(tmp_path, stage_one, *steps), REGISTRY)
    stored = train(short(tmp_path, stage_one, *steps, "name=stored", f"data.tokens={tokens}"), REGISTRY)
    assert losses_of(stored) == losses_of(online)
    assert len(losses_of(stored)) == 14


def test_with_stored_ids_no_tokenizer_is_needed(tmp_path: Path, tokens: Path):
    recipe = recipe_of(tmp_path, STAGE_TWO, "tokenizer=runs/gone", "data.views_per_image=2", f"data.tokens={tokens}")
    model = build_model(recipe, REGISTRY)
    assert len(model.teachers.teachers) == 0
    assert model.specs.views["token_ids"].num_classes == 8


def test_an_interrupted_call_goes_on(tmp_path: Path, stage_one: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch):
    import mim_framework.commands.tokenize as module

    calls = 0
    compute = module._ids

    def fail_late(*arguments):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return compute(*arguments)

    recipe = short(tmp_path, stage_one, "train.batch_size=64")
    monkeypatch.setattr(module, "_ids", fail_late)
    with pytest.raises(KeyboardInterrupt):
        tokenize(recipe, REGISTRY, tmp_path / "ids")
    with pytest.raises(DataError, match="no whole folder of token ids"):
        TokenCache(tmp_path / "ids")
    first, calls = calls, 100
    facts = tokenize(recipe, REGISTRY, tmp_path / "ids")
    assert calls - 100 == 2 * -(-1438 // 64) - (first - 1)
    assert facts.sha256 == TokenCache(tokens).facts.sha256
    with pytest.raises(DataError, match="holds token ids already"):
        tokenize(recipe, REGISTRY, tmp_path / "ids")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], r"ids of other views: seed: 0 there, 1 here"),
        (["views.flip=0"], r"ids of other views: views: .*there"),
        (["data.views_per_image=3"], r"data.views_per_image: 2 there, 3 here"),
        (["data.tokens=nowhere"], r"data.tokens nowhere is no whole folder of token ids; make one: mim tokenize"),
    ],
)
def test_ids_of_something_else_are_refused(tmp_path: Path, stage_one: Path, tokens: Path, overrides, message: str):
    with pytest.raises(DataError, match=message):
        build_model(short(tmp_path, stage_one, f"data.tokens={tokens}", *overrides), REGISTRY)


def test_ids_of_another_number_of_images_are_refused(tmp_path: Path, stage_one: Path, tokens: Path):
    copy = tmp_path / "ids"
    copy.mkdir()
    facts = json.loads((tokens / "tokens.json").read_text())
    ids = np.load(tokens / "ids.npy")[:100]
    np.save(copy / "ids.npy", ids)
    import hashlib

    facts |= {"num_images": 100, "sha256": hashlib.sha256((copy / "ids.npy").read_bytes()).hexdigest()}
    (copy / "tokens.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"ids of 100 images, data.source has 1,438"):
        train(short(tmp_path, stage_one, f"data.tokens={copy}"), REGISTRY)


def test_a_flipped_bit_is_found(tmp_path: Path, stage_one: Path, tokens: Path):
    copy = tmp_path / "ids"
    copy.mkdir()
    content = bytearray((tokens / "ids.npy").read_bytes())
    content[-1] ^= 1
    (copy / "ids.npy").write_bytes(content)
    (copy / "tokens.json").write_bytes((tokens / "tokens.json").read_bytes())
    with pytest.raises(DataError, match=r"ids.npy is damaged"):
        train(short(tmp_path, stage_one, f"data.tokens={copy}"), REGISTRY)


def test_a_worker_that_is_not_forked_opens_the_stored_ids_itself(tokens: Path):
    cache = TokenCache(tokens)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    sample = Sample(None, "a")
    assert torch.equal(pickle.loads(sent)(sample, 7, 1), cache(sample, 7, 1))
    assert not torch.equal(cache(sample, 7, 1), cache(sample, 8, 1))


def test_ids_without_fixed_views_or_a_target_are_refused(tmp_path: Path, stage_one: Path):
    with pytest.raises(RecipeError, match=r"views_per_image: missing; stored ids need fixed views"):
        tokenize(recipe_of(tmp_path, STAGE_TWO, f"tokenizer={stage_one}"), REGISTRY, tmp_path / "ids")
    with pytest.raises(RecipeError, match=r"'tokens' are those of fixed views"):
        recipe_of(tmp_path, STAGE_TWO, "data.tokens=ids")
    with pytest.raises(RecipeError, match=r"one target of token ids, its targets are 'pixels'"):
        tokenize(recipe_of(tmp_path, RECIPE, "data.views_per_image=1"), REGISTRY, tmp_path / "ids")


def test_images_that_cannot_be_read_have_no_ids_and_are_replaced(tmp_path: Path, stage_one: Path):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        Image.fromarray(np.full((20, 20, 3), 40 * number, np.uint8)).save(images / f"{number}.png")
    (images / "3.png").write_bytes(b"no image")
    source = f"data.source={{type: folder, root: '{images}'}}"
    recipe = short(tmp_path, stage_one, source, "train.total_batch_size=6", "train.steps=4")
    tokenize(recipe, REGISTRY, tmp_path / "ids")
    online = losses_of(train(recipe, REGISTRY))
    stored = short(tmp_path, stage_one, source, "train.total_batch_size=6", "train.steps=4", "name=stored",
                   f"data.tokens={tmp_path / 'ids'}")  # fmt: skip
    assert losses_of(train(stored, REGISTRY)) == online


def folder_of(tmp_path: Path, number: int, broken: set[int]) -> tuple[Path, str]:
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for each in range(number):
        Image.fromarray(np.full((20, 20, 3), 3 * each, np.uint8)).save(images / f"{each:02d}.png")
        if each in broken:
            (images / f"{each:02d}.png").rename(images / f"{each:02d}.kept")
            (images / f"{each:02d}.png").write_bytes(b"no image")
    return images, f"data.source={{type: folder, root: '{images}'}}"


def bring_back(images: Path) -> None:
    for each in images.glob("*.kept"):
        each.rename(each.with_suffix(".png"))


@pytest.mark.fault(row="m")
@pytest.mark.parametrize("broken", [{3}, {0, 5}])
def test_images_without_ids_are_listed_and_a_second_call_fills_them(
    tmp_path: Path, stage_one: Path, broken: set[int], figure
):
    images, source = folder_of(tmp_path, 8, broken)
    recipe = short(tmp_path, stage_one, source, "train.total_batch_size=6")
    told: list[str] = []
    facts = tokenize(recipe, REGISTRY, tmp_path / "ids", report=told.append)
    assert facts.missing == 2 * len(broken)
    assert f"{len(broken)} images could not be read ({len(broken)} not_an_image), listed in" in told[-1]
    listed = [json.loads(line) for line in (tmp_path / "ids" / "broken_images.jsonl").read_text().splitlines()]
    assert {line["index"] for line in listed} == broken
    bring_back(images)
    whole = tokenize(recipe, REGISTRY, tmp_path / "ids")
    assert whole.missing == 0
    assert whole.sha256 == tokenize(recipe, REGISTRY, tmp_path / "again").sha256
    assert sorted(each.name for each in (tmp_path / "ids").iterdir()) == ["ids.npy", "tokens.json"]
    with pytest.raises(DataError, match="holds token ids already"):
        tokenize(recipe, REGISTRY, tmp_path / "ids")
    number = len(broken)
    figure(f"{number} of 8 images broken: {number} counted and listed, a second call fills {number} of {number}")


@pytest.mark.fault(row="m")
@pytest.mark.parametrize("share", [0.01, 0.2])
def test_too_many_images_without_ids_stop_the_call_and_keep_what_is_done(
    tmp_path: Path, stage_one: Path, share: float, figure
):
    images, source = folder_of(tmp_path, 24, set(range(5, 20)))
    recipe = short(
        tmp_path, stage_one, source, "train.batch_size=1", "train.total_batch_size=1", f"data.max_broken={share}"
    )
    with pytest.raises(DataError, match=rf"11 images could not be read .* more than data.max_broken={share} allows"):
        tokenize(recipe, REGISTRY, tmp_path / "ids")
    assert not (tmp_path / "ids" / "tokens.json").exists()
    assert np.load(tmp_path / "ids" / "done.npy").sum() == 5
    bring_back(images)
    assert tokenize(recipe, REGISTRY, tmp_path / "ids").missing == 0
    figure(f"data.max_broken={share}: 15 of 24 broken stop the call at the 11th, 5 whole rows are kept")


def renamed(images: Path) -> None:
    (images / "03.png").rename(images / "99.png")


def replaced(images: Path) -> None:
    (images / "05.png").write_bytes((images / "05.png").read_bytes() + b"more")


@pytest.mark.slow  # a tokenizing and three runs each
@pytest.mark.parametrize(("change", "words"), [(renamed, "other names"), (replaced, "files of other sizes")])
def test_ids_of_other_images_are_refused_unless_that_is_accepted(
    tmp_path: Path, stage_one: Path, caplog: pytest.LogCaptureFixture, change: Any, words: str
):
    images, source = folder_of(tmp_path, 8, set())
    options = [source, "train.total_batch_size=4", "train.steps=2"]
    tokenize(short(tmp_path, stage_one, *options), REGISTRY, tmp_path / "ids")
    options.append(f"data.tokens={tmp_path / 'ids'}")
    train(short(tmp_path, stage_one, *options), REGISTRY)  # nothing has changed
    assert caplog.messages == []
    change(images)
    with pytest.raises(DataError, match=rf"holds ids of other images than data.source has: {words}\. Bring the"):
        train(short(tmp_path, stage_one, *options, "name=other"), REGISTRY)
    accepted = short(tmp_path, stage_one, *options, "name=other", "data.accept_changed_source=true")
    run_dir = train(accepted, REGISTRY)
    [line] = [json.loads(each) for each in (run_dir / "source_changes.jsonl").read_text().splitlines()]
    assert (line["tokens"], line["changes"]) == (str(tmp_path / "ids"), [words])
    assert f"{words}; accepted by the recipe" in caplog.text


def test_ids_of_before_say_that_they_do_not_know_their_images(
    tmp_path: Path, stage_one: Path, caplog: pytest.LogCaptureFixture
):
    _, source = folder_of(tmp_path, 8, set())
    options = [source, "train.total_batch_size=4", "train.steps=1"]
    tokenize(short(tmp_path, stage_one, *options), REGISTRY, tmp_path / "ids")
    facts = json.loads((tmp_path / "ids" / "tokens.json").read_text())
    assert facts["source"]["num_images"] == 8
    assert len(facts["source"]["names"]) == 64
    del facts["source"]
    (tmp_path / "ids" / "tokens.json").write_text(json.dumps(facts))
    train(short(tmp_path, stage_one, *options, f"data.tokens={tmp_path / 'ids'}"), REGISTRY)
    [said] = caplog.messages
    assert "says of how many images its ids are and not of which" in said


@pytest.mark.parametrize("change", [renamed, replaced, None])
def test_a_call_goes_on_with_the_same_names_only(
    tmp_path: Path, stage_one: Path, caplog: pytest.LogCaptureFixture, change: Any
):
    """Files of other sizes may be mended ones; a folder that was begun by an earlier version knows no names."""
    images, source = folder_of(tmp_path, 8, {3} if change is not renamed else {2})
    recipe = short(tmp_path, stage_one, source, "train.total_batch_size=6")
    assert tokenize(recipe, REGISTRY, tmp_path / "ids").missing == 2
    if change is None:
        facts = json.loads((tmp_path / "ids" / "tokens.json").read_text())
        (tmp_path / "ids" / "tokens.json").write_text(json.dumps({**facts, "source": {}}))
    else:
        change(images)
    if change is renamed:
        with pytest.raises(DataError, match=r"ids of other images than data.source has now: other names; bring them"):
            tokenize(recipe, REGISTRY, tmp_path / "ids")
        return
    bring_back(images)
    assert tokenize(recipe, REGISTRY, tmp_path / "ids").missing == 0
    assert ("it is taken to be of these" if change is None else "files of other sizes; what is there") in caplog.text
    facts = json.loads((tmp_path / "ids" / "tokens.json").read_text())
    assert facts["source"].keys() == {"num_images", "names", "sizes"}


@pytest.mark.fault(row="l")
@pytest.mark.parametrize("torn", [slice(1, None), slice(0, 3)])
def test_a_torn_row_never_counts_as_done(
    tmp_path: Path, stage_one: Path, monkeypatch: pytest.MonkeyPatch, torn: slice, figure
):
    """A row of which only a part reached the disk, whether its mark did or not."""
    import mim_framework.commands.tokenize as module

    _, source = folder_of(tmp_path, 8, set())
    recipe = short(tmp_path, stage_one, source, "train.batch_size=2", "train.total_batch_size=2")
    compute, calls = module._ids, iter(range(100))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(module, "_ids", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize(recipe, REGISTRY, tmp_path / "ids")
    monkeypatch.setattr(module, "_ids", compute)
    ids = np.load(tmp_path / "ids" / "ids.unfinished.npy", mmap_mode="r+")
    ids[1, 0, torn] = np.iinfo(ids.dtype).max
    ids[6, 1, torn] = 1  # never marked
    ids.flush()
    facts = tokenize(recipe, REGISTRY, tmp_path / "ids")
    assert facts.sha256 == tokenize(recipe, REGISTRY, tmp_path / "whole").sha256
    figure("2 of 2 torn rows computed again, the ids of an undisturbed call")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [4, "x"]}, r"tokens.json is damaged: grid.1: Input should be a valid integer"),
        ({"num_images": -4}, r"tokens.json is damaged: num_images: Input should be greater than 0"),
        ({"num_classes": 2**70}, r"tokens.json is damaged: num_classes: Input should be less than 4294967296"),
        ({"views_of": [1]}, r"tokens.json is damaged: views_of: Input should be an object"),
        (b"[" * 100_000, r"tokens.json is damaged: Invalid JSON"),
        (b"\xff\xfe", r"tokens.json is damaged: Invalid JSON"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_an_error_in_words(tmp_path: Path, tokens: Path, change: Any, message: str):
    copy = shutil.copytree(tokens, tmp_path / "ids")
    facts = json.loads((copy / "tokens.json").read_text())
    (copy / "tokens.json").write_bytes(change if isinstance(change, bytes) else json.dumps(facts | change).encode())
    with pytest.raises(DataError, match=message):
        TokenCache(copy)


@pytest.mark.parametrize(("place", "value"), [(0, 8), (15, 60_000)])
def test_an_id_out_of_the_vocabulary_is_refused_when_it_is_read(tmp_path: Path, tokens: Path, place: int, value: int):
    copy = shutil.copytree(tokens, tmp_path / "ids")
    ids = np.load(copy / "ids.npy", mmap_mode="r+")
    ids[4, 1, place] = value
    ids.flush()
    cache = TokenCache(copy)
    with pytest.raises(DataError, match=rf"ids.npy: id {value} of 'a' \(image 4, view 1\) is none of the 8"):
        cache(Sample(None, "a"), 4, 1)
    assert cache(Sample(None, "a"), 4, 0).shape == (16,)


def test_knn_of_a_second_stage_needs_neither_tokenizer_nor_stored_ids(tmp_path: Path, stage_one: Path, tokens: Path):
    moved = shutil.copytree(stage_one, tmp_path / "one")
    ids = shutil.copytree(tokens, tmp_path / "ids")
    run_dir = train(short(tmp_path, moved, f"data.tokens={ids}"), REGISTRY)
    [before] = evaluate(["knn"], [run_dir], registry=REGISTRY)
    shutil.rmtree(moved)
    shutil.rmtree(ids)
    [after] = evaluate(["knn"], [run_dir], registry=REGISTRY)
    assert after.numbers == before.numbers
    assert before.numbers["trained"] != before.numbers["untrained"]
