"""What the networks with a memory share: their controller, initial state, layouts and text."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ..ops.common import require_like, require_tensors

State = TypeVar("State", bound="tuple[Tensor, ...]")

_ACTIVATIONS = {None: None, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class MemoryNetwork(nn.Module, Generic[State]):
    """A controller that reads from and writes to a memory, and a Linear on what it then knows.

    The state is a NamedTuple: hidden and cell [L, B, C], then tensors that begin with B. A subclass
    calls `_add_controller`, registers the rest, and says in `_first_state` what a sequence starts
    with; its forward is `_enter`, its op, `_answer` and `_leave`.
    """

    _op: ClassVar[str]
    _state: ClassVar[Any]  # the NamedTuple
    output: nn.Linear
    memory_init: str  # as the next five, of those that call `_add_heads`
    head_weight: Tensor
    head_bias: Tensor
    initial_hidden: Tensor
    initial_cell: Tensor
    initial_memory: Tensor

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],  # of input, output, controller, N and M
        controller: str,
        num_layers: int,
        batch_first: bool,
        output_activation: str | None,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size, self.controller_size, *of_memory = sizes
        self.memory_size, self.memory_dim = of_memory
        self.num_layers = num_layers
        self.controller, self.batch_first = controller, batch_first
        self.output_activation = output_activation
        self._positive("input_size", "output_size", "controller_size", "memory_size")
        self._positive("memory_dim", "num_layers")
        self._one_of("controller", "lstm", "feedforward")
        self._one_of("output_activation", *_ACTIVATIONS)

    def _positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"seqmem::{self._op}: expected {name} > 0, got {getattr(self, name)}"
                )

    def _one_of(self, name: str, *allowed: Any) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"seqmem::{self._op}: expected {name} as one of {list(allowed)}, "
                f"got {getattr(self, name)!r}"
            )

    def _keep(self, made: dict[str, Any], name: str, learned: bool, *shape: int) -> None:
        """An empty parameter, or a buffer; `made` holds device and dtype."""
        if learned:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)))
        else:
            self.register_buffer(name, torch.empty(shape, **made))

    def _add_controller(self, made: dict[str, Any], reads: int) -> None:
        """The controller's parameters and the output layer, for that many reads."""
        size, wide = self.controller_size, reads * self.memory_dim
        self._controller_names: list[str] = []
        for k in range(self.num_layers):
            below = size if k else self.input_size + wide
            shapes: dict[str, tuple[int, ...]] = {"weight": (size, below), "bias": (size,)}
            if self.controller == "lstm":
                shapes = {"weight_ih": (4 * size, below), "weight_hh": (4 * size, size)}
                shapes |= {"bias_ih": (4 * size,), "bias_hh": (4 * size,)}
            for name, shape in shapes.items():
                self._controller_names.append(f"{name}_l{k}")
                self._keep(made, f"{name}_l{k}", True, *shape)
        self.output = nn.Linear(size + wide, self.output_size, **made)

    def _add_heads(self, made: dict[str, Any], rows: int) -> None:
        """The parameters that give that many head values, and what a sequence starts with."""
        self._keep(made, "head_weight", True, rows, self.controller_size)
        self._keep(made, "head_bias", True, rows)
        kept = self.num_layers if self.controller == "lstm" else 0
        self._keep(made, "initial_hidden", kept > 0, kept, self.controller_size)
        self._keep(made, "initial_cell", kept > 0, kept, self.controller_size)
        learned = self.memory_init == "learned"
        self._keep(made, "initial_memory", learned, self.memory_size, self.memory_dim)

    def _tensors(self, *names: str) -> list[Tensor]:
        """Attributes of these names; most are parameters, where nn.Module looks last."""
        own = cast("dict[str, Tensor]", self._parameters)
        return [own[name] if name in own else getattr(self, name) for name in names]

    def _controller(self) -> list[Tensor]:
        return self._tensors(*self._controller_names)

    def _reset_controller(self) -> None:
        """Draws as torch.nn.LSTM and torch.nn.Linear do."""
        parameters = self._controller()
        per_layer = len(parameters) // self.num_layers
        for k in range(self.num_layers):
            layer = parameters[k * per_layer : (k + 1) * per_layer]
            fan_in = self.controller_size if self.controller == "lstm" else layer[0].size(1)
            for parameter in layer:
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def _reset_heads(self, sizes: list[int], memory: float) -> None:
        """Draws what `_add_heads` registered and the output; a head has that many values."""
        for part in self.head_weight.detach().split(sizes):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.head_bias)
        self._reset_output()
        nn.init.zeros_(self.initial_hidden)
        nn.init.zeros_(self.initial_cell)
        if self.memory_init == "constant":
            nn.init.constant_(self.initial_memory, memory)
        else:
            bound = (self.memory_size + self.memory_dim) ** -0.5
            nn.init.uniform_(self.initial_memory, -bound, bound)

    def _reset_output(self) -> None:
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def init_state(self, batch_size: int | None = None) -> State:
        """What a sequence starts with, for a batch, or unbatched; differentiable.

        The tensors are copies, which may be changed in place.
        """
        made: State = self._state(*(t.clone() for t in self._initial_state(batch_size)))
        return made

    def _initial_state(self, batch_size: int | None = None) -> State:
        """The same without copies: views of the parameters and buffers."""
        first = self._first_state()
        if batch_size is None:
            return first
        hidden, cell, *rest = first
        expanded: State = self._state(
            hidden.unsqueeze(1).expand(-1, batch_size, -1),
            cell.unsqueeze(1).expand(-1, batch_size, -1),
            *(t.expand(batch_size, *[-1] * t.dim()) for t in rest),
        )
        return expanded

    def _first_state(self) -> State:
        raise NotImplementedError

    def _enter(
        self, input: Tensor, state: State | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, State, dict[str, Any]]:
        """Input [T, B, I] and state as the op takes them, and its further arguments."""
        input, state, reset = self._turn(input, state, lengths, reset)
        entered: State = (
            self._initial_state(input.size(1)) if state is None else self._state(*state)
        )
        arguments = {"lengths": lengths, "reset": reset}
        initial = None if reset is None else self._initial_state()
        return input, entered, {**arguments, "initial": initial, "controller_type": self.controller}

    def _turn(
        self, input: Tensor, state: State | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, State | None, Tensor | None]:
        """Input, state and reset as the op lays them out."""
        if input.dim() not in (2, 3) or input.size(-1) != self.input_size:
            order = "B, T" if self.batch_first else "T, B"
            raise ValueError(
                f"seqmem::{self._op}: expected input of shape [{order}, {self.input_size}] or "
                f"[T, {self.input_size}], got {list(input.shape)}"
            )
        (like,) = self._tensors(self._controller_names[0])
        require_like(self._op, like, input=input)
        if lengths is not None or reset is not None:
            require_tensors(self._op, lengths=lengths, reset=reset)
        if input.dim() == 2:
            if lengths is not None or reset is not None:
                raise ValueError(
                    f"seqmem::{self._op}: expected a batch beside lengths or reset, got input of "
                    f"shape {list(input.shape)}"
                )
            input = input.unsqueeze(1)
            if state is not None:
                hidden, cell, *rest = state
                state = self._state(
                    hidden.unsqueeze(1), cell.unsqueeze(1), *(t.unsqueeze(0) for t in rest)
                )
        elif self.batch_first:
            input = input.transpose(0, 1)
            reset = reset.t() if reset is not None and reset.dim() == 2 else reset
        return input, state, reset

    def _usual_output(self) -> tuple[Tensor, Tensor] | None:
        """The output layer's weight and bias where a compiled module may compute it."""
        layer = cast(nn.Linear, self._modules["output"])
        if (
            getattr(layer.forward, "__func__", None) is not nn.Linear.forward
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
        ):
            return None
        own = layer._parameters
        weight, bias = own.get("weight"), own.get("bias")
        return None if weight is None or bias is None else (weight, bias)

    def _answer(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """The output [T, B, O], zero beyond the lengths."""
        output: Tensor = self.output(features)
        activation = _ACTIVATIONS[self.output_activation]
        if activation is not None:
            output = activation(output)
        if lengths is not None:
            step = torch.arange(output.size(0), device=output.device)
            ended = step[:, None] >= lengths.to(output.device)
            output = output.masked_fill(ended[..., None], 0)
        return output

    def _leave(self, batched: bool, result: Tensor) -> Tensor:
        """A result [T, B, *] in the layout of the input."""
        if not batched:
            return result.squeeze(1)
        return result.transpose(0, 1) if self.batch_first else result

    def _leave_state(self, batched: bool, state: State) -> State:
        if batched:
            return state
        hidden, cell, *rest = state
        made: State = self._state(hidden.squeeze(1), cell.squeeze(1), *(t.squeeze(0) for t in rest))
        return made

    def _results(
        self, batched: bool, lengths: Tensor | None, features: Tensor, state: State, *traces: Any
    ) -> Any:
        """Of what the op returns: output, state, and the trace where there is one."""
        return self._left(batched, self._answer(features, lengths), state, *traces)

    def _left(self, batched: bool, output: Tensor, state: State, *traces: Any) -> Any:
        found: list[Any] = [self._leave(batched, output), self._leave_state(batched, state)]
        for trace in traces:
            if isinstance(trace, Tensor):
                found.append(self._leave(batched, trace))
            else:
                found.append(type(trace)(*(self._leave(batched, each) for each in trace)))
        return tuple(found)

    def extra_repr(self) -> str:
        """The sizes, and every option that is not at its default."""
        said = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if parameter.default is parameter.empty:
                said.append(f"{value}")
            elif value != parameter.default:
                said.append(f"{name}={value!r}")
        return ", ".join(said)
