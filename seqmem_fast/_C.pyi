from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
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
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def lstm_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
