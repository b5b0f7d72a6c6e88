"""seqmem_fast.Attention beside torch.nn.MultiheadAttention, and accelerate's swap of the two."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hostile_suite import check_refused_by_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import seqmem_fast as sf

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 6, 8, 2
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "widths": {"kdim": 5, "vdim": 7},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all_extras": {"add_bias_kv": True, "add_zero_attn": True, "bias": False, "kdim": 3},
    "batch_first": {"batch_first": True},
    "dropout": {"dropout": 0.3},
}
padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] + [True] * 5])
causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
bias = torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(1))
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads": {"average_attn_weights": False, "key_padding_mask": padding},
    "two_masks": {"key_padding_mask": padding, "attn_mask": causal},
    "causal": {"attn_mask": causal, "is_causal": True},
    "added": {"attn_mask": bias},
    "added_per_key": {"key_padding_mask": bias[:BATCH, 0], "attn_mask": bias[0]},
    "mixed": {"attn_mask": bias, "key_padding_mask": padding},
    "no_weights": {"need_weights": False},
    "no_weights_masked": {"need_weights": False, "key_padding_mask": padding},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # torch would rather have both masks of one type
        warnings.filterwarnings("ignore", message="Support for mismatched")
        yield


def pair(options: dict[str, Any]) -> tuple[nn.MultiheadAttention, sf.Attention]:
    made = []
    for cls in (nn.MultiheadAttention, sf.Attention):
        torch.manual_seed(0)
        made.append(cls(WIDTH, HEADS, **options))
    return tuple(made)


def inputs(options: dict[str, Any]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(2)
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    made = [
        torch.randn(length, BATCH, width, generator=rng).requires_grad_()
        for length, width in zip((QUERIES, KEYS, KEYS), widths, strict=True)
    ]
    return [t.transpose(0, 1) for t in made] if options.get("batch_first") else made


def run(module: nn.Module, args: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients of inputs and parameters, dropout drawn from one seed."""
    torch.manual_seed(3)
    output, weights = module(*args, **call)
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    if weights is not None:
        loss = loss + (weights * weights.detach().sin()).sum()
    leaves = [*args, *module.parameters()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [output, *([] if weights is None else [weights]), *grads]


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODULES)
def test_equals_torch(name: str, call: str) -> None:
    theirs, ours = pair(MODULES[name])
    args = inputs(MODULES[name])
    agree(run(ours, args, CALLS[call]), run(theirs, args, CALLS[call]))


@pytest.mark.parametrize("name", MODULES)
def test_same_parameters_from_the_same_seed_and_both_ways(name: str) -> None:
    theirs, ours = pair(MODULES[name])
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(ours.state_dict()[key], state[key]) for key in state)
    ours.load_state_dict({key: value + 1 for key, value in state.items()})
    theirs.load_state_dict(ours.state_dict())
    assert all(
        torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("shared", ["all", "key and value"])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_projects_at_once(shared: str, bias: bool) -> None:
    theirs, ours = pair({"bias": bias})
    q, k, _ = inputs({})
    args = [q, q, q] if shared == "all" else [q, k, k]
    agree(run(ours, args, {})[:2], run(theirs, args, {})[:2])


@pytest.mark.parametrize("need_weights", [True, False])
def test_other_normalizers(need_weights: bool) -> None:
    """Its parameters are torch's, its weights those of the op, also where dropout thins them."""
    torch.manual_seed(0)
    layer = sf.Attention(8, 2, normalizer="entmax", alpha=nn.Parameter(torch.tensor(1.7)))
    x = torch.randn(5, 3, 8)
    output, weights = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
    q, k, v = (
        t.unflatten(-1, (2, 4)).permute(1, 2, 0, 3)
        for t in nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    attended, expected = sf.ops.attention(q, k, v, normalizer="entmax", alpha=layer.alpha)
    right = layer.out_proj(attended.permute(2, 0, 1, 3).flatten(2))
    assert torch.allclose(output, right, atol=1e-6)
    assert torch.equal(weights, expected) if need_weights else weights is None
    output.sum().backward()
    assert layer.alpha.grad is not None and "alpha" in layer.state_dict()
    layer.dropout = 0.5
    _, weights = layer(x, x, x, average_attn_weights=False)
    kept = weights != 0
    assert torch.allclose(weights[kept], 2 * expected[kept]) and not kept.all()


def test_unbatched() -> None:
    theirs, ours = pair({})
    args = [t[:, 0] for t in inputs({})]
    for call in ({}, {"key_padding_mask": padding[1], "average_attn_weights": False}):
        agree(run(ours, args, call), run(theirs, args, call))
    assert ours(*args)[0].shape == (QUERIES, WIDTH)


def test_a_row_without_keys_is_uniform_where_weights_are_wanted() -> None:
    _, ours = pair({})
    everything = torch.ones(BATCH, KEYS, dtype=torch.bool)
    args = inputs({})
    output, weights = ours(*args, key_padding_mask=everything)
    _, _, v = args
    value = ours.in_proj_weight[2 * WIDTH :] @ v.mean(0).T
    torch.testing.assert_close(output, ours.out_proj(value.T).expand_as(output))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / KEYS))


@pytest.mark.parametrize("kind", ["bool", "-inf", "mixed"])
def test_a_row_without_keys_is_zero_where_no_weights_are_wanted(kind: str) -> None:
    theirs, ours = pair({})
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    args = inputs({})
    empty = padding | torch.tensor([[False], [True], [False]])
    masks: dict[str, Any] = {"key_padding_mask": empty}
    if kind == "-inf":
        masks = {"key_padding_mask": torch.zeros(BATCH, KEYS).masked_fill(empty, -torch.inf)}
    elif kind == "mixed":
        masks["attn_mask"] = bias
    output, _ = ours(*args, **masks, need_weights=False)
    torch.testing.assert_close(output, theirs(*args, **masks, need_weights=False)[0])
    torch.testing.assert_close(output[:, 1], ours.out_proj.bias.expand_as(output[:, 1]))


@pytest.mark.parametrize("call", ["plain", "two_masks", "no_weights", "no_weights_masked"])
def test_the_output_is_contiguous_in_either_layout(call: str) -> None:
    for options in ({}, {"batch_first": True}, {"add_zero_attn": True}):
        output, _ = pair(options)[1](*inputs(options), **CALLS[call])
        assert output.is_contiguous()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", ["plain", "no_weights"])
def test_the_compiled_call_is_the_general_one(call: str, batch_first: bool) -> None:
    """A hook on out_proj, which must run, sends the call the general way."""
    _, ours = pair({"batch_first": batch_first})
    q, k, v = inputs({"batch_first": batch_first})
    for args in ([q, k, v], [q, q, q], [k, v, v]):
        usual = run(ours, args, CALLS[call])
        seen: list[Any] = []
        handle = ours.out_proj.register_forward_hook(lambda *given, seen=seen: seen.append(given))
        agree(usual, run(ours, args, CALLS[call]))
        handle.remove()
        assert len(seen) == 1


def test_a_forward_of_out_proj_s_own_is_called() -> None:
    _, ours = pair({})
    ours.out_proj.forward = lambda x: torch.full_like(x, 3.0)
    with torch.no_grad():
        output, _ = ours(*inputs({}))
    assert bool((output == 3).all())


def test_the_compiled_call_refuses_as_the_general_one() -> None:
    _, ours = pair({})
    q, k, v = inputs({})
    for wrong in ((q, k[:-1], v), (q, k[:, :1], v[:, :1]), (q[..., :4], k, v), (q[0, 0], k, v)):
        with pytest.raises(ValueError, match=r"^seqmem::attention: expected"):
            ours(*wrong)


def test_torchs_other_names() -> None:
    theirs, ours = pair({"batch_first": True})
    for module in (theirs, ours):
        torch.manual_seed(5)
        module._reset_parameters()
    assert torch.equal(theirs.in_proj_weight, ours.in_proj_weight)
    x, square = inputs({"batch_first": True})[0], causal[:, :QUERIES]
    merged = [module.merge_masks(square, padding[:, :QUERIES], x) for module in (ours, theirs)]
    assert torch.equal(merged[0][0], merged[1][0]) and merged[0][1] == merged[1][1]


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    _, ours = pair({})
    args = inputs({})
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    agree(run(compiled, args, CALLS["two_masks"]), run(ours, args, CALLS["two_masks"]))


def test_copies_and_pickles() -> None:
    _, ours = pair({"add_bias_kv": True})
    args = inputs({})
    expected = ours(*args)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*args)[0], expected[0])


def test_autocast() -> None:
    theirs, ours = pair({})
    args = inputs({})
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = ours(*args, attn_mask=bias)
        expected = theirs(*args, attn_mask=bias)
    assert output.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected[0], rtol=0.05, atol=0.02)


class Model(nn.Module):
    """Attention of one's own, and torch's layer, which asks for no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return self.layer(y), weights


def test_accelerate_swaps_and_restores() -> None:
    torch.manual_seed(0)
    net = Model().eval()
    x = inputs({})[0]
    before = net(x)
    original, parameters = net.attention, dict(net.named_parameters())
    report = sf.accelerate(net)
    assert report.swapped == [("attention", "MultiheadAttention(8, 2)")]
    assert "left layer.self_attn: MultiheadAttention: its layer asks for no weights" in str(report)
    assert net.attention is original and type(original) is nn.MultiheadAttention
    assert "forward" in vars(original) and not original.training
    assert all(p is parameters[name] for name, p in net.named_parameters())
    torch.testing.assert_close(net(x), before)
    assert sf.restore(net) == 1 and "forward" not in vars(original)
    assert torch.equal(net(x)[0], before[0])


def test_accelerate_takes_parametrizations_along() -> None:
    net = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS)])
    parametrizations.weight_norm(net[0], "in_proj_weight")
    args = inputs({})
    before = net[0](*args)
    names = list(net.state_dict())
    sf.accelerate(net)
    assert "forward" in vars(net[0]) and list(net.state_dict()) == names
    torch.testing.assert_close(net[0](*args), before)


def test_accelerate_leaves_what_has_a_forward_of_its_own() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Masks(nn.MultiheadAttention):
        def merge_masks(self, *args: Any) -> Any:
            return super().merge_masks(*args)

    report = sf.accelerate(nn.ModuleList([Own(WIDTH, HEADS), Masks(WIDTH, HEADS)]))
    assert not report.swapped and str(report).count("a subclass") == 2
    model = nn.MultiheadAttention(WIDTH, HEADS)
    assert sf.accelerate(model).swapped and "forward" in vars(model)


def test_accelerate_takes_out_proj_s_weights_alone() -> None:
    """As torch, which never calls it."""
    theirs, _ = pair({})
    theirs.out_proj.forward = lambda x: torch.full_like(x, 3.0)
    args = inputs({})
    right = theirs(*args)
    sf.accelerate(theirs)
    for a, b in zip(theirs(*args), right, strict=True):
        torch.testing.assert_close(a, b)


def module(**options: Any) -> sf.Attention:
    return sf.Attention(6, 2, **options)


z = torch.zeros
x, long = z(4, 3, 6), z(5, 3, 6)
MODULE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "heads": (lambda: sf.Attention(6, 4), ValueError, "embed_dim > 0 that num_heads"),
    "no heads": (lambda: sf.Attention(6, 0), ValueError, "embed_dim > 0 that num_heads"),
    "dropout": (lambda: module(dropout=1.5), ValueError, "dropout in 0..1, got 1.5"),
    "query half": (lambda: module()(x.half(), x, x), TypeError, "query of the parameters' dtype"),
    "value double": (lambda: module()(x, x, x.double()), TypeError, "value of the parameters' d"),
    "no key": (lambda: module()(x, None, x), TypeError, "key to be a tensor, got NoneType"),
    "query list": (lambda: module()([1.0], x, x), TypeError, "query to be a tensor, got list"),
    "query 4-D": (lambda: module()(x[None], x, x), ValueError, "query with 2 or 3 dim"),
    "query width": (lambda: module()(z(4, 3, 5), x, x), ValueError, r"query of shape \[4, 3, 6\]"),
    "key 2-D": (lambda: module()(x, z(4, 6), x), ValueError, "key of shape"),
    "key width": (lambda: module(kdim=5)(x, x, x), ValueError, r"key of shape \[4, 3, 5\]"),
    "key batch": (lambda: module()(x, z(4, 2, 6), x), ValueError, r"key of shape \[4, 3, 6\]"),
    "value length": (lambda: module()(x, long, x), ValueError, r"value of shape \[5, 3, 6\]"),
    "value width": (lambda: module(vdim=7)(x, x, x), ValueError, r"value of shape \[4, 3, 7\]"),
    "batch_first": (
        lambda: module(batch_first=True)(x, long, long),
        ValueError,
        r"key of shape \[4, 3, 6\], got shape \[5, 3, 6\]",
    ),
    "padding shape": (
        lambda: module()(x, long, long, z(5, 3).bool()),
        ValueError,
        r"key_padding_mask of shape \[3, 5\]",
    ),
    "padding dtype": (lambda: module()(x, x, x, z(3, 4).int()), TypeError, "key_padding_mask of d"),
    "mask shape": (
        lambda: module()(x, long, long, attn_mask=z(3, 4, 5)),
        ValueError,
        r"attn_mask of shape \[4, 5\] or \[6, 4, 5\]",
    ),
    "mask dtype": (lambda: module()(x, x, x, attn_mask=z(4, 4).int()), TypeError, "attn_mask of d"),
    "causal": (lambda: module()(x, x, x, is_causal=True), ValueError, "attn_mask with is_causal"),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", MODULE)
def test_module_refuses(name: str) -> None:
    check_refused_by_module(*MODULE[name])


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_torchs_layers_do_not_put_softmax_in_its_place(normalizer: str) -> None:
    """nn.TransformerEncoderLayer computes a usual nn.MultiheadAttention by itself in inference."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = sf.Attention(8, 2, batch_first=True, normalizer=normalizer)  # type: ignore[assignment]
    x = 3 * torch.randn(2, 5, 8)
    layer.eval()
    followed = layer(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), followed, atol=1e-5)


def test_a_normalizer_is_checked_and_told() -> None:
    with pytest.raises(ValueError, match="seqmem::attention: expected normalizer softmax"):
        sf.Attention(8, 2, normalizer="hardmax")
    with pytest.raises(ValueError, match="expected alpha with 1 < alpha <= 2, got 7"):
        sf.Attention(8, 2, normalizer="entmax", alpha=7)
    with pytest.raises(TypeError, match="expected alpha to be a number with normalizer sparsemax"):
        sf.Attention(8, 2, normalizer="sparsemax", alpha=torch.tensor(2.0))
    assert repr(sf.Attention(8, 2, normalizer="entmax", alpha=1.3)) == (
        "Attention(\n  8, 2, normalizer=entmax, alpha=1.3\n"
        "  (out_proj): Linear(in_features=8, out_features=8, bias=True)\n)"
    )
    with pytest.raises(TypeError, match=r"expected Attention\.from_torch, got WindowAttention"):
        sf.WindowAttention.from_torch(nn.MultiheadAttention(8, 2))


def test_a_row_without_keys_and_another_normalizer() -> None:
    """It attends to all keys alike, whether weights are wanted or not."""
    layer = sf.Attention(8, 2, batch_first=True, normalizer="sparsemax")
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True
    for mask in (None, torch.zeros(5, 5, dtype=torch.bool), torch.zeros(5, 5)):
        output, _ = layer(x, x, x, padding, attn_mask=mask)
        alone, none = layer(x, x, x, padding, need_weights=False, attn_mask=mask)
        assert none is None and torch.equal(output, alone)
