"""plot.dnc: what is in the figure, not how its pixels fall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import panels, shown

pytest.importorskip("matplotlib")

from seqmem_fast import DNC, DNCTrace, plot
from seqmem_fast.plot.dnc import used_slots

T, BITS, SLOTS, READS, WRITES = 6, 3, 30, 2, 1


def trace(writes: int = WRITES, reads: int = READS, modes: int | None = None) -> DNCTrace:
    written, read = torch.zeros(T, writes, SLOTS), torch.zeros(T, reads, SLOTS)
    for t in range(T):
        written[t, :, t] = 1
        read[t, :, max(0, t - 1)] = 0.5
    return DNCTrace(
        usage=torch.rand(T, SLOTS),
        write_weights=written,
        read_weights=read,
        allocation_gates=torch.rand(T, writes),
        write_gates=torch.rand(T, writes),
        free_gates=torch.rand(T, reads),
        read_modes=torch.rand(T, reads, 1 + 2 * writes if modes is None else modes),
    )


def task() -> dict[str, torch.Tensor]:
    return {
        "input": torch.rand(T, BITS + 1),
        "output": torch.rand(T, BITS),
        "target": (torch.rand(T, BITS) > 0.5).float(),
        "mask": torch.tensor([0.0, 0, 0, 1, 1, 1]),
    }


def rows(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_panels_hold_what_they_say() -> None:
    given, made = task(), trace()
    links = torch.rand(2, WRITES, SLOTS, SLOTS)
    found = panels(plot.dnc(made, **given, links=links, links_at=(2, 5), title="copy"))
    names = ["input", "output", "error", "usage", "gates", "write weighting"]
    names += ["read weighting 0", "read weighting 1", "read mode 0", "read mode 1"]
    assert sorted(found) == sorted([*names, "links after step 2", "links after step 5"])
    slots = [0, 1, 2, 3, 4, 5]
    assert used_slots(made) == slots
    assert torch.equal(shown(found["input"]), given["input"].t())
    assert shown(found["output"])[:, :3].isnan().all()
    assert torch.equal(shown(found["output"])[:, 3:], given["output"][3:].t())
    assert torch.equal(shown(found["usage"]), made.usage[:, slots].t())
    assert torch.equal(shown(found["write weighting"]), made.write_weights[:, 0, slots].t())
    assert torch.equal(shown(found["gates"])[0], made.allocation_gates[:, 0])
    assert torch.equal(shown(found["gates"])[1], made.write_gates[:, 0])
    assert torch.equal(shown(found["gates"])[2:], made.free_gates.t())
    assert rows(found["gates"]) == ["allocation", "write", "free 0", "free 1"]
    for r in range(READS):
        weights, modes = made.read_weights[:, r, slots], made.read_modes[:, r]
        assert torch.equal(shown(found[f"read weighting {r}"]), weights.t())
        assert torch.equal(shown(found[f"read mode {r}"]), modes.t())
    assert rows(found["read mode 0"]) == ["backward", "content", "forward"]
    for k, step in enumerate((2, 5)):
        assert torch.equal(shown(found[f"links after step {step}"]), links[k, 0][:6, :6])


def test_only_slots_in_use_are_shown() -> None:
    made = trace()
    made.read_weights[3, 1, 8] = 0.2
    assert used_slots(made) == [0, 1, 2, 3, 4, 5, 8]
    assert rows(panels(plot.dnc(made))["usage"]) == ["0", "1", "2", "3", "4", "5", "8"]
    nothing = DNCTrace(*(torch.zeros_like(each) for each in made))
    assert used_slots(nothing) == list(range(SLOTS))
    few = made._replace(**{name: getattr(made, name)[..., :24] for name in made._fields[:3]})
    assert used_slots(few) == list(range(24))


def test_heads_are_numbered_where_there_are_several() -> None:
    made = trace(writes=2, reads=1)
    found = panels(plot.dnc(made, links=torch.rand(1, 2, SLOTS, SLOTS), links_at=[4]))
    assert "read weighting" in found and "write weighting 1" in found
    assert rows(found["gates"])[:4] == ["allocation 0", "allocation 1", "write 0", "write 1"]
    assert rows(found["read mode"]) == [
        "backward 0",
        "backward 1",
        "content",
        "forward 0",
        "forward 1",
    ]
    assert "links 0 after step 4" in found and "links 1 after step 4" in found


def test_a_dnc_without_links_has_no_modes() -> None:
    assert not any("mode" in name for name in panels(plot.dnc(trace(modes=0))))


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_what_a_layer_gives_can_be_drawn_and_saved(links: bool, tmp_path: Path) -> None:
    dnc, x = DNC(4, 3, 6, 8, 5, read_heads=2, links=links), torch.randn(T, 4)
    asked: dict[str, Any] = {"links_at": (1, 5)} if links else {"return_trace": True}
    _, _, made, *found = dnc(x, **asked)
    drawn = {"links": found[0], "links_at": (1, 5)} if links else {}
    plot.dnc(made, input=x, **drawn).savefig(tmp_path / "dnc.png")
    assert (tmp_path / "dnc.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("input", (T + 1, 2), r"expected input of shape \[6, 2\], got \[7, 2\]"),
        ("output", (T, 5), r"expected output of shape \[6, 3\], got \[6, 5\]"),
        ("mask", (T, 1), r"expected mask of shape \[6\], got \[6, 1\]"),
        ("links", (1, 1, 4, 4), r"expected links of shape \[2, 1, 30, 30\], got \[1, 1, 4, 4\]"),
    ],
)
def test_what_does_not_fit_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    given = {"links": torch.rand(2, WRITES, SLOTS, SLOTS), **task(), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        plot.dnc(trace(), **given, links_at=(0, 1))


def test_a_batch_and_half_a_task_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected usage of shape \[T, N\], got \[6, 1, 30\]"):
        plot.dnc(DNCTrace(*(each[:, None] for each in trace())))
    with pytest.raises(ValueError, match="expected input, output, target and mask together"):
        plot.dnc(trace(), output=torch.rand(T, BITS))
    with pytest.raises(ValueError, match=r"expected free_gates of shape \[6, 2\], got \[6, 3\]"):
        plot.dnc(trace()._replace(free_gates=torch.rand(T, 3)))
