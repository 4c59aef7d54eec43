"""``tidegate contract`` on real pages, files and a registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datacontract.data_contract import DataContract

from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import contract as command
from pipelines import usecases
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.contracts.odcs import to_odcs
from pipelines.features.windows import pages
from pipelines.spec import Contract, Field, FieldType, UseCase
from pipelines.training.artifact import load, write_page
from pipelines.training.registry import Registry
from serving import routing
from serving.cli import main as tidegate
from tests.data.profiles import made_case
from tests.data.test_evolution import OLD
from tests.model.test_artifact import make

AQUA = usecases.load("aqua")


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path / "home"))
    return Settings.from_environment()


def write(path: Path, **changes: Any) -> str:
    """A file with the contract of aqua, its top level changed; ``inflow`` changes that field."""
    document = json.loads(AQUA.contract.model_dump_json())
    for field in document["fields"]:
        if field["name"] == "inflow":
            field.update(changes.pop("inflow", {}))
    path.write_text(json.dumps({**document, **changes}))
    return str(path)


def champion(settings: Settings, folder: Path, training: dict[str, Any], page: UseCase = AQUA) -> str:
    """A champion of a page's view that was trained under what ``training`` says."""
    make(folder)
    changes = {"use_case": page.name, "view": next(iter(pages(page))), "training": training}
    write_page(folder, load(folder).model_copy(update=changes))
    version = Registry(settings).register(folder, gates={}, gates_passed=True, params={}, metrics={}).version
    database = Database(settings.database_url)
    database.create()
    routing.publish(database, page.name, None, {"champion": version})
    return version


def test_a_document_of_the_standard_is_read_like_any_other_file_and_its_linter_takes_it(
    settings, tmp_path, capsys
) -> None:
    for name in usecases.names():
        assert tidegate(["contract", "show", name, "--odcs"]) == 0
        path = tmp_path / f"{name}.odcs.yaml"
        path.write_text(capsys.readouterr().out)
        assert command.read_contract(str(path)) == usecases.load(name).contract
        assert DataContract(data_contract_file=str(path)).lint().has_passed()
        assert tidegate(["contract", "show", str(path)]) == 0
        assert Contract.model_validate_json(capsys.readouterr().out) == usecases.load(name).contract
    every = tmp_path / "every.odcs.yaml"
    every.write_text(to_odcs(OLD))
    assert DataContract(data_contract_file=str(every)).lint().has_passed()
    path.write_text(path.read_text().replace("logicalType: number", "logicalType: numbers"))
    assert not DataContract(data_contract_file=str(path)).lint().has_passed()
    assert tidegate(["contract", "diff", str(path), name]) == 1
    assert "is of logical type 'numbers'" in capsys.readouterr().err


def test_show_writes_what_diff_reads_as_the_same(settings, tmp_path, capsys) -> None:
    assert tidegate(["contract", "show", "aqua"]) == 0
    path = tmp_path / "shown.json"
    path.write_text(capsys.readouterr().out)
    assert command.read_contract(str(path)) == AQUA.contract
    assert tidegate(["contract", "diff", str(path), "aqua"]) == 0
    version = AQUA.contract.version
    told = f"0 changes: after {version} comes at least {version}; it is {version}\n"
    assert capsys.readouterr().out == told


def test_diff_names_changes_views_and_versions(settings, tmp_path, capsys) -> None:
    version = champion(settings, tmp_path / "artifact", {})
    old = write(tmp_path / "old.json", inflow={"maximum": 900.0}, owner="others")
    assert tidegate(["contract", "diff", old, "aqua"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("owner changed (others → ")
    assert said[1].startswith("inflow: maximum lowered (900.0 → ")
    assert said[2] == "2 changes: after 1.1.0 comes at least 2.0.0; it is 1.1.0"
    (view,) = said[3:]
    assert f"model versions {version}: inflow → inflow_last_1d" in view
    assert view.endswith("target inflow")


def test_check_fails_without_a_major_version_and_where_it_breaks_the_champion(settings, tmp_path, capsys) -> None:
    before = json.loads(Path(write(tmp_path / "old.json", inflow={"maximum": 900.0})).read_text())
    version = champion(settings, tmp_path / "artifact", {"contract": before})
    assert tidegate(["contract", "check", "aqua"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "version 1.1.0 must be at least 2.0.0, for 1 changes:"
    assert said[1].startswith("  inflow: maximum lowered")
    assert said[2].startswith(f"it would break the champion, version {version}: inflow → ")
    unused = write(tmp_path / "unused.json", owner="others", version="0.9.0")
    assert tidegate(["contract", "check", "aqua", "--against", unused]) == 0
    assert capsys.readouterr().out == "aqua: 1 changes after version 0.9.0, and nothing that breaks unsaid\n"


def test_check_fails_where_the_view_of_the_champion_is_no_longer_on_the_page(settings, tmp_path, capsys) -> None:
    version = champion(settings, tmp_path / "artifact", {"contract": json.loads(AQUA.contract.model_dump_json())})
    later = AQUA.contract.model_copy(update={"future": AQUA.contract.lateness, "version": "2.0.0"})
    lines, fine = command.checked(AQUA.model_copy(update={"contract": later}), None)
    assert not fine
    assert f"which version {version}, the champion, answers from" in lines[-1]
    assert command.checked(AQUA, None)[1]


def test_check_fails_where_the_table_keeps_a_column_as_another_type(settings, tmp_path, capsys) -> None:
    tables = Tables(settings.tables_url)
    tables.ensure("aqua/events", events_schema(AQUA.contract), [BUCKET])
    champion(settings, tmp_path / "artifact", {"contract": json.loads(AQUA.contract.model_dump_json())})
    fields = tuple(
        Field(name="holiday", type=FieldType.STRING) if field.name == "holiday" else field
        for field in AQUA.contract.fields
    )
    unused = AQUA.contract.model_copy(update={"fields": fields, "version": "2.0.0"})
    lines, fine = command.checked(AQUA.model_copy(update={"contract": unused}), None)
    assert not fine
    assert (
        "table aqua/events keeps holiday as bool, and the contract has it as string: no row could be added" in lines[0]
    )


def test_two_files_are_compared_with_the_page_that_has_their_contract(settings, tmp_path, capsys) -> None:
    old, new = write(tmp_path / "a.json", inflow={"maximum": 900.0}), write(tmp_path / "b.json")
    assert tidegate(["contract", "diff", old, new]) == 0
    assert "inflow → inflow_last_1d" in capsys.readouterr().out
    old, new = (write(tmp_path / f"{n}.json", name="others") for n in "cd")
    assert tidegate(["contract", "diff", old, new]) == 0
    assert "no page has a contract 'others'" in capsys.readouterr().out


@pytest.fixture
def metered(monkeypatch) -> UseCase:
    """A page with two dimensions, known by name beside the others."""
    page = made_case()
    load_others, known = usecases.load, usecases.names()
    monkeypatch.setattr(usecases, "names", lambda: [*known, page.name])
    monkeypatch.setattr(usecases, "load", lambda name: page if name == page.name else load_others(name))
    return page


def test_a_dimension_s_contract_is_shown_compared_and_checked_like_any_other(
    settings, tmp_path, metered, monkeypatch, capsys
) -> None:
    name = f"{metered.name}.profile"
    assert tidegate(["contract", "show", name]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "profiles"
    for field in shown["fields"]:
        field.update({"minimum": -1.0} if field["name"] == "people" else {})
    old = tmp_path / f"{metered.name}.json"  # which is no dimension
    old.write_text(json.dumps(shown))
    assert tidegate(["contract", "diff", str(old), name]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("people: minimum raised (-1.0 → 0.0): breaks writers")
    assert said[2].endswith("model versions none: people → profile_people")
    training = {"contract": metered.contract.model_dump(mode="json"), "dimensions": {"profile": shown}}
    version = champion(settings, tmp_path / "artifact", training, metered)
    assert tidegate(["contract", "check", metered.name]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{metered.name}: 0 changes after version ")
    assert said[1] == "version 1.0.0 must be at least 2.0.0, for 1 changes:"
    assert said[3] == f"it would break the champion, version {version}: people → profile_people"
    assert tidegate(["contract", "check", metered.name, "--dimension", "profile"]) == 1
    assert capsys.readouterr().out.splitlines() == said[1:]
    assert tidegate(["contract", "check", metered.name, "--dimension", "kind"]) == 1
    assert "keeps no contract of 'kind'" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert command.read_contract(old.name).field("people").minimum == -1, "a file of that name is a file"


def test_a_champion_from_before_dimensions_were_kept_says_what_was_not_checked(
    settings, tmp_path, metered, capsys
) -> None:
    champion(settings, tmp_path / "artifact", {"contract": metered.contract.model_dump(mode="json")}, metered)
    assert tidegate(["contract", "check", metered.name]) == 0
    assert "profile: the champion keeps no contract of it, so it was not checked" in capsys.readouterr().out


def test_help_and_what_is_away_are_told_in_a_line(settings, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        tidegate(["contract", "--help"])
    assert ended.value.code == 0
    assert "usage: tidegate contract" in capsys.readouterr().out
    assert tidegate(["contract", "show", "nope"]) == 1
    assert "nope" in capsys.readouterr().err
    monkeypatch.setenv("TIDEGATE_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    assert tidegate(["contract", "check", "aqua"]) == 1
    assert capsys.readouterr().err.startswith("tidegate: ")


def test_a_change_of_words_needs_a_patch(settings, tmp_path, capsys) -> None:
    old = write(tmp_path / "old.json", owner="others")
    assert tidegate(["contract", "check", "aqua", "--against", old]) == 1
    assert "must be at least 1.1.1" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(settings, tmp_path, capsys) -> None:
    for arguments, told in (
        (["check", "aqua"], "has no champion yet to check against"),
        (["diff", str(tmp_path / "none.json"), "aqua"], "is no use case or dimension (aqua, prop), nor a file"),
    ):
        assert tidegate(["contract", *arguments]) == 1
        assert told in capsys.readouterr().err
    path = tmp_path / "odd.json"
    for text, told in (("{", "Invalid JSON"), ('{"name": "x"}', "version: Field required"), ("[]", "it: Input should")):
        path.write_text(text)
        assert tidegate(["contract", "diff", str(path), "aqua"]) == 1
        assert f"{path} holds no contract" in (said := capsys.readouterr().err)
        assert told in said
    version = champion(settings, tmp_path / "artifact", {})
    assert tidegate(["contract", "check", "aqua"]) == 1
    assert f"version {version}, the champion, keeps no contract" in capsys.readouterr().err
