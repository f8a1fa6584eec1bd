"""iBOT (Zhou et al. 2021, arXiv 2111.07832) with AttMask (Kakogeorgiou et al. 2022, arXiv 2203.12719).

Start at `SelfDistillation.forward`, which is a whole step. A student sees crops of an image, of which the global ones
have hidden patches, and predicts what its averaged copy, the teacher, says of other crops (class token) and of the
hidden patches. AttMask hides what the teacher's class token attends to most. The crops are made in `views.py`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, log_softmax, normalize, softmax

from mim_framework import (
    Ask,
    Curve,
    Encoder,
    EncoderSpec,
    Grid,
    Latent,
    Mask,
    Masked,
    Masker,
    MaskerSpec,
    Objective,
    Parts,
    Pred,
    Schedule,
    Section,
    Specs,
    Step,
    Views,
    extremes,
    hookimpl,
    without_autocast,
)
from mim_framework.nn import (
    NORM_EPS,
    Block,
    check_heads,
    drop_path_ramp,
    gather_tokens,
    patch_grid,
    put_mask_token,
    run_blocks,
)
from mim_plugin_guest_ibot.views import MultiCropViews

requires_api = "2"


# --- encoder ---------------------------------------------------------------------------------------------------------


class CropViT(Encoder):
    """ViT for images of any size: its learned positions, made for the global crops, are resized for smaller ones.

    A mask token stands at hidden patches. The positions of the class token and of patches are learned.
    """

    name = "ibot_vit"

    class Config(Section):
        patch_size: int = Field(16, gt=0)
        """Side of a patch in pixels."""
        embed_dim: int = Field(384, gt=0)
        """Width; a multiple of `num_heads`."""
        depth: int = Field(12, gt=0)
        """Number of transformer blocks."""
        num_heads: int = Field(6, gt=0)
        """Attention heads per block."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs, as a multiple of `embed_dim`."""
        drop_path_rate: float = Field(0.1, ge=0, lt=1)
        """Stochastic depth of the student's last block, growing linearly from 0 at the first."""
        init_std: float = Field(0.02, gt=0)
        """Standard deviation of the first weights; a narrow encoder needs a larger one, about 1 / sqrt(embed_dim)."""

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        view, c = specs.view("x"), self.config
        check_heads(c.embed_dim, c.num_heads)
        for each in specs.views.values():
            if each.kind == "image":
                patch_grid(each.img_size, c.patch_size)  # refused here if a crop is not a whole number of patches
        grid, layers = patch_grid(view.img_size, c.patch_size), range(c.depth)
        self.patch_embed = nn.Conv2d(view.in_chans, c.embed_dim, c.patch_size, stride=c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid.num_patches, c.embed_dim))
        self.blocks = nn.ModuleList(
            Block(c.embed_dim, c.num_heads, c.mlp_ratio, drop_path=rate)
            for rate in drop_path_ramp(c.drop_path_rate, c.depth)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=NORM_EPS)
        init_linears(self, c.init_std)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.spec = EncoderSpec(
            dim=c.embed_dim,
            grid=grid,
            stride=c.patch_size,
            depth=c.depth,
            num_heads=c.num_heads,
            num_prefix_tokens=1,
            in_chans=view.in_chans,
            offers=Ask(layers=frozenset(layers), attn=frozenset(layers), qkv=frozenset(layers)),
            layers=dict.fromkeys(layers, (c.embed_dim, grid)),
        )

    def repeated_blocks(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, view: Tensor, mask: Mask, ask: Ask = Ask()) -> Latent:
        """view (B, C, H, W) of any size -> tokens (B, N, D) on the view's own grid."""
        grid = patch_grid(view.shape[-2:], self.spec.stride)
        mask = mask.at(grid)
        patches = put_mask_token(self.patch_embed(view).flatten(2).transpose(1, 2), self.mask_token, mask)
        x = torch.cat([self.cls_token.expand(len(view), -1, -1), patches], dim=1) + self.positions(grid)
        x, answers = run_blocks(self.blocks, x, ask)
        x = self.final_norm(x)
        return Latent(x[:, 1:], grid, prefix=x[:, :1], **answers)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def positions(self, grid: Grid) -> Tensor:
        """(1, 1 + N, D) for a view of `grid`; that of the class token is the same for all."""
        if grid == self.spec.grid:
            return self.pos_embed
        with without_autocast():
            patches = bicubic_weights(self.spec.grid, grid, self.pos_embed.device) @ self.pos_embed[:, 1:]
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)


@lru_cache(maxsize=16)
def bicubic_weights(old: Grid, new: Grid, device: torch.device) -> Tensor:
    """(N of `new`, N of `old`): a bicubic resize as a matrix. Its gradient, unlike that of torch's own resize on a GPU,
    is the same to the bit every time."""
    unit = torch.eye(old.num_patches, device=device).unflatten(1, old.shape)
    return interpolate(unit[:, None], new.shape, mode="bicubic", align_corners=False).flatten(1).T.contiguous()


def init_linears(module: nn.Module, std: float) -> None:
    """Normal weights and zero biases for all linear layers inside."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.trunc_normal_(each.weight, std=std)
            nn.init.zeros_(each.bias)


# --- masker ----------------------------------------------------------------------------------------------------------


class AttMask(Masker):
    """Hides the patches of every global crop to which the teacher's class token attends most, but for some hints."""

    name = "attmask"

    class Config(Section):
        teacher: str = "teacher"
        """The teacher whose attention decides."""
        mask_ratio: tuple[float, float] = (0.1, 0.5)
        """Smallest and largest share of hidden patches; uniform in between, for every image and crop."""
        mask_prob: float = Field(0.5, ge=0, le=1)
        """Probability that a crop has hidden patches at all."""
        show_max: float = Field(0.1, ge=0, lt=1)
        """Hints: of this share of most attended patches, as large a part is shown as is hidden of the image. 0 for
        none (AttMask-High)."""

        @model_validator(mode="after")
        def _interval(self) -> AttMask.Config:
            smallest, largest = self.mask_ratio
            if not 0 <= smallest <= largest < 1:
                raise ValueError(f"'mask_ratio' must be [smallest, largest] in [0, 1), got [{smallest:g}, {largest:g}]")
            return self

    config: Config

    def __init__(self, config: Section, specs: Specs) -> None:
        super().__init__(config, specs)
        c, shape = self.config, specs.view("x").shape
        teacher = specs.teacher(c.teacher)
        self.layer = teacher.depth - 1
        num_patches, mean_ratio = teacher.grid.num_patches, sum(c.mask_ratio) / 2
        self.max_hidden = int(num_patches * c.mask_ratio[1])
        self.spec = MaskerSpec(
            teacher.grid,
            equal=False,
            num_hidden=c.mask_prob * mean_ratio * (1 - c.show_max) * num_patches,
            views=tuple(name for name, view in specs.views.items() if view.shape == shape),
        )

    def teacher_asks(self) -> dict[str, Ask]:
        return {self.config.teacher: Ask(attn=frozenset({self.layer}))}

    def forward(self, step: Step, views: Views) -> Masked:
        return Masked({name: self.mask(step, name, views[name]) for name in self.spec.views}, views)

    def mask(self, step: Step, name: str, view: Tensor) -> Mask:
        """The mask of one crop, from the teacher's pass over it, which the objective shares."""
        c, num_patches = self.config, self.spec.grid.num_patches
        attention = step.teacher(c.teacher, view).attn[self.layer][:, :, 0, -num_patches:].float().mean(1)
        ratio, chance, noise = step.rand(f"mask {name}", 2 + num_patches).split([1, 1, num_patches], dim=1)
        ratio = c.mask_ratio[0] + (c.mask_ratio[1] - c.mask_ratio[0]) * ratio
        hidden = most_attended(attention, (ratio * num_patches).long().clamp(max=self.max_hidden))
        if c.show_max:
            candidates = most_attended(attention, int(c.show_max * num_patches))
            hidden &= ~some_of(candidates, noise, (c.show_max * ratio * num_patches).long())
        return Mask(hidden & (chance < c.mask_prob), self.spec.grid, max_hidden=self.max_hidden)


def most_attended(attention: Tensor, count: Tensor | int) -> Tensor:
    """attention (B, N), count (B, 1) or one for all -> (B, N) bool: the so many highest of every row."""
    return attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < count


def some_of(candidates: Tensor, noise: Tensor, count: Tensor) -> Tensor:
    """candidates (B, N) bool, noise (B, N) in [0, 1), count (B, 1) -> so many random ones of the candidates."""
    return candidates & (noise.masked_fill(~candidates, 1.0).argsort(dim=1, stable=True).argsort(dim=1) < count)


# --- objective -------------------------------------------------------------------------------------------------------


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have length 1, or a learned length that begins at 1."""

    def __init__(self, in_dim: int, out_dim: int, learned_length: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())
        self.length = nn.Parameter(torch.ones(out_dim, 1)) if learned_length else None

    def forward(self, x: Tensor) -> Tensor:
        weight = normalize(self.direction, dim=1)
        return linear(x, weight if self.length is None else self.length * weight)


class ProjectionHead(nn.Module):
    """From tokens to scores of `out_dim` prototypes, the same for class tokens and patches."""

    def __init__(self, dim: int, options: SelfDistillation.Config) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, options.hidden_dim),
            nn.GELU(),
            nn.Linear(options.hidden_dim, options.hidden_dim),
            nn.GELU(),
            nn.Linear(options.hidden_dim, options.bottleneck_dim),
        )
        init_linears(self.mlp, options.init_std)
        self.last_layer = WeightNormLinear(options.bottleneck_dim, options.out_dim, not options.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(normalize(self.mlp(x), dim=-1))


WARM_UP = Curve(shape="constant", start=0.07, warmup_epochs=30, warmup_from=0.04)


class SelfDistillation(Objective):
    """The student's class token predicts the teacher's of other crops, its hidden patches the teacher's of the same."""

    name = "ibot"

    class Config(Section):
        teacher: str = "teacher"
        """The averaged copy of `encoder` and `head` that is learned from."""
        out_dim: int = Field(8192, gt=1)
        """Prototypes: the size of the distributions that are compared."""
        hidden_dim: int = Field(2048, gt=0)
        """Width of the head."""
        bottleneck_dim: int = Field(256, gt=0)
        """Width in front of the prototypes."""
        init_std: float = Field(0.02, gt=0)
        """Standard deviation of the first weights of the head; a narrow one needs a larger one."""
        norm_last_layer: bool = True
        """Prototypes of length 1; false lets their lengths be learned (official for ViT-S)."""
        freeze_last_layer: float = Field(1.0, ge=0)
        """Epochs at the beginning in which the prototypes stay as they are."""
        student_temp: float = Field(0.1, gt=0)
        """Temperature of the student's distributions."""
        teacher_temp: Schedule = WARM_UP
        """Temperature of the teacher's distributions of class tokens; a low one sharpens."""
        teacher_patch_temp: Schedule = WARM_UP
        """That of patches."""
        center_momentum: float = Field(0.9, ge=0, le=1)
        """The centre that is taken off the teacher's class scores keeps so much of itself in a step; 1: no centring."""
        patch_center_momentum: float = Field(0.9, ge=0, le=1)
        """The same for the scores of patches."""
        cls_weight: float = Field(1.0, ge=0)
        """Factor of the loss of class tokens."""
        patch_weight: float = Field(1.0, ge=0)
        """Factor of the loss of hidden patches."""

        @model_validator(mode="after")
        def _above_zero(self) -> SelfDistillation.Config:
            for key in ("teacher_temp", "teacher_patch_temp"):
                if (value := min(extremes(getattr(self, key)))) <= 0:
                    raise ValueError(f"'{key}' must stay above 0, got {value:g}")
            return self

    config: Config

    def __init__(self, config: Section, parts: Parts) -> None:
        super().__init__(config, parts)
        c, encoder = self.config, parts.specs.encoder
        if encoder.visible_only or not encoder.num_prefix_tokens:
            what = "a class token and a token at every hidden patch"
            raise ValueError(f"objective 'ibot' needs {what}, which encoder '{parts.encoder.name}' lacks")
        self.masker, self.encoder = parts.masker, parts.encoder
        self.global_views = parts.specs.masker.views
        self.local_views = tuple(name for name in parts.specs.views if name not in self.global_views)
        if len(parts.specs.views) < 2 or len({parts.specs.views[name].shape for name in self.local_views}) > 1:
            raise ValueError(
                "objective 'ibot' compares global crops, which are masked, and local ones of another size; masker "
                f"'{parts.masker.name}' masks {', '.join(self.global_views)} of {', '.join(parts.specs.views)}"
            )
        self.head = ProjectionHead(encoder.dim, c)
        self.register_buffer("center", torch.zeros(2, c.out_dim))  # of class tokens and of patches
        self.register_buffer("score_sum", torch.zeros(2, c.out_dim), persistent=False)  # since the last step
        self.register_buffer("num_scored", torch.zeros(()), persistent=False)  # crops in that sum
        self.cls_probs: Tensor | None = None  # of the last micro-batch

    def forward(self, step: Step, views: Views) -> dict[str, Tensor]:
        masked = self.masker(step, views)
        taught = {name: self.teach(step, masked.clean(name)) for name in self.global_views}
        self.cls_probs = torch.cat([cls for cls, _ in taught.values()])

        student, patch_losses = {}, []
        for name in self.global_views:
            mask = masked.masks[name].at(self.encoder.spec.grid)
            latent, ids = self.encoder(masked.views[name], mask), mask.ids_predict
            tokens = latent.tokens if ids is None else gather_tokens(latent.tokens, ids)
            scores = self.head(torch.cat([latent.prefix[:, :1], tokens], dim=1))
            student[name] = scores[:, 0]
            where = mask.where if ids is None else mask.where.gather(1, ids)
            patch_losses.append(self.patch_loss(scores[:, 1:], taught[name][1].at(ids), where))
        if self.local_views:
            local = torch.cat([views[name] for name in self.local_views])
            grid = patch_grid(local.shape[-2:], self.encoder.spec.stride)
            latent = self.encoder(local, Mask.none(len(local), grid, local.device))
            scores = self.head(latent.prefix[:, 0]).chunk(len(self.local_views))
            student |= dict(zip(self.local_views, scores, strict=True))

        pairs = [(taught[q][0], student[v]) for q, v in product(self.global_views, student) if q != v]
        cls_loss = torch.stack([self.cross_entropy(scores, probs).mean() for probs, scores in pairs]).mean()
        patch_loss = torch.stack(patch_losses).mean()
        return {"cls": self.config.cls_weight * cls_loss, "patch": self.config.patch_weight * patch_loss}

    @torch.no_grad()
    def teach(self, step: Step, view: Tensor) -> tuple[Tensor, Pred]:
        """What the teacher says of a global crop: distributions (B, out_dim), and of patches (B, N, out_dim)."""
        c = self.config
        latent = step.teacher(c.teacher, view)
        head = step.teachers.part(c.teacher, "head")
        scores = head(torch.cat([latent.prefix[:, :1], latent.tokens], dim=1)).float()
        cls, patches = scores[:, 0], scores[:, 1:]
        self.score_sum += torch.stack([cls.sum(0), patches.mean(1).sum(0)])
        self.num_scored += len(scores)
        cls_probs = softmax((cls - self.center[0]) / step.value(c.teacher_temp), dim=-1)
        patch_probs = softmax((patches - self.center[1]) / step.value(c.teacher_patch_temp), dim=-1)
        return cls_probs, Pred(patch_probs, latent.grid)

    def cross_entropy(self, scores: Tensor, probs: Tensor) -> Tensor:
        """The student's scores and the teacher's probabilities, (..., out_dim) each -> (...)."""
        return -(probs * log_softmax(scores.float() / self.config.student_temp, dim=-1)).sum(-1)

    def patch_loss(self, scores: Tensor, probs: Tensor, where: Tensor) -> Tensor:
        """(B, M, out_dim) each, where (B, M): the mean over the hidden patches of an image, then over all images.

        An image without hidden patches counts as 0, as in the official code.
        """
        weights = where / where.sum(1, keepdim=True).clamp(min=1)
        return (self.cross_entropy(scores, probs) * weights).sum(1).mean()

    def before_step(self, step: Step) -> None:
        if step.epoch < self.config.freeze_last_layer:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None  # no step, and no decay either
        self.mean_score = self.score_sum / self.num_scored
        self.score_sum.zero_()  # also where the step will be skipped
        self.num_scored.zero_()

    def after_step(self, step: Step) -> None:
        """Move the centres to the mean score over crops, micro-batches and ranks, which hold equally many."""
        c, means = self.config, step.world.mean(self.mean_score)
        self.center[0].lerp_(means[0], 1 - c.center_momentum)
        self.center[1].lerp_(means[1], 1 - c.patch_center_momentum)

    def metrics(self) -> dict[str, Tensor]:
        """Two entropies, in nats, of the teacher's class distributions on this rank's last micro-batch.

        A collapse to one prototype shows in that of their mean, which falls to 0; one to uniform distributions in the
        mean of theirs, which rises to log(out_dim).
        """
        if self.cls_probs is None:
            return {}
        return {"entropy_of_mean": entropy(self.cls_probs.mean(0)), "mean_entropy": entropy(self.cls_probs).mean()}


def entropy(probs: Tensor) -> Tensor:
    """(..., n) -> (...), in nats."""
    return torch.special.entr(probs).sum(-1)


@hookimpl
def mim_encoders():
    return [CropViT]


@hookimpl
def mim_maskers():
    return [AttMask]


@hookimpl
def mim_objectives():
    return [SelfDistillation]


@hookimpl
def mim_views():
    return [MultiCropViews]
