"""Lightning Fabric: ``Fabric(strategy="dcp_fsdp2")``, and the strategies behind the flags.

    import dcp_plugins.lightning
    fabric = Fabric(strategy="dcp_fsdp2_async", devices=8)

Importing `dcp_plugins.lightning` registers the flags, which are those of the Trainer. The strategies of the Trainer and
of Fabric have the same names, as Lightning's own have, and their checkpoints the same layout.
"""

from __future__ import annotations

from dcp_plugins.lightning.fabric.strategies import (
    DCPDDPStrategy,
    DCPFSDP2Strategy,
    DCPFSDPStrategy,
    DCPSingleDeviceStrategy,
    register_strategies,
)

__all__ = [
    "DCPDDPStrategy",
    "DCPFSDP2Strategy",
    "DCPFSDPStrategy",
    "DCPSingleDeviceStrategy",
    "register_strategies",
]
