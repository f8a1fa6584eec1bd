"""What health numbers mean in words: a pure function of numbers. Start at `judge`.

Every threshold stands here with its reason, and in docs/health.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Level = Literal["bad", "watch", "good"]
Diagnosis = Literal[
    "untrained teacher",
    "untrained encoder",
    "learning rate too high",
    "collapsed",
    "learns nothing",
    "healthy",
    "unclear",
]
"""What a run comes to; the first of several that hold is told, since it may be the cause of the others."""

LEAST_GAIN = 0.03
"""Share by which the loss must lie below that of the mean of each position. Means of two halves of the images differ by
about 1 % in loss, so that less may be chance; short runs of MAE on digits gain 13 % and more."""
LARGEST_STEP = 0.15
"""Largest sound ratio of an Adam-like optimizer's learning rate to the size of a typical weight. It moves every weight
by about its rate in a step, so that at 0.15 a weight is seven steps long. The official recipes have 0.02 to 0.09; a
rate thirty times too high has 0.25 and more, although the weights grow under it."""
COLLAPSED_STD = 0.01
"""Spread of features of unit length, below which all images are one point: half of the smallest that untrained encoders
begin with on digits, which is 0.02 (BEiT's first weights) to 0.25 (Swin). Healthy ones end above 0.1."""
COLLAPSED_SPREAD = 0.02
"""Share of a target's mean square that varies at all, below which it is one vector for everything."""
FEW_CLASSES = 2.0
"""Perplexity of token ids, below which one id is nearly all there is."""
RISEN = 1.5
"""A loss has risen if it ends so many times above its lowest level, of at least `SMALLEST_LEVEL` of its first."""
SMALLEST_LEVEL = 0.01
SMOOTHED = 5
"""Logged losses whose median is the level of a curve."""
UNIFORM = 0.995
"""Entropy of attention, as a share of the largest, above which a block looks at all tokens alike."""


@dataclass(frozen=True)
class Facts:
    """What is judged: `numbers` of the evaluation by its names, and what is known of the run.

    `losses`: the logged ones, in order. `skipped`: steps left out, as something was not finite. `rate`: the highest
    learning rate. `adam`: whether the optimizer moves each weight by about its rate in a step. `moving`: whether
    targets change during training, so that a loss may rise by rights.
    """

    numbers: Mapping[str, float]
    losses: Sequence[float] = ()
    skipped: int = 0
    rate: float | None = None
    adam: bool = False
    moving: bool = False


@dataclass(frozen=True)
class Verdict:
    """One finding: how bad it is, of what, in a sentence with its numbers; what to try, and what it is a sign of."""

    level: Level
    topic: str
    text: str
    cure: str = ""
    sign_of: Diagnosis | None = None


@dataclass(frozen=True)
class Judgement:
    """What a run comes to, and all findings, the worst first."""

    diagnosis: Diagnosis
    verdicts: list[Verdict]

    @property
    def sentence(self) -> str:
        """The diagnosis in words."""
        return SENTENCES[self.diagnosis]


SENTENCES: dict[Diagnosis, str] = {
    "untrained teacher": "A network that has learned nothing is what this run predicts.",
    "untrained encoder": "The encoder has not been trained.",
    "learning rate too high": "The learning rate is too high: the model does not learn from what it sees.",
    "collapsed": "The features have collapsed: images can hardly be told apart.",
    "learns nothing": "The model does no better than a guess that does not look at the image.",
    "healthy": "Nothing looks wrong.",
    "unclear": "Too little could be measured to say how the run goes.",
}


def judge(facts: Facts) -> Judgement:
    """All findings, and the first diagnosis of which there is a sign."""
    checks = (_teachers, _encoder, _rate, _collapse, _learned, _skipped, _spikes, _attention, _rank)
    found = [verdict for check in checks for verdict in check(facts)]
    signs = {verdict.sign_of for verdict in found}
    diagnosis = next((each for each in SENTENCES if each in signs), None)
    if diagnosis is None:
        diagnosis = "healthy" if any(key.split("/")[0] == "trivial_loss" for key in facts.numbers) else "unclear"
    order = ("bad", "watch", "good")
    return Judgement(diagnosis, sorted(found, key=lambda verdict: order.index(verdict.level)))


# --- one check after the other; each yields what it can say of the facts that are there ------------------------------


def _teachers(facts: Facts) -> Iterator[Verdict]:
    for key, share in facts.numbers.items():
        name = key.removeprefix("norms_at_start/teacher/")
        if name != key and share == 1:
            yield Verdict(
                "bad", "teacher",
                f"Teacher '{name}' has learned nothing: the scales of all its normalisation layers are 1, as before "
                "the first step of any training.",
                f"Give it weights (teachers.{name}.checkpoint), or let it follow (a momentum below 1). Only if a fixed "
                "random projection is meant is this as it should be.",
                "untrained teacher",
            )  # fmt: skip
        elif name != key:
            yield Verdict("good", "teacher", f"Teacher '{name}' has been trained: its normalisation layers have moved.")


def _encoder(facts: Facts) -> Iterator[Verdict]:
    if facts.numbers.get("norms_at_start/encoder") == 1:
        yield Verdict(
            "bad", "encoder",
            "No normalisation layer of the encoder has moved since the start.",
            "Look for a learning rate of 0, a frozen encoder, or a run that has made no step yet.",
            "untrained encoder",
        )  # fmt: skip


def _rate(facts: Facts) -> Iterator[Verdict]:
    """A rate is too high if it is out of proportion to the weights and the run suffers, or if the loss gave way."""
    step, risen = _relative_step(facts), _risen(facts.losses) and not facts.moving
    gains = [gain for _, gain in _gains(facts)]
    stuck = bool(gains) and max(gains) < LEAST_GAIN
    too_long = step is not None and step > LARGEST_STEP
    if too_long and (stuck or risen or facts.skipped or facts.numbers.get("grad_norm_spikes")):
        why = f"The highest learning rate, {facts.rate:.2g}, is {step:.2g} times a typical weight"
        yield Verdict("bad", "learning rate", f"{why}, and the run suffers from it.", LOWER, "learning rate too high")
    elif too_long:
        text = f"The highest learning rate, {facts.rate:.2g}, is {step:.2g} times a typical weight"
        yield Verdict(
            "watch",
            "learning rate",
            f"{text}; above {LARGEST_STEP:g} is rare.",
            "If the loss is not steady, lower optim.lr.",
        )
    elif risen:
        lowest, last = _levels(facts.losses)
        text = f"The loss fell to {lowest:.3g} and then rose to {last:.3g}."
        yield Verdict("bad", "learning rate", text, LOWER, "learning rate too high")
    elif step is not None:
        yield Verdict("good", "learning rate", f"The highest learning rate is {step:.2g} times a typical weight.")


LOWER = "Divide optim.lr by 3 and again until the loss falls steadily; a longer optim.warmup_epochs helps too."


def _collapse(facts: Facts) -> Iterator[Verdict]:
    std, cosine = facts.numbers.get("relative_std"), facts.numbers.get("mean_cosine")
    cure = (
        "Where a moving teacher is predicted: normalise its features (target.normalize), raise its momentum, predict "
        "with a decoder that is not linear, lower weight decay. Otherwise lower the learning rate."
    )
    if std is not None and std < COLLAPSED_STD:
        text = f"Features of different images are one: their spread is {std:.2g} (0 is one point, 1 fills the sphere)"
        yield Verdict("bad", "collapse", f"{text}, their mean cosine {cosine:.4f}.", cure, "collapsed")
    elif std is not None:
        yield Verdict("good", "collapse", f"Features differ from image to image: their spread is {std:.2g}.")
    for key, spread in facts.numbers.items():
        if key.split("/")[0] == "target_spread" and spread < COLLAPSED_SPREAD:
            text = (
                f"What is predicted{_of(key)} is nearly one vector everywhere: of its mean square, {spread:.2g} varies"
            )
            yield Verdict("bad", "target", f"{text}.", cure, "collapsed")
        if key.split("/")[0] == "target_perplexity" and spread < FEW_CLASSES:
            text = f"What is predicted{_of(key)} is nearly one class: it has the variety of {spread:.2g}."
            yield Verdict("watch", "target", text, "Train the tokenizer longer, and look at how many codes it uses.")


def _learned(facts: Facts) -> Iterator[Verdict]:
    """Whether the loss on images kept aside is below that of the best guess that does not look at the image."""
    for key, gain in _gains(facts):
        what, loss, trivial = _guess(facts.numbers, key), facts.numbers[key], _trivial(facts.numbers, key)
        text = f"On images kept aside the loss{_of(key)} is {loss:.4g}, that of {what} {trivial:.4g}"
        if gain < LEAST_GAIN:
            cure = (
                "If the run is young, wait: the first thing learned is the mean. Else see the learning rate, and "
                "whether the visible part can tell anything of the hidden one (masker, size of patches)."
            )
            yield Verdict("bad", "learning", f"{text}: what is visible is hardly used.", cure, "learns nothing")
        else:
            yield Verdict("good", "learning", f"{text}: {100 * gain:.0f} % better.")


def _skipped(facts: Facts) -> Iterator[Verdict]:
    if facts.skipped:
        text = f"{facts.skipped} steps were skipped, as a loss or a gradient was not finite."
        yield Verdict("watch", "steps", text, "`mim replay` names the module where it begins; see nonfinite.jsonl.")


def _spikes(facts: Facts) -> Iterator[Verdict]:
    if (count := facts.numbers.get("grad_norm_spikes")) is not None and count:
        text = f"The norm of the gradient rose {count:.0f} times to more than five times its usual size."
        yield Verdict("watch", "gradient", text, "Set optim.clip_grad_norm, or lower the learning rate.")
    elif count is not None:
        yield Verdict("good", "gradient", "The norm of the gradient has no spikes.")


def _attention(facts: Facts) -> Iterator[Verdict]:
    of_blocks = {key: value for key, value in facts.numbers.items() if key.startswith("attention_entropy/")}
    if of_blocks and min(of_blocks.values()) > UNIFORM:
        text = f"Every block looks at all tokens alike (entropy of attention above {UNIFORM:g} of the largest)."
        yield Verdict("watch", "attention", text, "Usual before training; later a sign that nothing is learned.")


def _rank(facts: Facts) -> Iterator[Verdict]:
    if (rank := facts.numbers.get("rankme_centred")) is not None:
        text = f"Features without their mean fill {rank:.1f} directions (RankMe)."
        yield Verdict("good", "rank", f"{text} Compare that with the same run at other steps only.")


# --- what the checks read --------------------------------------------------------------------------------------------


def _of(key: str) -> str:
    """Of which head a number is, in words."""
    _, _, head = key.partition("/")
    return f" of head '{head}'" if head else ""


def _beside(key: str, name: str) -> str:
    """The key of another number of the same head."""
    _, slash, head = key.partition("/")
    return f"{name}{slash}{head}"


def _trivial(numbers: Mapping[str, float], key: str) -> float:
    guesses = (numbers.get(_beside(key, name), math.inf) for name in ("trivial_loss", "position_loss"))
    return min(guesses)


def _guess(numbers: Mapping[str, float], key: str) -> str:
    if _beside(key, "target_perplexity") in numbers:
        return "a guess by frequency"
    is_position = numbers.get(_beside(key, "position_loss")) == _trivial(numbers, key)
    return "the mean of each position" if is_position else "the mean"


def _gains(facts: Facts) -> list[tuple[str, float]]:
    """Of every loss beside that of a guess, by which share it is lower."""
    keys = [key for key in facts.numbers if key.split("/")[0] == "loss" and math.isfinite(_trivial(facts.numbers, key))]
    return [(key, 1 - facts.numbers[key] / max(_trivial(facts.numbers, key), 1e-12)) for key in keys]


def _relative_step(facts: Facts) -> float | None:
    size = facts.numbers.get("typical_weight")
    return facts.rate / size if facts.adam and facts.rate is not None and size else None


def _levels(losses: Sequence[float]) -> tuple[float, float]:
    """The lowest level of a curve and that of its end; a level is the median of some losses in a row."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    levels = [median(finite[start : start + SMOOTHED]) for start in range(max(1, len(finite) - SMOOTHED + 1))]
    return min(levels), levels[-1]


def _risen(losses: Sequence[float]) -> bool:
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) <= SMOOTHED:
        return False
    lowest, last = _levels(finite)
    return last > RISEN * max(lowest, SMALLEST_LEVEL * abs(finite[0]))
