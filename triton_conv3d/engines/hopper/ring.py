"""A ring of stages in shared memory: one warp fills it, two warpgroups multiply what is in it, and empty it.

The producer asks the copy engine for the operands of step after step, tile after tile, and waits only where the ring is
full; the consumers multiply what has arrived, free its stage, and write a tile while the operands of the next one are on
their way. Each stage has two barriers, ``full`` and ``empty``. A side that goes round the ring for the i-th time waits
for the i-th completion of the one barrier, by its parity, and then adds to the other.
"""

import triton
import triton.language as tl

from .gluon import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait

# Of a thread of the producer; what it leaves is shared out among the consumers. With the least, 24, Triton 3.9.0 spills.
PRODUCER_REGISTERS = gl.constexpr(40)
LINE = gl.constexpr(64)  # pixels of a line: the rows of one matrix instruction, and of wgrad a step of the reduction
CONSUMERS = gl.constexpr(2)  # of lines, each a warpgroup of its own
CONSUMER_REGISTERS = gl.constexpr(232)  # of a thread of these
UNDER_WAY = gl.constexpr(1)  # products, beside the newest, where many read the same registers: each a copy, with Triton 3.9.0


@triton.constexpr_function
def item(parts, i):
    """One of a tuple, a constant as it is."""
    return parts[i]


@triton.constexpr_function
def ahead_of(parts, i):
    """Channels of the parts before this one; None: of all."""
    return sum(parts[:i])


@triton.jit
def part(steps, split, splits):
    """(begin, end) of one of the equal parts of a loop; the last ones may be empty."""
    share = tl.cdiv(steps, splits)
    return tl.minimum(split * share, steps), tl.minimum(split * share + share, steps)


@triton.jit
def next_stage(stage, parity, STAGES: tl.constexpr):
    """The next stage of the ring, and the parity of its round."""
    last = stage == STAGES - 1
    return tl.where(last, 0, stage + 1), tl.where(last, parity ^ 1, parity)


@triton.jit
def next_digit(digit, carry, size):
    """One digit of a number that is counted up, and the carry to the next."""
    over = digit + carry == size
    return tl.where(over, 0, digit + carry), tl.where(over, 1, 0)


@triton.jit
def view_at(tap, step, start, stride):
    """Along one dimension, a tap -> (which of the views it reads, how far ahead)."""
    at = tap * step + start
    return at % stride, at // stride


@gluon.jit
def barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr = 1):
    """(full, empty): for each stage one that the copies complete, and one that all consumers do."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def multiply(
    acc,
    steps,
    left,
    right,
    full,
    empty,
    stage,
    parity,
    TURN_LEFT: gl.constexpr,
    TURN_RIGHT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """acc + the products of the next ``steps`` stages, each freed once its product is done; (acc, next stage, parity)."""
    gl.static_assert(STAGES > 1, "a stage is freed by the step after it: the ring needs more than one stage")
    before = 0  # not ``stage``: Triton carries a name from step to step only if it ends one as another value than it began
    for i in range(steps):
        mbarrier.wait(full.index(stage), parity)
        a = left.index(stage)
        if TURN_LEFT:
            a = a.permute((1, 0))
        b = right.index(stage)
        if TURN_RIGHT:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # of the step before
        mbarrier.arrive(empty.index(before), pred=i > 0)  # by one thread, behind a barrier of both warpgroups
        before = stage
        stage, parity = next_stage(stage, parity, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), pred=steps > 0)
    return acc, stage, parity


@gluon.jit
def begun(sums, WHICH: gl.constexpr, a, b):
    """The sums with a product more under way, of one of them."""
    sums_ = ()
    for i in gl.static_range(len(sums)):
        acc = sums[i]
        if i == WHICH:
            acc = warpgroup_mma(a, b, acc, is_async=True)
        sums_ = sums_ + (acc,)
    return sums_


@gluon.jit
def waited(PENDING: gl.constexpr, sums, read):
    """The sums once no more products are under way than that; registers that the others read are kept until then."""
    done = warpgroup_mma_wait(PENDING, deps=sums + read)
    sums_ = ()
    for i in gl.static_range(len(sums)):
        sums_ = sums_ + (done[i],)
    return sums_
