"""What the worker answers. Pure."""

import msgspec

from proxy.contents.findings import ScanFindings
from proxy.contents.layers.layer_contents import LayerContents
from proxy.contents.sboms.reader import SbomContents


class WorkerAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was read of a layer, an SBOM or a report, or why it was not."""

    layer: LayerContents | None = None
    sbom: SbomContents | None = None
    report: ScanFindings | None = None
    problem: str = ""
