"""Repack bitsandbytes' wheel with its libraries for CUDA 13.0 and CPUs only, so that it is small enough to send.

python benchmarks/gpu/slim_wheel.py bitsandbytes-*.whl FOLDER
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import zipfile
from pathlib import Path

KEPT_LIBRARIES = {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}


def is_kept(name: str) -> bool:
    return not name.endswith(".so") or Path(name).name in KEPT_LIBRARIES


def slim(source: Path, target: Path) -> None:
    """Copy a wheel without the other libraries; its RECORD lists what is left."""
    options = {"compress_type": zipfile.ZIP_DEFLATED, "compresslevel": 9}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        record = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        rows = []
        for name in old.namelist():
            if name == record or not is_kept(name):
                continue
            content = old.read(name)
            new.writestr(name, content, **options)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append([name, f"sha256={digest}", len(content)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, [record, "", ""]])
        new.writestr(record, text.getvalue(), **options)


if __name__ == "__main__":
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    slim(wheel, folder / wheel.name)
