"""The recipe sections of a training run's length, batch and hardware; `trainer.py` reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mim_framework.base.section import Section


class TrainSection(Section):
    """How long, how many images at a time, on what."""

    total_batch_size: int = Field(gt=0)
    """Images per optimizer step, over all ranks and accumulation steps."""
    batch_size: int | None = Field(None, gt=0)
    """Images per rank and micro-batch. By default the total divided by the ranks, without accumulation."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in epochs; an epoch is floor(images / total_batch_size) steps, as with `drop_last`."""
    steps: int | None = Field(None, gt=0)
    """Length of the run in optimizer steps, instead of `epochs`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` takes cuda, mps or cpu, the first that there is."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass. `auto` is bfloat16 autocast where the device has it in hardware. Weights stay
    float32."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """Replicate the model on every rank, or shard it (FSDP2)."""
    compile: bool = False
    """Compile every transformer block with `torch.compile`."""
    average: Literal["per_micro_batch", "over_positions"] = "per_micro_batch"
    """What a loss is divided by: each micro-batch of each rank by its own count, of which the mean is taken, as
    official codes do; or all of them once by the sum of their counts, so that every predicted position weighs the
    same."""
    frozen: tuple[str, ...] = ()
    """Patterns of names of parameters that do not train, for example `[encoder.*]` for linear probing. What holds no
    others stays in evaluation mode, without drop path, and keeps no activations."""
    max_nonfinite_steps: int = Field(5, ge=0)
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """What is done when a checkpoint cannot be written on the way, as on a full disk: end the run, or warn and go on
    with the earlier ones. The last one, and that of a run that is stopped, must be written."""
    step_timeout: float | None = Field(1800.0, gt=0)
    """Seconds that a step may take, with its images; null for no limit. A run whose step takes longer ends, says which
    rank hangs, and leaves the stacks of all ranks in the run directory. Ranks wait for each other as long, and at least
    10 minutes, since rank 0 saves meanwhile."""
    on_explosion: Literal["warn", "stop", "rewind"] = "stop"
    """What is done about a loss that explodes without ceasing to be a number. `stop` keeps a checkpoint from before the
    rise and sets later ones aside; `rewind` goes back to it and leaves out the images of the steps around the rise."""
    max_rewinds: int = Field(3, ge=0)
    """How often a run may go back with `rewind` before it stops."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the run as 'epochs' or as 'steps', one of the two")
        return self


class PhaseSection(Section):
    """One pass of a step. Most methods have a single phase that steps every optimizer."""

    name: str
    """What `step.phase` says during this pass."""
    optimizers: tuple[str, ...] = Field(min_length=1)
    """Names of the optimizers that step at its end."""
    sign: Literal[1, -1] = 1
    """-1 maximises the loss (an adversarial masker)."""
