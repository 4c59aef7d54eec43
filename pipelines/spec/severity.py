"""What follows where a rule is broken."""

from __future__ import annotations

from enum import StrEnum


class Severity(StrEnum):
    """The row is refused, or it is taken and counted, or its whole load is refused.

    Over HTTP, where events come one by one, the event is refused in the last case too.
    """

    REJECT = "reject"
    WARN = "warn"
    REFUSE = "refuse"
