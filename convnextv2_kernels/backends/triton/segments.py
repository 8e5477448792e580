"""How rows fall into segments (images), on the device: the same rule as ``csrc/include/cnx/params.h``."""

import triton
import triton.language as tl


@triton.jit
def segment_bounds(segment, offsets, rows_per_slot, rows, count):
    """First row of a segment and the row after its last, int64. ``count`` equal shares of ``rows`` when ``offsets`` is
    None, else rows ``rows_per_slot * (offsets[i] - offsets[0])`` up to the next."""
    # casts as functions: a compiled kernel receives a size of 1 as a constant, which has no methods
    segment = tl.cast(segment, tl.int64)
    if offsets is None:
        each = tl.cast(rows // count, tl.int64)
        return segment * each, (segment + 1) * each
    else:
        first = tl.load(offsets).to(tl.int64)
        begin = (tl.load(offsets + segment).to(tl.int64) - first) * rows_per_slot
        return begin, (tl.load(offsets + segment + 1).to(tl.int64) - first) * rows_per_slot
