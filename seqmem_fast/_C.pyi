from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def available_threads() -> int: ...
def bf16_in_use() -> str: ...
def attention_module(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    batch_first: bool,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None] | None: ...
def lstm_cell(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor]: ...

# rest: five weights and biases, lengths, reset, batch_first
def lstm_layer(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *rest: Tensor | bool | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
def ntm_module(
    input: Tensor,
    state: list[Tensor],
    controller: list[Tensor],
    rest: list[Tensor],  # weight and bias of the heads, and of the output layer
    heads: str,
    shift_range: int,
    lstm: bool,
    squash: bool,
    shared: bool,
    logits: bool,
    activation: str | None,
    trace: bool,
) -> list[Tensor] | None: ...
