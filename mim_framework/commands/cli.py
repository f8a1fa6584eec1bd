"""The command `mim`. Nothing here computes: each command reads its arguments and calls one function.

Commands import what they need when they run, so that help and listings start without torch. An error that a user can
cause (`MimError`) is printed as one message without a traceback; `--debug` shows it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mim_framework import __version__
from mim_framework.base.errors import MimError, PluginError, RecipeError
from mim_framework.base.paths import local_path
from mim_framework.base.text import for_people
from mim_framework.registry.registry import Registry

if TYPE_CHECKING:
    from mim_framework.recipe.recipe import Recipe

TELLING_SECONDS = 5.0
"""A silent rank waits so long before it leaves: with the first one, the launcher ends the one that tells."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""


class LocalPath(click.Path):
    """A path, in which `~` and `file://` mean what they mean in a recipe."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(local_path(os.fspath(value)), param, ctx)
        except ValueError as error:
            self.fail(str(error), param, ctx)


RECIPE = click.argument("recipe")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
RUN = click.argument("run", type=LocalPath(exists=True, file_okay=False, path_type=Path))
OUTPUT = click.option("--output", type=LocalPath(path_type=Path), help="Where to write.")


def say(text: object, err: bool = False) -> None:
    """Print a line in which nothing steers the terminal or tells a secret."""
    click.echo(for_people(str(text)), err=err)


def aside(line: str) -> None:
    """A line beside what a command answers."""
    say(line, err=True)


@dataclass(frozen=True)
class Settings:
    """Options that stand before the command."""

    registry: Registry
    no_plugins: bool

    def recipe(self, recipe: str, overrides: tuple[str, ...]) -> Recipe:
        from mim_framework.recipe.draft import load_recipe

        return load_recipe(recipe, overrides, self.registry)


def _leave_group_behind(status: int = 1) -> None:
    """End a rank that failed at once: its peers are not waited for, and gloo's threads now and then abort an exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class ErrorPolicy(click.Group):
    """Prints errors that a user can cause, without a traceback, and ends with status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("mim: interrupted", err=True)
            _leave_group_behind(INTERRUPTED)
            ctx.exit(INTERRUPTED)
        except click.ClickException as error:
            error.message = for_people(error.message)
            raise
        except MimError as error:
            if ctx.params["debug"]:
                raise
            # All ranks of a node find the same fault in a recipe or its plugins; one of them tells.
            same_on_the_node = isinstance(error, RecipeError | PluginError) and os.environ.get("LOCAL_RANK", "0") != "0"
            if error.told_by_another_rank or same_on_the_node:
                time.sleep(TELLING_SECONDS)
            else:
                say(f"mim: {error}", err=True)
            _leave_group_behind()
            ctx.exit(1)


@click.group(cls=ErrorPolicy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mim")
@click.option("--no-plugins", is_flag=True, help="Use the built-in components only.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, no_plugins: bool, debug: bool) -> None:
    """Masked image modeling pre-training, assembled from plugins by a recipe.

    RECIPE is a YAML file or the name of a shipped recipe (mim recipes list). KEY=VALUE changes it: optim.lr=1e-3
    """
    ctx.obj = Settings(Registry(only=()) if no_plugins else Registry(), no_plugins)


# --- training --------------------------------------------------------------------------------------------------------


class RankCount(click.ParamType):
    """A number of processes, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither a number of processes nor 'auto'", param, ctx)
        return int(value)


@main.command()
@RECIPE
@OVERRIDES
@click.option(
    "--nproc-per-node", type=RankCount(), default="auto", show_default="one per GPU, else 1", help="Processes."
)
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--node-rank", type=click.IntRange(min=0), help="Number of this machine, from 0.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="An address that all machines reach.")
@click.option("--rdzv-id", help="The same text on all machines of a run.")
@click.option("--fresh", is_flag=True, help="Refuse to resume a run that is there already.")
@click.option(
    "--allow-change",
    multiple=True,
    metavar="KEY",
    help="Go on although this key has changed, for example train.epochs or optim.lr; it is recorded.",
)
@click.option("--output", metavar="DIR", help="The same as output_dir=DIR.")
@click.pass_obj
def run(
    settings: Settings,
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | str,
    nnodes: int,
    node_rank: int | None,
    rdzv_endpoint: str | None,
    rdzv_id: str | None,
    fresh: bool,
    allow_change: tuple[str, ...],
    output: str | None,
) -> None:
    """Train. The same command again resumes."""
    if output is not None:
        overrides += (f"output_dir={json.dumps(output)}",)
    checked = settings.recipe(recipe, overrides)  # before any other process starts, so that errors are told once
    from mim_framework.runtime.launch import launch, under_launcher

    if not under_launcher():
        ranks = _devices(checked.train.device) if isinstance(nproc_per_node, str) else nproc_per_node
        if ranks > 1 or nnodes > 1:
            switches = ["--no-plugins"] if settings.no_plugins else []
            allowed = [word for key in allow_change for word in ("--allow-change", key)]
            launch(
                [*switches, "run", *(["--fresh"] if fresh else []), *allowed, "--", recipe, *overrides],
                nproc_per_node=ranks,
                nnodes=nnodes,
                node_rank=node_rank,
                rdzv_endpoint=rdzv_endpoint,
                rdzv_id=rdzv_id,
            )
            return
    from mim_framework.training.trainer import train

    directory = train(checked, settings.registry, fresh=fresh, allow_change=allow_change)
    if os.environ.get("RANK", "0") == "0":
        say(f"run directory: {directory}")


def _devices(wanted: str) -> int:
    """How many GPUs of this machine a run would use; 1 without any."""
    import torch

    return max(1, torch.cuda.device_count()) if wanted in ("auto", "cuda") else 1


@main.command()
@RECIPE
@OVERRIDES
@click.option("--world-size", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks to calculate for.")
@click.pass_obj
def check(settings: Settings, recipe: str, overrides: tuple[str, ...], world_size: int) -> None:
    """Check a recipe without training: parameters, FLOPs, tokens, memory, batch arithmetic."""
    checked = settings.recipe(recipe, overrides)
    from mim_framework.commands.check import report

    say(report(checked, settings.registry, world_size=world_size))


@main.command()
@RECIPE
@OVERRIDES
@click.option(
    "--data",
    type=click.Choice(["synthetic", "real", "loader-only"]),
    default="synthetic",
    show_default=True,
    help="Made-up images on the device, the recipe's own, or its loader without a model.",
)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps to measure.")
@click.pass_obj
def bench(settings: Settings, recipe: str, overrides: tuple[str, ...], data: str, steps: int) -> None:
    """Measure the speed of a recipe's training step, and where the time goes."""
    checked = settings.recipe(recipe, overrides)
    from mim_framework.commands.bench import run_bench

    say(run_bench(checked, settings.registry, data=data, steps=steps))


@main.command()
@RECIPE
@OVERRIDES
@click.option("--output", required=True, type=LocalPath(path_type=Path), help="Folder to write, for data.tokens.")
@click.pass_obj
def tokenize(settings: Settings, recipe: str, overrides: tuple[str, ...], output: Path) -> None:
    """Store the token ids of all fixed views (data.views_per_image), so that no tokenizer runs in training."""
    checked = settings.recipe(recipe, overrides)
    from mim_framework.commands.tokenize import tokenize as run_tokenize

    facts = run_tokenize(checked, settings.registry, output, report=say)
    without = f", {facts.missing:,} views without ids" if facts.missing else ""
    say(f"{facts.num_images:,} images x {facts.views_per_image} views{without}: use data.tokens={output}")


@main.command()
@RUN
@click.option("--step", type=click.IntRange(min=0), help="By default the last one of nonfinite.jsonl.")
@click.option("--from-start", is_flag=True, help="Repeat all steps, where no checkpoint before it is kept.")
@click.option("--images", type=LocalPath(path_type=Path), help="Folder to write the images of the step to.")
@click.pass_obj
def replay(settings: Settings, run: Path, step: int | None, from_start: bool, images: Path | None) -> None:
    """Repeat a step of a run and name the first module whose output is not finite."""
    from mim_framework.commands.replay import replay as repeat

    say(repeat(run, step, from_start=from_start, images=images, registry=settings.registry, report=say))


# --- images before training ------------------------------------------------------------------------------------------


@main.group()
def data() -> None:
    """Images before anything is trained on them."""


@data.command("scan")
@click.argument("source")
@click.option("--output", type=LocalPath(path_type=Path, file_okay=False), help="Folder to write; scans/NAME if none.")
@click.option("--labels", is_flag=True, help="Count images by class: the first folder below a folder.")
@click.option(
    "--sample", type=click.IntRange(min=1), metavar="N", help="Read the pixels of about N images, evenly chosen."
)
@click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Processes that read; as a run if none.")
@click.pass_obj
def scan(settings: Settings, source: str, **options: Any) -> None:
    """Say what images are: sizes, modes, broken files, duplicates, empty ones, mean and std for the recipe.

    SOURCE is a folder, a URL, a name such as digits, or a mapping with options: '{type: folder, root: FOLDER, pages:
    each}'. Killed at any time, the same command goes on. Writes scan.html and scan.json.
    """
    from mim_framework.commands.data_scan import run_scan
    from mim_framework.commands.image_progress import ImageProgress

    with ImageProgress() as progress:
        written = run_scan(source, settings.registry, progress=progress, report=aside, **options)
    for line in written.lines:
        say(line)


@data.command("pack")
@click.argument("source")
@click.argument("output", type=LocalPath(path_type=Path, file_okay=False))
@click.option("--format", type=click.Choice(["tar"]), default="tar", show_default=True, help="Kind of shards.")
@click.option(
    "--per-shard", type=click.IntRange(min=1), default=2000, show_default=True, metavar="N", help="Images of a shard."
)
@click.option(
    "--order", type=click.Choice(["kept", "shuffled"]), default="kept", show_default=True, help="Of the images."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the shuffled order.")
@click.option("--resize-short", type=click.IntRange(min=1), metavar="N", help="Shrink to a short side of N pixels.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality of what is shrunk."
)
@click.option("--labels", is_flag=True, help="Take the first folder below a folder as the class of an image.")
@click.option("--shard", "part", metavar="I/N", help="Pack part I of N, counted from 0: one on each of N machines.")
@click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Processes that read; as a run if none.")
@click.pass_obj
def pack(settings: Settings, source: str, output: Path, format: str, **options: Any) -> None:
    """Pack images into tar shards that source `tar` reads, a file for some thousand images.

    SOURCE is as in mim data scan. Killed at any time, the same command goes on with the first shard that is not whole.
    Every member is read back and compared by its hash. Images that cannot be read are left out and listed in pack.json.
    """
    from mim_framework.commands.data_pack import run_pack
    from mim_framework.commands.image_progress import ImageProgress

    with ImageProgress() as progress:
        lines = run_pack(source, output, settings.registry, progress=progress, report=aside, **options)
    for line in lines:
        say(line)


@data.command("index")
@click.argument("shards")
@click.option("--output", type=LocalPath(path_type=Path, file_okay=False), help="Folder to write to.")
@click.option("--label-key", default="label", show_default=True, help="Key of labels in json members.")
@click.option("--force", is_flag=True, help="Make those anew that are there.")
@click.pass_context
def index_data(ctx: click.Context, shards: str, output: Path | None, label_key: str, force: bool) -> None:
    """Find out once where every image of tar shards lies, for source `tar`, and write it beside each shard.

    SHARDS is a folder or URL of .tar files, one of them, or several: 'train-{0000..0063}.tar'. Of a URL, name a folder
    with --output and give it to data.source.index. Ends with status 1 if a shard is damaged.
    """
    from mim_framework.commands.index import index_shards

    failed = index_shards(shards, output, label_key=label_key, force=force, report=say)
    ctx.exit(1 if failed else 0)


# --- what is installed -----------------------------------------------------------------------------------------------


@main.group()
def plugins() -> None:
    """What is installed, and a new one of your own."""


@plugins.command("list")
@click.option("--load", is_flag=True, help="Import each plugin, to find errors that its source does not show.")
@click.pass_obj
def list_plugins(settings: Settings, load: bool) -> None:
    """Installed plugins with their components and faults; imports none of them."""
    registry = settings.registry
    failures = registry.load_all() if load else {}
    recipes = registry.recipes()
    for info in registry.plugins():
        say(f"{info.name} {info.version} ({info.distribution})")
        names: dict[str, list[str]] = {}
        for component in info.components if info.error else registry.components(info.name):
            names.setdefault(component.kind, []).append(component.name)
        for kind in sorted(info.unread - names.keys()) if not load else ():
            names[kind] = ["(known when loaded)"]
        names["recipes"] = [recipe.name for recipe in recipes if recipe.plugin == info.name]
        names["listens to"] = list(info.events)
        for kind, found in names.items():
            if found:
                say(f"  {kind}: {', '.join(found)}")
        if fault := info.error or failures.get(info.name):
            say(f"  cannot be used: {fault}")


@plugins.command("show")
@click.argument("name")
@click.option("--load", is_flag=True, help="Import the plugin.")
@click.pass_obj
def show_plugin(settings: Settings, name: str, load: bool) -> None:
    """One plugin, with a line about each of its components."""
    registry = settings.registry
    info = registry.plugin(name)
    if load:
        registry.load(info.name)
    say(f"{info.name} {info.version}\npackage: {info.distribution}\nmodule: {info.module}")
    for component in info.components if info.error else registry.components(info.name):
        say(f"{component.kind} {component.name}: {component.summary}")
    for recipe in registry.recipes():
        if recipe.plugin == info.name:
            say(f"recipe {recipe.name}: {recipe.summary}")
    for event in info.events:
        say(f"listens to {event}")
    if info.error:
        say(f"cannot be used: {info.error}")


@plugins.command("new")
@click.argument("name")
@click.option(
    "--output",
    type=LocalPath(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="Folder to write it in; this one by default.",
)
@click.pass_obj
def new_plugin(settings: Settings, name: str, output: Path) -> None:
    """Write a plugin of your own, mim-plugin-NAME: a small method that trains, with its tests, to be changed."""
    from mim_framework.commands import scaffold

    folder = scaffold.new_plugin(name, output, settings.registry)
    say(f"{folder} is a plugin that works; change it. Next:")
    for command in scaffold.next_commands(folder):
        say(f"  {command}")


@main.group()
def recipes() -> None:
    """Recipes that installed plugins ship."""


@recipes.command("list")
@click.pass_obj
def list_recipes(settings: Settings) -> None:
    """Shipped recipes by name."""
    shipped = settings.registry.recipes()
    width = max((len(recipe.name) for recipe in shipped), default=0)
    for recipe in shipped:
        say(f"{recipe.name:<{width}}  {recipe.plugin}: {recipe.summary}")
    if not shipped:
        say("no installed plugin ships a recipe", err=True)


@recipes.command("copy")
@click.argument("name")
@click.argument("dest", type=LocalPath(path_type=Path), default=".")
@click.pass_obj
def copy_recipe(settings: Settings, name: str, dest: Path) -> None:
    """Copy a shipped recipe to DEST, a file or a folder, to change it."""
    path = settings.registry.recipe(name).path
    dest = dest / path.name if dest.is_dir() else dest
    if dest.exists():
        raise MimError(f"{dest} is there already; name another file: mim recipes copy {name} DEST")
    try:
        dest.write_bytes(path.read_bytes())
    except OSError as error:
        raise MimError(f"{dest} cannot be written: {error.strerror}") from error
    say(dest)


@main.command()
@click.pass_obj
def schema(settings: Settings) -> None:
    """JSON schema of recipes, with the options of every installed component, for editors."""
    from mim_framework.recipe.schema import recipe_schema

    say(json.dumps(recipe_schema(settings.registry), indent=2))
    for error in settings.registry.load_all().values():
        say(f"left out: {error}", err=True)


@main.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Versions, devices, plugins and decoders; ends with status 1 if something is wrong."""
    from mim_framework.commands.doctor import examine

    findings = examine(ctx.obj.registry)
    for finding in findings:
        say(f"{'  ' if finding.ok else '! '}{finding.topic}: {finding.text}")
    ctx.exit(0 if all(finding.ok for finding in findings) else 1)


# --- after training --------------------------------------------------------------------------------------------------


@main.command("eval")
@click.argument("names", metavar="NAME[,NAME...]")
@click.argument("subjects", nargs=-1, required=True, metavar="SUBJECT... [KEY=VALUE]...")
@click.option("--train", metavar="SOURCE", help="Images to learn from: a folder or URL of class folders, or a source.")
@click.option("--test", metavar="SOURCE", help="Images to be tested on.")
@click.option("--checkpoint", metavar="best|all|STEP", help="Which checkpoints of the runs, instead of the newest.")
@click.option("--cache", type=LocalPath(path_type=Path, file_okay=False), help="Folder that keeps features.")
@click.option("--json", "as_json", is_flag=True, help="Print records instead of tables.")
@click.option("--report", "page", is_flag=True, help="Judge health in words, with report.html in the run directory.")
@click.pass_obj
def evaluate(
    settings: Settings, names: str, subjects: tuple[str, ...], as_json: bool, page: bool, **options: Any
) -> None:
    """What encoders are worth by evaluations such as knn: raw pixels, untrained encoder, trained encoder.

    SUBJECT is a run, a checkpoint folder inside one, a folder of `mim import`, a file of `mim export`, timm:NAME,
    timm:NAME,checkpoint=FILE.safetensors or timm:NAME,random. KEY=VALUE sets an option of an evaluation (knn.k=10,
    knn.layers=each) or names other images (data.eval_source.root=FOLDER). A SOURCE is a folder or URL of class
    folders, a name such as digits, or a mapping with options: '{type: folder, root: FOLDER, pages: each}'.
    """
    changes = [each for each in subjects if is_change(each)]
    judged = [each for each in subjects if each not in changes]
    if not judged:
        raise click.UsageError("name a SUBJECT, for example a run directory")
    if page:
        if names != "health":
            raise click.UsageError(
                f"--report is for health alone, not for {names}; name the others in a command of theirs"
            )
        if given := ["--json"] * as_json + [f"--{name}" for name, value in options.items() if value is not None]:
            raise click.UsageError(f"--report takes a run as it is; leave {', '.join(given)} out")
        from mim_framework.commands.health import lines, report_health

        for run_dir in map(Path, judged):
            say("\n".join(lines(run_dir, report_health(run_dir, changes, settings.registry))))
        return
    from mim_framework.commands.evaluate import report

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            say(line, err=True)

    wanted = names.split(",")
    for line in report(wanted, judged, changes, settings.registry, as_json=as_json, progress=progress, **options):
        say(line)


@main.command()
@click.argument("subject")
@click.argument("images", nargs=-1, metavar="[FOLDER|SOURCE] [KEY=VALUE]...")
@click.option("--output", required=True, type=LocalPath(path_type=Path), help="A .parquet, .npz or .safetensors file.")
@click.option(
    "--pool",
    type=click.Choice(["mean", "cls", "tokens"]),
    default="mean",
    show_default=True,
    help="Mean of the patch tokens, the class token, or every patch token.",
)
@click.option(
    "--layers", default="", metavar="N,...|each", help="Blocks, side by side; by default the encoder's output."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the stored numbers.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the forward pass.",
)
@click.option("--device", help="cpu, cuda, cuda:1 or mps; by default that of the run, or the first there is.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images per pass.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that read images.")
@click.pass_obj
def embed(settings: Settings, subject: str, images: tuple[str, ...], output: Path, layers: str, **options: Any) -> None:
    """Write the features that an encoder has of all images of a folder or source, with their names and labels.

    SUBJECT is a run, a checkpoint folder inside one, a folder of `mim import`, a file of `mim export`, timm:NAME,
    timm:NAME,checkpoint=FILE.safetensors or timm:NAME,random. Images are those of the run unless a FOLDER, a URL or a
    SOURCE is named. KEY=VALUE sets an option of the source, such as labels=true.
    """
    changes = [each for each in images if is_change(each)]
    places = [each for each in images if each not in changes]
    if len(places) > 1:
        raise click.UsageError(f"name one folder or source, got {', '.join(places)}")
    from mim_framework.commands.embed import run_embed

    place = places[0] if places else None
    written = run_embed(subject, place, changes, output, settings.registry, layers=layers, report=aside, **options)
    for line in written.lines():
        say(line)


def is_change(text: str) -> bool:
    """Whether an argument is KEY=VALUE, and no path or name in which a '=' stands."""
    return re.match(r"[A-Za-z_][\w.]*=", text) is not None and not Path(text).exists()


@main.command()
@RUN
@click.option("--to", required=True, help="Layout of the weights: timm, official, or another of the encoder's plugin.")
@click.option("--classifier", is_flag=True, help="Write the classifier of a fine-tuned run too, for timm.")
@OUTPUT
@click.pass_obj
def export(settings: Settings, run: Path, to: str, output: Path | None, classifier: bool) -> None:
    """Write a run's weights in another layout."""
    from mim_framework.convert import export_run

    notes: list[str] = []
    say(export_run(run, to, output, settings.registry, classifier=classifier, note=notes.append))
    for note in notes:
        say(note, err=True)


@main.command("import")
@click.argument("file", type=LocalPath(exists=True, path_type=Path))
@OVERRIDES
@click.option("--layout", metavar="NAME", help="Checkpoint format of the file, where several or none recognise it.")
@click.option("--key", metavar="NAME", help="Key of the file that holds the weights, such as model_ema.")
@click.option("--prefix", metavar="P", help="Take only the tensors whose names begin so, without it.")
@click.option("--allow-nonfinite", is_flag=True, help="Take tensors that hold NaN or infinite values too.")
@OUTPUT
@click.pass_obj
def import_file(
    settings: Settings,
    file: Path,
    overrides: tuple[str, ...],
    layout: str | None,
    key: str | None,
    prefix: str | None,
    allow_nonfinite: bool,
    output: Path | None,
) -> None:
    """Read a checkpoint of a method's official code, without running code from it.

    KEY=VALUE gives what no tensor tells, such as encoder.num_heads=12, or another image size: views.img_size=448.
    """
    from mim_framework.convert import import_checkpoint
    from mim_framework.recipe.draft import parse_override

    options = dict(parse_override(override) for override in overrides)
    say(
        import_checkpoint(
            file, output, settings.registry, layout=layout, options=options, key=key, prefix=prefix,
            allow_nonfinite=allow_nonfinite,
        )
    )  # fmt: skip


@main.command()
@RUN
@click.argument("images", nargs=-1, required=True, type=LocalPath(exists=True, dir_okay=False, path_type=Path))
@OUTPUT
@click.pass_obj
def reconstruct(settings: Settings, run: Path, images: tuple[Path, ...], output: Path | None) -> None:
    """Draw images masked and reconstructed by a run, as PNG files."""
    from mim_framework.commands.reconstruct import reconstruct_run

    for path in reconstruct_run(run, list(images), output, registry=settings.registry):
        say(path)
