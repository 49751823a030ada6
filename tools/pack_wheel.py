"""Packs a wheel's files into a .tar.xz: for a machine that takes only so many bytes at a time.

    python3 tools/pack_wheel.py WHEEL TARGET

Unpacked (`tar -xJf TARGET -C SITE`) it is what pip would install into SITE. Wheels are zip files,
whose deflate leaves machine code half as large again as xz does.
"""

from __future__ import annotations

import lzma
import os
import sys
import tarfile
import zipfile

FILTERS = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 128 << 20},
]


def pack(wheel: str, target: str) -> None:
    partial = f"{target}.partial"
    with (
        zipfile.ZipFile(wheel) as files,
        lzma.open(partial, "wb", filters=FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for info in files.infolist():
            # Stubs are for linking on other processors.
            if info.is_dir() or "/stubs/" in info.filename:
                continue
            entry = tarfile.TarInfo(info.filename)
            entry.size, entry.mode = info.file_size, 0o755
            with files.open(info) as source:
                tar.addfile(entry, source)
    os.replace(partial, target)


if __name__ == "__main__":
    pack(*sys.argv[1:])
