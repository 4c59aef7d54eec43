"""A release policy from a file, as ``tidegate rollout USECASE start VERSION --policy FILE`` reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import usecases
from serving.cli import _policy


def test_the_policy_of_a_page_written_to_a_file_is_the_same(tmp_path: Path) -> None:
    policy = usecases.load("aqua").release
    file = tmp_path / "policy.json"
    file.write_text(policy.model_dump_json())
    assert _policy(file) == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"harm_cap": "many"}', "holds no release policy: harm_cap"),
        ('{"harmcap": 1}', "holds no release policy: harmcap"),
    ],
)
def test_a_file_without_a_policy_is_refused_by_name(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "policy.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        _policy(file)
    assert str(file) in str(refused.value)
