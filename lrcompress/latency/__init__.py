"""How long operators take on the machine at hand: measured with ONNX Runtime alone, on the base install.

table = profile_device(threads=(1, 2), progress=progress)
write_table(Path("table.json"), table)
"""

from .measuring import timing
from .operators import BINARY, KINDS, UNARY, Dims, Probe
from .profiling import profile_device, sizes
from .table import LatencyTable, Row, check_table_output, machine, read_table, write_table

__all__ = [
    "BINARY", "KINDS", "UNARY", "Dims", "LatencyTable", "Probe", "Row", "check_table_output", "machine",
    "profile_device", "read_table", "sizes", "timing", "write_table",
]  # fmt: skip
