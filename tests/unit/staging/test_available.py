"""How much memory is available is what the machine and the container leave, shared by the ranks of the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_plugins.staging import available
from dcp_plugins.staging.available import available_bytes


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(available, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(available, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def test_a_system_that_does_not_say_gives_none(system: Path) -> None:
    assert available_bytes() is None


def test_the_machine_is_asked(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    (system / "memory.max").write_text("max\n")
    assert available_bytes() == 1000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes() == 250 * 1024


def test_a_container_with_less_wins_and_its_file_cache_counts_as_free(system: Path) -> None:
    (system / "meminfo").write_text("MemAvailable: 1000 kB\n")
    (system / "memory.max").write_text("500000\n")
    (system / "memory.current").write_text("450000\n")
    (system / "memory.stat").write_text("anon 100\nfile 300000\nshmem 50000\n")
    assert available_bytes() == 50_000 + 300_000 - 50_000
