"""The counting of machine code: ways through a loop, what lies on them, and how many programs fit a multiprocessor."""

import pytest
import sass

# A row in blocks: whole ones are read wide, the last one masked, 2 bytes at a time; a temperature of 1 skips the second
# exponential. Beside it a loop that waits, and after it another with fewer exponentials.
KERNEL = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
        /*0020*/               @P1 BRA `(.L_x_2) ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/               @P2 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0060*/               @P2 LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
        /*0070*/               @P2 LDG.E.U16 R6, desc[UR4][R2.64+0x4] ;
.L_x_3:
        /*0080*/                   FSETP.GEU.AND P3, PT, R4, -126, PT ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
        /*00b0*/              @!P4 BRA `(.L_x_4) ;
        /*00c0*/                   MUFU.EX2 R5, R5 ;
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_5:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64 P0, [UR4], R5 ;
        /*00f0*/              @!P0 BRA `(.L_x_5) ;
.L_x_4:
        /*0100*/                   FADD R5, R5, R4 ;
        /*0110*/               @P5 BRA `(.L_x_0) ;
.L_x_6:
        /*0120*/                   MUFU.EX2 R4, R4 ;
        /*0130*/               @P5 BRA `(.L_x_6) ;
        /*0140*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0150*/                   EXIT ;
.L_x_7:
        /*0160*/                   BRA `(.L_x_7);
"""


def test_the_ways_through_the_loop_that_works() -> None:
    counts = sass.count(KERNEL)
    assert counts.where == "loop at 0x20"
    assert (counts.least, counts.most) == (9, 11)  # not the masked block, and not the loop that waits
    assert counts.opcodes == {
        "BRA": 4,
        "MUFU.EX2": 2,
        "LDG.E.128": 1,
        "FSETP.GEU.AND": 1,
        "SHFL.BFLY": 1,
        "BAR.SYNC.DEFER_BLOCKING": 1,
        "FADD": 1,
    }
    assert (counts.exps, counts.narrow, counts.wide) == (2, 0, 1)
    assert (counts.votes, counts.shuffles, counts.barriers, counts.denormal) == (0, 1, 1, 1)


def test_narrow_loads_are_seen_where_no_way_is_without() -> None:
    counts = sass.count(KERNEL.replace("LDG.E.128", "LDG.E.U16"))
    assert (counts.narrow, counts.wide) == (1, 0)
    assert sass.count(KERNEL.replace("LDG.E.128", "LDG.E.U8")).narrow == 1
    assert sass.count(KERNEL.replace("LDG.E.128", "LDG.E")).narrow == 0


def test_an_early_end_is_no_way_through_a_straight_line() -> None:
    straight = """
        /*0000*/               @P0 EXIT ;
        /*0010*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/              @!P1 EXIT ;
        /*0040*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0050*/                   EXIT ;
.L_x_7:
        /*0060*/                   BRA `(.L_x_7);
"""
    counts = sass.count(straight)
    assert (counts.where, counts.least, counts.most, counts.narrow) == ("straight line", 6, 6, 1)


def test_a_kernel_without_exponentials_is_judged_by_its_products_or_loads() -> None:
    assert sass.count(KERNEL.replace("MUFU.EX2", "HGMMA.64x256x16.F32.BF16")).where == "loop at 0x20"
    assert sass.count(KERNEL.replace("MUFU.EX2", "FADD")).where == "loop at 0x20"
    assert sass.count(KERNEL.replace("MUFU.EX2", "FADD").replace("LDG.E.128", "LDG.E")).where == "loop at 0x20"
    with pytest.raises(ValueError, match="neither exponentials nor products nor wide loads"):
        sass.count(KERNEL.replace("MUFU.EX2", "FADD").replace("LDG", "LDS").replace("STG", "STS"))


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "programs"),
    [
        (32, 256, 0, 8),
        (149, 256, 64, 1),
        (128, 256, 0, 2),
        (128, 128, 39_168, 4),
        (168, 384, 199_016, 1),
        (16, 32, 0, 32),
    ],
)
def test_programs_an_sm(registers: int, threads: int, shared: int, programs: int) -> None:
    assert sass.programs_an_sm(registers, threads, shared) == programs


def test_waits_are_those_that_name_their_copies() -> None:
    ttgir = """
      %k_138 = ttg.async_wait %k_127, %v_128 {num = 3 : i32} loc(#loc241)
    %acc_124 = ttg.async_wait {num = 0 : i32} loc(#loc270)
"""
    assert sass.waits(ttgir) == [3]
