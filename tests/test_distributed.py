"""Several processes on CPUs: DDP and FSDP2 give the gradients of one process, and plans are shared when asked."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from triton_conv3d import broadcast_plans

RANK = Path(__file__).with_name("rank.py")
CHECKS = [
    node.name
    for node in ast.parse(RANK.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
]


@pytest.fixture(scope="module", params=(2, pytest.param(4, marks=pytest.mark.long)), ids=lambda n: f"{n}-ranks")
def wrong(request, tmp_path_factory):
    """What went wrong in each rank, by the name of the check: all of them run in the same processes, outside of Triton's
    interpreter."""
    folder = tmp_path_factory.mktemp("ranks")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    common = {
        **inherited,
        "WORLD_SIZE": str(request.param),
        "TRITON_CONV3D_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join((str(RANK.parent.parent), inherited.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(folder)], env={**common, "RANK": str(rank)}, text=True, stderr=subprocess.PIPE
        )
        for rank in range(request.param)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("name", CHECKS)
def test_in_every_rank(name, wrong):
    told = {rank: trouble[name] for rank, trouble in enumerate(wrong) if name in trouble}
    assert not told, "\n".join(told.values())


def test_a_broadcast_needs_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        broadcast_plans()
