"""What `mim export` writes beside the tensors, so that an import need not guess: the slots of the run, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mim_framework.assembly.builder import Model

RECORD = "mim_framework"
"""Key of the record: in the metadata of a safetensors file as JSON, in one of `torch.save` as a dictionary."""
FORMAT = 1
SLOTS = ("views", "masker", "encoder", "target", "decoder", "loss", "heads", "objective", "teachers")


@dataclass(frozen=True)
class ExportRecord:
    """The layout of an export, and the slots of the run that it comes from.

    `run`, `step`, `images_seen`: its name, its optimizer steps so far, and the images in them; None in older files.
    """

    layout: str
    slots: dict[str, dict[str, Any]]
    run: str | None = None
    step: int | None = None
    images_seen: int | None = None

    @classmethod
    def of(cls, model: Model, layout: str, step: int) -> ExportRecord:
        """The slots with all their options; a size that the recipe left to its tokenizer or its data is written out."""
        data = model.recipe.model_dump(mode="json", exclude_none=True, include=set(SLOTS))
        slots = {slot: data[slot] for slot in SLOTS if data.get(slot)}
        for name, section in model.recipe.named_heads().items():
            where = slots["heads"][name] if "heads" in slots else slots
            where["target"] = section.target.model_dump(mode="json")
            for option in ("vocab_size", "num_classes"):
                if section.target.options.get(option, 0) is None:
                    where["target"][option] = model.objective.heads[name].target.spec.dim
        return cls(layout, slots, model.recipe.name, step, step * model.recipe.train.total_batch_size)

    def data(self) -> dict[str, Any]:
        """Dictionaries, lists, texts and numbers alone."""
        trained = {"run": self.run, "step": self.step, "images_seen": self.images_seen}
        known = {name: value for name, value in trained.items() if value is not None}
        return {"format": FORMAT, "layout": self.layout, "slots": self.slots, **known}

    @classmethod
    def read(cls, data: Any) -> ExportRecord | None:
        """The record in a file; None if there is none, or one of another format or kind."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            return None
        layout, slots = data.get("layout"), data.get("slots")
        if not isinstance(layout, str) or not isinstance(slots, dict):
            return None
        known = {slot: slots[slot] for slot in SLOTS if isinstance(slots.get(slot), dict)}
        if not known.keys() >= {"views", "encoder"}:
            return None
        run, counts = data.get("run"), [data.get(name) for name in ("step", "images_seen")]
        return cls(
            layout, known, run if isinstance(run, str) else None, *(n if isinstance(n, int) else None for n in counts)
        )
