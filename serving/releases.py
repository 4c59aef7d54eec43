"""Asking for a release by hand: what a person may ask for, and what the journal then says about it."""

from __future__ import annotations

from cluster.clock import Clock
from cluster.database import Database
from pipelines.spec import ReleasePolicy
from pipelines.training.registry import Registry, RegistryError


class ReleaseError(RuntimeError):
    """A release cannot be asked for, or cannot go on; the message says why and what to do."""


def request(
    usecase: str,
    version: str,
    *,
    by: str,
    policy: ReleasePolicy | None,
    force: bool,
    reason: str,
    database: Database,
    registry: Registry,
    clock: Clock,
) -> None:
    """Asks for the release of a version; the rollout controller takes requests in their order.

    ``policy`` takes the place of the page's for this rollout. A version whose gates did not pass is refused unless
    ``force`` is given with a reason; the journal then names ``by``. Raises ``ReleaseError`` when the registry has no
    such version, or it waits already or is the champion.
    """
    forced = may_answer(usecase, version, force=force, reason=reason, database=database, registry=registry)
    payload = {
        "requested_by": by,
        "reason": reason,
        "forced": forced,
        "policy": policy and policy.model_dump(mode="json"),
    }
    if not database.request_release(usecase, version, payload, clock.now(), again=True):
        raise ReleaseError(f"version {version} of {usecase!r} waits for its release already")


def may_answer(usecase: str, version: str, *, force: bool, reason: str, database: Database, registry: Registry) -> bool:
    """Whether a version may answer only because it is forced; ``ReleaseError`` when it may not, see ``request``."""
    try:
        found = registry.version(usecase, version)
    except RegistryError as error:
        raise ReleaseError(str(error)) from error
    routing = database.routing(usecase)
    if routing is not None and routing.document["champion"] == version:
        raise ReleaseError(f"version {version} is the champion of {usecase!r} already")
    if not found.gates_passed and not force:
        raise ReleaseError(
            f"version {version} of {usecase!r} did not pass its gates: train a better one, or force it and say why"
        )
    if not found.gates_passed and not reason.strip():
        raise ReleaseError(f"forcing version {version} of {usecase!r} past its gates needs a reason, for the journal")
    return not found.gates_passed
