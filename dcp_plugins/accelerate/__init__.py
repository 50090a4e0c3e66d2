"""Hugging Face Accelerate: one line after a stock ``Accelerator`` is made, and its checkpoints go through this package.

    from dcp_plugins.accelerate import enable
    accelerator = enable(Accelerator())

From then on ``save_state`` and ``load_state`` are called on every process as before, and write and read committed DCP
directories in Accelerate's layout (`layout.py` says what is in one). Options come from the code (`DCPPlugin`), from the
environment, or from Accelerate's YAML file.
"""

from __future__ import annotations

from dcp_plugins.errors import MissingExtraError

try:
    import accelerate as _accelerate  # noqa: F401
except ImportError as exc:
    raise MissingExtraError(
        f"dcp_plugins.accelerate needs the distribution 'accelerate', which could not be imported: {exc}. Install it"
        " with: pip install 'dcp_plugins[accelerate]'"
    ) from exc

from dcp_plugins.accelerate.enable import disable, enable
from dcp_plugins.accelerate.layout import newest_checkpoint, write_stock_files
from dcp_plugins.accelerate.plugin import DCPPlugin
from dcp_plugins.accelerate.retention import best_checkpoint

__all__ = ["DCPPlugin", "best_checkpoint", "disable", "enable", "newest_checkpoint", "write_stock_files"]
