"""``dcp-plugins bench``: choose cases and places, run them, report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import click
import torch

from dcp_plugins.cli.bench import memory
from dcp_plugins.cli.bench.async_results import AsyncResult
from dcp_plugins.cli.bench.async_saves import measure_async
from dcp_plugins.cli.bench.cases import ALL_CASE_NAMES, ASYNC, STATE_CASES, STATE_DICT, estimate_bytes
from dcp_plugins.cli.bench.fsdp2 import measure_fsdp2
from dcp_plugins.cli.bench.group import group_of_one
from dcp_plugins.cli.bench.limits import Limit
from dcp_plugins.cli.bench.measure import Alone, measure
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.places import Place, choose, require_room
from dcp_plugins.cli.bench.report import async_report, case_report, state_dict_report, targets_report
from dcp_plugins.cli.bench.results import CaseResult, record
from dcp_plugins.cli.bench.runners import make_ours, make_stock, num_limit_threads
from dcp_plugins.cli.bench.state import blank_copy, local_tensors
from dcp_plugins.cli.bench.state_dict import StateDictResult, measure_state_dict
from dcp_plugins.cli.bench.targets import judge
from dcp_plugins.contract import TorchCheckpointException
from dcp_plugins.errors import CheckpointError

__all__ = ["bench"]

_DIRECTORY = click.Path(exists=True, file_okay=False, writable=True, path_type=Path)
_STDOUT = "-"


def _usable_device(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    try:
        torch.empty(0, device=name)
    # Whatever a device's own code raises where it cannot be used.
    except (RuntimeError, AssertionError) as exc:
        raise click.BadParameter(f"cannot use device {name!r} here: {exc}") from exc
    return name


# Click keeps the lines of a paragraph that begins with a backspace.
_HELP = """Measure saves and loads on your storage, beside stock torch and the machine's limit.

\b
CASE is any of these; without one, all of them run:
  big         200 float32 tensors, 1.2 GB
  small       20,000 tensors of 4 KB
  llm         a Llama-like model in bf16 with AdamW state in fp32, 1.4 GB
  fsdp2       a model of 1.2 GB sharded with fully_shard over 2 processes
  memory      the peak memory of a save and a load, beyond the state dict
  async       saves of big, llm and small in the background: what they cost the training loop
  state-dict  getters and setters on 1,000 parameters and AdamW over 2 processes

Without --path every case that writes runs in /dev/shm and on a disk. The limit is os.writev from, and os.preadv into,
the same tensors' memory, with as many threads as we use and the same fsync. Sides take turns; every load is compared
bit for bit with what was saved, and a difference ends the run with an error. Loads are warm (from the page cache).
Ratios are medians over the rounds. Both sides run as they would in a training job: in a process group, and
with Python's garbage collector on. Where there are many small tensors both cost much; --no-group and --no-gc show how
much.
"""


@click.command(help=_HELP)
@click.argument("cases", nargs=-1, type=click.Choice(ALL_CASE_NAMES), metavar="[CASE]...")
@click.option("--path", type=_DIRECTORY, help="Run in this directory only.")
@click.option("--disk", type=_DIRECTORY, help="The directory on disk [default: the system's temporary directory].")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Timed rounds.")
@click.option("--json", "json_file", metavar="FILE", help="Also write a machine-readable record; '-' is stdout.")
@click.option("--threads", type=click.IntRange(min=1), help="Our writer threads, and the limit's [default: ours].")
@click.option("--stock-threads", type=click.IntRange(min=1), help="Stock torch's writer threads [default: its own].")
@click.option(
    "--ranks", type=click.IntRange(min=2), default=2, show_default=True, help="Processes of cases fsdp2 and state-dict."
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor on the size of every case.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    callback=_usable_device,
    help="Where the case async has its state and trains, such as cuda or cuda:1.",
)
@click.option("--no-sync", is_flag=True, help="Do not make files durable in the timed part, on any side.")
@click.option("--no-gc", is_flag=True, help="Switch Python's garbage collector off in the timed part.")
@click.option("--no-group", is_flag=True, help="Run the cases of one process without a process group.")
@click.option("--targets", is_flag=True, help="End with the project's targets beside what was measured.")
def bench(
    *,
    cases: tuple[str, ...],
    path: Path | None,
    disk: Path | None,
    repeat: int,
    json_file: str | None,
    threads: int | None,
    stock_threads: int | None,
    ranks: int,
    scale: float,
    device: str,
    no_sync: bool,
    no_gc: bool,
    no_group: bool,
    targets: bool,
) -> None:
    """Run the benchmark; what it does is in the help text, for the user."""
    if path is not None and disk is not None:
        raise click.UsageError("--path and --disk exclude each other: --path names the only directory to run in")
    options = Options(
        num_rounds=repeat,
        scale=scale,
        sync=not no_sync,
        num_threads=threads,
        num_stock_threads=stock_threads,
        num_ranks=ranks,
        device=device,
        collect_garbage=not no_gc,
        use_group=not no_group,
    )
    # Each case once, in the order given.
    names = tuple(dict.fromkeys(cases)) or ALL_CASE_NAMES
    if "memory" in names and not memory.is_supported():
        raise click.UsageError("case 'memory' reads /proc/self and so needs Linux; name the other cases instead")
    saving = [name for name in names if name != STATE_DICT]
    places = choose(path, disk) if saving else []
    for place in places:
        for name in saving:
            require_room(place, name, estimate_bytes(name, scale), ranks if name == "fsdp2" else 1)
    to_stdout = json_file == _STDOUT
    results: list[AsyncResult | CaseResult | StateDictResult] = []
    # Whoever asks for JSON on stdout gets nothing else there.
    for name in names:
        if name == STATE_DICT:
            _progress(STATE_DICT)
            state_dicts = measure_state_dict(options)
            results.append(state_dicts)
            click.echo(state_dict_report(state_dicts), err=to_stdout)
            continue
        for place in places:
            if name == ASYNC:
                for found in _run_async(place, options):
                    results.append(found)
                    click.echo(async_report(found), err=to_stdout)
                continue
            result = _run(name, place, options)
            results.append(result)
            click.echo(case_report(result), err=to_stdout)
    if targets:
        click.echo(targets_report(judge(results), scale=scale), err=to_stdout)
    if json_file is not None:
        _write_json(json_file, json.dumps(record(options, results), indent=2))


def _run(name: str, place: Place, options: Options) -> CaseResult:
    _progress(f"{name} in {place.path} ({place.fs_type})")
    try:
        with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=place.path) as folder:
            directory = Path(folder)
            if name == "fsdp2":
                return measure_fsdp2(options, place, directory)
            if name == "memory":
                return _run_memory(place, options, directory)
            return _run_state_case(name, place, options, directory)
    except (CheckpointError, TorchCheckpointException, OSError) as exc:
        raise click.ClickException(f"case '{name}' failed in {place.path}: {exc}") from exc


def _run_async(place: Place, options: Options) -> Iterator[AsyncResult]:
    _progress(f"{ASYNC} in {place.path} ({place.fs_type})")
    with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=place.path) as folder:
        yield from measure_async(options, place, Path(folder), lambda line: _progress(f"  {line}"))


def _run_state_case(name: str, place: Place, options: Options, directory: Path) -> CaseResult:
    _progress(f"  building {STATE_CASES[name].summary}")
    state = STATE_CASES[name].build(options.scale)
    target = blank_copy(state)
    tensors = local_tensors(state)
    num_threads = num_limit_threads(options, tensors)
    limit = Limit(tensors, local_tensors(target), num_threads=num_threads, sync=options.sync)
    with group_of_one() if options.use_group else nullcontext():
        seconds = measure(
            state,
            target,
            [make(options, no_dist=not options.use_group) for make in (make_ours, make_stock)],
            limit,
            directory,
            num_rounds=options.num_rounds,
            collect_garbage=options.collect_garbage,
            flush=options.sync and not place.in_memory,
            together=Alone(),
            progress=lambda line: _progress(f"  {line}"),
        )
    return CaseResult(
        case=name,
        place=place,
        sync=options.sync,
        num_ranks=1,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        num_limit_threads=num_threads,
        seconds=seconds,
    )


def _run_memory(place: Place, options: Options, directory: Path) -> CaseResult:
    peaks = memory.measure_peaks(options, directory, lambda line: _progress(f"  {line}"))
    # The tensors live in the processes that measure: their number is known, their bytes by the case's arithmetic.
    return CaseResult(
        case="memory",
        place=place,
        sync=options.sync,
        num_ranks=1,
        num_tensors=200,
        num_bytes=estimate_bytes("memory", options.scale),
        peak_bytes=peaks,
    )


def _write_json(json_file: str, text: str) -> None:
    if json_file == _STDOUT:
        click.echo(text)
        return
    try:
        Path(json_file).write_text(text + "\n")
    except OSError as exc:
        raise click.FileError(json_file, hint=str(exc)) from exc


def _progress(line: str) -> None:
    click.echo(line, err=True)
