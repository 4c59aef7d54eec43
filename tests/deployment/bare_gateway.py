"""A gateway of which only routes, page and keys are real: what comes past its key is told by ``Reached``."""

from __future__ import annotations

from typing import Any

from cluster.settings import Settings
from pipelines.spec import UseCase
from serving.api import build_api
from serving.auth import KeyRing
from serving.gateway import Gateway


class Reached(RuntimeError):
    """The request came past its key."""


class Untouched:
    """Stands for a part that no refused request may reach."""

    def __getattr__(self, name: str) -> Any:
        raise Reached(name)

    def __contains__(self, item: object) -> bool:
        raise Reached(str(item))


class BareGateway(Gateway):
    """No process, no store; ``__call__`` and the routes are the gateway's own."""

    def __init__(self, use_case: UseCase, keys: KeyRing, settings: Settings) -> None:
        self.use_case, self.keys, self.settings = use_case, keys, settings
        self.rollouts = self.predictor = self.clock = self.follower = self.intake = self.views = Untouched()
        self.drain = self.feeds = Untouched()
        self._answering = 0
        self.api = build_api(self)
