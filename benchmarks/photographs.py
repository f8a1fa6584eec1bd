"""What pre-training brings on real photographs: every method, small, for the same time each, on one CPU.

    pip install elpv-dataset                           # 2,624 photographs of solar cells; CC BY-NC-SA 4.0, not shipped
    python benchmarks/photographs.py                   # some hours on two cores; what is done already is not done again
    python benchmarks/photographs.py --minutes 1 --only mae scratch --seeds 1
    python benchmarks/photographs.py --table           # the table of what there is

Every method pre-trains on the photographs of the training part, without labels, for as many steps as fit into the
given time. Then cells with a defect are told from the others, on photographs of other modules: by kNN, a linear and
an attentive probe on frozen features, and by fine-tuning; beside raw pixels, the untrained encoder and the same
fine-tuning from scratch.

The photographs of one module resemble each other. The package does not name the modules, but lists their cells one
after another, and a module is all monocrystalline or all polycrystalline: where the type changes, one ends. The test
part are whole stretches of one type, so that no module is on both sides.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mim_framework.assembly.opened import recipe_of_run
from mim_framework.commands.bench import measure_step
from mim_framework.commands.evaluate import Options, evaluate
from mim_framework.recipe.draft import load_recipe
from mim_framework.registry.registry import Registry

TEST_STRETCHES = (0, 1, 6, 7)
"""Of the ten stretches of one type, in the order of the package: 612 photographs, a third of them with a defect."""
DEFECT = 0.5
"""A cell counts as defective above this probability, of the four that its annotators could give."""
TOKENIZER_SHARE = 0.3
"""Part of the time that the tokenizer of a method in two stages gets."""
EVALUATIONS = {
    "knn": "knn_top1",
    "linear": "linear_top1",
    "attentive": "attentive_top1",
}
VIT = ["encoder.patch_size=8", "encoder.embed_dim=128", "encoder.depth=6", "encoder.num_heads=4"]


@dataclass(frozen=True)
class Method:
    """How a method is made small for photographs of 64 pixels: changes to its recipe for digits."""

    recipe: str
    changes: tuple[str, ...]
    norm: str = "new"
    """The norm before the classifier in fine-tuning: a new one, or the encoder's own (Swin)."""
    stage_one: Method | None = None


def small(recipe: str, *changes: str, crop: str | None = "views.scale=[0.4, 1.0]", **more: Any) -> Method:
    common = ["views.img_size=64", "views.flip=0.5", *([crop] if crop else [])]
    return Method(recipe, (*common, *changes), **more)


METHODS = {
    "mae": small("quickstart", *VIT, "target.norm_pix_loss=true"),
    "mff": small("mff_quickstart", *VIT, "views.padding=8", "objective.layers=[0, 3, 5]", crop=None),
    "maskfeat": small("maskfeat_quickstart", *VIT, "encoder.mlp_ratio=4", "target.cell_size=8"),
    "simmim": small(
        "simmim_quickstart", "encoder.embed_dim=64", "encoder.num_heads=[2, 4]", "encoder.depths=[2, 4]",
        "masker.mask_patch_size=16", norm="encoder",
    ),
    "mixmim": small(
        "mixmim_quickstart", "encoder.embed_dim=64", "encoder.num_heads=[2, 4]", "encoder.depths=[2, 4]",
        "encoder.window_size=[8, 8]", "masker.mask_patch_size=16", norm="encoder",
    ),
    "beit": small(
        "beit_quickstart", *VIT, "views.second_size=64",
        stage_one=small("beit_dvae_quickstart", "encoder.vocab_size=256", crop="views.scale=[0.4, 1.0]"),
    ),
    "beit_v2": small(
        "beit_v2_quickstart", *VIT, "views.second_size=64", "objective.early_layers=4",
        stage_one=small("beit_v2_vqkd_quickstart", "encoder.patch_size=8", "encoder.num_codes=128"),
    ),
}  # fmt: skip
SCRATCH = "scratch"
"""The encoder of MAE, fine-tuned without any pre-training."""
SEVERAL_SEEDS = ("mae", SCRATCH)


@dataclass
class Benchmark:
    """The parts of the benchmark, each done once: its result lies in `output/parts`."""

    output: Path
    minutes: float
    epochs: int
    registry: Registry = field(default_factory=Registry)

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a part, made if it is not there yet."""
        file = self.output / "parts" / f"{name}.json"
        if not file.exists():
            print(f"{name} ...", flush=True)
            found = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".tmp").write_text(json.dumps(found, indent=1))
            file.with_suffix(".tmp").replace(file)
        return json.loads(file.read_text())

    def method(self, name: str, seed: int) -> None:
        """Pre-train, judge the frozen encoder, fine-tune."""
        method, label = METHODS[name], f"{name}_{seed}"
        changes: list[str] = []
        share = 1.0
        if method.stage_one is not None:
            share = 1 - TOKENIZER_SHARE
            tokenizer = self.pretrained(f"{label}_tokenizer", method.stage_one, seed, TOKENIZER_SHARE)
            changes = [f"tokenizer={tokenizer}"]
        run = self.pretrained(label, method, seed, share, *changes)
        self.part(f"{label}_frozen", lambda: self.frozen(run))
        self.part(f"{label}_finetuned", lambda: self.finetuned(label, run, method, seed, start=run))

    def scratch(self, seed: int) -> None:
        """Fine-tune the untrained encoder of MAE; needs the recipe of MAE's first run."""
        run = self.output / "runs" / "mae_0"
        label = f"{SCRATCH}_{seed}"
        self.part(f"{label}_finetuned", lambda: self.finetuned(label, run, METHODS["mae"], seed, start=None))

    def pretrained(self, label: str, method: Method, seed: int, share: float, *changes: str) -> Path:
        """The directory of a run that takes its share of the time on a quiet machine."""
        run = self.output / "runs" / label
        source = f"data.source={{type: folder, root: {self.output}/images/train}}"
        quiet = ["log.num_images=0", "evaluate=[]", "checkpoint.every_epochs=5", "log.every_steps=50"]
        every = [source, *method.changes, *changes, *quiet, f"seed={seed}", "optim.warmup_epochs=3"]

        def make() -> dict[str, Any]:
            step = measure_step(load_recipe(method.recipe, every, self.registry), self.registry, data="real", steps=9)
            steps = max(1, int(60 * self.minutes * share / step.fastest))
            _mim("run", method.recipe, *every, "train.epochs=null", f"train.steps={steps}", *_into(run))
            return {"steps": steps, "seconds_of_a_step": step.fastest}

        self.part(f"{label}_pretrained", make)
        return run

    def frozen(self, run: Path) -> dict[str, Any]:
        """Accuracy of the frozen encoder, the untrained one and raw pixels by every evaluation."""
        images = self.output / "images"
        options = Options(train=str(images / "train"), test=str(images / "test"))
        [judged] = evaluate(list(EVALUATIONS), [run], ["attentive.epochs=30"], self.registry, options=options)
        return {
            variant: {name: numbers[key] for name, key in EVALUATIONS.items() if key in numbers}
            for variant, numbers in judged.numbers.items()
        }

    def finetuned(self, label: str, run: Path, method: Method, seed: int, *, start: Path | None) -> dict[str, Any]:
        """Accuracy after the last epoch, never that of the best one, which the test part would choose."""
        recipe, _ = recipe_of_run(run, self.registry)
        file, out = self.output / "recipes" / f"{label}.yaml", self.output / "runs" / f"{label}_finetuned"
        file.parent.mkdir(parents=True, exist_ok=True)
        written = classifier_recipe(recipe.model_dump(mode="json", exclude_unset=True), method, self.output / "images")
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        init = [f"init={start}"] if start else []
        _mim("run", str(file), f"seed={seed}", f"train.epochs={self.epochs}", *init, *_into(out))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return {"top1": [row["accuracy_top1"] for row in rows if "accuracy_top1" in row][-1]}


def classifier_recipe(pretrained: dict[str, Any], method: Method, images: Path) -> dict[str, Any]:
    """One recipe of fine-tuning for the encoder of every method."""
    encoder = {key: value for key, value in pretrained["encoder"].items() if value is not None}
    return {
        "name": "finetuned",
        "data": {
            "source": {"type": "folder", "root": str(images / "train"), "labels": True},
            "eval_source": {"type": "folder", "root": str(images / "test"), "labels": True},
            "workers": 0,
        },
        "views": {"type": "image", "img_size": 64, "scale": [0.6, 1.0], "flip": 0.5, "label_smoothing": 0.1,
                  "eval_view": "resize_crop", "eval_crop": 1.0},
        "masker": "none",
        "encoder": encoder,
        "objective": "classify",
        "target": "labels",
        "decoder": {"type": "classifier", "norm": method.norm, "init_std": 2.0e-5},
        "loss": "cross_entropy",
        "optim": {"type": "adamw", "lr": 1.0e-3, "weight_decay": 0.05, "warmup_epochs": 2, "min_lr": 1.0e-6,
                  "layer_decay": 0.75},
        "train": {"total_batch_size": 64, "epochs": 20, "precision": "float32"},
        "log": {"every_steps": 31, "num_images": 0, "images_every_epochs": 0},
        "evaluate": [{"type": "accuracy", "every_epochs": 5}],
    }  # fmt: skip


def lay_out(images: Path, *, most: int | None = None) -> None:
    """The photographs of the package, copied into `train` and `test` with a folder for each class.

    Args:
        most: take so many of each class in either part only.
    """
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        sys.exit("the photographs are not here: pip install elpv-dataset (CC BY-NC-SA 4.0)")
    data = Path(spec.origin).parent / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines() if line]
    partial = images.with_name("images.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, (_, stretch) in enumerate(groupby(rows, key=lambda row: row[2])):
        part = "test" if number in TEST_STRETCHES else "train"
        for name, probability, _ in stretch:
            folder = partial / part / ("defective" if float(probability) > DEFECT else "functional")
            folder.mkdir(parents=True, exist_ok=True)
            if most is None or len(list(folder.iterdir())) < most:
                shutil.copy(data / name, folder)
    partial.rename(images)


def table(parts: Path) -> Iterator[str]:
    """The table of what there is: the mean of the seeds, and their range where there are several."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(parts.glob("*.json"))}
    yield "| | steps | kNN | linear | attentive | fine-tuned |"
    yield "|---|---|---|---|---|---|"

    def row(title: str, steps: str, frozen: list[dict[str, float]], tuned: list[float]) -> str:
        cells = [_spread([each[name] for each in frozen if name in each]) for name in EVALUATIONS]
        return f"| {title} | {steps} | {' | '.join(cells)} | {_spread(tuned)} |"

    of = {kind: {key: value for key, value in found.items() if key.endswith(f"_{kind}")}
          for kind in ("pretrained", "frozen", "finetuned")}  # fmt: skip
    mae = [value for key, value in of["frozen"].items() if key.startswith("mae_")]
    yield row("raw pixels", "", [each["raw_pixels"] for each in mae[:1]], [])
    yield row("untrained encoder of MAE", "", [each["untrained"] for each in mae],
              [value["top1"] for key, value in of["finetuned"].items() if key.startswith(SCRATCH)])  # fmt: skip
    for name in METHODS:
        labels = [key.removesuffix("_frozen") for key in of["frozen"] if key.rsplit("_", 2)[0] == name]
        if labels:
            steps = of["pretrained"][f"{labels[0]}_pretrained"]["steps"]
            tuned = [of["finetuned"][f"{each}_finetuned"]["top1"] for each in labels if f"{each}_finetuned" in found]
            yield row(name, f"{steps:,}", [of["frozen"][f"{each}_frozen"]["trained"] for each in labels], tuned)


def _spread(values: list[float]) -> str:
    """Per cent, with the smallest and largest of several."""
    if not values:
        return ""
    text = f"{100 * fmean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _into(run: Path) -> list[str]:
    """What makes `mim run` use this directory."""
    return [f"name={run.name}", f"output_dir={run.parent}"]


def _mim(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mim_framework", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mim {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/photographs"))
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of pre-training for each method, on a quiet machine"
    )
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, help="of MAE and of training from scratch; others have one")
    parser.add_argument("--only", nargs="+", choices=[*METHODS, SCRATCH], default=[*METHODS, SCRATCH])
    parser.add_argument("--images", type=int, help="take so many of each class only, to try the script")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and nothing else")
    args = parser.parse_args(arguments)
    benchmark = Benchmark(args.output.resolve(), args.minutes, args.epochs)
    if not args.table:
        if not (benchmark.output / "images").is_dir():
            lay_out(benchmark.output / "images", most=args.images)
        for seed in range(args.seeds):
            for name in args.only:
                if seed == 0 or name in SEVERAL_SEEDS:
                    benchmark.scratch(seed) if name == SCRATCH else benchmark.method(name, seed)
    print("\n".join(table(benchmark.output / "parts")))


if __name__ == "__main__":
    main()
