"""Fuzzes one parser, guided by the lines that an input reaches.

    python -m tests.torture.guided PARSER FOLDER NUMBER SEED

A process of its own, because libFuzzer ends its process, and because parsers are instrumented when they are imported.
Inputs that reached new lines are kept in ``FOLDER/corpus``.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import warnings
from pathlib import Path

import atheris

# Far more than any input may take, and less than the machine has.
_ADDRESS_SPACE = 8 << 30
_MAX_INPUT_BYTES = 8192
_HANG_SECONDS = 120


def main(name: str, folder: Path, number: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["dcp_plugins.format", "dcp_plugins.storage.hf_index"]):
        from tests.torture.fuzz import corpus_of
        from tests.torture.mutations import mutated
        from tests.torture.parsers import PARSERS, problem_with
    parser = PARSERS[name]
    samples = parser.samples()
    corpus = folder / "corpus"
    corpus.mkdir()
    for at, sample in enumerate([*samples, *corpus_of(name)]):
        (corpus / f"given-{at}").write_bytes(sample)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    seen: set[str] = set()

    def attempt(data: bytes) -> None:
        problem = problem_with(parser, data)
        # One of each place: the same fault shows in thousands of inputs.
        place = "".join(line for line in problem.splitlines() if line.startswith("  File"))
        if problem and place not in seen:
            seen.add(place)
            with (folder / "problems.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"input": data.hex(), "problem": problem}) + "\n")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        choose = random.Random(seed)
        if choose.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data or samples[0], samples, choose, is_pickle=parser.is_pickle)[:max_size]

    options = {
        "runs": number,
        "seed": seed + 1,
        "max_len": _MAX_INPUT_BYTES,
        "timeout": _HANG_SECONDS,
        "rss_limit_mb": 0,
        "artifact_prefix": f"{folder}/fatal-",
    }
    arguments = [sys.argv[0], *(f"-{option}={value}" for option, value in options.items()), str(corpus)]
    atheris.Setup(arguments, attempt, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
