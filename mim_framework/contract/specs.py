"""What builders publish and later ones read, so that no dimension is typed twice in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Ask

BUILD_ORDER = ("views", "encoder", "frozen teachers", "masker", "target", "decoder", "loss")


class Specs:
    """What has been built so far, read by the components that are built next; never changed, see `also`.

    Build order: views, encoder, frozen teachers, masker, target, decoder, loss. `head_view` is the view that the head
    predicts whose parts are being built; its `encoder` is the encoder as that view sees it.
    """

    def __init__(
        self,
        views: Mapping[str, ViewSpec] | None = None,
        teachers: Mapping[str, EncoderSpec] | None = None,
        teacher_views: Mapping[str, str] | None = None,
        *,
        encoder: EncoderSpec | None = None,
        masker: MaskerSpec | None = None,
        target: TargetSpec | None = None,
        pred: PredSpec | None = None,
        head_view: str = "x",
    ) -> None:
        self.views = dict(views or {})
        self.teachers = dict(teachers or {})
        self.teacher_views = dict(teacher_views or {})
        self.head_view = head_view
        self._parts = {"encoder": encoder, "masker": masker, "target": target, "pred": pred}

    def also(self, **changes: Any) -> Specs:
        """The same with some entries set, by the names of the arguments."""
        own = {"views": self.views, "teachers": self.teachers, "teacher_views": self.teacher_views}
        return Specs(**{**own, **self._parts, "head_view": self.head_view, **changes})

    @property
    def encoder(self) -> EncoderSpec:
        """The encoder.

        Raises:
            ValueError: as all of these, if it is not built yet.
        """
        return self._built("encoder", "encoder")

    @property
    def masker(self) -> MaskerSpec:
        """The masker."""
        return self._built("masker", "masker")

    @property
    def target(self) -> TargetSpec:
        """The target of the head that is being built."""
        return self._built("target", "target")

    @property
    def pred(self) -> PredSpec:
        """The decoder's prediction, of the head that is being built."""
        return self._built("pred", "decoder")

    def _built(self, part: str, slot: str) -> Any:
        found = self._parts[part]
        if found is None:
            raise ValueError(f"the {slot} is not built yet: the order is {', '.join(BUILD_ORDER)}")
        return found

    def view(self, name: str) -> ViewSpec:
        """The named view.

        Raises:
            ValueError: if no view builder provides it.
        """
        if name not in self.views:
            raise ValueError(
                f"no view '{name}'; the views of this recipe are {', '.join(sorted(self.views)) or 'none'}"
            )
        return self.views[name]

    def teacher(self, name: str) -> EncoderSpec:
        """The named teacher's encoder.

        Raises:
            ValueError: if the recipe has no such teacher.
        """
        if name not in self.teachers:
            raise ValueError(
                f"no teacher '{name}'; the teachers of this recipe are {', '.join(sorted(self.teachers)) or 'none'}"
            )
        return self.teachers[name]

    def teacher_view(self, name: str) -> str:
        """The name of the view that the named teacher looks at."""
        return self.teacher_views.get(name, "x")


PLANE = ("height", "width")
"""Axes of an image."""


@dataclass(frozen=True)
class ViewSpec:
    """A view: one sample has `in_chans` channels over `axes` of `size` each, (C, H, W) for images.

    A clip has the axes (time, height, width). `mean` and `std` are those of each channel, by which images in [0, 1]
    were normalised. A view of another kind has channels of its own, or none (`in_chans` None): `ids` holds token ids
    (N,) of `num_classes` classes on `grid`, `labels` the class of an image, (), or where views mix labels the
    probabilities of all classes, (num_classes,). A plugin may have a kind of its own, such as `points`, for its own
    components; those that look at images refuse it.
    """

    name: str
    axes: tuple[str, ...] = PLANE
    size: tuple[int, ...] = ()
    in_chans: int | None = 3
    kind: str = "image"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    grid: Grid | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.size):
            raise ValueError(
                f"view '{self.name}' has {len(self.axes)} axes ({', '.join(self.axes)}) and {len(self.size)} sizes"
            )

    @classmethod
    def of_kind(cls, kind: str, name: str, *shape: int, **facts: Any) -> ViewSpec:
        """A view that holds no image: its axes have no names that others know."""
        axes = tuple(f"axis_{number}" for number in range(len(shape)))
        return cls(name, axes, tuple(shape), None, kind, **facts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: channels first, where there are any."""
        return self.size if self.in_chans is None else (self.in_chans, *self.size)

    @property
    def img_size(self) -> tuple[int, ...]:
        """Pixels along every axis: (height, width), or (frames, height, width) of a clip.

        Raises:
            ValueError: if the view holds no images.
        """
        if self.kind != "image":
            raise ValueError(f"view '{self.name}' holds {self.kind}, images are needed")
        return self.size

    @property
    def height_width(self) -> tuple[int, int]:
        """For components that know images of two axes only.

        Raises:
            ValueError: if the view holds no images, or has other axes.
        """
        height_width = self.img_size
        if self.axes != PLANE:
            raise ValueError(f"view '{self.name}' has the axes {', '.join(self.axes)}; height and width are needed")
        return height_width  # type: ignore[return-value]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder: output width, token grid, pixels per token, blocks, attention heads, and what it can be asked for.

    `stride`: pixels of a token along every axis; one number for all axes may be given.

    `visible_only`: hidden tokens are dropped, so that `Latent.tokens` holds the visible positions only.
    `accepts`: masks whose rows hide equal numbers, masks whose rows vary, no mask at all, and mixed images (an encoder
    that accepts masks only of mixed images never sees an empty position).
    `num_classes`: of a tokenizer, the size of the vocabulary of the ids (B, N) that it gives as `Latent.aux["ids"]`.
    `mean`, `std`: the normalisation of the images that its weights were made for; None = that of the view it is built
    for. `views`: what it sees; `grids`: grid and stride of every view, where an encoder joins several.
    """

    dim: int
    grid: Grid
    stride: tuple[int, ...]
    depth: int
    num_heads: int
    num_prefix_tokens: int = 0
    in_chans: int = 3
    visible_only: bool = False
    accepts: frozenset[Literal["equal", "varies", "none", "mixed"]] = frozenset({"equal", "varies", "none"})
    offers: Ask = Ask()  # noqa: RUF009  (frozen)
    layers: Mapping[int, tuple[int, Grid]] = field(default_factory=dict)
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    views: tuple[str, ...] = ("x",)
    grids: Mapping[str, tuple[Grid, tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.stride, int):
            object.__setattr__(self, "stride", (self.stride,) * len(self.grid.shape))

    def of(self, view: str) -> EncoderSpec:
        """The encoder as one view sees it: its grid and stride.

        Raises:
            ValueError: if it does not see the view.
        """
        if view not in self.views:
            raise ValueError(f"the encoder sees the views {', '.join(self.views)}, not '{view}'")
        grid, stride = self.grids.get(view, (self.grid, self.stride))
        return replace(self, grid=grid, stride=stride, grids={}, views=(view,))

    def lacks(self, ask: Ask) -> str:
        """What of `ask` this encoder cannot answer, in words; empty if it can answer all of it."""
        wanted = {
            name: sorted(getattr(ask, name) - getattr(self.offers, name)) for name in ("layers", "attn", "qkv", "aux")
        }
        return ", ".join(f"{name} {missing}" for name, missing in wanted.items() if missing)


@dataclass(frozen=True)
class MaskerSpec:
    """A masker: the views it masks, on which grid, whether rows hide equal numbers, and how many on average.

    `grids`: of every view, where they differ; `grid` and `num_hidden` are those of the first. `mixes`: hidden positions
    show another image of the batch (`Mask.partner`), which only some encoders and decoders can tell apart.
    """

    grid: Grid
    equal: bool
    shared: bool = False
    num_hidden: float = 0.0
    views: tuple[str, ...] = ("x",)
    rewrites: tuple[str, ...] = ()
    mixes: bool = False
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def grid_of(self, view: str) -> Grid:
        """The grid on which a view is masked."""
        return self.grids.get(view, self.grid)


Kind = Literal["dense", "ids", "probs", "map", "opaque"]


@dataclass(frozen=True)
class TargetSpec:
    """A target: kind, size of each vector (or number of classes) and the grid it lives on.

    `layout`: what a vector is made of where that is known: (rows, columns, channels) of a patch's pixels.
    """

    kind: Kind
    dim: int
    grid: Grid
    layout: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PredSpec:
    """A decoder's prediction: kind `dense` (vectors), `probs` (logits over classes) or `opaque`, its size and grid."""

    kind: Kind
    dim: int
    grid: Grid

    @classmethod
    def for_target(cls, target: TargetSpec, grid: Grid) -> PredSpec:
        """What fits a target: logits over its classes if it has classes, else vectors of its size."""
        return cls("probs" if target.kind in ("ids", "probs") else "dense", target.dim, grid)
