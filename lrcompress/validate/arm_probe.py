"""Print the /proc/cpuinfo block of the processor this runs on, as an ARM Linux kernel would write it.

Runs in the emulated Python, before ONNX Runtime can be imported there. The identity comes from the MIDR_EL1 register,
the features from the auxiliary vector; the bit order is the kernel's (arch/arm64 hwcap.h).
"""

from __future__ import annotations

import ctypes
import mmap

_HWCAP = """
fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4
asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg
"""
_HWCAP2 = """
dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh rng
bti mte ecv afp rpres mte3 sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 smef32f32 smefa64
"""
_AT_HWCAP, _AT_HWCAP2 = 16, 26
#: mrs x0, midr_el1 ; ret
_READ_MIDR = bytes.fromhex("000038d5c0035fd6")


def cpuinfo() -> str:
    """Return the block of one processor, without its number."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_READ_MIDR)
    midr = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    libc = ctypes.CDLL(None)
    libc.getauxval.restype, libc.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    features = [
        name
        for names, entry in ((_HWCAP, _AT_HWCAP), (_HWCAP2, _AT_HWCAP2))
        for bit, name in enumerate(names.split())
        if libc.getauxval(entry) >> bit & 1
    ]
    fields = {
        "BogoMIPS": "100.00",
        "Features": " ".join(features),
        "CPU implementer": f"{midr >> 24 & 0xFF:#04x}",
        "CPU architecture": "8",
        "CPU variant": f"{midr >> 20 & 0xF:#x}",
        "CPU part": f"{midr >> 4 & 0xFFF:#05x}",
        "CPU revision": str(midr & 0xF),
    }
    return "".join(f"{key}\t: {value}\n" for key, value in fields.items()) + "\n"


if __name__ == "__main__":
    print(cpuinfo(), end="")
