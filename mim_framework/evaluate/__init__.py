"""What a model is worth: features of its encoder, and pictures of its reconstructions."""

from __future__ import annotations

from mim_framework.contract.hooks import hookimpl
from mim_framework.evaluate.accuracy import Accuracy
from mim_framework.evaluate.knn import KNN


@hookimpl
def mim_evaluations():
    return [KNN, Accuracy]
