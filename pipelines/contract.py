"""``tidegate contract``: shows the contract of a page, tells what a change of it breaks, checks it beforehand, tells of
a load on one HTML page, and sends quarantined rows through it again.

A contract is named by its use case, or by a file: one that ``tidegate contract show`` has written, or a document of the
Open Data Contract Standard (``.yaml``, ``.yml``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.compute as pc
from deltalake.exceptions import DeltaError
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from cluster.clock import open_clock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.contracts.enforce import events_table, quarantine_table
from pipelines.contracts.events import LOAD_ID
from pipelines.contracts.evolution import Change, diff, enough, required_version
from pipelines.contracts.leases import LeaseLost
from pipelines.contracts.lineage import Use, lineage
from pipelines.contracts.odcs import NotReadable, from_odcs, to_odcs
from pipelines.contracts.page import EXAMPLES, load_page
from pipelines.features.state import StateError
from pipelines.features.windows import pages
from pipelines.replay import replay
from pipelines.spec import Contract, EventSource, UseCase
from pipelines.training.artifact import ArtifactError, load
from pipelines.training.registry import Registry, RegistryError

_AWAY = (
    *(ArtifactError, RegistryError, LeaseLost, StateError),
    *(SQLAlchemyError, DeltaError, TimeoutError, OSError),
)
"""What the parts that a contract is compared with, or replayed through, may fail with."""


class NoContract(ValueError):
    """There is no such contract; the message says what was looked for and where."""


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> int:
    """The command; 1 when a check fails."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="the contract of a page as JSON")
    show.add_argument("usecase", help="a use case or a file")
    show.add_argument("--odcs", action="store_true", help="as a document of the Open Data Contract Standard")
    told = actions.add_parser("diff", help="what changes from one contract to another, and whom that breaks")
    told.add_argument("old", help="a use case or a file")
    told.add_argument("new", help="a use case or a file")
    check = actions.add_parser("check", help="fail on a change that needs another version, or breaks the champion")
    check.add_argument("usecase")
    check.add_argument("--against", help="a file (default: the contract that the champion was trained under)")
    page = actions.add_parser("page", help="one HTML page about a load: what came, what was refused and why")
    page.add_argument("usecase")
    page.add_argument("--load", help="its id (default: the load that ended last)")
    page.add_argument("--dimension", help="a load of this dimension instead of events")
    page.add_argument("--out", required=True, help="the file to write")
    again = actions.add_parser("replay", help="send quarantined rows through the contract again, each once")
    again.add_argument("usecase")
    again.add_argument("--rule", action="append", default=[], help="only rows that broke this rule; may be repeated")
    again.add_argument("--load", action="append", default=[], help="only rows of this load; may be repeated")
    again.add_argument("--dimension", help="rows of this dimension instead of events")
    options = parser.parse_args(arguments)
    try:
        match options.action:
            case "show":
                contract = read_contract(options.usecase)
                lines, fine = [to_odcs(contract) if options.odcs else contract.model_dump_json(indent=1)], True
            case "diff":
                lines, fine = told_of(options.old, options.new), True
            case "page":
                lines, fine = [_page(_use_case(options.usecase), options)], True
            case "replay":
                lines, fine = [_replay(_use_case(options.usecase), options)], True
            case _:
                lines, fine = checked(_use_case(options.usecase), options.against)
    except (NoContract, *_AWAY) as error:
        sys.stderr.write(f"tidegate: {error}\n")
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0 if fine else 1


def read_contract(name: str) -> Contract:
    """The contract of a use case or of a file; raises ``NoContract``."""
    if name in usecases.names():
        return usecases.load(name).contract
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(usecases.names())
        raise NoContract(f"{name!r} is neither a use case ({known}) nor a file that can be read: {error}") from error
    try:
        return from_odcs(text) if name.endswith((".yaml", ".yml")) else Contract.model_validate_json(text)
    except NotReadable as error:
        raise NoContract(f"{name} holds no contract: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise NoContract(f"{name} holds no contract: {where}: {first['msg']}") from error


def affected(changes: Iterable[Change], uses: Iterable[Use]) -> tuple[Use, ...]:
    """The uses that breaking changes reach: those of their fields, or all where one is of the contract as a whole.

    A rule is one of the fields that it names, and one of a load that names none reaches no column.
    """
    fields = {field for change in changes if change.breaking for field in (change.field, *change.reads)}
    return tuple(use for use in uses if None in fields or use.field in fields)


def told_of(old: str, new: str) -> list[str]:
    """What changes from one contract to another, each a line, and what of a page that is breaks."""
    before, after = read_contract(old), read_contract(new)
    changes = diff(before, after)
    required = required_version(before.version, changes)
    lines = [str(change) for change in changes]
    lines.append(f"{len(changes)} changes: after {before.version} comes at least {required}; it is {after.version}")
    named = [name for name in (old, new) if name in usecases.names()]
    pages_of = named or [n for n in usecases.names() if usecases.load(n).contract.name in (before.name, after.name)]
    if not pages_of:
        lines.append(f"no page has a contract {after.name!r}: which views and versions it reaches cannot be told")
    for page in pages_of[:1]:
        uses = affected(changes, lineage(usecases.load(page)))
        versions = _versions(page) if uses else {}
        for use in uses:
            known = ", ".join(versions.get(use.view, ())) or "none"
            reached = f"{use.field} → {', '.join(use.columns)}"
            lines.append(f"view {use.name} ({use.view}), model versions {known}: {reached}")
    return lines


def checked(use_case: UseCase, against: str | None) -> tuple[list[str], bool]:
    """What is wrong with the contract of a page after that of ``against`` (None: of its champion), and whether nothing
    is: it needs another version, or a breaking change reaches the view that the champion answers from.
    """
    champion = _champion(use_case.name)
    if against is not None:
        before = read_contract(against)
    elif champion is None:
        raise NoContract(f"{use_case.name!r} has no champion yet to check against: give --against FILE")
    elif champion.contract is None:
        raise NoContract(f"version {champion.version}, the champion, keeps no contract: give --against FILE")
    else:
        before = champion.contract
    new, changes = use_case.contract, diff(before, use_case.contract)
    required, lines = required_version(before.version, changes), []
    if not enough(new.version, required):
        breaking = [change for change in changes if change.breaking] or list(changes)
        lines.append(f"version {new.version} must be at least {required}, for {len(changes)} changes:")
        lines += [f"  {change}" for change in breaking]
    if champion is not None and champion.view not in pages(use_case):
        lines.append(
            f"the page no longer has view {champion.view}, which version {champion.version}, the champion, answers "
            "from: a view is another one when its fields, entity, time or lateness change"
        )
    elif champion is not None:
        for use in affected(changes, lineage(use_case)):
            if use.view == champion.view:
                reached = f"{use.field} → {', '.join(use.columns)}"
                lines.append(f"it would break the champion, version {champion.version}: {reached}")
    fine = not lines
    said = f"{use_case.name}: {len(changes)} changes after version {before.version}, and nothing that breaks unsaid"
    return ([said] if fine else lines), fine


def _use_case(name: str) -> UseCase:
    if name not in usecases.names():
        raise NoContract(f"there is no use case {name!r}; there are {', '.join(usecases.names())}")
    return usecases.load(name)


def _source(use_case: UseCase, dimension: str | None) -> EventSource:
    if dimension is None:
        return use_case
    known = {part.name: part for part in use_case.dimensions}
    if dimension not in known:
        raise NoContract(f"{use_case.name!r} has no dimension {dimension!r}; it has {sorted(known)}")
    return use_case.source(known[dimension])


def _page(use_case: UseCase, options: argparse.Namespace) -> str:
    source = _source(use_case, options.dimension)
    settings = Settings.from_environment()
    database = Database(settings.database_url)
    database.create()
    ended = [load for load in database.loads(source.name) if load.manifest is not None]
    found = ended[-1:] if options.load is None else [load for load in ended if load.load_id == options.load]
    if not found:
        known = ", ".join(load.load_id for load in ended[-5:]) or "none"
        raise NoContract(f"{source.name!r} has no load {options.load or ''!r} that has ended; the last are: {known}")
    (load,) = found
    tables = Tables(settings.tables_url, settings.storage_options)
    mine, names = pc.field(LOAD_ID) == load.load_id, [field.name for field in source.contract.fields]
    accepted = tables.read(events_table(source), columns=names, filter=mine)
    columns = ["rules", "source", "position", "record"]
    refused = tables.read(quarantine_table(source), columns=columns, filter=mine).slice(0, EXAMPLES).to_pylist()
    text = load_page(source.contract, {**load.manifest} if load.manifest else {}, load.as_of_us, accepted, refused)
    Path(options.out).write_text(text, encoding="utf-8")
    return f"load {load.load_id} is told of in {options.out}"


def _replay(use_case: UseCase, options: argparse.Namespace) -> str:
    source = _source(use_case, options.dimension)
    settings = Settings.from_environment()
    database = Database(settings.database_url)
    database.create()
    done = replay(
        source,
        tables=Tables(settings.tables_url, settings.storage_options),
        database=database,
        settings=settings,
        clock=open_clock(settings),
        broken=options.rule,
        loads=options.load,
    )
    return json.dumps({**asdict(done), "accepted": done.accepted})


@dataclass(frozen=True)
class _Champion:
    """The version that answers, the contract that it was trained under, if it keeps it, and its view."""

    version: str
    contract: Contract | None
    view: str


def _champion(usecase: str) -> _Champion | None:
    settings = Settings.from_environment()
    database = Database(settings.database_url)
    database.create()
    routing = database.routing(usecase)
    if routing is None:
        return None
    version: str = routing.document["champion"]
    page = load(Registry(settings).download(usecase, version, settings.cache_dir / "models"))
    kept = page.training.get("contract")
    return _Champion(version, None if kept is None else Contract.model_validate(kept), page.view)


def _versions(usecase: str) -> dict[str, list[str]]:
    """The registered versions by the view that they were trained on."""
    found: dict[str, list[str]] = {}
    for version in Registry(Settings.from_environment()).versions(usecase):
        found.setdefault(version.tags.get("view", ""), []).append(version.version)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
