"""Encoders in Python: `mim_framework.load("runs/x")` turns images into features. Start at `FrozenEncoder`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image as pil
from torch import Tensor

from mim_framework.assembly.opened import LoadedEncoder, Origin
from mim_framework.base.errors import DataError, RecipeError
from mim_framework.contract.components import Encoder, ViewBuilder
from mim_framework.contract.evaluation import Pool, check_features
from mim_framework.contract.mask import Grid
from mim_framework.contract.records import Sample
from mim_framework.contract.specs import EncoderSpec
from mim_framework.evaluate.base import tokens_of
from mim_framework.features.subjects import open_encoder
from mim_framework.registry.registry import Registry

AnImage = str | PathLike[str] | bytes | pil.Image | np.ndarray
"""A path, encoded bytes, a Pillow image, or an array (H, W) or (H, W, bands)."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    subject: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    registry: Registry | None = None,
) -> FrozenEncoder:
    """The encoder of a run, a checkpoint of it, an import, an export, or of timm, ready to be called with images.

    Args:
        subject: a run directory or a checkpoint folder inside one; a folder of `mim import`; a file of `mim export`;
            `timm:NAME`, `timm:NAME,checkpoint=FILE.safetensors` or `timm:NAME,random`, with `,img_size=N` if wanted.
        device: by default the one of the run's recipe if this machine has it, else the first of cuda, mps and cpu.
        dtype: in which features come: float32, float16 or bfloat16. With the latter two the pass runs under autocast.
        registry: the plugins to use; by default those of the environment.

    Raises:
        RecipeError: if the subject names no encoder, or the device is not there.
        CheckpointError: if its weights cannot be had, are damaged, or do not fill the encoder.
        ValueError: if there is no such dtype.
    """
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    return FrozenEncoder(open_encoder(subject, device=device, registry=registry), dtype=wanted)


class Transform:
    """From one image to what the encoder sees: cropped, resized and normalised as its evaluations do it.

    The short side becomes 256 / 224 of the view's, and the centre is cut out. It can be pickled, and used in data sets.
    """

    def __init__(self, views: ViewBuilder) -> None:
        self.views = views

    def __call__(self, image: AnImage) -> Tensor:
        """An image -> float32 (C, H, W) on the CPU.

        Raises:
            BrokenImage: if it cannot be used, a DataError.
            DataError: if there is no such file, or the views are several.
        """
        found = self.views.evaluation_view(Sample(*_data_of(image)))
        if not isinstance(found, Tensor):
            if found.keys() != {"x"}:
                raise DataError(f"views '{self.views.name}' show an image as {', '.join(found)}, not as one")
            found = found["x"]
        return self.views.prepare(None, {"x": found[None]})["x"][0]


class FrozenEncoder:
    """An encoder that stands still, with its own preprocessing.

    Calls take one image or a sequence of them, each a path, encoded bytes, a Pillow image or an array; or a float
    tensor (B, C, H, W), or (C, H, W), that `transform` has prepared. One image is a batch of one.
    """

    module: Encoder
    """The encoder itself, in evaluation mode."""
    transform: Transform
    """One image -> float32 (C, H, W) on the CPU; for data sets and loaders of your own."""
    origin: Origin
    """Where it comes from: its method, run, step and images seen, as far as its files tell."""
    device: torch.device
    dtype: torch.dtype

    def __init__(self, opened: LoadedEncoder, *, dtype: torch.dtype = torch.float32) -> None:
        spec = opened.trained.spec
        if spec.views != ("x",):
            raise RecipeError(f"{opened.origin.subject}: its encoder joins the views {', '.join(spec.views)}, not one")
        self.module, self.transform, self.origin = opened.trained.eval(), Transform(opened.views), opened.origin
        self.device, self.dtype = opened.device, dtype
        self._opened = opened

    @property
    def spec(self) -> EncoderSpec:
        """All that is known of the encoder's shape: tokens, blocks, heads, what it hands out."""
        return self.module.spec

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.spec.dim

    @property
    def grid(self) -> Grid:
        """Rows and columns of the patch tokens: `tokens(...)` has `grid.num_patches` of them, row by row."""
        return self.spec.grid

    @property
    def img_size(self) -> tuple[int, ...]:
        """(height, width) in pixels of what `transform` makes."""
        return self.transform.views.specs["x"].img_size

    @property
    def weights_sha256(self) -> str:
        """The hash of its weights, by which features can be told to be of this encoder."""
        return self._opened.weights_sha256

    def __call__(
        self,
        images: AnImage | Sequence[AnImage] | Tensor,
        *,
        pool: Pool = "mean",
        layers: Sequence[int] = (),
        batch_size: int = 64,
        grad: bool = False,
    ) -> Tensor:
        """One feature an image: (B, D), on the encoder's device, in its dtype.

        Args:
            pool: mean of the patch tokens; `cls`, the class token; or `tokens`, as the method `tokens`.
            layers: blocks whose outputs stand side by side in D, from 0, or from the end if negative; each normalised
                as the encoder's end is, where it has its width. Of none, the encoder's own output.
            batch_size: of more images than this, so many are read and passed at a time.
            grad: let gradients flow, to a tensor of images and to the weights of `module`.

        Raises:
            BrokenImage: naming the image that cannot be used, a DataError.
            ValueError: if the encoder has no such features, or a tensor is not what `transform` makes.
        """
        if pool not in get_args(Pool):
            raise ValueError(f"pool is {pool!r}, which is none of {', '.join(get_args(Pool))}")
        check_features(self.spec, pool, layers)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        numbers = [layer % self.spec.depth for layer in layers] or [None]
        extract = tokens_of(self.module, pool, numbers)
        found = []
        with nullcontext() if grad else torch.no_grad():
            for batch in self._batches(images, batch_size):
                with self.precision():
                    features = extract({"x": batch.to(self.device, non_blocking=True)})
                found.append(torch.cat([each.to(self.dtype) for each in features], dim=-1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def tokens(
        self,
        images: AnImage | Sequence[AnImage] | Tensor,
        *,
        layers: Sequence[int] = (),
        batch_size: int = 64,
        grad: bool = False,
    ) -> Tensor:
        """The patch tokens, (B, N, D), row by row of `grid`; arguments and errors as of a call."""
        return self(images, pool="tokens", layers=layers, batch_size=batch_size, grad=grad)

    def precision(self) -> AbstractContextManager[Any]:
        """For passes of one's own through `module`: autocast to the dtype, if it is none of full precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.img_size))
        return f"FrozenEncoder({self.origin.subject!r}, dim={self.dim}, grid={self.grid}, img_size={size})"

    def _batches(self, images: AnImage | Sequence[AnImage] | Tensor, batch_size: int) -> Any:
        if isinstance(images, Tensor):
            yield from self._checked(images).split(batch_size)
            return
        if not isinstance(images, list | tuple):
            images = [images]
        if not images:
            raise ValueError("no images are given")
        for start in range(0, len(images), batch_size):
            yield torch.stack([self.transform(image) for image in images[start : start + batch_size]])

    def _checked(self, images: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if these are not images as `transform` makes them.
        """
        shape = (self.spec.in_chans, *self.img_size)
        batch = images[None] if images.ndim == len(shape) else images
        if not batch.is_floating_point() or tuple(batch.shape[1:]) != shape or not len(batch):
            what = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise ValueError(
                f"got a tensor {what}; a tensor holds images that encoder.transform has prepared, floats "
                f"(B, {', '.join(map(str, shape))}); give others as a list of paths, Pillow images or arrays"
            )
        return batch.float()


def _data_of(image: AnImage) -> tuple[Any, str]:
    """What is decoded, and a name for messages."""
    if isinstance(image, str | PathLike):
        try:
            return Path(image).read_bytes(), str(image)
        except OSError as error:
            raise DataError(f"{image} cannot be read: {error.strerror}") from error
    return image, f"the image given as {type(image).__name__}"
