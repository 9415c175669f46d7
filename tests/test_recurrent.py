"""The recurrent core: resets, equality with torch, and the reference path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlrnn.recurrent import Cell, Recurrent

T, B, D, H = 9, 4, 3, 5
CELLS: list[Cell] = ["lstm", "gru", "rnn"]
STACKS: dict[Cell, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


def _core(cell: Cell, layers: int) -> Recurrent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Recurrent(D, H, layers, cell).double()


def _normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _state(core: Recurrent) -> Tensor:
    return _normal(*core.initial_state(B).shape, seed=1)


def _starts(p: float = 0.3) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < p


core_cases = pytest.mark.parametrize(
    "core", [_core(c, n) for c in CELLS for n in (1, 2)], ids=lambda c: c.cell
)


@core_cases
def test_equals_torch_without_restarts(core: Recurrent) -> None:
    x, state = _normal(T, B, D), _state(core)
    expected: Tensor
    if core.cell == "lstm":
        expected, pair = core.stack(x, tuple(state.chunk(2)))
        last = torch.cat(pair)
    else:
        expected, last = core.stack(x, state)
    for starts in (None, torch.zeros(T, B, dtype=torch.bool)):
        for run in (core.forward, core.reference):
            y, end = run(x, state, starts)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(end, last)


@core_cases
def test_reference_equals_forward(core: Recurrent) -> None:
    """Outputs, states, and the gradients of inputs, state and weights."""
    starts = _starts()
    results = []
    for run in (core.forward, core.reference):
        x = _normal(T, B, D).requires_grad_()
        state = _state(core).requires_grad_()
        y, end = run(x, state, starts)
        loss = (y * _normal(T, B, H, seed=3)).sum() + end.square().sum()
        grads = torch.autograd.grad(loss, [x, state, *core.parameters()])
        results.append([y, end, *grads])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


@core_cases
def test_t_steps_are_t_times_one_step(core: Recurrent) -> None:
    x, state, starts = _normal(T, B, D), _state(core), _starts()
    y, end = core(x, state, starts)
    for t in range(T):
        y_t, state = core(x[t : t + 1], state, starts[t : t + 1])
        torch.testing.assert_close(y_t[0], y[t])
    torch.testing.assert_close(state, end)


@core_cases
@pytest.mark.parametrize("t", [0, 1, T - 1])
def test_a_restart_makes_two_sequences(core: Recurrent, t: int) -> None:
    """In one column only: the others run on."""
    x, state = _normal(T, B, D), _state(core)
    starts = torch.zeros(T, B, dtype=torch.bool)
    starts[t, 1] = True
    y, end = core(x, state, starts)
    whole, whole_end = core(x, state)
    first, _ = core(x[:t], state) if t else (y[:0], state)
    second, second_end = core(x[t:], core.initial_state(B))
    torch.testing.assert_close(y[:, 1], torch.cat((first, second))[:, 1])
    torch.testing.assert_close(end[:, 1], second_end[:, 1])
    others = [0, 2, 3]
    torch.testing.assert_close(y[:, others], whole[:, others])
    torch.testing.assert_close(end[:, others], whole_end[:, others])


@core_cases
def test_no_gradient_crosses_a_restart(core: Recurrent) -> None:
    for run in (core.forward, core.reference):
        x = _normal(T, B, D).requires_grad_()
        state = _state(core).requires_grad_()
        starts = torch.zeros(T, B, dtype=torch.bool)
        starts[5] = True
        y, end = run(x, state, starts)
        loss = y[5:].square().sum() + end.square().sum()
        by_x, by_state = torch.autograd.grad(loss, [x, state])
        assert not by_x[:5].any() and not by_state.any()
        assert by_x[5:].any()


@core_cases
def test_truncation(core: Recurrent) -> None:
    """Detaching every K steps: K >= T is full BPTT, K = 1 reaches no earlier input."""

    def by_input(truncation: int) -> Tensor:
        x, state = _normal(T, B, D).requires_grad_(), _state(core)
        outputs = []
        for window in torch.split(x, truncation):
            y, state = core(window, state.detach())
            outputs.append(y)
        (grad,) = torch.autograd.grad(torch.cat(outputs)[-1].sum(), x)
        return grad

    torch.testing.assert_close(by_input(T), by_input(T + 3))
    assert by_input(T)[0].any()
    assert not by_input(1)[:-1].any() and by_input(1)[-1].any()


def test_initial_state_is_zero_and_shaped() -> None:
    assert Recurrent(D, H, 2, "lstm").initial_state(B).shape == (4, B, H)
    assert Recurrent(D, H, 2, "gru").initial_state(B).shape == (2, B, H)
    assert not Recurrent(D, H, 2, "rnn").initial_state(B).any()


def test_parameters_are_those_of_torch() -> None:
    for cell, stack in STACKS.items():
        ours = Recurrent(D, H, 2, cell).stack.state_dict()
        theirs = stack(D, H, 2).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {
            k: v.shape for k, v in theirs.items()
        }
