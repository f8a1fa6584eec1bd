"""A codebook of unit vectors, each of which follows the mean of what is assigned to it (BEiT v2).

The codes move once per optimizer step, by what all micro-batches of all ranks have seen; never in eval mode.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_framework import Step, permutation, random_bits, uniform, without_autocast
from mim_framework.nn import perplexity

VECTORS_AT_ONCE = 4096
"""Vectors that are compared with all codes at a time: 128 MiB of similarities for 8192 codes."""
MAX_REVIVED = 1024
"""Codes that are replaced in one step at most; others wait for the next."""
NO_KEY = torch.iinfo(torch.int64).max


@torch.no_grad()
def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """vectors (..., C) and codes (K, C), all of length 1 -> the nearest code of each vector, (...) int64.

    Between unit vectors the nearest is the one of largest product.
    """
    with without_autocast():
        parts = vectors.flatten(0, -2).split(VECTORS_AT_ONCE)
        return torch.cat([(part @ codes.t()).argmax(-1) for part in parts]).view(vectors.shape[:-1])


def counts_and_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """vectors (n, C), ids (n,) -> how many vectors each code has, (K,), and their sums, (K, C)."""
    counts = vectors.new_zeros(num_codes).index_add_(0, ids, vectors.new_ones(len(vectors)))
    return counts, vectors.new_zeros(num_codes, vectors.shape[-1]).index_add_(0, ids, vectors)


def directions(counts: Tensor, sums: Tensor, otherwise: Tensor) -> Tensor:
    """The unit vector along the mean of each code's vectors, (K, C); that of `otherwise` where it has none."""
    means = normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
    return torch.where(counts[:, None] > 0, means, otherwise)


@torch.no_grad()
def spherical_k_means(samples: Tensor, centers: Tensor, num_iterations: int = 10) -> tuple[Tensor, Tensor]:
    """samples (n, C) and first centers (K, C), all of length 1 -> centers (K, C), samples of each in the last round.

    A center without samples stays where it is.
    """
    counts = samples.new_zeros(len(centers))
    for _ in range(num_iterations):
        counts, sums = counts_and_sums(samples, nearest_codes(samples, centers), len(centers))
        centers = directions(counts, sums, otherwise=centers)
    return centers, counts


def first_centers(samples: Tensor, num_centers: int, seed: int) -> Tensor:
    """Random samples, each at most once if there are enough; samples (n, C) -> (K, C)."""
    stream, num_samples = "k-means", len(samples)
    if num_samples >= num_centers:
        chosen = permutation(seed, stream, num_samples)[:num_centers]
    else:
        chosen = (uniform(seed, stream, torch.arange(num_centers), 1)[:, 0] * num_samples).long()
    return samples[chosen.to(samples.device)]


class EMACodebook(nn.Module):
    """Unit vectors `codes` (K, C), equal on all ranks because every rank makes the same updates of them.

    A training forward pass only adds up what it has seen; `take` and `update` are the two halves of the update. A code
    that was used moves by the share 1 - `decay` towards the mean of its vectors, however many those are; others stay.
    """

    def __init__(
        self, num_codes: int, dim: int, decay: float, *, revive_after: int | None = None, begins_from_data: bool = False
    ) -> None:
        super().__init__()
        self.decay, self.revive_after = decay, revive_after
        self.register_buffer("codes", normalize(torch.randn(num_codes, dim), dim=-1))
        self.register_buffer("initted", torch.full((1,), 0.0 if begins_from_data else 1.0))
        # What has been seen since the last update, and since the last line of the log; no model needs it.
        self.register_buffer("counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("window", torch.zeros(num_codes), persistent=False)
        if revive_after is not None:
            num_spares = min(MAX_REVIVED, num_codes)
            self.register_buffer("idle_steps", torch.zeros(num_codes, dtype=torch.int32))
            self.register_buffer("spare_keys", torch.full((num_spares,), NO_KEY), persistent=False)
            self.register_buffer("spares", torch.zeros(num_spares, dim), persistent=False)
        self.taken: dict[str, Tensor] = {}
        self.last_window: Tensor | None = None

    @property
    def num_codes(self) -> int:
        return len(self.codes)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """vectors (B, N, C) of length 1 -> their codes (B, N, C) and the ids of these (B, N)."""
        ids = nearest_codes(vectors, self.codes)
        if self.training:
            counts, sums = counts_and_sums(vectors.detach().flatten(0, 1), ids.flatten(), self.num_codes)
            self.counts += counts
            self.sums += sums
        return self.codes[ids], ids

    def keep_spares(self, vectors: Tensor, step: Step) -> None:
        """Remember some random ones of a micro-batch's vectors (B, N, C), to put them where unused codes were.

        Those of the smallest keys of a whole step are the same however it is divided among ranks and micro-batches.
        """
        if self.revive_after is None:
            return
        keys = random_bits(step.seed, "revived codes", step.positions, vectors.shape[1]).flatten()
        keys = torch.cat([self.spare_keys, keys])
        vectors = torch.cat([self.spares, vectors.detach().flatten(0, 1)])
        order = keys.argsort(stable=True)[: len(self.spare_keys)]
        self.spare_keys.copy_(keys[order])
        self.spares.copy_(vectors[order])

    def take(self) -> None:
        """Set aside what the micro-batches of a step have seen, and begin to count anew."""
        names = ["counts", "sums", *(() if self.revive_after is None else ("spare_keys", "spares"))]
        self.taken = {name: getattr(self, name).clone() for name in names}
        for name in names:
            getattr(self, name).fill_(NO_KEY if name == "spare_keys" else 0)

    @torch.no_grad()
    def update(self, step: Step) -> None:
        """Move the codes by what `take` has set aside, on all ranks together."""
        taken, world = self.taken, step.world
        seen = world.sum(torch.cat([taken["counts"][:, None], taken["sums"]], dim=1))
        counts, sums = seen[:, 0], seen[:, 1:]
        used = counts > 0
        moved = self.decay * self.codes + (1 - self.decay) * directions(counts, sums, otherwise=self.codes)
        self.codes.copy_(torch.where(used[:, None], normalize(moved, dim=-1), self.codes))
        self.window += counts
        if self.revive_after is not None:
            self.idle_steps.add_(1).masked_fill_(used, 0)
            self._revive(
                self.idle_steps >= self.revive_after, world.gather(taken["spare_keys"]), world.gather(taken["spares"])
            )

    def _revive(self, dead: Tensor, keys: Tensor, spares: Tensor) -> None:
        """Replace dead codes, in their order, by the spare vectors (n, C) in the order of their random keys (n,)."""
        order = keys.argsort(stable=True)[: len(self.spares)]
        rank = dead.cumsum(0)
        number = (rank - 1).clamp(0, len(order) - 1)
        replaced = dead & (rank <= (keys[order] != NO_KEY).sum())
        self.codes.copy_(torch.where(replaced[:, None], spares[order][number], self.codes))
        self.idle_steps.masked_fill_(replaced, 0)

    @torch.no_grad()
    def begin_from(self, samples: Tensor, step: Step) -> None:
        """Place the codes by k-means over all ranks' samples (n, C), in an order that is the same for any ranks.

        Officially every rank clusters its own batch with its own seed, so that code k is another one on each of them.
        """
        centers = torch.zeros_like(self.codes)
        if step.world.is_main:
            centers, _ = spherical_k_means(samples, first_centers(samples, self.num_codes, step.seed))
        self.codes.copy_(step.world.sum(centers))
        self.initted.fill_(1)

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of the codes used since the last line of the log, and perplexity, exp of the entropy of their use."""
        return (self.window > 0).float().mean(), perplexity(self.window)

    def start_window(self) -> None:
        """A line of the log has been written."""
        self.last_window = self.window.clone()
        self.window.zero_()
