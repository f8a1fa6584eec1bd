"""Plugins that listen to the events of a run."""

from __future__ import annotations

from typing import Any

from mim_framework.base.text import plain_logger
from mim_framework.training.run import Run

logger = plain_logger(__name__)


class Listeners:
    """Those of one run. One that raises is named once, and cannot end the run."""

    def __init__(self, hook: Any, run: Run) -> None:
        """
        Args:
            hook: the hooks of the registry.
        """
        self.hook, self.run = hook, run
        self.failed: set[str] = set()

    def tell(self, event: str, **details: Any) -> None:
        """Call all that implement the hook `event` with those of the details that they ask for, and the run."""
        details["run"] = self.run
        for listener in reversed(getattr(self.hook, event).get_hookimpls()):  # the last registered first, as in pluggy
            try:
                listener.function(*[details[name] for name in listener.argnames])
            except Exception as error:
                if listener.plugin_name not in self.failed:
                    self.failed.add(listener.plugin_name)
                    logger.warning(
                        f"plugin '{listener.plugin_name}' failed in {event}: {type(error).__name__}: {error}. "
                        "The run goes on; further errors of this plugin are not shown"
                    )
