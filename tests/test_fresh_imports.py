"""What an interpreter has that imports this package alone; one interpreter, started once, answers for all tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.test_architecture import FRAMEWORKS
from tests.test_exported_names import MODULES

# Torch is imported first: our import must not add to what is compared. Children are forked where one import would hide
# what another one does.
PROGRAM = """
import json, os, sys
import torch.distributed.checkpoint as theirs
frameworks, modules = json.loads(sys.argv[1])
names = [name for name in dir(theirs) if not name.startswith("_") or name == "_extension"]
assert {"planner_helpers", "state_dict_saver", "utils", "save"} <= set(names), names
import dcp_plugins as ours
found = {"unlisted": [name for name in names if name not in dir(ours)]}
found["frameworks"] = [name for name in frameworks if name in sys.modules]
found["before"] = "dcp_plugins.state_dict" in sys.modules

def in_child(call):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(call()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read())
    os.wait()
    return answer

def refusal(adapter, framework):
    sys.modules[framework] = None
    try:
        __import__(f"dcp_plugins.{adapter}")
    except ImportError as exc:
        return [type(exc).__name__, str(exc)]

found["modules"] = [in_child(lambda: getattr(ours, name).__name__) for name in modules]
adapters = {"lightning": "lightning", "accelerate": "accelerate", "transformers": "accelerate"}
found["refusals"] = {name: in_child(lambda: refusal(name, framework)) for name, framework in adapters.items()}
ours.state_dict
found["after"] = "dcp_plugins.state_dict" in sys.modules
found["missing"] = [name for name in names if not hasattr(ours, name)]
print(json.dumps(found))
"""
ATTRIBUTES = [*MODULES, "protocol", "_extension"]


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, json.dumps([FRAMEWORKS, ATTRIBUTES])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_attribute_of_torchs_package_is_one_of_ours_after_the_import_alone(fresh: dict[str, Any]) -> None:
    assert (fresh["unlisted"], fresh["missing"]) == ([], [])


def test_each_submodule_is_an_attribute_after_the_import_of_the_package_alone(fresh: dict[str, Any]) -> None:
    assert fresh["modules"] == [f"dcp_plugins.{name}" for name in ATTRIBUTES]


def test_a_submodule_that_takes_long_is_imported_when_it_is_asked_for(fresh: dict[str, Any]) -> None:
    assert (fresh["before"], fresh["after"]) == (False, True)


def test_importing_the_package_imports_no_framework(fresh: dict[str, Any]) -> None:
    assert fresh["frameworks"] == []


@pytest.mark.parametrize("adapter", ["lightning", "accelerate", "transformers"])
def test_without_the_framework_the_import_names_the_extra_to_install(fresh: dict[str, Any], adapter: str) -> None:
    kind, message = fresh["refusals"][adapter]
    assert kind == "MissingExtraError"
    assert f"pip install 'dcp_plugins[{adapter}]'" in message
