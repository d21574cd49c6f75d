"""The loops of a kernel and what its instructions cost, on machine code whose cost is known."""

from __future__ import annotations

import pytest
import torch

from reformer_kernels.gpu import machine_code
from reformer_kernels.gpu.control_flow import loops_of
from reformer_kernels.gpu.disassembly import (
    Instruction,
    parse_amdgcn,
    parse_sass,
    store_width,
    tcgen05_descriptors,
)
from reformer_kernels.gpu.instruction_issue import IssueCount, Machine, count
from reformer_kernels.gpu.machine_code import MachineCode, Request


def sass(*lines: str) -> list[Instruction]:
    """Instructions 16 bytes apart, as cuobjdump prints them. `>n` stands for the address of line n."""
    text = ""
    for n, line in enumerate(lines):
        while ">" in line:
            before, after = line.split(">", 1)
            number = after.split()[0]
            line = f"{before}{16 * int(number):#x}{after[len(number) :]}"
        text += f"        /*{16 * n:04x}*/                   {line} ;                /* 0x000000 */\n"
        text += "                                                          /* 0x000e */\n"
    parsed = parse_sass(text)
    assert len(parsed) == len(lines)
    return parsed


KERNEL = sass(
    "S2R R0, SR_TID.X",
    "ISETP.GE.AND P0, PT, R0, UR4, PT",
    "@P0 BRA >14",
    "LDG.E.128 R4, desc[UR6][R2.64]",  # the steady loop starts
    "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24",
    "MUFU.EX2 R8, R9",
    "LDG.E R10, desc[UR6][R2.64]",  # a loop over rounds inside
    "IADD3 R10, R10, 0x1, RZ",
    "@!P1 BRA >6",
    "@P2 BRA >16",  # seldom: code behind the end, which comes back
    "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24, gsb0",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR5], R7",
    "@!P3 BRA >11",  # waits
    "@P4 BRA >3",
    "STG.E.128 desc[UR6][R2.64], R4",
    "EXIT",
    "MOV R1, R2",
    "BRA >10",
    "RET.REL.NODEC R2 0x0",  # a function, reached by calls alone
    "BRA >19",
)


def test_loops() -> None:
    outside, (loop,) = loops_of(KERNEL)
    assert outside == (0, 1, 2, 14, 15)
    assert loop.own == (3, 4, 5, 9, 10, 13, 16, 17)
    assert [inner.own for inner in sorted(loop.inner, key=lambda inner: inner.own)] == [(6, 7, 8), (11, 12)]


def counted(rounds: int, warps: int = 4, pairs: int = 2048) -> IssueCount:
    machine = Machine(warps=warps, lanes=32, tensor_operations=4096)
    return count(KERNEL, machine, products=2, depth=16, tile_pairs=pairs, rounds=rounds)


def test_steady_loop_and_the_rest() -> None:
    issue = counted(rounds=3)
    assert issue.step is not None and issue.steady is issue.step
    # 8 instructions of its own, three times the 3 of the loop that reads, once the 2 of the one that waits.
    assert issue.step.instructions == 8 + 3 * 3 + 2
    assert issue.step.cycles == {
        "issue": 19.0,  # 19 instructions of 4 warps by 4 schedulers
        "integer": 3 * 4 * 32 / 64,
        "special": 4 * 32 / 16,
        "memory": (16 + 3 * 4) * 4 * 32 / 128,
        "tensor": 2 * (64 * 32 * 16 + 64 * 64 * 16) / 4096,
    }
    assert issue.outside.instructions == 5 and issue.outside.pairs == 0
    assert issue.step.pairs == 2048 and issue.cycles_per_pair("issue") == 19 / 2048
    assert counted(1).step.cycles["issue"] == 13.0  # type: ignore[union-attr]
    assert counted(1, warps=8).step.cycles["issue"] == 26.0  # type: ignore[union-attr]
    # The compiler made one step of three: the products of 98,304 operations serve three times as many pairs.
    assert counted(1, pairs=1024).step.pairs == 3072  # type: ignore[union-attr]


def test_a_kernel_without_a_loop_is_counted_whole() -> None:
    code = sass("S2R R0, SR_TID.X", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "STG.E.64 [R2.64], R4", "EXIT")
    machine = Machine(warps=2, lanes=32, tensor_operations=2048)
    issue = count(code, machine, products=1, depth=16, tile_pairs=256, rounds=1)
    assert issue.step is None and issue.steady is issue.outside
    assert (issue.outside.instructions, issue.outside.pairs) == (4, 256)
    assert issue.outside.cycles["tensor"] == 2 * 2 * 16 * 8 * 16 / 2048
    rowwise = count(code, machine, products=0, depth=16, tile_pairs=0, rounds=1)
    assert rowwise.cycles_per_pair("issue") is None


def test_amd_code() -> None:
    code = parse_amdgcn(
        "kernel:\n\ts_load_dwordx2 s[0:1], s[2:3], 0x0\n.LBB0_1:\n\tglobal_load_dwordx4 v[0:3], v[4:5], off\n"
        "\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]\n\tv_exp_f32_e32 v0, v1\n"
        "\ts_cbranch_scc1 .LBB0_1\n; %bb.2:\n\tglobal_store_dwordx2 v[0:1], v[2:3], off\n\ts_endpgm\n"
    )
    outside, (loop,) = loops_of(code)
    assert (outside, loop.own) == ((0, 5, 6), (1, 2, 3, 4))
    machine = Machine(2, lanes=64, tensor_operations=2048, instruction_cycles=4, vector_prefix="v_")
    issue = count(code, machine, products=1, depth=8, tile_pairs=1024, rounds=1)
    assert issue.step is not None and issue.step.pairs == 2048
    assert issue.step.cycles["issue"] == (4 + 3) * 2 / 4  # v_exp takes four cycles, the three others one
    assert store_width(code[5].name) == 8


def test_sizes_of_tcgen05_products() -> None:
    ptx = """
    mov.b32 \t%r430, 68158608;
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r9 + 0 ], %rd1, %rd2, %r430, %p2;
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r9 + 0 ], [ %r7 + 8 ], %rd2, %r430, %p2;
    """
    assert tcgen05_descriptors(ptx) == [68158608] * 2
    code = sass(
        "UTCHMMA gdesc[UR24], gdesc[UR32], tmem[UR23]", "UTCBAR [UR4], URZ", "UTCHMMA tmem[UR23]", "EXIT"
    )
    machine = Machine(warps=8, lanes=32, tensor_operations=8192)
    issue = count(code, machine, products=1, depth=32, tile_pairs=4096, rounds=1, descriptors=[68158608] * 2)
    assert issue.outside.cycles["tensor"] == 2 * 2 * 64 * 64 * 16 / 8192
    assert tcgen05_descriptors(ptx.replace("mov.b32", "add.s32")) == []
    # Without the sizes, the tensor cores are charged for what the tile's pairs need.
    unsized = count(code, machine, products=1, depth=32, tile_pairs=4096, rounds=1)
    assert unsized.outside.cycles == issue.outside.cycles


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_products_of_compiled_kernels_are_all_found(architecture: str) -> None:
    """The tensor cores' share follows from the tile's sizes. The count of instructions must agree with it."""
    pytest.importorskip("triton")
    request = Request(
        architecture, torch.bfloat16, 64, "off", ("attention",), ("local",), kernels=("attention_forward",)
    )
    (inspected,) = machine_code.inspect(request)
    code: MachineCode = inspected.code
    assert code.tile is not None
    needed = 2 * 2 * 64 / machine_code.CHIPS[architecture].tensor_operations
    assert code.issue.cycles_per_pair("tensor") == pytest.approx(needed)
    per_pair = code.issue.cycles_per_pair("issue")
    assert per_pair is not None and 0.1 < per_pair < 1
    row = code.to_json()
    assert row["issue_cycles_per_pair"] == per_pair and row["preset"] == "local"
    assert row["tensor_cycles_per_pair"] == code.issue.cycles_per_pair("tensor")
