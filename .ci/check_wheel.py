"""Check that a wheel holds triton_conv3d, all of it, and nothing else: ``check_wheel.py FILE.whl``."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "triton_conv3d"


def main(wheel: str) -> int:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    package = {name for name in names if ".dist-info/" not in name}
    expected = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    for name in sorted(package - expected):
        print(f"the wheel holds {name}, which is not of the package")
    for name in sorted(expected - package):
        print(f"the wheel lacks {name}")
    wrong = package != expected or "triton_conv3d/py.typed" not in package
    if "triton_conv3d/py.typed" not in package:
        print("the wheel lacks triton_conv3d/py.typed")
    print(f"{Path(wheel).name}: {len(package)} files of the package" + (", NOT as it should be" if wrong else ""))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
