"""All kinds of saves that the campaigns on system calls interrupt."""

from __future__ import annotations

from tests.torture.adapter_saves import ADAPTERS
from tests.torture.campaign import Campaign
from tests.torture.engine_saves import ENGINE, STOCK
from tests.torture.scenario import Scenario

__all__ = ["chosen", "modules_of"]

_SMALL_SHARE = 0.1


def chosen(campaign: Campaign) -> list[Scenario]:
    """Return the kinds of saves that a campaign tries; stock torch's only if asked for by its name."""
    scenarios = (*ENGINE, *ADAPTERS)
    if campaign.match == STOCK.name:
        return [STOCK]
    if campaign.match:
        return [scenario for scenario in scenarios if campaign.match in scenario.name]
    return [scenario for scenario in scenarios if campaign.share >= _SMALL_SHARE or not scenario.is_slow]


def modules_of(scenarios: list[Scenario]) -> set[str]:
    """Return what ranks are to have imported before they are forked."""
    return {"tests.torture.scenarios"}.union(*(scenario.modules for scenario in scenarios))
