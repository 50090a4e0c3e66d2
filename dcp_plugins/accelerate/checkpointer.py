"""`Checkpointer`: ``save_state`` and ``load_state`` of one accelerator."""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.accelerate import layout
from dcp_plugins.accelerate.collect import (
    check_files,
    diverging_in,
    is_fsdp,
    optimizers_of,
    owner_of,
    restore_files,
    state_of,
    wanted_of,
    weights_of,
)
from dcp_plugins.accelerate.plugin import DCPPlugin
from dcp_plugins.accelerate.retention import follow_commit
from dcp_plugins.accelerate.stock import load_stock_model, load_stock_optimizer
from dcp_plugins.coord import naming_absent
from dcp_plugins.errors import CheckpointNotFoundError, listing
from dcp_plugins.format.trust import check_safe_globals
from dcp_plugins.manager import Saver, load_state, unwrapped_plan_errors
from dcp_plugins.manager.agreement import deciding_ranks, on_rank_zero
from dcp_plugins.manager.record import RECORD_KEY, record_item
from dcp_plugins.manager.saver import renormed_weights
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.plan.unloadable import loaded_with
from dcp_plugins.state_dict import StateDictOptions, set_model_state_dict
from dcp_plugins.state_dict.owned import restore_optimizer_state
from dcp_plugins.storage.parts import PartsWriter
from dcp_plugins.templates import only_as_asked
from dcp_plugins.user_warnings import warn_user

__all__ = ["Checkpointer"]

_ADVICE = "Call it on every process: take it out of conditions such as `if accelerator.is_main_process`"

_PathLike = str | os.PathLike[str]
_Answer = TypeVar("_Answer")


class Checkpointer:
    """Saves and loads everything that one accelerator was given; its methods are called on every process together."""

    def __init__(self, accelerator: Accelerator, plugin: DCPPlugin) -> None:
        # Weak, because the accelerator refers to this object: in a reference cycle, `del accelerator` would not free
        # the model until the collector runs.
        self._reference = weakref.ref(accelerator)
        self._is_alone = accelerator.num_processes == 1
        self.plugin = plugin
        self._saver = Saver(plugin, no_dist=self._is_alone)
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._calls = 0
        self._last_begun = time.monotonic()

    def save_state(
        self,
        output_dir: _PathLike | None = None,
        safe_serialization: bool = True,
        *,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
        **save_model_func_kwargs: Any,
    ) -> Path | None:
        """Save models, optimizers, schedulers, scaler, samplers, random states and registered objects.

        A previous checkpoint in the directory stays loadable until the new one is committed. With ``asynchronous`` off
        that is so on return; otherwise training goes on while it is written, and what fails is raised by the next save
        or by ``end_training``, on every process.

        Args:
            output_dir: The same on every process; not needed with automatic checkpoint naming.
            safe_serialization: Has no effect: tensors are in DCP's format either way.
            metrics: Numbers to choose the best checkpoint by; those of the main process are saved.
            force: Save whatever the options say of when to.
            save_model_func_kwargs: Have no effect: stock Accelerate gives them to DeepSpeed.

        Returns:
            The checkpoint's directory; None if the options say not to save now (``save_every``, ``save_every_minutes``,
            ``in_flight``), which is the same on every process.
        """
        accelerator = self._accelerator
        self._calls += 1
        if not self._is_due(force=force):
            return None
        self._saver.finish()
        path = self._decide("make room", lambda: self._make_room(output_dir))
        try:
            with self._loaded_with():
                state = self._collect(path, metrics)
        # Whatever hooks and objects of the user raise, the other ranks hear of it from the engine.
        except Exception as exc:
            if self._is_alone:
                raise
            state = {layout.REST: _Failed(exc)}
        parts = [layout.model_part(index) for index in range(len(accelerator._models))]
        parts += [layout.optimizer_part(index) for index in range(len(accelerator._optimizers))]
        with self._loaded_with():
            self._saver.save(
                state,
                path,
                optimizers=optimizers_of(accelerator),
                changed_by_forward=renormed_weights(accelerator._models),
                diverging=self._diverging_in(state),
                writer=PartsWriter(
                    path, parts=parts, sync_files=self.plugin.sync_files, thread_count=self.plugin.thread_count
                ),
            )
        if accelerator.is_main_process:
            policy = self.plugin.keep_policy(accelerator.project_configuration.total_limit)
            # The program may change its working directory before the commit.
            self._saver.after_commit(partial(follow_commit, path.absolute(), policy, removes_old=self._is_naming))
        self._last_begun = time.monotonic()
        accelerator.project_configuration.iteration += 1
        return path

    def load_state(
        self,
        input_dir: _PathLike | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Load what ``save_state`` saved, ours or stock's, on however many processes there are now.

        Args:
            input_dir: The checkpoint's directory; None takes the newest one of automatic checkpoint naming.
            load_kwargs: ``weights_only=False`` unpickles everything that is neither model nor optimizer, which can run
                code. ``safe_globals=[...]`` admits these classes in it. Both go before those of `DCPPlugin`.
            load_model_func_kwargs: ``strict=False`` loads what models and checkpoint share; ``map_location`` as in
                Accelerate.

        Raises:
            CheckpointNotFoundError: There is no committed checkpoint; names the newest one beside it.
            CheckpointException: Some process failed; raised on every process.
        """
        accelerator = self._accelerator
        options = dict(load_model_func_kwargs)
        strict, map_location = options.pop("strict", True), options.pop("map_location", None)
        if options:
            raise TypeError(f"load_state takes strict and map_location for the models, found {listing(options)} too")
        if map_location not in (None, "cpu", "on_device"):
            raise TypeError(f"map_location must be None, 'cpu' or 'on_device', got {map_location!r}")
        self._saver.wait()
        with nullcontext() if self._is_alone else naming_absent("load_state", _ADVICE):
            path, kind = self._decide("find", lambda: self._find(input_dir))
        models = list(accelerator._models)
        if not is_fsdp(accelerator):
            # A hook removes the models that it loads itself. Under FSDP stock calls hooks after models and optimizers.
            self._call_load_hooks(models, path)
        kwargs = dict(load_kwargs or {})
        weights_only = kwargs.pop("weights_only", self.plugin.weights_only)
        safe_globals = check_safe_globals(kwargs.pop("safe_globals", self.plugin.safe_globals))
        with tempfile.TemporaryDirectory(prefix="dcp_accelerate_") as folder:
            if kind == "ours":
                trust = {"weights_only": weights_only, "safe_globals": safe_globals}
                self._load_ours(path, models, Path(folder), strict=strict, trust=trust)
            else:
                self._load_stock(path, models, strict=strict)
            if is_fsdp(accelerator):
                self._call_load_hooks([], path)
            self._together(
                "restore",
                lambda: restore_files(
                    accelerator,
                    Path(folder) if kind == "ours" else path,
                    map_location=map_location,
                    load_kwargs=kwargs,
                    weights_only=weights_only,
                    safe_globals=safe_globals,
                ),
            )
        number = layout.automatic_number(path.name)
        if self._is_naming and number is not None and path.resolve().parent == self._folder.resolve():
            # Where stock leaves it to the script to choose the next number, and refuses to save if it forgets.
            configuration = accelerator.project_configuration
            configuration.iteration = max(configuration.iteration, number + 1)

    def note_prepared(self, model: nn.Module) -> None:
        """Note a model that the accelerator has prepared, with its wrapper."""
        self._prepared.add(model)

    def _diverging_in(self, state: Mapping[str, Any]) -> list[KeyPath]:
        return [] if self._is_alone else list(diverging_in(self._accelerator, self._prepared, state))

    def _loaded_with(self) -> AbstractContextManager[None]:
        return loaded_with(weights_only=self.plugin.weights_only, safe_globals=self.plugin.safe_globals)

    def close(self) -> None:
        """Finish the save in flight, and free the memory that it was staged in."""
        self._saver.close()

    @property
    def _accelerator(self) -> Accelerator:
        accelerator = self._reference()
        assert accelerator is not None, "the accelerator calls the methods of this object"
        return accelerator

    @property
    def _is_naming(self) -> bool:
        return bool(self._accelerator.project_configuration.automatic_checkpoint_naming)

    @property
    def _folder(self) -> Path:
        """Where checkpoints are that are named automatically."""
        if self._accelerator.project_dir is None:
            raise ValueError("automatic_checkpoint_naming needs project_dir in the ProjectConfiguration, found None")
        return Path(self._accelerator.project_dir, "checkpoints")

    def _make_room(self, output_dir: _PathLike | None) -> Path:
        """Choose the directory to save into and see that it is there. Runs on the main process."""
        if self._is_naming:
            number = self._accelerator.save_iteration
            path = self._folder / f"checkpoint_{number}"
            if layout.kind_of(path) is not None:
                raise ValueError(
                    f"Checkpoint directory {path} ({number}) already exists. Set"
                    " accelerator.project_configuration.iteration to the number to go on with."
                )
        elif output_dir is None or not os.fspath(output_dir):
            raise ValueError(
                "save_state needs output_dir, or automatic_checkpoint_naming in the ProjectConfiguration, found"
                f" {output_dir!r}"
            )
        elif "://" in os.fspath(output_dir):
            raise ValueError(f"save_state saves into a directory, found the URL {os.fspath(output_dir)!r}")
        else:
            path = Path(output_dir).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _collect(self, path: Path, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
        accelerator = self._accelerator
        shown = weights_of(accelerator)
        before = [dict(weights) for weights in shown]
        left = list(shown)
        for hook in accelerator._save_model_state_pre_hook.values():
            hook(accelerator._models, left, str(path))
        state = state_of(accelerator, shown, before, left)
        if accelerator.is_main_process:
            state[RECORD_KEY] = record_item(accelerator.save_iteration, time.time(), metrics)
        return state

    def _find(self, input_dir: _PathLike | None) -> tuple[Path, str]:
        """Return the checkpoint to load and its kind. Runs on the main process."""
        if input_dir is not None:
            path = Path(input_dir).expanduser()
            if not os.fspath(input_dir) or not path.is_dir():
                beside, _ = layout.newest_of(layout.numbered(path.parent))
                hint = f". The newest committed checkpoint beside it is {beside[0]}" if beside is not None else ""
                named = os.fspath(input_dir) or "''"
                raise ValueError(f"Tried to find {named} but folder does not exist{hint}")
            return path, layout.refuse_unless_checkpoint(path)
        if not self._is_naming:
            raise ValueError("load_state needs input_dir, or automatic_checkpoint_naming in the ProjectConfiguration")
        newest, skipped = layout.newest_of(layout.automatically_named(self._folder))
        reasons = listing(f"{path.name} ({reason})" for path, reason in skipped.items())
        if newest is None:
            raise CheckpointNotFoundError(
                f"Expected a committed checkpoint in {self._folder}, found {reasons or 'none'}"
            )
        if skipped:
            warn_user(f"Loading {newest[0]}: newer ones are no good checkpoints: {reasons}")
        return newest

    def _call_load_hooks(self, models: list[nn.Module], path: Path) -> None:
        def call() -> None:
            for hook in self._accelerator._load_model_state_pre_hook.values():
                hook(models, str(path))

        if self._accelerator._load_model_state_pre_hook:
            self._together("load hooks", call)

    def _load_ours(
        self, path: Path, models: Sequence[nn.Module], folder: Path, *, strict: bool, trust: Mapping[str, Any]
    ) -> None:
        """Load models and optimizers, and put the other files into a folder."""
        accelerator = self._accelerator
        reader = dcp.FileSystemReader(path)
        optimizers = [(owner_of(one, accelerator._models), one) for one in optimizers_of(accelerator)]

        def prepare() -> dict[str, Any]:
            contents = layout.contents_of(reader.read_metadata(), path)
            state = wanted_of(contents, models, optimizers, strict=strict, path=path)
            check_files(accelerator, contents.files[0], path)
            rest: dict[str, dict[str, bytes]] = {}
            for name, rank in contents.files_for(accelerator.process_index, accelerator.num_processes).items():
                rest.setdefault(str(rank), {})[name] = b""
            state[layout.REST] = only_as_asked(rest)
            return state

        state = self._together("prepare", prepare)
        with unwrapped_plan_errors():
            load_state(state, storage_reader=reader, no_dist=self._is_alone, **trust)

        def apply() -> None:
            # The load has filled the tensors. This call sets the other values, and runs the modules' load hooks.
            for index, model in enumerate(models):
                loaded = state[layout.model_part(index)]["model"]
                set_model_state_dict(model, loaded, options=StateDictOptions(strict=strict))
            for index, (owner, optimizer) in enumerate(optimizers):
                restore_optimizer_state(owner, optimizer, state[layout.optimizer_part(index)]["optimizer"])
            for own in state[layout.REST].values():
                for name, data in own.items():
                    (folder / name).write_bytes(data)

        with unwrapped_plan_errors("Prepare what was prepared when the checkpoint was saved."):
            self._together("apply", apply)

    def _load_stock(self, path: Path, models: Sequence[nn.Module], *, strict: bool) -> None:
        accelerator, alone = self._accelerator, self._is_alone
        optimizers = optimizers_of(accelerator)

        def load_model(index: int) -> None:
            load_stock_model(path, index, models[index], strict=strict, no_dist=alone)

        def load_optimizer(index: int) -> None:
            load_stock_optimizer(path, index, optimizers[index], accelerator._models, no_dist=alone)

        self._together("prepare", lambda: check_files(accelerator, os.listdir(path), path))
        for index in range(len(models)):
            self._together(layout.model_part(index), partial(load_model, index))
        for index in range(len(optimizers)):
            self._together(layout.optimizer_part(index), partial(load_optimizer, index))

    def _is_due(self, *, force: bool) -> bool:
        """Agree whether to save now, in one exchange.

        Raises:
            ValueError: Some processes would write in the background and others would not: they would not meet.
        """
        plugin = self.plugin
        own = _Wish(
            asynchronous=plugin.asynchronous,
            is_due=force or plugin.save_policy.is_due(self._calls, time.monotonic() - self._last_begun),
            may_be_skipped=plugin.in_flight == "skip" and not force,
            is_busy=self._saver.is_busy,
        )
        found = [own]
        if not self._is_alone:
            with naming_absent("save_state", _ADVICE):
                # The exchange has its own group: absent processes may be using the default group for training.
                found = deciding_ranks().all_gather("options", lambda: own)
        if len({one.asynchronous for one in found}) > 1:
            said = listing(f"{one.asynchronous!r} on process {rank}" for rank, one in enumerate(found))
            raise ValueError(
                f"Expected asynchronous to be the same on every process, found {said}. It comes from enable(), from"
                " DCP_PLUGINS_ASYNCHRONOUS, or from the YAML file, which each node reads for itself."
            )
        # The main process's clock counts, and its options.
        main = found[0]
        return main.is_due and not (main.may_be_skipped and any(one.is_busy for one in found))

    def _together(self, step: str, local: Callable[[], _Answer]) -> _Answer:
        """Run something on every process; if it fails on one, every process raises."""
        if self._is_alone:
            return local()
        return deciding_ranks().settle(step, local)

    def _decide(self, step: str, decide: Callable[[], _Answer]) -> _Answer:
        """Run something on the main process and return its answer, or raise its error, on every process."""
        return decide() if self._is_alone else on_rank_zero(deciding_ranks(), step, decide)


class _Wish(NamedTuple):
    """One process's part in the decision whether to save."""

    asynchronous: str
    is_due: bool
    may_be_skipped: bool
    is_busy: bool


class _Failed:
    """Stands in a state dict for what this process could not collect: raises where the engine tells the other ranks."""

    def __init__(self, failure: Exception) -> None:
        self._failure = failure

    def state_dict(self) -> dict[str, Any]:
        raise self._failure

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: it is never loaded."""
