"""What a model is worth: features of its encoder, and pictures of its reconstructions."""

from __future__ import annotations

from mim_framework.contract.hooks import hookimpl
from mim_framework.evaluate.accuracy import Accuracy
from mim_framework.evaluate.attentive import Attentive
from mim_framework.evaluate.few_shot import FewShot
from mim_framework.evaluate.health.evaluation import Health
from mim_framework.evaluate.knn import KNN
from mim_framework.evaluate.linear import Linear
from mim_framework.evaluate.segment import Segment


@hookimpl
def mim_evaluations():
    return [KNN, FewShot, Linear, Attentive, Segment, Accuracy, Health]
