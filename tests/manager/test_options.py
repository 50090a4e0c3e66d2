"""Options are checked when they are made, and a configuration's mistakes are named with the place they stand in."""

from __future__ import annotations

import pytest

from dcp_plugins.manager import SaveOptions, StepNames


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({"asynchronous": "yes"}, ValueError, "asynchronous must be one of off, process, thread"),
        ({"asynchronous": True}, ValueError, "got True"),
        ({"thread_count": 0}, ValueError, "thread_count must be at least 1"),
        ({"thread_count": "2"}, TypeError, "thread_count must be a number"),
        ({"sync_files": "no"}, TypeError, "sync_files must be true or false"),
        ({"async": "thread", "sync": 1}, ValueError, "unknown option(s) async, sync. Valid names: asynchronous"),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_place(mapping: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SaveOptions.from_mapping(mapping, where="cfg.yaml: dcp")
    assert str(caught.value).startswith("cfg.yaml: dcp: ")
    assert message in str(caught.value)


def test_what_a_mapping_does_not_name_has_its_default() -> None:
    assert SaveOptions.from_mapping({"asynchronous": "thread"}, where="here") == SaveOptions(asynchronous="thread")


def test_names_are_steps_only_if_they_are_spelt_as_saves_spell_them() -> None:
    names = StepNames("checkpoint-")
    assert names.name(40) == "checkpoint-40"
    assert names.step_of("checkpoint-40") == 40
    for other in (
        "checkpoint-",
        "checkpoint-040",
        "checkpoint--4",
        "checkpoint-4.tmp",
        "xcheckpoint-4",
        "checkpoint-٤",
    ):
        assert names.step_of(other) is None, other
    for wrong in ("", "a/b", "v2"):
        with pytest.raises(ValueError, match="prefix must be"):
            StepNames(wrong)
    with pytest.raises(ValueError, match="must not be negative"):
        names.name(-1)
