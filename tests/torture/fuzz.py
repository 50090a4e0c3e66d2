"""Each parser is given inputs that were made from real files: it returns, or raises an error of the package.

The corpus beside this module holds inputs that together run through all lines that any input has reached; they are
tried first. Then inputs are changed at random. A part of them is guided by the lines that inputs reach, if atheris is
installed and the share is not too small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from tests.torture.campaign import Campaign
from tests.torture.children import run_in_children
from tests.torture.mutations import mutated
from tests.torture.parsers import PARSERS, problem_with

_CORPUS = Path(__file__).parent / "corpus"

_INPUTS = 1_100_000
_BATCH = 200
# The parsers are slower when they are instrumented, and it takes seconds for each of them.
_GUIDED = 0.1
_GUIDED_SHARE = 0.05


def run(campaign: Campaign) -> None:
    warnings.simplefilter("ignore")
    names = [name for name in PARSERS if campaign.match in name]
    number = campaign.number(_INPUTS // len(PARSERS))
    _replay(campaign, names)
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: all inputs are changed at random: atheris, which would guide some of them, is not installed")
    elif campaign.share >= _GUIDED_SHARE:
        _guided(campaign, names, round(number * _GUIDED))
    _random(campaign, names, number)


def corpus_of(name: str) -> list[bytes]:
    """Return the kept inputs of a parser."""
    return [path.read_bytes() for path in sorted((_CORPUS / name).glob("*"))]


def _replay(campaign: Campaign, names: list[str]) -> None:
    cases = [(name, data) for name in names for data in corpus_of(name)]
    for (name, data), problem in run_in_children(cases, lambda folder: None, _try, campaign.folder / "replay"):
        with campaign.case(f"kept inputs of {name}", data.hex()):
            assert not problem, problem


def _try(_: object, case: tuple[str, bytes]) -> None:
    name, data = case
    problem = problem_with(PARSERS[name], data)
    assert not problem, f"{name}, input {data.hex()[:20_000]}: {problem}"


def _random(campaign: Campaign, names: list[str], number: int) -> None:
    batches = [(name, f"{campaign.seed} {at}") for at in range(-(-number // _BATCH)) for name in names]
    for (name, seed), problem in run_in_children(batches, lambda folder: {}, _try_batch, campaign.folder / "random"):
        campaign.counts[f"inputs of {name}"] += _BATCH - 1
        with campaign.case(f"inputs of {name}", f"batch {seed}"):
            assert not problem, problem


def _try_batch(samples: dict[str, list[bytes]], batch: tuple[str, str]) -> None:
    name, seed = batch
    if name not in samples:
        samples[name] = [*PARSERS[name].samples(), *corpus_of(name)]
    choose = random.Random(f"{seed} {name}")
    for _ in range(_BATCH):
        data = choose.choice(samples[name])
        _try(None, (name, mutated(data, samples[name], choose, is_pickle=PARSERS[name].is_pickle)))


def _guided(campaign: Campaign, names: list[str], number: int) -> None:
    left = list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while left or running:
        while left and len(running) < (os.cpu_count() or 1):
            name = left.pop(0)
            running[name] = _start(campaign, name, number)
        name = next(iter(running))
        running.pop(name).wait()
        campaign.counts[f"guided inputs of {name}"] += number
        for title, problem in _problems(campaign.folder / name):
            with campaign.case("broken promises", f"{name}, {title}"):
                raise AssertionError(problem)


def _start(campaign: Campaign, name: str, number: int) -> subprocess.Popen[bytes]:
    folder = campaign.folder / name
    folder.mkdir()
    command = [sys.executable, "-m", "tests.torture.guided", name, str(folder), str(number), str(campaign.seed)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _problems(folder: Path) -> Iterator[tuple[str, str]]:
    """Return what a run has found: inputs that broke a promise, and those that ended it."""
    found = folder / "problems.jsonl"
    for line in found.read_text(encoding="utf-8").splitlines() if found.exists() else ():
        record = json.loads(line)
        yield f"input {record['input'][:20_000]}", record["problem"]
    fatal = sorted(folder.glob("fatal-*"))
    for path in fatal:
        yield f"{path.name}, input {path.read_bytes().hex()[:20_000]}", "the interpreter crashed, or the input hung"
    log = (folder / "log").read_text(errors="replace")
    if not fatal and "DONE" not in log:
        yield "all", f"the fuzzer did not finish:\n{log[-4000:]}"
