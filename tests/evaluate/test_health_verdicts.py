"""What follows from numbers, by hand: each way to fail has its own name, and a sound run none."""

from __future__ import annotations

import pytest

from mim_framework.evaluate.health.verdicts import SENTENCES, Facts, judge

SOUND = {
    "relative_std": 0.2, "mean_cosine": 0.95, "rankme_centred": 20.0, "loss": 1.3, "trivial_loss": 2.4,
    "position_loss": 1.6, "target_spread": 0.9, "norms_at_start/encoder": 0.0, "norms_at_start/teacher/t": 0.0,
    "typical_weight": 0.1, "grad_norm_spikes": 0.0, "attention_entropy/0": 0.8, "attention_entropy/1": 0.9,
}  # fmt: skip
FALLING = [4.0, 3.0, 2.0, 1.8, 1.7, 1.6, 1.5, 1.4, 1.4, 1.4]
RISING = [4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def facts(losses=FALLING, rate=2e-3, adam=True, moving=False, skipped=0, **numbers) -> Facts:
    changed = {name.replace("__", "/"): value for name, value in numbers.items()}
    kept = {name: value for name, value in {**SOUND, **changed}.items() if value is not None}
    return Facts(kept, losses, skipped, rate, adam, moving)


def texts(facts: Facts, level: str) -> list[str]:
    return [verdict.topic for verdict in judge(facts).verdicts if verdict.level == level]


def test_a_sound_run_is_healthy_and_nothing_is_bad():
    judgement = judge(facts())
    assert judgement.diagnosis == "healthy"
    assert {verdict.level for verdict in judgement.verdicts} == {"good"}
    [learned] = [verdict.text for verdict in judgement.verdicts if verdict.topic == "learning"]
    assert learned == "On images kept aside the loss is 1.3, that of the mean of each position 1.6: 19 % better."


@pytest.mark.parametrize(
    ("diagnosis", "found"),
    [
        ("untrained teacher", facts(norms_at_start__teacher__t=1.0)),
        ("untrained encoder", facts(norms_at_start__encoder=1.0, loss=1.7)),
        ("learning rate too high", facts(rate=0.06, loss=1.59)),
        ("learning rate too high", facts(rate=0.06, skipped=3)),
        ("learning rate too high", facts(rate=0.06, grad_norm_spikes=2.0)),
        ("learning rate too high", facts(losses=RISING)),
        ("collapsed", facts(relative_std=0.001)),
        ("collapsed", facts(target_spread=0.001)),
        ("learns nothing", facts(loss=1.58)),
        ("unclear", facts(loss=None, trivial_loss=None, position_loss=None, target_spread=None)),
    ],
)
def test_every_way_to_fail_has_its_name(diagnosis, found):
    judgement = judge(found)
    assert (judgement.diagnosis, judgement.sentence) == (diagnosis, SENTENCES[diagnosis])
    signs = [verdict for verdict in judgement.verdicts if verdict.sign_of == diagnosis]
    assert bool(signs) == (diagnosis != "unclear")
    assert all(verdict.level == "bad" and verdict.cure for verdict in signs)


def test_thresholds_are_where_they_are_said_to_be():
    assert judge(facts(loss=1.6 * 0.969)).diagnosis == "healthy"
    assert judge(facts(loss=1.6 * 0.971)).diagnosis == "learns nothing"
    assert judge(facts(relative_std=0.0099)).diagnosis == "collapsed"
    assert judge(facts(relative_std=0.0101)).diagnosis == "healthy"
    assert judge(facts(rate=0.0149, loss=1.59)).diagnosis == "learns nothing"
    assert judge(facts(rate=0.0151, loss=1.59)).diagnosis == "learning rate too high"


def test_a_high_rate_that_does_no_harm_is_only_watched():
    assert judge(facts(rate=0.06)).diagnosis == "healthy"
    assert texts(facts(rate=0.06), "watch") == ["learning rate"]


def test_the_size_of_a_step_is_only_known_of_optimizers_like_adam():
    assert judge(facts(rate=0.06, loss=1.59, adam=False)).diagnosis == "learns nothing"
    assert judge(facts(rate=None, loss=1.59)).diagnosis == "learns nothing"


def test_a_loss_may_rise_where_targets_move():
    assert judge(facts(losses=RISING, moving=True)).diagnosis == "healthy"


def test_one_spike_of_the_loss_is_no_rise():
    assert judge(facts(losses=[4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0])).diagnosis == "healthy"
    assert judge(facts(losses=[1.0, 5.0])).diagnosis == "healthy"


def test_the_cause_is_told_before_its_consequences():
    everything = facts(norms_at_start__teacher__t=1.0, rate=0.06, relative_std=0.0, loss=2.0)
    assert judge(everything).diagnosis == "untrained teacher"
    assert texts(everything, "bad") == ["teacher", "learning rate", "collapse", "learning"]
    assert judge(facts(rate=0.06, relative_std=0.0, loss=2.0)).diagnosis == "learning rate too high"
    assert judge(facts(relative_std=0.0, loss=2.0)).diagnosis == "collapsed"


def test_heads_are_judged_one_by_one():
    two = {"loss": None, "trivial_loss": None, "position_loss": None, "target_spread": None}
    two |= {"loss__a": 1.0, "trivial_loss__a": 2.0, "loss__b": 5.0, "trivial_loss__b": 5.0, "target_perplexity__b": 9.0}
    judgement = judge(facts(**two))
    assert judgement.diagnosis == "learns nothing"
    assert [verdict.text for verdict in judgement.verdicts if verdict.topic == "learning"] == [
        "On images kept aside the loss of head 'b' is 5, that of a guess by frequency 5: what is visible is hardly "
        "used.",
        "On images kept aside the loss of head 'a' is 1, that of the mean 2: 50 % better.",
    ]


def test_what_is_only_worth_watching_is_no_diagnosis():
    watched = facts(skipped=2, grad_norm_spikes=3.0, attention_entropy__0=0.999, attention_entropy__1=0.999)
    assert judge(watched).diagnosis == "healthy"
    assert texts(watched, "watch") == ["steps", "gradient", "attention"]


def test_a_tokenizer_with_hardly_any_code_is_told():
    few = facts(target_spread=None, position_loss=None, target_perplexity=1.3)
    assert texts(few, "watch") == ["target"]
    assert texts(facts(target_spread=None, position_loss=None, target_perplexity=2.1), "watch") == []


def test_without_any_number_nothing_is_said():
    assert judge(Facts({})).diagnosis == "unclear"
    assert judge(Facts({})).verdicts == []
