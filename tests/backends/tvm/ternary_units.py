"""What tests of integer layers with ternary weights run on."""

from dataclasses import dataclass

from test_fixed_conv2d import UNITS, SoftVnni
from tvm import tirx

from shohin.backends.tvm.kernels.dots import DotUnit
from shohin.backends.tvm.target import CpuTarget

AVX2 = CpuTarget("x86-64-v3", tune="off")


@dataclass(frozen=True)
class SoftTables(SoftVnni):
    """Registers of 64 bytes, with tables in those of 32."""

    def look_up(self, table, index):
        halves = [list(range(32 * i, 32 * i + 32)) for i in range(2)]
        narrow = DotUnit("maddubs", 8)
        parts = [
            narrow.look_up(tirx.Shuffle([table], half), tirx.Shuffle([index], half))
            for half in halves
        ]
        return tirx.Shuffle(parts, list(range(64)))


BYTES = {name: UNITS[name] for name in ("avx2", "sse", "vnni", "avx vnni")}
BYTES["soft vnni"] = (SoftTables("vnni", 16), "x86-64-v3")
