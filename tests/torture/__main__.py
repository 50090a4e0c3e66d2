"""Run campaigns against the package: ``python -m tests.torture [CAMPAIGN ...]``.

Each campaign is a module of this package with ``run(campaign)``. The program prints the counts of each and every
violation, and ends with status 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.campaign import Campaign
from tests.torture.shim import is_preloaded, run_preloaded

CAMPAIGNS = ("calls", "power", "damage", "hostile", "fuzz", "neighbours", "ranks", "soak")
UNDER_SHIM = {"calls", "power"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.splitlines()[0])
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"any of {', '.join(CAMPAIGNS)}; else all")
    parser.add_argument("--share", type=float, default=1.0, help="the part of the cases to run (default: all, 1.0)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the cases of a share")
    parser.add_argument("--match", default="", help="try only kinds of saves whose names contain this text")
    parser.add_argument("--folder", help="where to write; a directory of the system's for temporary files otherwise")
    parser.add_argument("--json", type=Path, help="also write counts and violations to this file")
    options = parser.parse_args()
    unknown = set(options.campaigns) - set(CAMPAIGNS)
    if unknown:
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}; there are {', '.join(CAMPAIGNS)}")
    if UNDER_SHIM & set(options.campaigns or CAMPAIGNS) and not is_preloaded():
        return run_preloaded(["-m", "tests.torture", *sys.argv[1:]])
    record = {}
    for name in options.campaigns or CAMPAIGNS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"torture-{name}-", dir=options.folder) as folder:
            campaign = Campaign(Path(folder).resolve(), options.share, options.seed, options.match)
            importlib.import_module(f"tests.torture.{name}").run(campaign)
        counts = dict(sorted(campaign.counts.items()))
        seconds, cases = time.monotonic() - start, sum(counts.values())
        print(f"{name}: {seconds:.0f} s, {cases} cases, {len(campaign.violations)} violations")
        for kind, number in counts.items():
            print(f"    {number:8,} {kind}")
        for violation in campaign.violations:
            print(violation, flush=True)
        record[name] = {"counts": counts, "violations": campaign.violations}
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1))
    return 1 if any(found["violations"] for found in record.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
