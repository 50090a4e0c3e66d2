"""A loss of power at every call of a save, with every kind of choice of what the disk has kept.

What must hold: a load gives the checkpoint before or the new one, the new one when the save had returned, and the next
save succeeds and leaves no litter.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from dcp_plugins.testing.ranks import preload, run_ranks
from tests.torture.calls import NEW, NEXT, Trials
from tests.torture.campaign import Campaign
from tests.torture.disk import Choice
from tests.torture.scenario import Scenario, aftermath
from tests.torture.scenarios import chosen, modules_of
from tests.torture.shim import Shim

_RANDOM_STATES = 3
_WRITES = ("all", "none", "half", "zeros", "some")


def run(campaign: Campaign) -> None:
    shim = Shim()
    preload(*modules_of(chosen(campaign)))
    for scenario, overwrites in itertools.product(chosen(campaign), (False, True)):
        with campaign.case("kinds of saves", f"{scenario.name}, overwrites={overwrites}"):
            _lose_power(campaign, Trials(campaign, shim, scenario, overwrites=overwrites))


def _choices(campaign: Campaign) -> Iterator[Choice]:
    """Yield ways in which a disk keeps what was not synced."""
    chance = campaign.random
    for names, change in (("no names", False), ("all names", True)):
        for write in _WRITES:
            yield Choice(f"{names}, {write} data", lambda change=change: change, lambda write=write: write, chance)
    for number in range(_RANDOM_STATES):
        yield Choice(
            f"some names, number {number}", lambda: chance.random() < 0.5, lambda: chance.choice(_WRITES), chance
        )


def _lose_power(campaign: Campaign, trials: Trials) -> None:
    disk, calls = trials.recorded()
    states = [(number, choice) for number in range(len(calls) + 1) for choice in _choices(campaign)]
    wanted: dict[int, list[Choice]] = {}
    for number, choice in campaign.pick(states):
        wanted.setdefault(number, []).append(choice)
    for number in range(len(calls) + 1):
        for choice in wanted.get(number, []):
            folder = trials.folder / f"power {number}"
            folder.mkdir(parents=True)
            disk.write(choice, folder)
            name = f"{trials.name}, after {number} of {len(calls)} calls, {choice.name}"
            with campaign.case("losses of power", name):
                _check(trials.scenario, folder / "c", {NEW} if number == len(calls) else trials.allowed)
            shutil.rmtree(folder)
        if number < len(calls):
            disk.apply(calls[number])


def _check(scenario: Scenario, folder: Path, allowed: set[int | None]) -> None:
    held = run_ranks(scenario.ranks, aftermath, scenario, folder, NEXT)
    assert set(held) <= allowed, f"a load gave {held}, expected one of {allowed}"
    assert scenario.apart or len(set(held)) == 1, f"ranks hold {held}"
