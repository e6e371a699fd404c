"""The machine computes what the PTX ISA says, and finds what a GPU would fault or wait at."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.ptx.barriers import Pool
from tests.ptx.block import Grid, Order, run_grid
from tests.ptx.memory import Global, MachineError
from tests.ptx.program import entries, parse

#: A kernel whose body is given: %rd1 is a tensor's address, %r1 the thread, %rd2 its element's.
KERNEL = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{{
	.reg .pred %p<9>;
	ld.param.u64 %rd1, [kernel_param_0];  // the tensor
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd2, %rd1, %rd2;
{body}
	ret;

}}
"""


IN_ORDER = Order()


def run(body: str, tensor: torch.Tensor, threads: int = 32, order: Order = IN_ORDER) -> None:
    ((_, entry),) = entries(KERNEL.format(body=body)).items()
    parameter = tensor.data_ptr().to_bytes(8, "little")
    grid = Grid((1, 1, 1), threads, 4096, (parameter,))
    run_grid(parse(entry), grid, Global.of([tensor]), order)


def computed(body: str, threads: int = 32) -> np.ndarray:
    """What %r2 is in all threads, as int32."""
    tensor = torch.zeros(threads, dtype=torch.int32)
    run(f"{body}\nst.global.u32 [%rd2], %r2;", tensor, threads)
    return tensor.numpy()


LANES = np.arange(32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sub.s32 %r3, %r1, 9;\ndiv.s32 %r2, %r3, 4;", np.trunc((LANES - 9) / 4)),
        ("sub.s32 %r3, %r1, 9;\nrem.s32 %r2, %r3, 4;", np.fmod(LANES - 9, 4)),
        ("sub.s32 %r3, %r1, 9;\nshr.s32 %r2, %r3, 1;", (LANES - 9) >> 1),
        ("sub.s32 %r3, %r1, 9;\nmul.hi.s32 %r2, %r3, 715827883;", (LANES - 9) * 715827883 >> 32),
        ("mov.u32 %r3, -2;\nmad.hi.u32 %r2, %r1, %r3, 5;", np.maximum(LANES - 1, 0) + 5),
        ("shl.b32 %r2, %r1, %r1;", (LANES.astype(np.int64) << LANES).astype(np.int32)),
        ("bfe.s32 %r2, %r1, 1, 2;", np.array([0, 1, -2, -1])[LANES >> 1 & 3]),
        ("prmt.b32 %r2, %r1, 0x44332211, 0x6540;", LANES + 0x33221100),
        ("lop3.b32 %r2, %r1, 12, 3, 0xea;", LANES & 12 | 3),
        ("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;", LANES ^ 5),
        ("shfl.sync.up.b32 %r2, %r1, 1, 0, -1;", np.maximum(LANES - 1, 0)),
        ("redux.sync.add.s32 %r2, %r1, -1;", np.full(32, 496)),
        ("cvt.rn.f32.s32 %r3, %r1;\ncvt.rn.bf16x2.f32 %r2, %r3, 0f00000000;",
         [torch.tensor(float(i)).bfloat16().view(torch.int16).item() << 16 for i in LANES]),
        ("setp.lt.u32 %p1, %r1, 7;\nselp.b32 %r2, 1, 2, %p1;", np.where(LANES < 7, 1, 2)),
        ("cvt.s8.s32 %rs1, -3;\nshr.u16 %rs2, %rs1, 13;\ncvt.u32.u16 %r2, %rs2;", np.full(32, 7)),
        ("cvt.s64.s32 %rd3, -1;\nmov.b64 {%r3, %r2}, %rd3;", np.full(32, -1)),
    ],
)  # fmt: skip
def test_arithmetic(body: str, expected: np.ndarray) -> None:
    assert computed(body).tolist() == np.asarray(expected).astype(np.int32).tolist()


def test_lanes_part_and_meet_again() -> None:
    body = """
	mov.u32 %r2, 0;
$L_again:
	add.s32 %r2, %r2, %r1;
	add.s32 %r3, %r2, 0;
	setp.lt.s32 %p1, %r3, 40;
	setp.ne.b32 %p2, %r1, 0;
	and.pred %p1, %p1, %p2;
	@%p1 bra $L_again;
	shfl.sync.bfly.b32 %r2, %r2, 0, 31, -1;"""
    expected = [0] + [-(-40 // i) * i for i in range(1, 32)]
    assert computed(body).tolist() == expected


def test_warps_exchange_through_shared_memory() -> None:
    body = """
	shl.b32 %r3, %r1, 2;
	st.shared.u32 [%r3], %r1;
	bar.sync 0;
	xor.b32 %r3, %r3, 128;
	ld.shared.u32 %r2, [%r3];"""
    assert computed(body, threads=64).tolist() == [i ^ 32 for i in range(64)]


FAULTS = {
    "st.global.u32 [%rd2+128], %r1;": "no tensor's",
    "st.global.u32 [%rd2+2], %r1;": "misaligned",
    "mov.u32 %r3, 4096;\nst.shared.u32 [%r3], %r1;": "4 bytes of shared memory",
    "setp.lt.u32 %p1, %r1, 3;\n@%p1 ret;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 "
    "{%r2, %r3, %r4, %r5}, [%r9];": "parted",
    "mov.u32 %r3, 1;\nbar.sync 1, 64;": "deadlock",
    "mbarrier.init.shared::cta.b64 [%r9], 1;": "%r9",
    "mov.u32 %r9, 64;\nmbarrier.arrive.shared::cta.b64 _, [%r9];": "nobody initialized",
    "mov.u32 %r9, 64;\nmbarrier.init.shared::cta.b64 [%r9], 1;\n"
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;": "deadlock",
    "cp.async.cg.shared.global [%r1], [%rd1], 16, 16;": "16 bytes of shared memory",
    "mov.u32 %r9, 0;\ncp.async.cg.shared.global [%r9], [%rd1], 16, 16;": "nobody waited for",
    "mov.u32 %r9, 0;\ncp.async.cg.shared.global [%r9], [%rd1], 16, 16;\n"
    "cp.async.commit_group;": "nobody waited for",
    "setp.lt.and.u32 %p1, %r1, 3, %p2;": "not known here",
    "vote.sync.all.pred %p1, %p1, -1;": "all",
    "setmaxnreg.inc.sync.aligned.u32 256;": "deadlock",
    "frobnicate.b32 %r2, %r1;": "not known here",
    "mov.u32 %r2, %clock;": "not known here",
}


@pytest.mark.parametrize("body", FAULTS)
def test_faults(body: str) -> None:
    with pytest.raises(MachineError, match=FAULTS[body]):
        run(body, torch.zeros(32, dtype=torch.int32))


@pytest.mark.parametrize("registers", [216, 224])
def test_warps_trade_the_registers_that_they_started_with(registers: int) -> None:
    """Three warpgroups have 168 each; two can have 216 if the third keeps 72, but not 224."""
    assert Pool.of(12).owned == [168] * 12
    body = f"""
	setp.ge.u32 %p1, %r1, 256;
	@%p1 bra $L_shrink;
	setmaxnreg.inc.sync.aligned.u32 {registers};
	bra.uni $L_end;
$L_shrink:
	setmaxnreg.dec.sync.aligned.u32 72;
$L_end:
	mov.u32 %r2, 1;"""
    if registers == 216:
        assert computed(body, threads=384).all()
    else:
        with pytest.raises(MachineError, match="deadlock"):
            computed(body, threads=384)


def test_copies_are_late_or_early() -> None:
    """What is read before the wait is there only if the copy happened to be early."""
    body = """
	shl.b32 %r3, %r1, 4;
	mul.wide.u32 %rd3, %r1, 16;
	add.s64 %rd3, %rd1, %rd3;
	cp.async.cg.shared.global [%r3], [%rd3], 16, 16;
	cp.async.commit_group;
	ld.shared.u32 %r2, [%r3];
	cp.async.wait_group 0;
	ld.shared.u32 %r4, [%r3];
	st.global.u32 [%rd2], %r2;
	st.global.u32 [%rd2+256], %r4;"""
    for early in (False, True):
        tensor = torch.arange(128, dtype=torch.int32)
        run(body, tensor, order=Order(early=early))
        expected = torch.arange(0, 128, 4, dtype=torch.int32)
        assert tensor[64:96].tolist() == expected.tolist()
        assert tensor[:32].tolist() == (expected.tolist() if early else [-1] * 32)


def test_scopes_of_inline_assembly() -> None:
    """Labels of braces are their own, also twice; others may stand before a brace."""
    once = (
        "{ .reg .pred ended, more;\nagain:\nsetp.eq.u32 ended, %r1, %r1;\n@!ended bra again;\n}\n"
    )
    once = f"bra.uni $L_before;\n$L_before:\n{once}"
    entry = KERNEL.format(body=once + once.replace("before", "other"))
    program = parse(entries(entry)["kernel"])
    assert len([key for key in program.labels if key[1] == "again"]) == 2
    assert not re.search("reg", " ".join(line.text for line in program.instructions))
    run(once, torch.zeros(32, dtype=torch.int32))
