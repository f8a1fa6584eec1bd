"""Hostile inputs made from good ones, the same ones for the same seed; and what became of them. Start at `outcome`."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mim_framework.assembly.builder import build_model
from mim_framework.assembly.cost import measure_cost
from mim_framework.assembly.trained import trained_encoder
from mim_framework.assembly.weights import load_into
from mim_framework.base.errors import MimError
from mim_framework.commands.check import report
from mim_framework.convert import import_checkpoint
from mim_framework.data.companions import FACTS, IDS, TokenCache
from mim_framework.data.decode import open_image
from mim_framework.recipe.draft import load_recipe
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry
from mim_framework.runtime.metrics import LogSection, MetricsWriter, read_metrics
from mim_framework.training.trainer import Trainer, train

SECONDS = 10.0
"""Processor time that no input may take."""


@dataclass(frozen=True)
class Outcome:
    """What an input led to: a refusal in words, a success, or `traceback`."""

    refused: str = ""
    traceback: str = ""
    seconds: float = 0.0


def outcome(action: Callable[[], object]) -> Outcome:
    """Do it; only a MimError is a refusal."""
    began = time.process_time()
    try:
        action()
    except MimError as error:
        return Outcome(refused=str(error), seconds=time.process_time() - began)
    except Exception:
        return Outcome(traceback=traceback.format_exc(), seconds=time.process_time() - began)
    return Outcome(seconds=time.process_time() - began)


@contextmanager
def little_memory(gib: float = 16) -> Iterator[None]:
    """An input that asks for too much must not end the tests of others."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- recipes and overrides -------------------------------------------------------------------------------------------

VALUES = [
    "0",
    "-1",
    "1",
    "3",
    "1e400",
    "-1e400",
    "1e-400",
    "9" * 5000,
    "1" + "0" * 9,
    "1e9",
    "100000",
    ".inf",
    ".nan",
    "null",
    "true",
    "''",
    '"\\u001b[31m"',
    '"\\0"',
    "[]",
    "{}",
    "[[[]]]",
    "{a: {b: 1}}",
    "!!python/name:os.system",
    "&a 1",
    "*a",
    "<<",
    "x" * 3000,
    "../../etc",
    "/dev/zero",
    "2001-01-01",
    "1:30",
    "0x10",
    "[1, 2, 3, 4, 5, 6, 7]",
    "{type: mae_vit}",
    "{type: ''}",
    "{type: {type: x}}",
    "s3://key:secret@bucket/x",
    '"\\uD800"',
    "1.5",
    "-0.0",
    "~",
    "main",
    "🦀",
]
"""What may stand anywhere in a recipe by a slip or on purpose."""
LINES = [
    "- x",
    "? [a]\n: b",
    "---",
    "%YAML 9.9",
    "name: again",
    "\t",
    "a: &a [*a]",
    "evaluate: {knn: {k: 1}}",
    "x" * 500,
]


def textually_mutated(rng: random.Random, texts: list[str]) -> bytes:
    """One of the texts with one to four changes of values, keys, lines or bytes."""
    lines = rng.choice(texts).splitlines()
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        key, colon, _value = lines[at].partition(":")
        kind = rng.randrange(8)
        if kind < 4 and colon:
            lines[at] = f"{key}: {rng.choice(VALUES)}"
        elif kind == 4:
            lines[at] = lines[at].replace(": ", f"_{rng.randrange(9)}: ", 1)
        elif kind == 5:
            lines.insert(at, rng.choice(LINES))
        elif kind == 6:
            del lines[at]
            lines = lines or ["a"]
        else:
            lines[at] += rng.choice(["{", "[" * 300, "}", ", ", "#", '"', "'", " " * 5000])
    text = bytearray("\n".join(lines).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 5)):
            text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def mutated_recipe(seed: int, texts: list[str]) -> bytes:
    """One of the texts, mutated: a quarter of the seeds by values of the right type, the others as text."""
    rng = random.Random(seed)
    return deeply_mutated(rng, texts) if seed % 4 == 1 else textually_mutated(rng, texts)


# --- recipes whose values are of the right type, so that they come as far as a model ---------------------------------

INTEGERS = [0, 1, 2, 3, 5, 7, 8, 12, 13, 16, 64, 97, 127, 1024, 65_536, 10**6, 2**31, 2**63 - 1, -1]
NUMBERS = [0.0, 1e-12, 1e-6, 0.01, 0.1, 0.5, 0.9, 0.999, 0.999999, 1.0, 1.0000001, 2.0, 100.0, 1e30, -1e-3, -1.0]
SLOTS = ("views", "masker", "encoder", "target", "decoder", "loss", "objective")
HEAD_SLOTS = ("target", "decoder", "loss")
SECTIONS = ("data", "optim", "train", "log", "checkpoint")
SMALL = "quickstart"
"""Recipes of that in their name are taken four times as often: a step of theirs costs little."""


@functools.cache
def everything() -> tuple[Registry, dict[str, Any]]:
    """A registry with all plugins loaded, and the schema of a recipe."""
    registry = Registry()
    registry.load_all()
    return registry, Recipe.model_json_schema()


@functools.cache
def schema_of(kind: str, name: str) -> dict[str, Any]:
    """Of the options of a component; empty for one that is not there."""
    cls = everything()[0].classes(kind).get(name)
    return {} if cls is None else cls.Config.model_json_schema()


def deeply_mutated(rng: random.Random, texts: list[str]) -> bytes:
    """A recipe on digits with one to three values at the edge of their type, or components in other's slots."""
    texts = [text for text in texts if SMALL in text.partition("\ndata:")[0]] * 4 + texts
    recipe = on_digits(yaml.safe_load(rng.choice(texts)))
    for _ in range(rng.randint(1, 3)):
        rng.choice([change_option, change_option, add_option, add_option, change_section, swap])(rng, recipe)
    return yaml.safe_dump(recipe, allow_unicode=True).encode()


def on_digits(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without what is not on this machine: images, tokenizers and published weights."""
    recipe["data"] = {**recipe["data"], "source": "digits"}
    recipe["data"].pop("tokens", None)
    teachers = recipe.get("teachers") or {}
    if recipe.pop("tokenizer", None):
        teachers["tokenizer"] = {"encoder": {"type": "dvae", "vocab_size": 8, "hidden_dim": 8, "blocks_per_group": 1}}
    for teacher in teachers.values():
        if "encoder" in teacher:
            for key in ("checkpoint", "pretrained"):
                teacher["encoder"].pop(key, None)
            teacher["random"] = True
    return {**recipe, "teachers": teachers}


def choices_of(recipe: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Kind of every component of a recipe, and where it stands: what holds it, and its key there."""
    found = [(kind, recipe, kind) for kind in SLOTS if kind in recipe]
    for head in (recipe.get("heads") or {}).values():
        found += [(kind, head, kind) for kind in HEAD_SLOTS if kind in head]
    teachers = recipe.get("teachers") or {}
    found += [("encoder", teacher, "encoder") for teacher in teachers.values() if "encoder" in teacher]
    for _, holder, key in found:
        if isinstance(holder[key], str):
            holder[key] = {"type": holder[key]}
    return found


def change_option(rng: random.Random, recipe: dict[str, Any]) -> None:
    """Another value for an option that a component of the recipe has."""
    kind, holder, key = rng.choice(choices_of(recipe))
    options = holder[key]
    if names := [name for name in options if name != "type"]:
        schema, name = schema_of(kind, options["type"]), rng.choice(names)
        options[name] = extreme(rng, schema.get("properties", {}).get(name, {}), schema, options[name])


def add_option(rng: random.Random, recipe: dict[str, Any]) -> None:
    """A value for any option of a component of the recipe, whether or not the recipe names it."""
    kind, holder, key = rng.choice(choices_of(recipe))
    schema = schema_of(kind, holder[key]["type"])
    if properties := schema.get("properties", {}):
        name = rng.choice(sorted(properties))
        holder[key][name] = extreme(rng, properties[name], schema, holder[key].get(name))


def change_section(rng: random.Random, recipe: dict[str, Any]) -> None:
    """A value of the recipe's own sections."""
    schema = everything()[1]
    name = rng.choice([name for name in SECTIONS if isinstance(recipe.get(name, {}), dict)])
    properties = resolved(rng, schema["properties"][name], schema).get("properties")
    if not properties:  # an alternative without keys, such as null
        return
    key = rng.choice(sorted(properties.keys() - {"source", "device", "tokens", "compile"}))
    section = recipe.setdefault(name, {})
    section[key] = extreme(rng, properties[key], schema, section.get(key))


def swap(rng: random.Random, recipe: dict[str, Any]) -> None:
    """Another component of the same kind, or now and then the name of one of another kind."""
    kind, holder, key = rng.choice(choices_of(recipe))
    kind = kind if rng.random() < 0.9 else rng.choice(SLOTS)
    name = rng.choice(sorted(everything()[0].classes(kind)))
    holder[key] = {**holder[key], "type": name} if rng.random() < 0.3 else {"type": name}


def resolved(rng: random.Random, schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """A schema behind its references, and one of its alternatives."""
    while True:
        if "$ref" in schema:
            schema = root.get("$defs", {}).get(schema["$ref"].rpartition("/")[2], {})
        elif ways := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
            schema = rng.choice(ways)
        else:
            return schema


def extreme(rng: random.Random, schema: dict[str, Any], root: dict[str, Any], now: Any) -> Any:
    """A value of the type, at its edge or odd; of `now`, a neighbour."""
    schema = resolved(rng, schema, root)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if isinstance(now, int) and not isinstance(now, bool) and rng.random() < 0.5:
        return rng.choice(
            [now + 1, now - 1, now * 2, now // 2, now * 3, max(1, now // 3), [now, now * 2], [now, now + 1]]
        )
    if isinstance(now, list) and now and rng.random() < 0.6:
        edge = extreme(rng, schema.get("items") or {"type": "number"}, root, now[0])
        return rng.choice([now[:-1], now * 2, now[::-1], [*now[1:], edge], [edge] * len(now), []])
    draw: dict[str, Callable[[], Any]] = {
        "integer": lambda: within(rng, schema, INTEGERS),
        "number": lambda: within(rng, schema, [*NUMBERS, *INTEGERS]),
        "boolean": lambda: rng.random() < 0.5,
        "string": lambda: rng.choice(["", "x", "cls", "encoder", "xyxy", "model"]),
        "null": lambda: None,
        "array": lambda: some_items(rng, schema, root),
        "object": lambda: {rng.choice(["x", "main", "steps"]): rng.choice([*NUMBERS, *INTEGERS])},
    }
    return draw.get(schema.get("type", "integer"), draw["integer"])()


def within(rng: random.Random, schema: dict[str, Any], values: list[Any]) -> Any:
    """One of the values, mostly one that keeps the bounds, where the least and the most are likely."""
    least, most = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    kept = [value for value in values if (least is None or value >= least) and (most is None or value <= most)]
    kept = [value for value in kept if (above is None or value > above) and (below is None or value < below)]
    edges = [edge for edge in (least, most) if edge is not None]
    return rng.choice(values) if rng.random() < 0.1 or not kept else rng.choice([*kept, *edges * 2])


def some_items(rng: random.Random, schema: dict[str, Any], root: dict[str, Any]) -> list[Any]:
    """As many as the schema says, or an odd number of them."""
    least, most = schema.get("minItems"), schema.get("maxItems")
    count = rng.choice([0, 1, 2, 3, 7]) if rng.random() < 0.2 or least is None else rng.choice([least, most or least])
    each = schema.get("prefixItems") or [schema.get("items") or {"type": "integer"}]
    return [extreme(rng, each[index % len(each)], root, None) for index in range(count)]


def reached(file: Path, registry: Registry) -> str:
    """How far `mim check` comes with a recipe: "nothing", "recipe", "model" or "step"."""
    stage = "nothing"
    with suppress(MimError):
        recipe = load_recipe(file, (), registry)
        stage = "recipe"
        with torch.device("meta"):
            build_model(recipe, registry, with_weights=False)
        stage = "model"
        measure_cost(recipe, registry)
        stage = "step"
    return stage


def mutated_override(seed: int, keys: list[str]) -> str:
    """KEY=VALUE with a key that is there, nearly there or nothing at all."""
    rng = random.Random(seed)
    where = rng.choice([*keys, "", ".", "a" + ".a" * 5000, "x" * 100_000, "evaluate.knn.k", "phases.0.name", "\x1b[2J"])
    if rng.random() < 0.3:
        where += rng.choice([".x", ".0", ".type", "..", ".type.type", "[0]"])
    return where + rng.choice(["=", "=", "=", "", "=="]) + rng.choice(VALUES)


def check_recipe(file: Path, registry: Registry, overrides: tuple[str, ...] = ()) -> str:
    """`mim check`, in this process."""
    return report(load_recipe(file, overrides, registry), registry)


# --- files -----------------------------------------------------------------------------------------------------------


class Runs:
    """One tiny run and what commands write of it, to be damaged in copies. `canary` is made by code that runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.registry = folder, Registry()
        self.canary = folder / "canary"
        (folder / "tiny.yaml").write_text(json.dumps(tiny.RECIPE))
        train(self.recipe(2), self.registry)
        self.step = next((folder / "tiny" / "checkpoints").iterdir()).name
        state = {f"blocks.{i}.w": torch.randn(4, 4) for i in range(3)}
        torch.save({"model": state, "args": {"x": 1}}, folder / "good.pth")
        save_file(state, folder / "good.safetensors")
        Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(folder / "good.png")
        Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(folder / "good.jpg")
        self.facts = {
            "num_images": 4,
            "views_per_image": 1,
            "grid": [2, 2],
            "num_classes": 9,
            "seed": 0,
            "views_of": {},
            "tokenizer": "t",
            "precision": "float32",
            "format": 1,
            "sha256": "",
        }

    def recipe(self, steps: int, name: str = "tiny") -> Any:
        changes = [f"train.steps={steps}", f"output_dir={json.dumps(str(self.folder))}", f"name={name}"]
        return load_recipe(self.folder / "tiny.yaml", changes, self.registry)

    def damaged(self, seed: int) -> tuple[str, Callable[[], object]]:
        """What is damaged, and the reading of it."""
        rng = random.Random(seed)
        kind = rng.choice([self.checkpoint, self.pickle, self.tensors, self.tokens, self.record, self.image, self.odd])
        return kind(rng)

    def checkpoint(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """A run whose state was changed, mostly with hashes that fit."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "tiny", copy)
        step = copy / "checkpoints" / self.step
        (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace("name: tiny", "name: copy"))
        name = rng.choice(
            ["state.json", "state.json", "manifest.json", "model.safetensors", "optimizer.main.safetensors"]
        )
        state = json.loads((step / "state.json").read_text())
        if name == "state.json" and rng.random() < 0.7:
            key = rng.choice(list(state))
            state[key] = rng.choice(JSON)
            (step / name).write_text(json.dumps(state))
        else:
            damage(step / name, rng)
        if rng.random() < 0.7 and name != "manifest.json":
            sign(step, step=rng.choice([2, 2, 2, -5, 10**18]))
        recipe = self.recipe(3, "copy")

        def resume() -> None:
            with Trainer.opened(recipe, self.registry):
                pass

        return f"checkpoint {name}", resume

    def pickle(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """What torch.save writes, damaged, or a pickle that would run code."""
        file = self.folder / rng.choice(["bad.pth", "bad.pt", "bad.bin", "bad.safetensors"])
        code = pickle.dumps({"model": Runs_(f"touch {self.canary}")}, protocol=rng.choice([0, 2, 4]))
        choice = rng.randrange(4)
        if choice == 0:
            file.write_bytes(code)
        elif choice == 1:
            torch.save({"model": Runs_(f"touch {self.canary}"), "a": torch.zeros(2)}, file)
        elif choice == 2:
            buffer = io.BytesIO()
            torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
            file.write_bytes(buffer.getvalue()[: rng.randrange(len(buffer.getvalue()))] + code)
        else:
            file.write_bytes((self.folder / "good.pth").read_bytes())
            damage(file, rng)
        return file.name, lambda: import_checkpoint(file, self.folder / "imported", self.registry)

    def odd(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """Tensors under the names of a known layout, of kinds that no such file holds."""
        file = self.folder / "odd.pth"
        names = [
            "patch_embed.proj.weight",
            "cls_token",
            "pos_embed",
            "blocks.0.mlp.fc1.weight",
            "decoder_embed.weight",
            "mask_token",
            "norm.weight",
            "blocks.0.attn.qkv.weight",
            "decoder_pred.weight",
        ]
        state = {name: rng.choice(ODD)() for name in rng.sample(names, rng.randint(1, len(names)))}
        torch.save({rng.choice(["model", "state_dict", "x"]): state}, file)
        layout = rng.choice([None, *sorted(self.registry.classes("checkpoint_format"))])
        return "odd tensors", lambda: import_checkpoint(file, self.folder / "imported", self.registry, layout=layout)

    def tensors(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """A safetensors file for `init`."""
        file = self.folder / "bad.safetensors"
        file.write_bytes((self.folder / "good.safetensors").read_bytes())
        if rng.random() < 0.5:
            damage(file, rng)
        else:
            header = rng.choice(
                [b"{}", b"[]", b"{" * 3000, b'{"a": 1}', b'{"__metadata__": 3}', b"\xff\xfe", ODD_HEADER]
            )
            length = rng.choice([len(header), 0, 2**40, 2**63])
            file.write_bytes(struct.pack("<Q", length) + header)
        return "safetensors", lambda: load_into(torch.nn.Linear(2, 2), file)

    def tokens(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """A folder of token ids."""
        folder = self.folder / "tokens"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        ids = np.full((4, 1, 4), rng.choice([1, 8, 9, 60000, 65535]), np.uint16)
        np.save(folder / IDS, ids)
        facts = {**self.facts, "sha256": hashlib.sha256((folder / IDS).read_bytes()).hexdigest()}
        if rng.random() < 0.6:
            facts[rng.choice(list(facts))] = rng.choice(JSON)
        (folder / FACTS).write_text(json.dumps(facts))
        if rng.random() < 0.4:
            damage(folder / rng.choice([IDS, FACTS]), rng)

        def read() -> None:
            cache = TokenCache(folder)
            cache.verify()
            cache.check_views(views_of={}, seed=0)
            cache(SAMPLE, 0, 0)

        return "tokens", read

    def record(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """Records beside a run, and the slots of an import."""
        name = rng.choice(["metrics.jsonl", "slots.yaml", "environment.json", "recipe.yaml"])
        folder = self.folder / "records"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "tiny", folder)
        slots = {"encoder": {"type": "mae_vit"}, "views": {"type": "image"}}
        if name == "slots.yaml":
            if rng.random() < 0.5:
                slots[rng.choice(list(slots))] = rng.choice(JSON)
            (folder / name).write_text(json.dumps(slots))
        if rng.random() < 0.7:
            damage(folder / name, rng)
        if name == "metrics.jsonl":
            return name, lambda: (
                read_metrics(folder),
                MetricsWriter(folder, resume_step=1, section=LogSection(tensorboard=False)).close(),
            )
        return name, lambda: trained_encoder(folder, self.registry)

    def image(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """The bytes of a picture."""
        file = self.folder / "bad.png"
        file.write_bytes((self.folder / rng.choice(["good.png", "good.jpg"])).read_bytes())
        damage(file, rng)
        return "image", lambda: open_image(file.read_bytes(), "bad\x1b[2J.png").crop(0, 0, 8, 8, (8, 8))


SAMPLE = type("Sample", (), {"name": "a.png"})()


class Runs_:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


JSON: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    [[[[]]]],
    {"main|group 0|lr": "x"},
    {"x": {}},
    {"main|blocks|y": 1},
    {"nobody|a|b": 1.0},
    [0],
    [-1, 4],
    [2, "x"],
    "NaN",
    [2**40, 2**40],
]
"""What may stand where another value belongs."""
ODD: list[Callable[[], Any]] = [
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(1, 1, 3, 3),
    lambda: torch.eye(4).to_sparse(),
    lambda: torch.zeros(4, device="meta"),
    lambda: torch.zeros(1).expand(10**6, 10**6),
    lambda: torch.zeros(2, dtype=torch.complex64),
    lambda: torch.zeros(4, dtype=torch.float8_e4m3fn),
    lambda: torch.zeros(1, 17, 32),
    lambda: "text",
    lambda: torch.zeros(32, 3, 4, 4),
    lambda: torch.zeros(7, 5, 3),
    lambda: torch.zeros(64, 32),
    lambda: torch.zeros(3, dtype=torch.bool),
    lambda: None,
    lambda: torch.full((1, 1, 32), float("nan")),
    lambda: torch.zeros(96, 32),
    lambda: torch.zeros(32),
]
ODD_HEADER = b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'


def damage(path: Path, rng: random.Random) -> None:
    """Cut, empty, lengthen, zero, change bytes, nest too deep, or hold something else."""
    data = bytearray(path.read_bytes()) if path.exists() else bytearray(b"x")
    kind = rng.randrange(9)
    if kind == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 1:
        data = bytearray()
    elif kind == 2:
        data += bytes(rng.randrange(256) for _ in range(20))
    elif kind == 3:
        data = bytearray(len(data))
    elif kind == 4:
        data = bytearray(b"[" * 100_000)
    elif kind == 5:
        data = bytearray(
            rng.choice([b"[]", b"null", b'"x"', b"{}", b'{"step": 1e999}', b"\xff\xfe\x00", b"1" * 10_000])
        )
    else:
        for _ in range(rng.randint(1, 8)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def sign(folder: Path, step: int) -> None:
    """A manifest whose hashes fit what is there, as only somebody who means harm makes it."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "tensors": None,
        }
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    content = {"format": 1, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))
