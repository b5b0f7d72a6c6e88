"""Every kind of fault, planted in a small kernel, is found; without it the kernel is clean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .launch import Faults, Module, Output

Run = Callable[[str, int], None]
HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
SEEDS = range(4)

# Each of 64 threads stores its number in shared memory and reads that of the thread opposite.
REVERSE = """
.visible .entry reverse(.param .u64 out)
{
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  .shared .align 4 .b8 buffer[256];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, buffer;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  st.shared.u32 [%r4], %r1;
  bar.sync 0;
  sub.s32 %r5, 63, %r1;
  shl.b32 %r6, %r5, 2;
  add.s32 %r7, %r2, %r6;
  ld.shared.u32 %r8, [%r7];
  ld.param.u64 %rd1, [out];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r8;
  ret;
}
"""

# The same within each warp, so that a barrier of the warp is enough.
REVERSE_IN_WARP = REVERSE.replace("bar.sync 0", "bar.warp.sync -1").replace(
    "sub.s32 %r5, 63, %r1", "xor.b32 %r5, %r1, 31"
)

# The same, from memory that each thread copies to shared memory while it goes on.
REVERSE_COPIED = REVERSE.replace("reverse(", "reverse_copied(.param .u64 in, ").replace(
    "st.shared.u32 [%r4], %r1;",
    """ld.param.u64 %rd4, [in];
  mul.wide.u32 %rd5, %r1, 4;
  add.s64 %rd6, %rd4, %rd5;
  cp.async.ca.shared.global [%r4], [%rd6], 4;
  cp.async.commit_group;
  cp.async.wait_group 0;""",
)

# Each of two blocks of a cluster sends the other its rank through distributed shared memory.
SWAP = """
.visible .entry swap(.param .u64 out)
{
  .reg .pred %p<4>;
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  .shared .align 4 .b8 mail[4];
  mov.u32 %r1, %cluster_ctarank;
  xor.b32 %r2, %r1, 1;
  mov.u32 %r3, mail;
  mapa.shared::cluster.u32 %r4, %r3, %r2;
  barrier.cluster.arrive.aligned; // started
  barrier.cluster.wait.aligned; // started
  mov.u32 %r5, %tid.x;
  setp.ne.s32 %p1, %r5, 0;
  @%p1 bra SKIP;
  st.shared::cluster.u32 [%r4], %r1;
SKIP:
  barrier.cluster.arrive.aligned; // sent
  barrier.cluster.wait.aligned; // sent
  @%p1 bra END;
  ld.shared.u32 %r6, [mail];
  ld.param.u64 %rd1, [out];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r6;
END:
  ret;
}
"""

# Every block stores its number, adds 1 to a counter and waits, spinning, until all have; then it
# reads its neighbour's number.
NEIGHBOURS = """
.visible .entry neighbours(.param .u64 counter, .param .u64 values, .param .u64 out)
{
  .reg .pred %p<4>;
  .reg .b32 %r<16>;
  .reg .b64 %rd<16>;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %nctaid.x;
  ld.param.u64 %rd1, [values];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  mov.u32 %r3, %tid.x;
  setp.ne.s32 %p1, %r3, 0;
  @%p1 bra MEET;
  st.global.u32 [%rd3], %r1;
  ld.param.u64 %rd4, [counter];
  fence.acq_rel.gpu; // before
  atom.global.add.u32 %r4, [%rd4], 1;
WAIT:
  ld.relaxed.gpu.global.u32 %r5, [%rd4];
  setp.lt.u32 %p2, %r5, %r2;
  @%p2 bra WAIT;
  fence.acq_rel.gpu; // after
MEET:
  bar.sync 0;
  setp.ne.s32 %p1, %r3, 63;
  @%p1 bra END;
  add.s32 %r6, %r1, 1;
  rem.u32 %r7, %r6, %r2;
  mul.wide.u32 %rd5, %r7, 4;
  add.s64 %rd6, %rd1, %rd5;
  ld.global.u32 %r8, [%rd6];
  ld.param.u64 %rd7, [out];
  add.s64 %rd8, %rd7, %rd2;
  st.global.u32 [%rd8], %r8;
END:
  ret;
}
"""


def reverse(text: str, seed: int) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    Module(HEADER + text)["reverse"].launch((1,), (64,), [Output(out)], seed=seed)
    opposite = torch.arange(64).flip(0) if "63" in text else torch.arange(64) ^ 31
    assert torch.equal(out, opposite.int())


def reverse_copied(text: str, seed: int) -> None:
    numbers, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    kernel = Module(HEADER + text)["reverse_copied"]
    kernel.launch((1,), (64,), [numbers, Output(out)], seed=seed)
    assert torch.equal(out, numbers.flip(0))


def swap(text: str, seed: int) -> None:
    out = torch.zeros(2, dtype=torch.int32)
    Module(HEADER + text)["swap"].launch((2,), (64,), [Output(out)], cluster=2, seed=seed)
    assert out.tolist() == [1, 0]


def neighbours(text: str, seed: int) -> None:
    counter, values, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 5, 5))
    arguments = [counter, Output(values), Output(out)]
    kernel = Module(HEADER + text)["neighbours"]
    limit = 500_000
    kernel.launch((5,), (64,), arguments, cooperative=True, seed=seed, most_instructions=limit)
    assert out.tolist() == [1, 2, 3, 4, 0]


CLEAN = {
    "reverse": (reverse, REVERSE),
    "reverse in warp": (reverse, REVERSE_IN_WARP),
    "reverse copied": (reverse_copied, REVERSE_COPIED),
    "swap": (swap, SWAP),
    "neighbours": (neighbours, NEIGHBOURS),
}
# What is planted, into which kernel: the text that goes, the text that comes, what is reported.
PLANTED: dict[str, tuple[Run, str, str, str, str]] = {
    "a barrier removed": (reverse, REVERSE, "bar.sync 0;", "", "race: (reads|writes) shared"),
    "a barrier of the warp removed": (
        reverse, REVERSE_IN_WARP, "bar.warp.sync -1;", "", "race: reads shared memory"),
    "a barrier that part of a warp skips": (
        reverse, REVERSE, "bar.sync 0;",
        ".reg .pred %q; setp.lt.u32 %q, %r1, 5; @%q bar.sync 0;", "only some lanes reach"),
    "a barrier that a warp skips": (
        reverse, REVERSE, "bar.sync 0;", ".reg .pred %q; setp.lt.u32 %q, %r1, 32; @%q bar.sync 0;",
        "all warps wait|race|nobody has written"),
    "shared memory's end passed by one": (
        reverse, REVERSE, "sub.s32 %r5, 63", "sub.s32 %r5, 64",
        "out of bounds: shared memory at byte 256"),
    "the output's start passed by one": (
        reverse, REVERSE, "[%rd3], %r8", "[%rd3+-4], %r8", "out of bounds: argument 0 at byte -4"),
    "the output's end passed by one": (
        reverse, REVERSE, "[%rd3], %r8", "[%rd3+4], %r8", "out of bounds: argument 0 at byte 256"),
    "an output's element left out": (
        reverse, REVERSE, "st.global.u32 [%rd3], %r8",
        ".reg .pred %q; setp.ne.u32 %q, %r1, 7; @%q st.global.u32 [%rd3], %r8",
        "argument 0 at byte 28 is never written"),
    "a store left out": (
        reverse, REVERSE, "st.shared.u32 [%r4], %r1;", "", "which nobody has written"),
    "an output read before it is written": (
        reverse, REVERSE, "st.global.u32 [%rd3], %r8",
        "ld.global.u32 %r9, [%rd3]; st.global.u32 [%rd3], %r8", "argument 0 .* nobody has written"),
    "all threads write one element": (
        reverse, REVERSE, "[%rd3], %r8", "[%rd1], %r8",
        "race: (writes|lanes write different values to) argument 0"),
    "a misaligned address": (
        reverse, REVERSE, "st.global.u32 [%rd3], %r8", "st.global.u32 [%rd3+2], %r8", "misaligned"),
    "a shuffle from a lane that has left": (
        reverse, REVERSE, "ld.param.u64 %rd1, [out];",
        ".reg .pred %q; setp.lt.u32 %q, %r1, 3; @%q bra NEXT; "
        "shfl.sync.bfly.b32 %r9, %r8, 1, 31, 0xfffffff8; NEXT: ld.param.u64 %rd1, [out];",
        "shuffles a value from a lane"),
    "the wait for a copy removed": (
        reverse_copied, REVERSE_COPIED, "cp.async.wait_group 0;", "", "nothing has waited for"),
    "a wait for all but the last copy": (
        reverse_copied, REVERSE_COPIED, "wait_group 0", "wait_group 1", "nothing has waited for"),
    "a copy waited for by its own warp alone": (
        reverse_copied, REVERSE_COPIED, "bar.sync 0;", "", "race|nothing has waited|nobody has"),
    "a copy to memory that is still read": (
        reverse_copied, REVERSE_COPIED, "st.global.u32 [%rd3]",
        "cp.async.ca.shared.global [%r4], [%rd6], 4; st.global.u32 [%rd3]",
        "race: writes shared memory .* has read"),
    "a copy from beyond the input": (
        reverse_copied, REVERSE_COPIED, "[%r4], [%rd6], 4", "[%r4], [%rd6+4], 4",
        "out of bounds: argument 0 at byte 256"),
    "blocks that are not known to have started": (
        swap, SWAP, "// started", "", "may not have started"),
    "the second cluster barrier removed": (swap, SWAP, "// sent", "", "may have exited|nobody has"),
    "only the cluster wait removed": (
        swap, SWAP, "barrier.cluster.wait.aligned; // sent", "", "race|nobody has written"),
    "a cluster barrier that releases nothing": (
        swap, SWAP, "arrive.aligned; // sent", "arrive.relaxed.aligned; // sent", "race"),
    "no fence before the grid's barrier": (
        neighbours, NEIGHBOURS, "fence.acq_rel.gpu; // before", "", "race: reads argument 1"),
    "no fence after the grid's barrier": (
        neighbours, NEIGHBOURS, "fence.acq_rel.gpu; // after", "", "race: reads argument 1"),
    "a fence of the block alone": (
        neighbours, NEIGHBOURS, "fence.acq_rel.gpu; // before", "fence.acq_rel.cta;",
        "race: reads argument 1"),
    "a counter read as ordinary memory": (
        neighbours, NEIGHBOURS, "ld.relaxed.gpu.global", "ld.global", "race: reads argument 0"),
    "no grid barrier": (neighbours, NEIGHBOURS, "@%p2 bra WAIT;", "", "race|nobody has written"),
    "a grid barrier that one block misses": (
        neighbours, NEIGHBOURS, "setp.lt.u32 %p2, %r5, %r2", "setp.le.u32 %p2, %r5, %r2",
        "does not end"),
}  # fmt: skip


def remove(text: str, old: str, new: str) -> str:
    """A comment names the lines that have it; other text is replaced where it is."""
    assert old in text
    if old.startswith("//"):
        return "\n".join(line for line in text.split("\n") if old not in line)
    return text.replace(old, new)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels(name: str, seed: int) -> None:
    run, text = CLEAN[name]
    run(text, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults(name: str, seed: int) -> None:
    run, text, old, new, expected = PLANTED[name]
    with pytest.raises(Faults, match=expected):
        run(remove(text, old, new), seed)


def test_reports_name_both_places() -> None:
    text = "\n".join([*HEADER.splitlines(), '.file 1 "kernel.cu"', REVERSE.strip()])
    text = remove(text, "bar.sync 0;", ".loc 1 42 7")
    with pytest.raises(Faults) as caught:
        reverse(text, 0)
    races = [line for line in caught.value.lines if "race" in line]
    assert races and all(line.count("PTX line") == 2 for line in races)
    assert "kernel.cu:42" in str(caught.value) and "st.shared.u32 [%r4], %r1" in str(caught.value)
