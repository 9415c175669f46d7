"""The recurrent core: resets, equality with torch, and the reference path."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from rlrnn.recurrent import Cell, Recurrent, together
from rlrnn.scan import doubling, scan

T, B, D, H = 9, 4, 3, 5
CELLS: list[Cell] = ["lstm", "gru", "rnn", "mingru"]
STACKS: dict[Cell, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


def _core(cell: Cell, layers: int, weight_drop: float = 0.0) -> Recurrent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Recurrent(D, H, layers, cell, weight_drop).double()


def _normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _state(core: Recurrent) -> Tensor:
    return _normal(*core.initial_state(B).shape, seed=1)


def _starts(p: float = 0.3) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < p


def _cases(cells: Iterable[Cell]) -> pytest.MarkDecorator:
    cores = [_core(cell, layers) for cell in cells for layers in (1, 2)]
    return pytest.mark.parametrize("core", cores, ids=lambda c: f"{c.cell}-{c.layers}")


core_cases = _cases(CELLS)


@_cases(STACKS)
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
    traced = core.trace(x, state, starts)
    for t in range(T):
        y_t, state = core(x[t : t + 1], state, starts[t : t + 1])
        torch.testing.assert_close(y_t[0], y[t])
        torch.testing.assert_close(state, traced[t])
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


@core_cases
def test_gradients_of_two_states_at_once(core: Recurrent) -> None:
    """The way back writes into nothing that is somebody's gradient."""
    x, state = _normal(2 * T, B, D), _state(core).requires_grad_()
    _, middle = core(x[:T], state)
    y, end = core(x[T:], middle)
    loss = y.square().sum() + end.sum()
    both = torch.autograd.grad(loss, (state, middle), retain_graph=True)
    for found, at in zip(both, (state, middle), strict=True):
        (alone,) = torch.autograd.grad(loss, at, retain_graph=True)
        torch.testing.assert_close(found, alone)


def test_initial_state_is_zero_and_shaped() -> None:
    assert Recurrent(D, H, 2, "lstm").initial_state(B).shape == (4, B, H)
    assert Recurrent(D, H, 2, "gru").initial_state(B).shape == (2, B, H)
    assert Recurrent(D, H, 2, "mingru").initial_state(B).shape == (2, B, H)
    assert not Recurrent(D, H, 2, "rnn").initial_state(B).any()


def test_parameters_are_those_of_torch() -> None:
    for cell, stack in STACKS.items():
        ours = Recurrent(D, H, 2, cell).stack.state_dict()
        theirs = stack(D, H, 2).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {
            k: v.shape for k, v in theirs.items()
        }


# --- minGRU ---------------------------------------------------------------------------


def test_a_mingru_that_sees_nothing_goes_half_way_to_one_half() -> None:
    """Without weights z = 1/2 and g(0) = 1/2, so h_t = 1/2 + (h_0 - 1/2) / 2^t."""
    core = _core("mingru", 1)
    for weight in core.parameters():
        nn.init.zeros_(weight)
    state = _state(core)
    y, _ = core(_normal(T, B, D), state)
    halves = 0.5 ** torch.arange(1, T + 1, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(y, 0.5 + (state - 0.5) * halves)


@pytest.mark.parametrize("open_", [True, False])
def test_gates_of_a_mingru(open_: bool) -> None:
    """Open, the state is the candidate; shut, it stays, until a sequence starts."""
    core = _core("mingru", 1)
    w_x, b_x = core.weights(0)
    with torch.no_grad():
        w_x[:H] = 0.0
        b_x[:H] = 1e3 if open_ else -1e3
    x, state, starts = _normal(T, B, D), _state(core), _starts()
    y, _ = core(x, state, starts)
    seen = x @ w_x[H:].T + b_x[H:]
    if open_:
        assert (seen > 0).any() and (seen < 0).any()
        expected = (seen + 0.5) * (seen >= 0) + torch.sigmoid(seen) * (seen < 0)
    else:
        expected = state[0] * (starts.cumsum(0) == 0).unsqueeze(-1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("way", [scan, doubling])
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 33])
def test_scan_is_a_loop(way: Callable[..., Tensor], steps: int) -> None:
    """Values and gradients; zeros in `a` are where sequences start."""

    def loop(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        outputs = []
        for a_t, b_t in zip(a, b, strict=True):
            h = a_t * h + b_t
            outputs.append(h)
        return torch.stack(outputs)

    a, b, h = _normal(steps, B, H), _normal(steps, B, H, seed=1), _normal(B, H, seed=2)
    a[_normal(steps, B, seed=3) > 1] = 0.0
    results = []
    for run in (way, loop):
        given = [tensor.clone().requires_grad_() for tensor in (a, b, h)]
        y = run(*given)
        weight = _normal(*y.shape, seed=4)
        results.append([y, *torch.autograd.grad((weight * y.square()).sum(), given)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_both_ways_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole function, with its gradient, on what other devices compute."""
    given = [
        _normal(*shape, seed=i).requires_grad_()
        for i, shape in enumerate([(T, B, H), (T, B, H), (B, H)])
    ]
    expected = torch.autograd.grad(scan(*given).square().sum(), given)
    monkeypatch.setattr("rlrnn.scan._forward", doubling)
    found = torch.autograd.grad(scan(*given).square().sum(), given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_other_number_types_than_kernels_know() -> None:
    """In bfloat16, whose 8 bits of precision are the tolerance."""
    core = _core("mingru", 2)
    x, state, starts = _normal(T, B, D), _state(core), _starts()
    expected, _ = core(x, state, starts)
    y, _ = core.bfloat16()(x.bfloat16(), state.bfloat16(), starts)
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    core.double()


@core_cases
def test_together_is_each_alone(core: Recurrent) -> None:
    other, head = _core(core.cell, 1), nn.Sequential(nn.Linear(H, 2), nn.Tanh())
    head.double()
    x, starts = _normal(T, B, D), _starts()
    states = [_state(core), _state(other)]
    results = together([core, other], [head, head], [x, x], states, starts)
    for alone, state, (out, after, y) in zip(
        (core, other), states, results, strict=True
    ):
        expected, end = alone.reference(x, state, starts)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(after, end)
        torch.testing.assert_close(out, head(expected))


@core_cases
def test_layers_alone_share_the_parameters(core: Recurrent) -> None:
    x, state, starts = _normal(T, B, D), _state(core), _starts()
    expected, _ = core(x, state, starts)
    for i in range(core.layers):
        layer = core.layer(i)
        assert all(
            a is b for a, b in zip(layer.weights(0), core.weights(i), strict=True)
        )
        x, _ = layer(x, state[i :: core.layers], starts)
    torch.testing.assert_close(x, expected)


# --- weight_drop ----------------------------------------------------------------------

dropping_cases = pytest.mark.parametrize("cell", list(STACKS))


def _seeded(core: Recurrent, seed: int = 0) -> Recurrent:
    core.generator = torch.Generator().manual_seed(seed)
    return core


@dropping_cases
def test_nothing_is_dropped_outside_training(cell: Cell) -> None:
    given = _normal(T, B, D), _state(_core(cell, 2)), _starts()
    expected = _core(cell, 2)(*given)
    for core in (_core(cell, 2, 0.5).eval(), _core(cell, 2, 0.0)):
        for ours, plain in zip(core(*given), expected, strict=True):
            assert torch.equal(ours, plain)


@dropping_cases
@pytest.mark.parametrize("way", ["forward", "unbroken", "reference", "together"])
def test_dropped_weights_are_zero_for_a_whole_call(cell: Cell, way: str) -> None:
    """The same as a core whose weights are masked by hand, and no gradient where they
    are; the global generator stays as it is."""
    core, masked = _seeded(_core(cell, 2, 0.4)), _core(cell, 2)
    generator = torch.Generator().manual_seed(0)
    masks = []
    for i in range(2):
        w_h = masked.weights(i)[1]
        masks.append(torch.empty_like(w_h).bernoulli_(0.6, generator=generator))
        w_h.data *= masks[-1] / 0.6
    before = torch.random.get_rng_state()
    x, state = _normal(T, B, D), _state(core)
    starts = None if way == "unbroken" else _starts()
    if way == "together":
        ((_, end, y),) = together([core], [nn.Sequential()], [x], [state], starts)
    else:
        run = core.reference if way == "reference" else core.forward
        y, end = run(x, state, starts)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected, expected_end = masked(x, state, starts)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(end, expected_end)
    for i, mask in enumerate(masks):
        (found,), (plain,) = (
            torch.autograd.grad(s.square().sum(), c.weights(i)[1], retain_graph=True)
            for s, c in ((end, core), (expected_end, masked))
        )
        assert not found[mask == 0].any() and found[mask == 1].any()
        torch.testing.assert_close(found, plain * mask / 0.6)


@dropping_cases
def test_a_trace_is_a_call_too(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for all its steps, that of a call from the same generator."""
    given = _normal(T, B, D), _state(_core(cell, 2)), _starts()
    for kernels in (True, False):
        _, end = _seeded(_core(cell, 2, 0.5))(*given)
        traced = _seeded(_core(cell, 2, 0.5)).trace(*given)
        torch.testing.assert_close(traced[-1], end)
        if kernels:
            monkeypatch.setattr("rlrnn.recurrent.compiles", lambda x: False)


def test_weights_are_dropped_anew_at_each_call_and_right_on_average() -> None:
    core = _seeded(_core("gru", 1, 0.3))
    draws = torch.stack([core.drawn(0)[1].detach() for _ in range(4000)])
    w_h = core.weights(0)[1].detach()
    share = (draws == 0).double().mean(0)
    # four deviations of a mean of 4000 draws, and some for 75 weights
    torch.testing.assert_close(share, torch.full_like(share, 0.3), rtol=0, atol=0.035)
    torch.testing.assert_close(draws.mean(0), w_h, rtol=0.05, atol=0)
    assert not torch.equal(draws[0], draws[1])


def test_cudnn_is_left_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own layers would run, which take no other weights than theirs."""
    monkeypatch.setattr("rlrnn.recurrent.compiles", lambda x: False)
    x, state = _normal(T, B, D), _state(_core("lstm", 1))
    y, _ = _seeded(_core("lstm", 1, 0.5))(x, state)
    expected, _ = _seeded(_core("lstm", 1, 0.5)).reference(x, state)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, _core("lstm", 1)(x, state)[0])


def test_what_weight_drop_refuses() -> None:
    with pytest.raises(ValueError, match="no hidden-to-hidden weights: expected 0"):
        Recurrent(D, H, 1, "mingru", weight_drop=0.5)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="expected at least 0 and below 1"):
            Recurrent(D, H, weight_drop=share)
    with pytest.raises(AssertionError, match="set `generator`"):
        core = _core("lstm", 1, 0.5)
        core(_normal(T, B, D), _state(core))


@_cases(CELLS)
def test_half_precision_is_near(core: Recurrent) -> None:
    single = copy.deepcopy(core).float()
    x, state = _normal(T, B, D).float(), _state(core).float()
    found = []
    for starts in (None, _starts()):
        for half in (False, True):
            single.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y, after = single(x, state, starts)
            assert y.dtype == after.dtype == torch.float32
            (y.square().sum() + after.sum()).backward()
            grads = [
                p.grad.flatten() for p in single.parameters() if p.grad is not None
            ]
            found.append((y.detach(), after.detach(), torch.cat(grads)))
        exact, rounded = found[-2:]
        for a, b in zip(exact, rounded, strict=True):
            far = (a - b).norm() / a.norm()
            assert 0 < far < 0.02  # bfloat16 has 8 bits


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("steps", [1, 50])
def test_half_precision_does_not_round_the_state(cell: Cell, steps: int) -> None:
    """Gates that keep everything: what is remembered stays as it was, to its last
    bits, of which bfloat16 has few."""
    core = Recurrent(D, H, 1, cell)
    with torch.no_grad():
        for w in core.weights(0):
            w.zero_()
        core.weights(0)[2][:H] = -40.0  # lstm: nothing new
        core.weights(0)[2][H : 2 * H] = 40.0  # keep
    state = torch.full((core.rows, B, H), 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        _, after = core(torch.zeros(steps, B, D), state)
    torch.testing.assert_close(after[-1], state[-1], rtol=1e-6, atol=0)
