"""LSTM and LSTMCell as modules: against torch.nn's, and what goes beyond them."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_suite import TOLERANCES, error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import seqmem_fast as sf

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"batch_first": True},
    {"bidirectional": True},
    {"proj_size": 3},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True, "bias": False},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.4},
    {"num_layers": 3, "batch_first": True, "dropout": 0.4},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[nn.LSTM, sf.LSTM]:
    """torch.nn's module and ours from the same seed."""
    modules = []
    for cls in (nn.LSTM, sf.LSTM):
        torch.manual_seed(7)
        modules.append(cls(4, 6, dtype=dtype, **options))
    return modules[0], modules[1]


def run(module: nn.Module, input: Any, hx: Any, **kwargs: Any) -> list[Tensor]:
    """Outputs, then the gradients by input, hx and parameters, under one fixed seed for dropout."""
    torch.manual_seed(3)
    data = input.data if isinstance(input, PackedSequence) else input
    leaf = data.detach().requires_grad_()
    given = input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf
    state = None if hx is None else tuple(t.detach().requires_grad_() for t in hx)
    output, final = module(given, state, **kwargs)
    results = [output.data if isinstance(output, PackedSequence) else output, *final]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.rand(r.shape, generator=generator, dtype=r.dtype) for r in results]
    leaves = [leaf, *(state or ()), *module.parameters()]
    grads = torch.autograd.grad(results, leaves, seeds, allow_unused=True)
    return [r.detach() for r in results] + [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
    ]


def state_for(module: nn.Module, batch: int | None, dtype: torch.dtype = torch.float32) -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    rows = () if batch is None else (batch,)
    return (
        torch.randn(layers, *rows, module.proj_size or module.hidden_size, dtype=dtype),
        torch.randn(layers, *rows, module.hidden_size, dtype=dtype),
    )


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_option
def test_construction_matches(options: dict[str, Any]) -> None:
    theirs, ours = pair(options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    for a, b in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert [w.shape for w in a] == [w.shape for w in b]
    x = torch.randn(5, 3, 4)
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)
    ours.flatten_parameters()
    assert ours._all_weights == theirs._all_weights
    assert ours._flat_weights_names == theirs._flat_weights_names
    for module in (ours, theirs):
        module._flat_weights[0] = torch.zeros_like(module._flat_weights[0])
    if not ours.dropout:
        x = x.transpose(0, 1) if ours.batch_first else x
        assert_same([ours(x)[0]], [theirs(x)[0]])


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 0},
        {"input_size": 4.0},
        {"hidden_size": 0},
        {"hidden_size": "6"},
        {"num_layers": 0},
        {"bias": 1},
        {"batch_first": None},
        {"dropout": -0.1},
        {"dropout": 1.5},
        {"dropout": True},
        {"proj_size": -1},
        {"proj_size": 6},
    ],
    ids=str,
)
def test_bad_construction_is_refused_as_torch_does(options: dict[str, Any]) -> None:
    arguments = {"input_size": 4, "hidden_size": 6, **options}
    with pytest.raises((ValueError, TypeError)) as theirs:
        nn.LSTM(**arguments)
    with pytest.raises(theirs.type, match=next(iter(options))):
        sf.LSTM(**arguments)


def test_idle_dropout_warns() -> None:
    with pytest.warns(UserWarning, match="dropout"):
        sf.LSTM(4, 6, dropout=0.5)


@every_option
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed", "packed_unsorted"])
def test_matches_torch(options: dict[str, Any], with_state: bool, form: str) -> None:
    theirs, ours = pair(options)
    batch: int | None = 3
    input: Any
    if form == "batched":
        input = torch.randn((3, 5, 4) if theirs.batch_first else (5, 3, 4))
    elif form == "unbatched":
        input, batch = torch.randn(5, 4), None
    else:
        lengths = [5, 3, 1] if form == "packed" else [2, 5, 3]
        rows = [torch.randn(n, 4) for n in lengths]
        input = pack_sequence(rows, enforce_sorted=form == "packed")
    hx = state_for(theirs, batch) if with_state else None
    for training in (True, False):
        assert_same(run(ours.train(training), input, hx), run(theirs.train(training), input, hx))


@pytest.mark.parametrize("form", ["packed", "packed_unsorted"])
def test_packed_output_carries_its_order(form: str) -> None:
    theirs, ours = pair({})
    rows = [torch.randn(n, 4) for n in ([5, 3, 1] if form == "packed" else [2, 5, 3])]
    input = pack_sequence(rows, enforce_sorted=form == "packed")
    for a, b in zip(ours(input)[0], theirs(input)[0], strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


def test_dropout_draws_as_torch_does() -> None:
    theirs, ours = pair({"num_layers": 2, "dropout": 0.5})
    x = torch.randn(5, 3, 4)
    first, second = run(ours, x, None), run(theirs, x, None)
    assert_same(first, second)
    torch.manual_seed(4)
    assert not torch.allclose(ours(x)[0], first[0])  # another seed, another mask


@every_option
def test_state_dict_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = pair(options)
    other_theirs, other_ours = pair(options)
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *ours.parameters()):
            parameter.normal_()
    other_ours.load_state_dict(theirs.state_dict())
    other_theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4)
    for module in (theirs, ours, other_theirs, other_ours):
        module.eval()
    assert_same([other_ours(x)[0]], [theirs(x)[0]])
    assert_same([other_theirs(x)[0]], [ours(x)[0]])


def segments_reference(
    module: nn.LSTM, x: Tensor, hx: Any, lengths: Tensor, reset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """nn.LSTM run on every uninterrupted stretch of every row by itself; x is [T, B, I]."""
    time, batch, _ = x.shape
    directions = 2 if module.bidirectional else 1
    out = module.proj_size or module.hidden_size
    output = x.new_zeros(time, batch, directions * out)
    zeros = tuple(torch.zeros_like(t) for t in state_for(module, batch, x.dtype))
    h_n, c_n = (t.clone() for t in hx) if hx is not None else (t.clone() for t in zeros)
    for row in range(batch):
        end = int(lengths[row])
        cuts = [t for t in range(1, end) if reset[t, row]]
        edges = [0, *cuts, end] if end else []
        for start, stop in itertools.pairwise(edges):
            state = [t[:, row].clone() for t in zeros]
            for k, initial in enumerate(hx or ()):
                for line in range(initial.size(0)):
                    backward = directions == 2 and line % 2 == 1
                    enters = stop == end if backward else start == 0 and not reset[0, row]
                    if enters:
                        state[k][line] = initial[line, row]
            y, final = module(x[start:stop, row], tuple(state))
            output[start:stop, row] = y
            for target, value in zip((h_n, c_n), final, strict=True):
                for line in range(value.size(0)):
                    backward = directions == 2 and line % 2 == 1
                    if start == 0 if backward else stop == end:
                        target[line, row] = value[line]
    return output, h_n, c_n


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    hidden = draw(st.integers(1, 20))
    options = {
        "input_size": draw(st.integers(1, 20)),
        "hidden_size": hidden,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(0, hidden - 1)),
    }
    time, batch = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    lengths = draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch))
    return {
        "options": options,
        "sizes": (time, batch),
        "lengths": draw(st.sampled_from([None, lengths])),
        "reset": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "hx": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, print_blob=True)
@given(configurations())
def test_space_of_configurations(config: dict[str, Any]) -> None:
    """Any options, sizes, lengths and resets: outputs and gradients against nn.LSTM in float64."""
    torch.manual_seed(config["seed"])
    options, dtype, (time, batch) = config["options"], config["dtype"], config["sizes"]
    ours = sf.LSTM(dtype=dtype, **options)
    exact = nn.LSTM(dtype=torch.float64, **{**options, "batch_first": False})
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(time, batch, options["input_size"]).to(dtype)
    hx = [t.to(dtype) for t in state_for(ours, batch)] if config["hx"] else None
    reset = torch.rand(time, batch) < config["reset"]
    lengths = None if config["lengths"] is None else torch.tensor(config["lengths"]).long()

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, 1) if options["batch_first"] else t

    leaves = [t.requires_grad_() for t in (x, *(hx or ()))]
    output, (h_n, c_n) = ours(
        transposed(x),
        None if hx is None else tuple(hx),
        lengths=lengths,
        reset=transposed(reset) if config["reset"] else None,
    )
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    whole = torch.full((batch,), time) if lengths is None else lengths
    expected = segments_reference(exact, doubles[0], tuple(doubles[1:]) or None, whole, reset)
    found = (transposed(output), h_n, c_n)
    bounds = TOLERANCES[dtype]
    if bounds.eager:  # a stack rounds to 16 bits between layers, so its errors grow with depth
        bounds = bounds._replace(output=0.03, gradient=0.06)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and error(a, b) <= bounds.output
    seeds = [torch.rand_like(e) for e in expected]
    loss = sum((a * s.to(dtype)).sum() for a, s in zip(found, seeds, strict=True))
    target = sum((a * s.to(dtype)).sum() for a, s in zip(expected, seeds, strict=True))
    loss.backward()
    if target.requires_grad:  # with an empty batch nothing was run for it
        target.backward()
    pairs = zip((*leaves, *ours.parameters()), (*doubles, *exact.parameters()), strict=True)
    for a, b in pairs:
        grad = torch.zeros_like(b) if b.grad is None else b.grad
        if a.numel():
            assert error(a.grad, grad) <= bounds.gradient


@pytest.mark.parametrize("hx", [False, True])
def test_lengths_match_packing(hx: bool) -> None:
    theirs, ours = pair({"num_layers": 2, "bidirectional": True})
    x, lengths = torch.randn(6, 4, 4), torch.tensor([3, 6, 1, 4])
    state = state_for(theirs, 4) if hx else None
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, final = theirs(packed, state)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, total_length=6)
    output, state = ours(x, state, lengths=lengths)
    assert_same([output, *state], [expected, *final])


@every_option
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed"])
def test_gates_recompute_the_output(options: dict[str, Any], form: str) -> None:
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t) hold between what comes back."""
    _, ours = pair(options)
    ours.eval()
    input: Any = torch.randn(5, 4) if form == "unbatched" else torch.randn(5, 3, 4)
    if form == "packed":
        input = pack_sequence([torch.randn(5, 4), torch.randn(5, 4)])
    elif form == "batched" and ours.batch_first:
        input = input.transpose(0, 1)
    output, (h_n, c_n), gates = ours(input, return_gates=True)
    plain, _ = ours(input)
    data = output.data if form == "packed" else output
    assert torch.equal(data, plain.data if form == "packed" else plain)
    time = 2 if form == "batched" and ours.batch_first else 1
    every = torch.stack(gates)
    if form == "packed":
        every = every.unflatten(2, (5, 2))
    i, f, g, o, c = every.unbind()
    directions = 2 if ours.bidirectional else 1
    for line in range(c.size(0)):
        steps = c[line].unbind(time - 1)
        order = list(range(5))[:: -1 if directions == 2 and line % 2 else 1]
        before = torch.zeros_like(steps[0])
        for t in order:
            at = (line,) + (slice(None),) * (time - 1) + (t,)
            torch.testing.assert_close(c[at], f[at] * before + i[at] * g[at])
            before = c[at]
        torch.testing.assert_close(before, c_n[line])
        h = o[line] * torch.tanh(c[line])
        if ours.proj_size:
            h = h @ ours.all_weights[line][-1].t()
        torch.testing.assert_close(h.select(time - 1, order[-1]), h_n[line])
        if line >= c.size(0) - directions:
            width = h.size(-1)
            start = (line - c.size(0) + directions) * width
            last = data.unflatten(0, (5, 2)) if form == "packed" else data
            torch.testing.assert_close(h, last[..., start : start + width])
    every.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("rows", [(), (3,), (0,)])
def test_cell_matches_torch(bias: bool, with_state: bool, rows: tuple[int, ...]) -> None:
    modules = []
    for cls in (nn.LSTMCell, sf.LSTMCell):
        torch.manual_seed(7)
        modules.append(cls(4, 6, bias))
    theirs, ours = modules
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*rows, 4)
    hx = (torch.randn(*rows, 6), torch.randn(*rows, 6)) if with_state else None
    results = []
    for module in modules:
        leaf = x.clone().requires_grad_()
        hy, cy = module(leaf, hx)
        (hy.sum() + 2 * cy.sum()).backward()
        results.append([hy, cy, leaf.grad, *(p.grad for p in module.parameters())])
    assert_same(*results)


@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm], ids=["hook", "param"])
def test_weight_norm(wrap: Any) -> None:
    theirs, ours = pair({"num_layers": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs, ours = wrap(theirs, "weight_hh_l0"), wrap(ours, "weight_hh_l0")
    x = torch.randn(5, 3, 4)
    for _ in range(2):  # the second time after a step: nothing may be cached
        assert_same(run(ours, x, None), run(theirs, x, None))
        with torch.no_grad():
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                p.mul_(1.5)
                q.mul_(1.5)


def test_pruned_and_replaced_weights() -> None:
    theirs, ours = pair({})
    x = torch.randn(5, 3, 4)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    assert_same([ours(x)[0]], [theirs(x)[0]])
    for module in (theirs, ours):
        prune.remove(module, "weight_hh_l0")
        module.weight_ih_l0 = nn.Parameter(torch.ones(24, 4))
    assert_same([ours(x)[0]], [theirs(x)[0]])


def test_functional_call() -> None:
    theirs, ours = pair({"num_layers": 2})
    x = torch.randn(5, 3, 4)
    doubled = {name: 2 * p for name, p in theirs.named_parameters()}
    a, _ = torch.func.functional_call(ours, doubled, (x,))
    b, _ = torch.func.functional_call(theirs, doubled, (x,))
    assert_same([a], [b])


def test_per_sample_gradients() -> None:
    """vmap over grad over functional_call: the usual road to per-sample gradients."""
    _, ours = pair({})
    x = torch.randn(3, 5, 4)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, (row,))[0].sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k in range(3):
        ours.zero_grad()
        ours(x[k])[0].sum().backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(grads[name][k], p.grad)


@every_option
def test_copy_and_pickle(options: dict[str, Any]) -> None:
    _, ours = pair(options)
    ours.eval()
    x = torch.randn(5, 3, 4)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    again = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ]
    for other in again:
        assert torch.equal(other(x)[0], ours(x)[0])
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert not torch.equal(other(x)[0], ours(x)[0])


def test_moves_and_casts() -> None:
    _, ours = pair({})
    assert ours.double()(torch.randn(5, 3, 4, dtype=torch.float64))[0].dtype == torch.float64
    assert ours.bfloat16()(torch.randn(5, 3, 4).bfloat16())[0].dtype == torch.bfloat16
    output, (h_n, _) = ours.to("meta")(torch.empty(5, 3, 4, device="meta", dtype=torch.bfloat16))
    assert output.is_meta and output.shape == (5, 3, 6) and h_n.shape == (1, 3, 6)


def test_checkpointing_and_offloaded_activations() -> None:
    _, ours = pair({"num_layers": 2})
    x = torch.randn(5, 3, 4)
    expected = run(ours, x, None)

    def checkpointed(input: Tensor, hx: Any) -> Any:
        return checkpoint(ours, input, hx, use_reentrant=False)

    checkpointed.parameters = ours.parameters  # type: ignore[attr-defined]
    assert_same(run(checkpointed, x, None), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same(run(ours, x, None), expected)


def test_jacobians_of_whole_batches() -> None:
    """The vectorised backward passes many gradients at once through the C++ node."""
    _, ours = pair({})
    x = torch.randn(3, 2, 4)
    rows = torch.autograd.functional.jacobian(lambda x: ours(x)[0], x)
    together = torch.autograd.functional.jacobian(lambda x: ours(x)[0], x, vectorize=True)
    torch.testing.assert_close(together, rows)


def test_weights_changed_before_backward_are_noticed() -> None:
    _, ours = pair({})
    output, _ = ours(torch.randn(5, 3, 4))
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_in_eval_mode() -> None:
    theirs, ours = pair({"num_layers": 2, "dropout": 0.5})
    x = torch.randn(5, 3, 4)
    assert_same(run(ours.eval(), x, None), run(theirs.eval(), x, None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [OPTIONS[0], OPTIONS[6], {"num_layers": 2, "dropout": 0.4}], ids=str
)
def test_compile_module(options: dict[str, Any]) -> None:
    _, ours = pair(options)
    ours.eval()
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn((3, 5, 4) if ours.batch_first else (5, 3, 4))
    hx = state_for(ours, 3)
    for state in (None, hx):
        assert_same(run(compiled, x, state), run(ours, x, state))
    reset = torch.rand(x.shape[:2]) < 0.3
    variable = {"lengths": torch.tensor([1, 5, 3]), "reset": reset}
    assert_same(run(compiled, x, hx, **variable), run(ours, x, hx, **variable))


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    """The real backend, once, with work before and after to fuse."""
    _, ours = pair({"num_layers": 2, "bidirectional": True})
    model = nn.Sequential(nn.Linear(4, 4), ours)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 3, 4)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        output, (h_n, _) = call(x)
        (output.sin().sum() + h_n.sum()).backward()
        results.append([output, h_n, *(p.grad.clone() for p in model.parameters())])
    assert_same(*results)


def test_compile_does_not_unroll_or_recompile_over_time() -> None:
    from torch._dynamo.testing import CompileCounter

    _, ours = pair({})
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    for time in (5, 6, 7, 300):
        assert compiled(torch.randn(time, 3, 4))[0].shape == (time, 3, 6)
    assert counter.frame_count == 1
    assert counter.op_count < 20


@pytest.mark.slow
def test_compiled_packed_sequence() -> None:
    _, ours = pair({})
    torch.compiler.reset()
    packed = pack_sequence([torch.randn(n, 4) for n in (2, 5, 3)], enforce_sorted=False)
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(packed)[0].data, ours(packed)[0].data)


@pytest.mark.parametrize("strict", [False, True])
def test_export_module(strict: bool) -> None:
    _, ours = pair({"num_layers": 2, "batch_first": True})
    ours.eval()
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1)
    program = torch.export.export(
        ours, (torch.randn(3, 5, 4),), dynamic_shapes=({0: batch, 1: time},), strict=strict
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in ((3, 5, 4), (2, 9, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), ours(x))


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cell_has_torchs_dtypes_under_autocast(
    dtype: torch.dtype, state: torch.dtype | None
) -> None:
    theirs = nn.LSTMCell(3, 4)
    ours = sf.LSTMCell.from_torch(theirs)
    x = torch.randn(2, 3, dtype=dtype)
    hx = None if state is None else (torch.randn(2, 4, dtype=state), torch.randn(2, 4, dtype=state))
    with torch.autocast("cpu", torch.bfloat16):
        found, right = ours(x, hx), theirs(x, hx)
    for a, b in zip(found, right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), atol=3e-2, rtol=3e-2)


def test_regularized_cell_keeps_its_state_under_autocast() -> None:
    x, hx = torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4))
    cell = sf.LSTMCell(3, 4, zoneout_c=0.1, layer_norm=True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = cell(x, hx)
        assert cell(x)[1].dtype == torch.float32
        assert cell(x.bfloat16(), hx)[1].dtype == torch.float32
    for a, b in zip(found, cell(x, hx), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_from_torch_takes_what_it_can_use(kind: str) -> None:
    ours, theirs = getattr(sf, kind), getattr(nn, kind)
    name = "weight_hh" if kind == "LSTMCell" else "weight_hh_l0"
    with pytest.raises(TypeError, match=rf"expected a torch.nn.{kind}, got GRU"):
        ours.from_torch(nn.GRU(4, 6))
    computed = parametrizations.weight_norm(theirs(4, 6), name)
    with pytest.raises(ValueError, match=f"every weight to be a Parameter, got {name} computed"):
        ours.from_torch(computed)
    own = ours(4, 6, zoneout_h=0.5, layer_norm=True)
    again = ours.from_torch(own)
    assert repr(again) == repr(own) and again.state_dict().keys() == own.state_dict().keys()


@pytest.mark.parametrize("batch", [0, 3])
def test_cell_trains_where_its_state_is_changed_in_place(batch: int) -> None:
    theirs = nn.LSTMCell(3, 4).double()
    ours = sf.LSTMCell.from_torch(theirs)
    steps, keep = torch.randn(3, batch, 3).double(), (torch.arange(batch) % 2)[:, None].double()
    grads = []
    for cell in (theirs, ours):
        h = c = torch.zeros(batch, 4).double()
        for x in steps:
            h, c = cell(x, (h, c))
            h *= keep
            c *= keep
        total = (h + c.square()).sum()
        first = torch.autograd.grad(total, list(cell.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(cell.parameters()))
        grads.append([*first, *second])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_module() -> None:
    theirs, ours = pair({"num_layers": 2})
    x, hx = torch.randn(5, 3, 4), state_for(ours, 3)
    with torch.autocast("cpu", torch.bfloat16):
        a, _ = ours(x, hx)
    assert a.dtype == torch.bfloat16
    torch.testing.assert_close(a.float(), theirs(x, hx)[0], rtol=0.05, atol=0.02)
    a.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_training_takes_the_same_road() -> None:
    theirs, ours = pair({"num_layers": 2})
    x, y = torch.randn(8, 4, 4), torch.randn(8, 4, 6)
    losses: list[list[float]] = []
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(30):
            optimizer.zero_grad()
            loss = (module(x)[0] - y).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)
    assert losses[1][-1] < losses[1][0]
