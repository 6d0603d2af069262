"""Which kernels spill registers or serialise their products, from what ptxas prints."""

from __future__ import annotations

from report_spills import serialised, spills

LOG = """\
ptxas warning : Registers are spilled to local memory in function '_Z4slowv', 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_Z4slowv' for 'sm_90a'
ptxas info    : Function properties for _Z4slowv
    24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z4fastv' for 'sm_75'
ptxas info    : Function properties for _Z4fastv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_a_spill_is_reported_with_kernel_and_architecture() -> None:
    assert spills(LOG) == ["_Z4slowv on sm_90a: 8 bytes spill stores, 4 bytes spill loads"]
    assert spills(LOG[LOG.index("ptxas info    : Compiling entry function '_Z4fastv'") :]) == []


def test_products_that_wait_for_each_other_are_reported_with_the_reason() -> None:
    log = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non "
        "wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in "
        "the function '_Z4gemmv'\n"
    )
    assert serialised(LOG + log) == [
        "_Z4gemmv: non wgmma instructions defining accumulator registers of a wgmma between start and end of the "
        "pipeline stage"
    ]
    assert serialised(LOG) == []
