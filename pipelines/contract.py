"""``tidegate contract``: shows the contract of a page, tells what a change of it breaks, checks it beforehand, tells of
a load on one HTML page, and sends quarantined rows through it again.

A contract is named by its use case, as ``USECASE.DIMENSION`` where it is that of a dimension, or by a file: one that
``tidegate contract show`` has written, or a document of the Open Data Contract Standard (``.yaml``, ``.yml``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
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
from pipelines.contracts.events import LOAD_ID, contract_schema
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


_NAMED = "a use case, USECASE.DIMENSION, or a file"


class NoContract(ValueError):
    """There is no such contract; the message says what was looked for and where."""


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> int:
    """The command; 1 when a check fails."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="the contract of a page as JSON")
    show.add_argument("usecase", help=_NAMED)
    show.add_argument("--odcs", action="store_true", help="as a document of the Open Data Contract Standard")
    told = actions.add_parser("diff", help="what changes from one contract to another, and whom that breaks")
    told.add_argument("old", help=_NAMED)
    told.add_argument("new", help=_NAMED)
    check = actions.add_parser("check", help="fail on a change that needs another version, or breaks the champion")
    check.add_argument("usecase")
    check.add_argument("--against", help="a file (default: the contract that the champion was trained under)")
    check.add_argument("--dimension", help="the contract of this dimension alone, instead of those of the whole page")
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
                lines, fine = checked(_use_case(options.usecase), options.against, options.dimension)
    except (NoContract, *_AWAY) as error:
        sys.stderr.write(f"tidegate: {error}\n")
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0 if fine else 1


def read_contract(name: str) -> Contract:
    """The contract of a use case, of one of its dimensions, or of a file; raises ``NoContract``."""
    if (place := _contracts().get(name)) is not None:
        return place.contract
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(_contracts())
        raise NoContract(
            f"{name!r} is no use case or dimension ({known}), nor a file that can be read: {error}"
        ) from error
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
    known = _contracts()
    named = [known[name] for name in (old, new) if name in known]
    found = named or [place for place in known.values() if place.contract.name in (before.name, after.name)]
    if not found:
        lines.append(f"no page has a contract {after.name!r}: which views and versions it reaches cannot be told")
    for place in found[:1]:
        page = place.use_case.name
        uses = affected(changes, lineage(place.use_case, place.dimension))
        versions = _versions(page) if uses else {}
        for use in uses:
            trained = ", ".join(versions.get(use.view, ())) or "none"
            reached = f"{use.field} → {', '.join(use.columns)}"
            lines.append(f"view {use.name} ({use.view}), model versions {trained}: {reached}")
    return lines


@dataclass(frozen=True)
class _Place:
    """Where a contract is: on a page, as that of its events or of one of its dimensions."""

    use_case: UseCase
    dimension: str | None
    contract: Contract


def _contracts() -> dict[str, _Place]:
    """Every contract of every page, by the name of its source."""
    found = {}
    for name in usecases.names():
        page = usecases.load(name)
        found[name] = _Place(page, None, page.contract)
        for part in page.dimensions:
            found[page.source(part).name] = _Place(page, part.name, part.contract)
    return found


def checked(use_case: UseCase, against: str | None, dimension: str | None = None) -> tuple[list[str], bool]:
    """What is wrong with the contracts of a page, or with that of one ``dimension``, after those of its champion, and
    whether nothing is: one needs another version, or a breaking change reaches the view that the champion answers from.
    ``against`` is a contract that takes the place of the champion's; then the page's own one is checked alone, unless
    ``dimension`` says otherwise.
    """
    champion = _champion(use_case.name)
    if against is not None or dimension is not None:
        return _checked(use_case, against, dimension, champion)
    lines, fine = _checked(use_case, None, None, champion)
    trained = None if champion is None else champion.dimensions
    for name in (part.name for part in use_case.view.dimensions):
        if trained is None:
            lines.append(f"{name}: the champion keeps no contract of it, so it was not checked")
        elif name in trained:
            said, well = _checked(use_case, None, name, champion)
            lines, fine = lines + said, fine and well
    return lines, fine


def _checked(
    use_case: UseCase, against: str | None, dimension: str | None, champion: _Champion | None
) -> tuple[list[str], bool]:
    source = _source(use_case, dimension)
    if against is not None:
        before = read_contract(against)
    elif champion is None:
        raise NoContract(f"{use_case.name!r} has no champion yet to check against: give --against FILE")
    elif (kept := champion.contract if dimension is None else (champion.dimensions or {}).get(dimension)) is None:
        of = "" if dimension is None else f" of {dimension!r}"
        raise NoContract(f"version {champion.version}, the champion, keeps no contract{of}: give --against FILE")
    else:
        before = kept
    new, changes = source.contract, diff(before, source.contract)
    required = required_version(before.version, changes)
    lines: list[str] = []
    if not enough(new.version, required):
        breaking = [change for change in changes if change.breaking] or list(changes)
        lines.append(f"version {new.version} must be at least {required}, for {len(changes)} changes:")
        lines += [f"  {change}" for change in breaking]
    lines += _columns_kept(source)
    if champion is not None and champion.view not in pages(use_case):
        lines.append(
            f"the page no longer has view {champion.view}, which version {champion.version}, the champion, answers "
            "from: a view is another one when its fields, entity, time or lateness change"
        )
    elif champion is not None:
        for use in affected(changes, lineage(use_case, dimension)):
            if use.view == champion.view:
                reached = f"{use.field} → {', '.join(use.columns)}"
                lines.append(f"it would break the champion, version {champion.version}: {reached}")
    fine = not lines
    said = f"{source.name}: {len(changes)} changes after version {before.version}, and nothing that breaks unsaid"
    return ([said] if fine else lines), fine


def _columns_kept(source: EventSource) -> list[str]:
    """The columns of the table of events whose type is not the contract's: no row could be added to it."""
    settings = Settings.from_environment()
    tables, name = Tables(settings.tables_url, settings.storage_options), events_table(source)
    if not tables.exists(name):
        return []
    held = tables.schema(name)
    wanted = [field for field in contract_schema(source.contract) if field.name in held.names]
    return [
        f"table {name} keeps {field.name} as {held.field(field.name).type}, and the contract has it as {field.type}: "
        "no row could be added; give the field another name"
        for field in wanted
        if held.field(field.name).type != field.type
    ]


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
    held = set(tables.schema(events_table(source)).names)
    accepted = tables.read(events_table(source), columns=[name for name in names if name in held], filter=mine)
    for field in contract_schema(source.contract):
        if field.name not in held:  # it came into the contract since the last load
            accepted = accepted.append_column(field, pa.nulls(accepted.num_rows, field.type))
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
    """The version that answers, the contracts that it was trained under, if it keeps them, and its view."""

    version: str
    contract: Contract | None
    dimensions: dict[str, Contract] | None
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
    kept, parts = page.training.get("contract"), page.training.get("dimensions")
    return _Champion(
        version,
        None if kept is None else Contract.model_validate(kept),
        None if parts is None else {name: Contract.model_validate(part) for name, part in parts.items()},
        page.view,
    )


def _versions(usecase: str) -> dict[str, list[str]]:
    """The registered versions by the view that they were trained on."""
    found: dict[str, list[str]] = {}
    for version in Registry(Settings.from_environment()).versions(usecase):
        found.setdefault(version.tags.get("view", ""), []).append(version.version)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
