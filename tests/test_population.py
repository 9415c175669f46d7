"""Many models in one program: each becomes what it would alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlrnn import kernels_stacked
from rlrnn.data.chunks import Features, Symbols
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes, Labels, Numbers, Objective
from rlrnn.recurrent import Cell
from rlrnn.stacked import Form, Stack, Windows

OPTIMIZERS = ["sgd", "momentum", "adam", "adamw"]
DECAY = [0.0, 0.1, 0.01, 0.1]
M, K, B, V, H = 4, 6, 3, 5, 4
CELLS: list[Cell] = ["lstm", "gru", "rnn"]


class Case(NamedTuple):
    inputs: Symbols | Features
    objective: Objective
    config: ModelConfig


def case(cell: Cell, layers: int, kind: str = "symbols") -> Case:
    objective: Objective = Classes(V)
    inputs: Symbols | Features = Symbols(V)
    size: int | None = 3
    if kind == "features":
        inputs, objective, size = Features(2), Numbers(2), None
    elif kind == "dense":
        inputs, objective, size = Features(2), Labels(3), 7
    return Case(inputs, objective, ModelConfig(cell, H, layers, size))


CASES = [case(cell, layers) for cell in CELLS for layers in (1, 2)]
CASES += [case(cell, 2, kind) for cell in CELLS for kind in ("features", "dense")]
cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.config.cell}-{c.config.layers}-{c.objective}"
)
Run = Callable[..., Any]


def make(case: Case, count: int = M) -> list[SequenceModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            SequenceModel(case.inputs, case.objective.outputs, case.config).double()
            for _ in range(count)
        ]


def draw(
    case: Case, seed: int = 0, steps: int = K, count: int = M, starts: float = 0.2
) -> Windows:
    """With restarts, and losses due at two thirds of the positions."""
    g = torch.Generator().manual_seed(seed)
    shape = count, steps, B
    luck = torch.rand(2, *shape, generator=g)
    if isinstance(case.inputs, Symbols):
        x = torch.randint(V, shape, generator=g)
    else:
        x = torch.randn(*shape, case.inputs.width, generator=g, dtype=torch.float64)
    if isinstance(case.objective, Classes):
        y = torch.randint(V, shape, generator=g)
    else:
        y = torch.randn(*shape, case.objective.outputs, generator=g).double()
        y = (y > 0).double() if isinstance(case.objective, Labels) else y
    scale = torch.rand(count, generator=g, dtype=torch.float64) * 10 + 5
    return Windows(x, y, luck[0] < starts, luck[1] < 0.7, scale)


def stack_of(case: Case, models: list[SequenceModel]) -> Stack:
    count = len(models)
    chosen = [i % len(OPTIMIZERS) for i in range(count)]
    names, decay = [OPTIMIZERS[i] for i in chosen], [DECAY[i] for i in chosen]
    return Stack(models, case.objective, names, decay)


class Alone:
    """A model under torch.optim."""

    def __init__(self, case: Case, model: SequenceModel, index: int) -> None:
        self.model, self.objective = model, case.objective
        name, decay = OPTIMIZERS[index % 4], DECAY[index % 4]
        parameters = list(model.parameters())
        if name in ("sgd", "momentum"):
            momentum = 0.9 if name == "momentum" else 0.0
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, lr=1.0, momentum=momentum, weight_decay=decay
            )
        else:
            kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
            self.optimizer = kind(parameters, lr=1.0, weight_decay=decay)

    def window(
        self, w: Windows, i: int, state: Tensor, lr: float, clip: float, update: bool
    ) -> tuple[Tensor, ...]:
        """Loss, norm, state after; and the gradient's norms of the states before the
        first step, and in the middle."""
        starts = None if w.starts is None else w.starts[i]
        half = w.x.shape[1] // 2
        parts = (slice(None, half), slice(half, None))
        given = state.requires_grad_()
        outs, states = [], [given]
        for at in parts:
            begins = None if starts is None else starts[at]
            out, after = self.model(w.x[i, at], states[-1], begins)
            after.retain_grad()
            outs.append(out)
            states.append(after)
        mask = None if w.mask is None else w.mask[i]
        loss = self.objective.total(torch.cat(outs), w.y[i], mask) / w.scale[i]
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.param_groups[0]["lr"] = lr
        if update:
            self.optimizer.step()
        seen = [s.grad.norm() for s in states[:2] if s.grad is not None]
        return loss.detach(), norm, states[2].detach(), *seen


def content(stack: Stack) -> list[Tensor]:
    own = stack.weights, stack.grads, stack.first, stack.second, stack.updates
    return [rows.clone() for rows in own]


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


LR = torch.tensor([0.3, 0.1, 0.02, 0.05], dtype=torch.float64)
CLIP = torch.tensor([0.05, 0.1, 1.0, 100.0], dtype=torch.float64)


@cases
def test_each_becomes_what_it_would_alone(case: Case) -> None:
    """Losses, norms, states and weights over several windows, under all optimisers;
    some of one step, some without restarts, some with every loss due."""
    models = make(case)
    stack, alone = stack_of(case, models), []
    for i, model in enumerate(models):
        alone.append(Alone(case, model, i))
    state = stack.initial_state(B)
    states = list(state.clone())
    for step in range(6):
        windows = draw(case, step, steps=K if step % 3 else 2)
        if step == 3:
            windows = windows._replace(starts=None)
        if step == 4:
            windows = windows._replace(mask=None)
        lr = LR * (1 + step)
        watch = step % 2 == 0
        done = stack.window(windows, state, lr, CLIP, watch=watch, keep=watch)
        state = done.state
        for i in range(M):
            loss, norm, states[i], far, near = alone[i].window(
                windows, i, states[i], float(lr[i]), float(CLIP[i]), True
            )
            same(done.loss[i], loss)
            same(done.norm[i], norm)
            same(done.state[i], states[i])
            if watch:
                same(done.far[i], far)
                same(done.near[i], near)
            else:
                assert done.far[i].isnan() and done.near[i].isnan()
            weights = torch.cat([p.detach().flatten() for p in models[i].parameters()])
            same(stack.weights[i], weights)


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_equals_reference_over_many_steps(cell: Cell) -> None:
    """More columns and steps than go through the kernels at a time; sizes that fill no
    vector register, or several."""
    config = ModelConfig(cell, 70, 2, 33)
    wide = Case(Symbols(V), Classes(V), config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [SequenceModel(wide.inputs, V, config).double() for _ in range(2)]
    ours, theirs = (stack_of(wide, models) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(V, (2, 2, 9, 100), generator=g)
    starts = torch.rand(2, 9, 100, generator=g) < 0.1
    scale = torch.full((2,), 900.0)
    windows, state = Windows(x, y, starts, None, scale), ours.initial_state(100)
    for _ in range(2):
        given = windows, state, LR[:2], CLIP[:2], None, None, True, True
        done, expected = ours.window(*given), theirs.reference(*given)
        state = expected.state
        for mine, reference in zip(done, expected, strict=True):
            same(mine, reference)
    for mine, reference in zip(content(ours), content(theirs), strict=True):
        same(mine, reference)


def test_an_objective_that_is_not_compiled() -> None:
    """Goes the plain way."""
    case = Case(Features(2), Numbers(2, "normal"), ModelConfig("gru", H))
    models = make(case)
    stack, one = stack_of(case, models), Alone(case, models[3], 3)
    windows, state = draw(case), stack.initial_state(B)
    windows = windows._replace(y=windows.y[..., :2])
    for _ in range(2):
        done = stack.window(windows, state, LR, CLIP)
        loss, norm, after, *_ = one.window(windows, 3, state[3], 0.05, 100.0, True)
        same(done.loss[3], loss)
        same(done.norm[3], norm)
        same(done.state[3], after)


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_missing_numbers(loss: Any) -> None:
    case = Case(Features(2), Numbers(3, loss), ModelConfig("gru", H))
    ours, theirs = (stack_of(case, make(case)) for _ in range(2))
    windows, state = draw(case), ours.initial_state(B)
    windows.y[torch.rand(windows.y.shape, generator=torch.Generator()) < 0.4] = (
        torch.nan
    )
    for _ in range(2):
        done = ours.window(windows, state, LR, CLIP)
        expected = theirs.reference(windows, state, LR, CLIP)
        same(done.loss, expected.loss)
        same(ours.weights, theirs.weights)


def test_the_exponential_of_float32() -> None:
    x = torch.linspace(-100, 0, 10_001)
    ours, total = x.clone(), kernels_stacked._exponentials
    whole = total(ours.numpy(), np.float32(0))
    torch.testing.assert_close(ours, x.exp(), rtol=4e-7, atol=1e-37)
    assert whole == pytest.approx(float(x.double().exp().sum()), rel=1e-6)
    some = torch.tensor([0.0, torch.nan, -torch.inf])
    total(some.numpy(), np.float32(0))
    assert some[0] == 1 and some[1].isnan() and some[2] < 1e-37


def test_optimisers_are_those_of_torch() -> None:
    """Given the same gradients, to rounding."""
    case = CASES[0]
    models = make(case)
    stack = stack_of(case, models)
    alone = [Alone(case, model, i) for i, model in enumerate(models)]
    g = torch.Generator().manual_seed(0)
    for step in range(30):
        grad = torch.randn(stack.weights.shape, generator=g, dtype=torch.float64)
        lr = LR / (1 + step)
        stack._update(grad, lr, None, None)
        for i, one in enumerate(alone):
            parts = stack.parameters(grad[i])
            for parameter, part in zip(one.model.parameters(), parts, strict=True):
                parameter.grad = part.clone()
            one.optimizer.param_groups[0]["lr"] = float(lr[i])
            one.optimizer.step()
            weights = torch.cat([p.detach().flatten() for p in one.model.parameters()])
            torch.testing.assert_close(
                stack.weights[i], weights, rtol=1e-12, atol=1e-14
            )


@cases
def test_some_of_them(case: Case) -> None:
    """Those chosen are treated as in the company of all; others stay as they are."""
    all_of_them, some = (stack_of(case, make(case)) for _ in range(2))
    windows, state = (
        draw(case),
        torch.randn(all_of_them.initial_state(B).shape).double(),
    )
    chosen = torch.tensor([3, 1])
    few = Windows._make(None if part is None else part[chosen] for part in windows)
    for _ in range(2):
        before = content(some)
        full = all_of_them.window(windows, state, LR, CLIP, watch=True, keep=True)
        done = some.window(
            few, state[chosen], LR[chosen], CLIP[chosen], chosen, watch=True, keep=True
        )
        for ours, theirs in zip(done, full, strict=True):
            same(ours, theirs[chosen])
        rows = zip(content(some), before, content(all_of_them), strict=True)
        for now, earlier, expected in rows:
            same(now[chosen], expected[chosen])
            assert torch.equal(now[[0, 2]], earlier[[0, 2]])


@cases
def test_without_an_update_only_the_state_goes_on(case: Case) -> None:
    learning, resting = (stack_of(case, make(case)) for _ in range(2))
    windows, state = draw(case), learning.initial_state(B)
    before = content(resting)
    active = torch.tensor([True, False, True, False])
    full = learning.window(windows, state, LR, CLIP, keep=True)
    done = resting.window(windows, state, LR, CLIP, active=active, keep=True)
    same(done.loss, full.loss)
    same(done.state, full.state)
    rows = zip(content(resting), before, content(learning), strict=True)
    for now, earlier, expected in rows:
        same(now[active], expected[active])
        assert torch.equal(now[~active], earlier[~active])


@cases
def test_evaluation(case: Case) -> None:
    """The loss and the state of `window`, and nothing changes."""
    stack = stack_of(case, make(case))
    windows, state = draw(case), stack.initial_state(B)
    before = content(stack)
    loss, after = stack.evaluate(windows, state)
    assert all(map(torch.equal, content(stack), before))
    done = stack.window(windows, state, LR, CLIP)
    same(loss, done.loss)
    same(after, done.state)
    chosen = torch.tensor([2])
    few = Windows._make(None if part is None else part[chosen] for part in windows)
    again, _ = stack.evaluate(few, state[chosen], chosen)
    same(again, stack.evaluate(windows, state)[0][chosen])


def test_weights_come_from_models_and_go_back() -> None:
    case = CASES[1]
    models, others = make(case), make(case)
    stack = stack_of(case, models)
    stack.weights += 1
    stack.write(others)
    for old, new in zip(models, others, strict=True):
        for before, after in zip(old.parameters(), new.parameters(), strict=True):
            assert torch.equal(before + 1, after)


@pytest.mark.parametrize("other", [case("gru", 1), case("lstm", 2), case("lstm", 1)])
def test_one_form(other: Case) -> None:
    models = make(CASES[0], 1) + make(other, 1)
    if other == CASES[0]:
        assert len(stack_of(other, models).weights) == 2
        return
    with pytest.raises(ValueError, match="have 2 forms, expected one"):
        stack_of(other, models)


@pytest.mark.parametrize(
    "config", [ModelConfig("mingru"), ModelConfig(residual=True, layers=2)]
)
def test_what_a_stack_cannot_hold(config: ModelConfig) -> None:
    model = SequenceModel(Symbols(V), V, config)
    with pytest.raises(ValueError, match="a stack cannot hold.*train such a model"):
        Form.of(model)


def test_a_diverged_model_disturbs_no_other() -> None:
    case = CASES[0]
    stack, healthy = stack_of(case, make(case)), stack_of(case, make(case))
    stack.weights[1] = torch.nan
    windows, state = draw(case), stack.initial_state(B)
    for _ in range(2):
        done = stack.window(windows, state, LR, CLIP)
        expected = healthy.window(windows, state, LR, CLIP)
    assert done.loss[1].isnan() and done.norm[1].isnan()
    others = [0, 2, 3]
    same(done.loss[others], expected.loss[others])
    same(stack.weights[others], healthy.weights[others])
