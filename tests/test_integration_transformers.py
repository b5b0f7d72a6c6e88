"""A small Qwen3-Next of transformers gives the same with our op as with its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from seqmem_fast.integrations.transformers import NAMES, patch

qwen: Any = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """Three layers with a memory and one of attention."""
    torch.manual_seed(0)
    config = qwen.Qwen3NextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    yield qwen.Qwen3NextForCausalLM(config).eval()


def calls(patched: list[str], patch_object: pytest.MonkeyPatch) -> None:
    """Notes the rules of transformers that still run."""
    for name in NAMES:
        rule = getattr(qwen, name)

        def noted(*args: Any, rule: Any = rule, name: str = name, **kwargs: Any) -> Any:
            patched.append(name)
            return rule(*args, **kwargs)

        patch_object.setattr(qwen, name, noted)


def test_logits_loss_and_gradients(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    calls(ran, monkeypatch)
    tokens = torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(0))
    results = []
    for ours in (False, True):
        patched = patch() if ours else None
        before = len(ran)
        model.zero_grad()
        found = model(tokens, labels=tokens)
        found.loss.backward()
        assert (len(ran) > before) != ours
        if patched is not None:
            patched.undo()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([found.logits.detach(), found.loss.detach(), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_generation_and_undo(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding goes step by step through the cache."""
    tokens = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    ran: list[str] = []
    calls(ran, monkeypatch)
    rules = [getattr(qwen, name) for name in NAMES]
    with patch():
        patch().undo()  # of nothing: it is patched already
        assert torch.equal(model.generate(tokens, **options), expected) and not ran
    assert [getattr(qwen, name) for name in NAMES] == rules
    model(tokens)
    assert ran


def test_what_is_not_ours_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    calls(ran, monkeypatch)
    q, beta = torch.randn(1, 4, 2, 8), torch.rand(1, 4, 2)
    with patch():
        ours = qwen.torch_chunk_gated_delta_rule(q, q, q, -beta, beta)
        assert ours[1] is None and not ran
        with pytest.raises(ValueError, match="packed sequences"):
            qwen.torch_chunk_gated_delta_rule(q, q, q, -beta, beta, cu_seqlens=torch.arange(2) * 4)
        assert ran == ["torch_chunk_gated_delta_rule"]
    theirs = qwen.torch_chunk_gated_delta_rule(q, q, q, -beta, beta)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)


def test_nothing_to_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.modules", {})
    with pytest.raises(RuntimeError, match=r"expected a loaded model of transformers .*got none"):
        patch()
