"""The images by which a recipe's encoder is judged: those that its source keeps aside, or others that it names."""

from __future__ import annotations

from mim_framework.assembly.builder import build_source
from mim_framework.base.errors import DataError
from mim_framework.base.text import plain_logger
from mim_framework.contract.components import Source
from mim_framework.data.loader import SourceChoice
from mim_framework.evaluate.splits import Splits
from mim_framework.recipe.recipe import Recipe
from mim_framework.registry.registry import Registry

logger = plain_logger(__name__)

TEST, TRAIN = "data.eval_source", "data.eval_train_source"


def evaluation_splits(recipe: Recipe, registry: Registry, source: Source | None = None) -> Splits:
    """The splits of `data.eval_source` and `data.eval_train_source`, by default those of the recipe's source.

    Args:
        source: that of the recipe, if it is built already; else it is where it is needed.

    Raises:
        DataError: if one of the sources cannot be read, or the classes of the two do not fit.
    """
    section = recipe.data
    if section.eval_source is None and section.eval_train_source is None:
        return Splits.of(build_source(recipe, registry) if source is None else source)
    if section.eval_train_source is None:
        assert section.eval_source is not None
        test = _built(section.eval_source, TEST, registry)
        pair = test.evaluation_sources()
        if pair is not None:
            return Splits.of_pair(pair[0], _part(test, TEST, 1))
        return Splits.of_pair(build_source(recipe, registry) if source is None else source, test)
    train = _built(section.eval_train_source, TRAIN, registry)
    if section.eval_source is not None:
        test = _built(section.eval_source, TEST, registry)
        return Splits.of_pair(_part(train, TRAIN, 0), _part(test, TEST, 1))
    if (pair := train.evaluation_sources()) is not None:
        return Splits.of_pair(*pair)
    return Splits.of(train)


def _built(choice: SourceChoice, key: str, registry: Registry) -> Source:
    """A source, whose messages name the key at which it stands."""
    cls, config = registry.resolve("source", choice)
    try:
        return cls(config)
    except DataError as error:
        raise DataError(str(error).replace("data.source", key)) from error


def _part(source: Source, key: str, part: int) -> Source:
    """The part of a source that divides itself, 0 to learn from or 1 to be tested on; else the source as it is."""
    pair = source.evaluation_sources()
    if pair is None:
        return source
    if source.config not in (pair[part].config, pair[0].config):  # of several parts, the first is the default
        what = "the part to learn from" if part == 0 else "the part to be tested on"
        taken = pair[part].config.model_dump()
        chosen = " ".join(f"{k}={v!r}" for k, v in source.config.model_dump().items() if v != taken[k])
        logger.warning(f"{key}: source '{source.name}' divides itself; {what} is taken, not {chosen}")
    return pair[part]
