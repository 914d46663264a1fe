"""Machine code of the copies from one memory format to the other, compiled ahead of time with no GPU."""

from __future__ import annotations

import json
import sys

import ahead_of_time
import pytest

pytest.importorskip("triton")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE = {"sm": ("LDG.E.128", "STG.E.128"), "gf": ("load_dwordx4", "store_dwordx4")}  # 16 bytes


def main(*architectures: str) -> None:
    import torch

    from perf.disassembly import resources
    from perf.machine_code import compiled, compiling_for
    from triton_conv3d.engines import launching, transposing

    for arch in architectures:
        for dtype in (torch.bfloat16, torch.float32):
            for channels_last in (True, False):
                wanted = torch.contiguous_format if channels_last else torch.channels_last_3d
                x, found = torch.empty((2, 40, 5, 6, 12), dtype=dtype, device="meta", memory_format=wanted), []
                with launching.replaced(lambda kernel, grid, args, options: found.append((kernel, args, options))):
                    transposing.transposed(x, channels_last)
                with compiling_for(arch):
                    _, kernel = compiled(*found)
                registers, spills, text = resources(arch, kernel)
                load, store = (text.count(word) for word in WIDE[arch[:2]])
                found_here = {"registers": registers, "spills": spills, "wide_loads": load, "wide_stores": store}
                print(
                    json.dumps({"arch": arch, "dtype": str(dtype), "to_last": channels_last, **found_here}), flush=True
                )


def test_both_sides_are_wide() -> None:
    rows = ahead_of_time.reports(__file__, *ARCHITECTURES)
    assert len(rows) == 4 * len(ARCHITECTURES)
    assert not [row for row in rows if row["spills"] or row["registers"] > 64]  # 1,024 threads at once
    assert not [row for row in rows if row["wide_loads"] != row["wide_stores"] or not row["wide_loads"]]


if __name__ == "__main__":
    main(*sys.argv[1:])
