"""Plans from one rank to the others. Nothing here runs unless it is called: selecting a plan is never a collective."""

from __future__ import annotations

from collections import Counter

import torch

from .cache import ImportReport, pack, unpack
from .select import adopt, known


def broadcast_plans(group=None, src: int = 0) -> ImportReport:
    """Let every rank take over the plans that rank ``src`` has measured, in memory and in its cache, for its GPU model.

    A collective: every rank of the group calls it, for instance after the first training step of one of them, or after
    ``triton-conv3d tune`` on its machine. The ranks then compute alike, and none of them measures what ``src`` has. A
    plan is checked as one of a file is: it must be measured on the same GPU model with the same versions, and its config
    be one that an engine offers. Where ranks share a cache directory, or ``triton-conv3d cache import`` has filled each,
    a broadcast serves only those that have run before.

    Args:
        group: a process group of torch.distributed; the default one if None.
        src: the rank to learn from, of the default group as in :func:`torch.distributed.broadcast`.

    Returns:
        How many plans this rank took over, and how many not, by reason; on ``src`` itself, none.

    Raises:
        RuntimeError: torch.distributed has no default group yet.
        ValueError: ``src`` is no rank of the group, or what arrived is no set of plans.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("broadcast_plans needs a process group: call torch.distributed.init_process_group first")
    ranks = dist.get_process_group_ranks(group)
    if src not in ranks:
        raise ValueError(f"broadcast_plans: src={src!r} must be a rank of the group, one of {ranks}")
    own = dist.get_rank() == src
    data = bytearray(pack(known())) if own else bytearray()
    on_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    length = torch.tensor(len(data), device=device)
    dist.broadcast(length, src, group)
    content = torch.frombuffer(data, dtype=torch.uint8) if own else torch.empty(int(length), dtype=torch.uint8)
    content = content.to(device)
    dist.broadcast(content, src, group)
    if own:
        return ImportReport()
    entries, skipped = unpack(bytes(content.tolist()))
    refused = Counter(map(adopt, entries))
    return ImportReport(refused.pop(None, 0), dict(skipped + refused))
