"""Hugging Face Trainer: a callback that saves and resumes through this package's engine.

    from dcp_plugins.transformers import DCPCallback

    trainer = Trainer(..., callbacks=[DCPCallback(asynchronous="thread")])
    trainer.train(resume_from_checkpoint=True)

Checkpoints are saved at the Trainer's own times, under its own names. What a callback alone cannot reach is reached
through methods of `Trainer` that the first `DCPCallback` replaces; they do what they did for every Trainer that has no
`DCPCallback` (`seam.py`). Importing this package changes nothing.
"""

from __future__ import annotations

from dcp_plugins.errors import MissingExtraError

try:
    import accelerate as _accelerate  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as exc:
    raise MissingExtraError(
        f"dcp_plugins.transformers needs the distributions 'transformers' and 'accelerate', which could not be"
        f" imported: {exc}. Install them with: pip install 'dcp_plugins[transformers]'"
    ) from exc

from dcp_plugins.transformers.callback import DCPCallback
from dcp_plugins.transformers.layout import last_checkpoint
from dcp_plugins.transformers.stock import write_stock_checkpoint

__all__ = ["DCPCallback", "last_checkpoint", "write_stock_checkpoint"]
