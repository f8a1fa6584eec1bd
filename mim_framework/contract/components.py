"""What a component is: a named class with a validated `Config`, built from its config and the specs published so far.

Start here to write a plugin. Five slots make a training step (masker, encoder, target, decoder, loss); an objective
orders them; views and sources bring the data. Every base class says what a subclass must set and what it may override.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mim_framework.base import rng
from mim_framework.base.errors import BrokenImage
from mim_framework.base.precision import without_autocast
from mim_framework.base.schedule import Curve
from mim_framework.base.section import Section
from mim_framework.contract.mask import Mask
from mim_framework.contract.records import Ask, Latent, Masked, Measured, Outcome, Pred, Sample, Views
from mim_framework.contract.specs import EncoderSpec, Kind, MaskerSpec, PredSpec, Specs, TargetSpec, ViewSpec
from mim_framework.contract.step import Step

API_VERSION = "2"
"""Version of the plugin contract. A plugin module may set `requires_api = "2"`; another version is refused."""

EMBEDDINGS = frozenset({"patch_embed", "pos_embed", "cls_token", "mask_token", "reg_token"})
"""Names of what stands before the first block of an encoder."""


class Component(nn.Module):
    """Base of the components that run in a training step.

    Buffers are not synchronised between ranks, and checkpoints hold those of rank 0: a component that keeps statistics
    reduces them itself, through `step.world`.
    """

    kind: ClassVar[str]
    """The slot, set by the base classes below."""
    name: ClassVar[str]
    """The name by which a recipe selects the component."""
    full_precision: ClassVar[bool] = False
    """True for a precision island: autocast is off while the component runs."""
    needs_labels: ClassVar[bool] = False
    """True if it reads the view `label`: the samples' labels then travel beside the views."""

    class Config(Section):
        """No options."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__()
        self.config = config  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.full_precision:
            return super().__call__(*args, **kwargs)
        with without_autocast():
            return super().__call__(*args, **kwargs)

    def no_weight_decay(self) -> Iterable[str]:
        """Names of parameters inside, besides biases and other 1-D ones, that are exempt from weight decay.

        A component speaks for all modules inside it: those of timm that have such a method are not asked.
        """
        return ()

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """Repeated blocks, in order: the units of `torch.compile` and of FSDP sharding."""
        return ()

    def teacher_asks(self) -> dict[str, Ask]:
        """What this component wants from which teacher, besides the last tokens."""
        return {}

    counted_for_the_log: ClassVar[tuple[str, ...]] = ()
    """Names of buffers, equal on all ranks after a step, that count for `metrics` since the last line of the log. They
    are kept in checkpoints, apart from the model, so that the log of a resumed run is exact."""

    def metrics(self) -> dict[str, Tensor]:
        """Scalars of its own parameters and buffers worth logging, read only when a line is logged; detached.

        What is measured of a batch is returned with the loss instead: `Measured`, `Outcome`.
        """
        return {}

    def pictures(self) -> dict[str, Tensor]:
        """Pictures worth logging, (1 or 3, H, W) in [0, 1], read when reconstructions are drawn."""
        return {}

    def calibrate(self, batches: Sequence[tuple[Step, Views]]) -> None:
        """Called once, before the first step of a new run, with this rank's micro-batches of that step.

        For what begins from data, such as a codebook; without gradients, on every rank. Ranks must end up equal.
        """

    @property
    def calibrates(self) -> bool:
        """Whether it begins from data, so that the batches of the first step are kept for `calibrate`."""
        return type(self).calibrate is not Component.calibrate

    def begin_step(self, step: Step) -> None:
        """Called before the forward pass of every micro-batch of training: the place to read a schedule's value."""

    def before_step(self, step: Step) -> None:
        """Called after the last backward and before the optimizer; `step` is that of the last micro-batch."""

    def after_step(self, step: Step) -> None:
        """Called after a successful optimizer step, never a skipped one; `step` is that of the last micro-batch."""


class Masker(Component):
    """Decides what is hidden and what must be predicted; may rewrite the views. Set `self.spec` in `__init__`."""

    kind = "masker"
    spec: MaskerSpec

    @abstractmethod
    def forward(self, step: Step, views: Views) -> Masked:
        """The masks of the views in `spec.views`, by name, and the views. All randomness is `step.rand`."""


class Encoder(Component):
    """Turns a view under a mask into tokens: drops the hidden ones, replaces them, or mixes. Set `self.spec`.

    Call `mask = mask.at(self.spec.grid)` first: a masker may draw on coarser units than tokens. Of several masks of a
    sample each gives a row of tokens: `mask.per_mask`. An encoder of several views at once is a `JointEncoder`.
    """

    kind = "encoder"
    spec: EncoderSpec

    @abstractmethod
    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, *shape of its spec) -> tokens, and what `ask` wants besides."""

    @property
    def num_layers(self) -> int:
        """How many layers `layer_of` tells apart: the embedding, every repeated block, and what follows them."""
        return len(self.repeated_blocks()) + 2

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, by its name inside the encoder: the first learns slowest under `optim.layer_decay`.

        0 for patch embedding, positions and tokens (`patch_embed`, `pos_embed`, `cls_token`, `mask_token`, `reg_token`
        anywhere in the name), i + 1 inside block i of `repeated_blocks`, `num_layers - 1` for all else, such as the
        last norm. An encoder with other names, or with layers between its blocks, overrides it.
        """
        paths = {id(module): path for path, module in self.named_modules()}
        for number, block in enumerate(self.repeated_blocks()):
            if name.startswith(f"{paths[id(block)]}."):
                return number + 1
        return self.num_layers - 1 if EMBEDDINGS.isdisjoint(name.split(".")) else 0

    def encode(self, views: Views, masks: dict[str, Mask], ask: Ask = Ask()) -> Latent:
        """What an objective calls: the pass over the view "x", or over all views of an encoder that joins them."""
        return self(views["x"], masks["x"], ask)

    @property
    def has_weights(self) -> bool:
        """True if the options name weights that `load_published` loads: a frozen teacher without any is refused."""
        return False

    def load_published(self) -> None:
        """Load the weights that options name and that somebody else has published; `has_weights` says if they do.

        Called once after the encoder is built, unless weights do not matter: to count costs, for an import or export.
        """

    bias_tables: ClassVar[Literal["geometric", "bicubic"]] = "geometric"
    """How tables of relative position biases are resized where `init` is for another image size; as in
    `CheckpointFormat`."""

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of another run's encoder under the names of this one, where the two were built differently.

        For what a protocol builds in another way than pre-training did, such as a table of biases in every block. Only
        names change here; tables of another size are resized afterwards.
        """
        return weights

    def final_norm(self, x: Tensor) -> Tensor:
        """A sequence like those of `Latent.layers`, (B, P + n, D), as the end of `forward` normalises its tokens.

        For whoever puts something else in the place of the last block's output (MFF). The identity if there is no norm.
        """
        return x


class JointEncoder(Encoder):
    """An encoder that joins several views into one sequence (RGB and depth). Set `self.spec`, with `spec.views`.

    `Latent.stretches` says which tokens are whose; a head sees the stretch of the view that it predicts.
    """

    @abstractmethod
    def forward(self, views: Views, masks: dict[str, Mask], ask: Ask = Ask()) -> Latent:  # type: ignore[override]
        """views by name, each (B, *shape of its spec), under their masks -> tokens, and what `ask` wants besides."""

    def encode(self, views: Views, masks: dict[str, Mask], ask: Ask = Ask()) -> Latent:
        """The pass over all views of `spec.views`."""
        return self(views, masks, ask)


class Target(Component):
    """What should be predicted. Set `self.spec`. May return values at the predicted positions only, as a `Pred`.

    `self.view` is the view that its head predicts.
    """

    kind = "target"
    full_precision = True
    spec: TargetSpec

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        self.view = specs.head_view

    @abstractmethod
    def forward(self, step: Step, masked: Masked) -> Tensor | Pred | dict[str, Any]:
        """What `spec` promises: (B, N, dim) vectors, (B, N) ids; a dictionary only for losses that know it."""

    def reconstruct(self, pred: Pred, mask: Mask, view: Tensor) -> Tensor | None:
        """A picture of a prediction, (B, C, H, W) in the scale of `view`, or None if the target is not an image.

        Visible patches are pasted from `view`.
        """
        return None

    def draw(self, pred: Pred, mask: Mask, view: Tensor) -> Tensor | None:
        """A drawing of a prediction that is no image itself, such as its edges, or None.

        (B, 1 or C, f * H, f * W) in [0, 1], with a whole number f; asked for if `reconstruct` gives no picture.
        """
        return None


class Decoder(Component):
    """From latent to prediction. Set `self.spec`, and `self.ask` if more than the last tokens is needed."""

    kind = "decoder"
    spec: PredSpec
    ask: Ask = Ask()
    unmixes: ClassVar[bool] = False
    """True if it predicts every image from mixed ones (`Mask.partner`); it then takes no others."""

    @abstractmethod
    def forward(self, latent: Latent, mask: Mask) -> Pred | dict[str, Any]:
        """The prediction on the grid of `spec`, at every position or at `mask.at(grid).ids_predict` only."""


class Loss(Component):
    """One number, reduced as the method's paper reduces it."""

    kind = "loss"
    full_precision = True
    accepts: ClassVar[frozenset[Kind]] = frozenset({"dense"})
    """Kinds of target that make sense; anything else is refused when the recipe is checked."""
    sees_views: ClassVar[bool] = False
    """True if `forward` takes the keyword `masked` too: the views, for a loss over the whole image."""

    @abstractmethod
    def forward(self, pred: Pred | Any, target: Tensor | Pred | Any, mask: Mask, latent: Latent) -> Tensor | Measured:
        """A scalar, over the positions `mask.at(pred.grid).where`; `pred` and `target` may hold only these.

        With measures beside it as a `Measured`.
        """


class Head(nn.Module):
    """One prediction of a recipe: its target, decoder and loss, the weight of its loss (a number or a schedule).

    `view`: the view that it predicts.
    """

    target: Target
    decoder: Decoder
    loss: Loss

    def __init__(
        self, target: Target, decoder: Decoder, loss: Loss, weight: Curve | float = 1.0, view: str = "x"
    ) -> None:
        super().__init__()
        self.target, self.decoder, self.loss, self.weight, self.view = target, decoder, loss, weight, view

    def measure(self, masked: Masked, latent: Latent, target: Any, decoder: Decoder | None = None) -> Measured:
        """Decode what the encoder made of this head's view, and compare; not weighted yet.

        Args:
            latent: of all views.
            decoder: in the place of the head's own.
        """
        mask, own = masked.masks[self.view], latent.of(self.view)
        pred = (self.decoder if decoder is None else decoder)(own, mask)
        extra = {"masked": masked} if self.loss.sees_views else {}
        return Measured.of(self.loss(pred, target, mask, own, **extra))


@dataclass
class Parts:
    """The built components that an objective orders."""

    masker: Masker
    encoder: Encoder
    heads: dict[str, Head]
    views: ViewBuilder
    specs: Specs


class Objective(Component):
    """The order of a step. The one module that DDP or FSDP wraps; one call is one forward.

    A method with an order of its own subclasses this; every part that trains must be registered as a submodule. The
    core looks for these attributes, which are None or empty where a method has no such part:

    - `encoder`: what evaluations, export, `init` of later runs and `step.detached` use;
    - `masker`: whose masks the preflight and the contract tests check;
    - `heads`: whose targets give token ids and pictures.
    """

    kind = "objective"
    starts_from_encoder: ClassVar[bool] = False
    """True if `init` gives it the encoder of another run, whose heads were for something else."""

    encoder: Encoder | None
    masker: Masker | None
    heads: Mapping[str, Head]

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts.specs)
        self.encoder, self.masker, self.heads = None, None, {}
        self._at_rest: list[nn.Module] = []

    @abstractmethod
    def forward(self, step: Step, views: Views) -> dict[str, Tensor] | Outcome:
        """The losses of this micro-batch, already weighted; the trainer minimises their sum.

        With measures beside them as an `Outcome`.
        """

    def encode(self, masked: Masked) -> Latent | None:
        """What the heads see of masked views; None of an order that nobody else can follow: it has no pictures then."""
        return None

    def logits(self, views: Views) -> Tensor | None:
        """Scores (B, num_classes) of views in which nothing is hidden, if it classifies images; else None.

        Several classifiers give (B, num_heads, num_classes).
        """
        return None

    def freeze(self, names: Iterable[str]) -> None:
        """Take parameters out of training, by their names inside.

        Gradients end at the first one that trains, so that nothing before it keeps activations. A module that holds
        only frozen ones stays in evaluation mode: without dropout and drop path, and with running statistics.
        """
        chosen = set(names)
        for name, parameter in self.named_parameters():
            if name in chosen:
                parameter.requires_grad_(False)
        parameters = {module: list(module.parameters()) for module in self.modules()} if chosen else {}
        self._at_rest += [
            module for module, own in parameters.items() if own and not any(each.requires_grad for each in own)
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> Objective:
        """Everything in training or evaluation mode, but what is frozen, which is always in the second."""
        super().train(mode)
        for module in self._at_rest:
            module.eval()
        return self

    def components(self) -> Iterable[Component]:
        """All components inside, this one included."""
        return (module for module in self.modules() if isinstance(module, Component))


class ViewBuilder:
    """From a sample to named views. `__call__` runs in a data worker, `prepare` on the device."""

    kind: ClassVar[str] = "views"
    name: ClassVar[str]

    class Config(Section):
        """No options."""

    specs: dict[str, ViewSpec]
    """What it provides, by view name. Set in `__init__`."""
    num_random: int = 0
    """How many uniform numbers one sample needs."""
    batch_multiple: int = 1
    """A micro-batch must have a multiple of so many images, for example 2 where `prepare` mixes pairs."""
    mixes_labels: bool = False
    """True if `prepare` changes labels, as mixup does: the view `label`, (B,) int64, is then in the batch it gets."""

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, sample: Sample, rand: Tensor) -> dict[str, Tensor]:
        """sample, rand (num_random,) -> named tensors of one sample. Uses no randomness but `rand`."""

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Samples of one micro-batch, in order, to a batch."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def prepare(self, step: Step | None, batch: dict[str, Tensor]) -> Views:
        """The batch on the device to views that the slots see, for example uint8 to normalised floats."""
        return dict(batch)

    def label_spec(self, given: ViewSpec) -> ViewSpec:
        """Called once where `mixes_labels`: the spec of labels (B,), to that of what `prepare` makes of them.

        Raises:
            ValueError: if the builder cannot mix them.
        """
        return given

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """A made-up batch before `prepare`, for the preflight and benchmarks: uint8 noise of each view's shape."""
        positions = torch.arange(batch_size)
        return {
            name: (rng.uniform(0, f"example {name}", positions, prod(spec.shape)) * 256)
            .to(torch.uint8)
            .reshape(-1, *spec.shape)
            for name, spec in self.specs.items()
        }

    @abstractmethod
    def evaluation_view(self, sample: Sample) -> Tensor | dict[str, Tensor]:
        """The deterministic view "x" of a sample for evaluations and pictures, before `prepare`; or several by name."""

    def to_image(self, view: Tensor) -> Tensor:
        """Prepared view (B, C, H, W) -> float images in [0, 1]; undoes the normalisation."""
        return view


class Source:
    """Where samples come from. Reading may happen in several worker processes."""

    kind: ClassVar[str] = "source"
    name: ClassVar[str]

    class Config(Section):
        """No options."""

    classes: Sequence[str] | None = None
    """Class names if the samples carry labels, which count them from 0."""
    blocks: Sequence[int] | None = None
    """Lengths of runs of samples that are cheap to read together, such as those of a shard, in order; they add up to
    all. None if every sample costs the same wherever it lies. The recipe may then say `data.order: blocks`."""
    remote: bool = False
    """True if `read` opens network connections, which do not survive a fork: workers are then started without one."""

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample at `index`. An unreadable one raises `mim_framework.BrokenImage`."""

    def read_many(self, indices: Sequence[int]) -> list[Sample | BrokenImage]:
        """The samples at `indices`, in their order; an unreadable one is its `BrokenImage`, returned and not raised.

        A source that has several samples for the price of one overrides this: it is asked for whole micro-batches.
        """
        return [sample_or_broken(self, index) for index in indices]

    def expect_blocks(self, window: int) -> None:
        """Called before workers start, with `data.order: blocks`: samples of so many blocks are drawn at a time.

        `read_many` may then keep what it reads of a block until as many others were read. By default nothing happens.
        """

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again, as JSON; a checkpoint keeps it.

        By default the number of samples and the lengths of blocks. A source that knows names adds a hash of them as
        `names`, as they decide which sample stands where. `sizes` is for a hash of what not every place of the same
        images tells: it stands beside a run's state and is compared where both sides have it.
        """
        found: dict[str, Any] = {"num_images": len(self)}
        if self.blocks is not None:
            lengths = ",".join(map(str, self.blocks))
            found["blocks"] = hashlib.sha256(lengths.encode()).hexdigest()
        return found

    def size(self, index: int) -> int | None:
        """Bytes of what is stored of the sample at `index`, told without reading it; None if that is not known."""
        return None

    def left_out(self) -> Sequence[str]:
        """What lies beside the samples and is none, counted, such as "300 .heic": told before a run and after it."""
        return ()

    def evaluation_sources(self) -> tuple[Source, Source] | None:
        """(train, test) with the same classes, of a source that keeps test images aside, whichever it is; or None."""
        return None


def sample_or_broken(source: Source, index: int) -> Sample | BrokenImage:
    """What `source.read` gives, with the error of an unreadable sample in its place."""
    try:
        return source.read(index)
    except BrokenImage as error:
        return error


TOLD = {
    "views.img_size": ("input_size", "img_size"),
    "views.mean": ("mean",),
    "views.std": ("std",),
    "masker.mask_ratio": ("mask_ratio",),
    "masker.mask_patch_size": ("mask_patch_size",),
    "encoder.num_heads": ("num_heads",),
    "target.norm_pix_loss": ("norm_pix_loss",),
    "decoder.num_heads": ("decoder_num_heads",),
}
"""Option of a slot -> the names that training scripts have for it."""


class CheckpointFormat:
    """A foreign checkpoint layout that a plugin can read and perhaps write."""

    kind: ClassVar[str] = "checkpoint_format"
    name: ClassVar[str]

    encoders: ClassVar[frozenset[str]] = frozenset()
    """Names of the encoders whose weights it writes; empty = every encoder of its plugin."""
    objectives: ClassVar[frozenset[str]] = frozenset()
    """Names of objectives whose runs it writes, whichever plugin the encoder comes from."""
    bias_tables: ClassVar[Literal["geometric", "bicubic"]] = "geometric"
    """How tables of relative position biases are resized when the grid or window changes: on BEiT's geometric grid of
    source points (BEiT, SimMIM), or plainly bicubic (MixMIM)."""
    fallback: ClassVar[bool] = False
    """True for a layout that is meant only for files which no other layout recognises."""

    @abstractmethod
    def recognises(self, state: dict[str, Tensor]) -> bool:
        """True if the keys look like this layout."""

    @abstractmethod
    def to_recipe(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """The slots of a recipe (encoder, decoder, ...) that fit the weights.

        A value that no tensor tells is None, and is asked for, or a `layouts.Guess`, and is shown as one.
        """

    @abstractmethod
    def import_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Foreign state -> objective state dict keys ("encoder.…", "heads.main.decoder.…")."""

    def adapt(self, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `import_state` found, once the state of the slots' model is known, for what depends on its options."""
        return found

    def told_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the options of the script that wrote a file tell of the slots, such as {"masker.mask_ratio": 0.6}.

        They count where `to_recipe` has None, a guess or nothing; None and what a component has no option for is left
        out. A value may be a function of the slots. Here: the names that most scripts share.
        """
        return {
            where: next((options[name] for name in names if name in options), None) for where, names in TOLD.items()
        }

    def remarks(self, state: dict[str, Tensor]) -> list[str]:
        """Sentences for the user on what the file is and is not."""
        return []

    def export_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Objective state dict -> this layout.

        Raises:
            ValueError: if the layout cannot hold the model.
        """
        raise ValueError(f"checkpoint format '{self.name}' cannot be written")
