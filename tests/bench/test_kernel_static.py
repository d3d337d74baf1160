"""The static table of kernels: what is read from machine code and PTX, and the command on one kernel."""

import json

import pytest

from ppcoat.bench import kernel_static, sass
from ppcoat.cli.main import main
from ppcoat.errors import ConfigError

CODE = """
 Function kernel:
  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   S2R R3, SR_TID.X ;      /* 0x0000000000037919 */
                                                           /* 0x000e220000002100 */
        /*0010*/              @!P0 LDG.E.128 R12, desc[UR6][R8.64] ;
        /*0020*/               @P0 BRA 0x50 ;
        /*0030*/                   MUFU.RCP R8, R8 ;
        /*0040*/                   BRA 0x70 ;
        /*0050*/                   MOV R4, 0x70 ;
        /*0060*/                   CALL.REL.NOINC 0xd0 ;
        /*0070*/                   LDG.E R1, [R2.64] ;
        /*0080*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, R88, gdesc[UR8] ;
        /*0090*/               @P1 BRA 0x70 ;
        /*00a0*/              @!P6 EXIT ;
        /*00b0*/                   STG.E [R2.64], R1 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   RET.REL.NODEC R4 0x0 ;
"""

# Each thread stores `bytes` at `tid * stride`; STEP is filled in.
STORE = """
.visible .entry kernel() .reqntid 64
{{
	mov.u32 	%r1, %tid.x;
	mul.lo.s32 	%r2, %r1, {stride};
	mov.b32 	%r3, global_smem;
	add.s32 	%r4, %r3, %r2;
	setp.lt.u32 	%p1, %r1, {below};
	@%p1 st.shared.{kind} 	[%r4+16], %r9;
}}
"""


def test_the_main_path_is_counted():
    code = sass.MachineCode.parsed(CODE)
    assert (code.registers, code.spill_bytes) == (40, 8)
    once, often = code.executed(), code.executed(5)
    assert "CALL.REL.NOINC" not in once and "RET.REL.NODEC" not in once  # the slow path
    assert once["EXIT"] == 2 and once["STG.E"] == 1 and once["LDG.E.128"] == 1
    assert sum(once.values()) == 11 and sum(often.values()) == 11 + 4 * 3
    assert sum((code.executed(2) - once).values()) == 3
    assert sass.special(often) == 1
    assert sass.tensor_core_instruction(often) == "QGMMA.64x128x32.F32.E4M3.E4M3"
    assert sass.tensor_core_instruction(code.executed() - often) is None


@pytest.mark.parametrize(
    ("kind", "stride", "below", "degree"),
    [
        ("b32", 4, 64, 1),  # neighbours
        ("b8", 1, 64, 1),  # four lanes a word
        ("b8", 128, 64, 32),  # all lanes in one bank
        ("b32", 32, 64, 8),
        ("b32", 32, 4, 1),  # the predicate leaves four lanes
        ("v4.b32", 16, 64, 1),  # eight lanes at a time
        ("v4.b32", 32, 64, 2),
        ("v2.b32", 8, 64, 1),
    ],
)
def test_bank_conflicts_are_those_of_all_lanes(kind, stride, below, degree):
    assert sass.bank_conflict_degree(STORE.format(kind=kind, stride=stride, below=below)) == degree


def test_without_shared_memory_there_is_no_degree():
    ptx = STORE.format(kind="b32", stride=4, below=64).replace("st.shared", "st.global")
    assert sass.bank_conflict_degree(ptx) is None


def test_an_address_that_nobody_knows_is_an_error():
    ptx = STORE.format(kind="b32", stride=4, below=64).replace("mul.lo.s32", "ld.global.b32")
    with pytest.raises(ValueError, match="made by ld.global.b32"):
        sass.bank_conflict_degree(ptx)


@pytest.mark.slow
def test_the_command_compiles_and_counts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    file = tmp_path / "static.json"
    monkeypatch.setattr(kernel_static, "ARCHITECTURES", (90,))
    only = kernel_static.static_rows
    monkeypatch.setattr(kernel_static, "static_rows", lambda arch: only(arch, "gated_residual"))
    assert main(["benchmark", "kernels", "--static", "--output", str(file)]) == 0
    both, alone = json.loads(file.read_text())
    assert list(both) == [
        *("kernel", "shape", "arch", "registers", "spill_bytes", "shared_bytes", "instructions_per_element"),
        *("bytes_per_element", "bank_conflict_degree", "tensor_core_instruction", "reachable_share", "of"),
    ]
    assert both["kernel"] == "gated_residual" and alone["kernel"] == "gated_residual, product alone"
    assert (both["shape"], both["arch"], both["of"]) == ([4608, 3072], "sm_90", "copy speed of an H200")
    assert both["bytes_per_element"] == 6 and alone["bytes_per_element"] == 4
    assert 3 < alone["instructions_per_element"] < both["instructions_per_element"] < 30
    assert both["spill_bytes"] == 0 and both["tensor_core_instruction"] is None
    afforded = 132 * 4 * 32 * 1.755e9 / (0.9 * 4.8e12)  # instructions a byte
    share = afforded * 6 / both["instructions_per_element"]
    assert both["reachable_share"] == pytest.approx(min(1, share), abs=1e-3)
    assert "| gated_residual | 4608x3072 | 6.00 |" in capsys.readouterr().out


def test_what_cannot_be_compiled_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(kernel_static, "COMPILE", "raise RuntimeError('no compiler')")
    with pytest.raises(ConfigError, match="for sm_90: RuntimeError: no compiler; pip install"):
        kernel_static.static_rows(90)


def test_the_file_is_checked_before_anything_is_compiled(capsys):
    assert main(["benchmark", "kernels", "--static", "--output", "table.txt"]) == 2
    assert "a .json file" in capsys.readouterr().err
