"""The controller beside a plain loop of torch."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlrnn import checkpoint
from rlrnn.agents import LearnedController
from rlrnn.agents.loop import LoopKnobs
from rlrnn.control import FEATURES, NO_OP, Controller, Familiar, NoOp, Steered, prior

STREAMS, SYMBOLS, BUDGET = 4, 6, 14_000.0


def text() -> Tensor:
    """[N, B]: each symbol follows from the one before, nine times in ten."""
    rng = np.random.default_rng(0)
    follows, lines = rng.permutation(SYMBOLS), np.zeros((5000, STREAMS), np.int64)
    for t in range(1, len(lines)):
        strange = rng.random(STREAMS) < 0.1
        drawn = rng.integers(0, SYMBOLS, STREAMS)
        lines[t] = np.where(strange, drawn, follows[lines[t - 1]])
    return torch.from_numpy(lines)


TEXT = text()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SYMBOLS, 8)
        self.head = nn.Linear(8, SYMBOLS)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        out, state = self.lstm(nn.functional.one_hot(x, SYMBOLS).float(), state)
        return self.head(out), state


class Loop:
    """What somebody has at home."""

    def __init__(
        self,
        controller: Controller | None = None,
        kind: str = "Adam",
        budget: float = BUDGET,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.net = Net()
        make = getattr(torch.optim, kind)
        groups = [
            {"params": self.net.lstm.parameters(), "lr": 0.02},
            {"params": self.net.head.parameters(), "lr": 0.01},
        ]
        self.optimizer = make(groups)
        if controller is None:
            self.controller = LearnedController.shipped(
                self.optimizer, budget, **options
            )
        else:
            self.controller = LearnedController(
                controller, self.optimizer, budget, **options
            )
        self.t = 0
        self.state: Any = None
        self.losses: list[float] = []
        self.said: list[LoopKnobs] = []

    def window(self, poison: float = 1.0) -> None:
        k = self.controller.knobs.truncation
        at = torch.arange(self.t, self.t + k + 1) % len(TEXT)
        symbols = TEXT[at]
        out, state = self.net(symbols[:-1], self.state)
        loss = nn.functional.cross_entropy(out.flatten(0, 1), symbols[1:].flatten())
        loss = loss * poison
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        knobs = self.controller.step(loss, k * STREAMS)
        self.state = None if knobs.restored else tuple(s.detach() for s in state)
        self.t += k
        self.losses.append(loss.item())
        self.said.append(knobs)

    def run(self, windows: int | None = None) -> "Loop":
        while not self.controller.done and windows != len(self.said):
            self.window()
        return self

    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.fixture(scope="module")
def whole() -> Loop:
    return Loop().run()


def test_it_learns_and_spends_the_budget(whole: Loop) -> None:
    ledger = whole.controller.ledger
    assert ledger is not None and ledger.decision == 24
    assert ledger.spent == pytest.approx(BUDGET, rel=0.01)
    assert whole.t * STREAMS == ledger.spent
    entropy = -0.917 * math.log(0.917) - 5 * 0.0167 * math.log(0.0167)
    assert np.mean(whole.losses[-200:]) < 1.05 * entropy < 0.5 * whole.losses[0]


def test_the_same_loop_twice(whole: Loop) -> None:
    again = Loop().run()
    assert again.said == whole.said and again.losses == whole.losses


def test_no_op_is_range_test_warm_up_and_cosine() -> None:
    """The knobs are those of the prior in `fit`; in between they move linearly."""
    loop = Loop(prior()).run()
    ends = [i for i, knobs in enumerate(loop.said) if knobs.restored]
    assert len(ends) == 1, "only the range test is undone"
    tested, after = loop.said[: ends[0]], loop.said[ends[0] :]
    growth = np.diff(np.log([knobs.lr for knobs in tested]))
    assert (growth > 0).all() and np.allclose(growth, growth[0])
    assert {knobs.truncation for knobs in after[-20:]} == {16}
    rates = np.array([knobs.lr for knobs in after])
    top = int(rates.argmax())
    assert (np.diff(rates[: top + 1]) >= 0).all() and (np.diff(rates[top:]) <= 0).all()
    assert rates[-1] < 0.02 * rates[top]


def test_momentum_is_not_plain_sgd() -> None:
    """Whose range test has a factor."""
    for momentum, kind in ((0.0, "sgd"), (0.9, "momentum")):
        weights = [torch.ones(2, requires_grad=True)]
        optimizer = torch.optim.SGD(weights, 0.1, momentum=momentum)
        told = LearnedController(prior(), optimizer, 10_000)
        assert told.config.optimizer == kind


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_optimizers(kind: str) -> None:
    loop = Loop(prior(), kind).run()
    adaptive = kind != "SGD"
    signals = loop.controller.signals
    assert signals is not None and signals.adaptive[0] == adaptive
    assert loop.said[0].lr < 2e-4 if adaptive else loop.said[0].lr < 2e-2
    assert loop.losses[-1] < loop.losses[0]


def test_groups_keep_their_ratio() -> None:
    loop = Loop()
    for _ in range(80):
        loop.window()
        high, low = loop.rates()
        assert low == high / 2 and high == loop.controller.knobs.lr


def test_the_range_test_is_undone() -> None:
    loop = Loop()
    before = [p.detach().clone() for p in loop.net.parameters()]
    while not loop.said or not loop.said[-1].restored:
        loop.window()
    for old, new in zip(before, loop.net.parameters(), strict=True):
        assert torch.equal(old, new)
    assert loop.optimizer.state_dict()["state"] == {}
    assert len(loop.said) < 100 and loop.t * STREAMS < 0.06 * BUDGET


@pytest.mark.parametrize(
    ("cut", "how"), [(1, "torch"), (8, "rlrnn"), (100, "torch"), (150, "rlrnn")]
)
def test_resumed_it_says_the_same(
    whole: Loop, cut: int, how: str, tmp_path: Path
) -> None:
    first = Loop().run(cut)
    tree = {
        "net": first.net.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "controller": first.controller.state_dict(),
        "state": first.state,
    }
    if how == "torch":
        file = io.BytesIO()
        torch.save(tree, file)
        file.seek(0)
        tree = torch.load(file)  # no pickle but tensors
    else:
        checkpoint.save(tmp_path / "file", tree)
        tree = checkpoint.load(tmp_path / "file")
    second = Loop()
    second.net.load_state_dict(tree["net"])
    second.optimizer.load_state_dict(tree["optimizer"])
    second.controller.load_state_dict(tree["controller"])
    second.t, second.state = first.t, tree["state"]
    second.run()
    assert first.said + second.said == whole.said
    assert first.losses + second.losses == whole.losses


def test_another_budget_is_another_run() -> None:
    one, other = Loop(), Loop(budget=30_000)
    with pytest.raises(ValueError, match=r"^budget_tokens is 30000, expected that of"):
        other.controller.load_state_dict(one.controller.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_loss_that_blows_up_is_told_and_undone(bad: float) -> None:
    loop = Loop().run(120)
    controller = loop.controller
    decided = [weight.clone() for weight in controller.weights]
    assert controller.ledger is not None and controller.ledger.lr_scale == 1
    loop.window(bad)
    while controller.ledger.lr_scale == 1:
        loop.window()
    assert loop.said[-1].restored and controller.ledger.lr_scale == 0.5
    for old, new in zip(decided, loop.net.parameters(), strict=True):
        assert torch.equal(old, new)
    assert loop.run().losses[-1] < loop.losses[0]


def test_it_gives_up_but_never_raises() -> None:
    loop = Loop().run(100)
    for _ in range(3):
        loop.window(math.nan)
    assert loop.controller.done and loop.said[-1].restored
    rate = loop.said[-1].lr
    for loss in (math.nan, torch.tensor(math.inf), 1.0):
        assert loop.controller.step(loss, 64).lr == rate
    assert all(p.isfinite().all() for p in loop.net.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -3.0, 0.0, 1])
def test_losses_alone(value: float) -> None:
    """Without gradients, and whatever they are."""
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1)
    controller = LearnedController.shipped(optimizer, 20_000)
    for _ in range(2000):
        knobs = controller.step(value, controller.knobs.truncation * 4)
        assert 0 < knobs.lr <= 10 * 30 and 4 <= knobs.truncation <= 1024
        if controller.done:
            break
    assert controller.done


def test_a_probe_is_what_it_goes_by() -> None:
    asked: list[float] = []

    def probe() -> float:
        asked.append(2.0 / (1 + len(asked)))
        return asked[-1]

    loop = Loop(prior(), probe=probe).run()
    assert len(asked) == 25
    signals = loop.controller.signals
    assert signals is not None and signals.probe_loss[0] == asked[-1]


def test_what_is_unfamiliar_is_told() -> None:
    width = len(FEATURES)
    low, high = np.full(width, -5, np.float32), np.full(width, 5, np.float32)
    at = FEATURES.index("no hidden gradient")
    high[at] = 0
    player = Familiar(NoOp(), low, high)
    actions, _ = player(np.zeros((1, width), np.float32), player.init(1))
    assert actions.tolist() == [list(NO_OP)]
    loop = Loop(Steered(player)).run(100)
    assert loop.said[-1].fallback and not loop.said[0].fallback
    assert not Loop(prior()).run(100).said[-1].fallback


def test_other_optimizers_are_one_line() -> None:
    weights = [torch.ones(2, requires_grad=True)]
    with pytest.raises(ValueError, match=r"^optimizer is LBFGS, expected SGD, or one"):
        LearnedController.shipped(torch.optim.LBFGS(weights), 1e6)


def test_a_budget_that_is_too_small_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^budget is 100 tokens, expected at least"):
        Loop(budget=100)
    with pytest.raises(ValueError, match=r"for 4 streams and 24 decisions"):
        Loop(budget=3000).window()


def test_the_loop_in_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "controller.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?LearnedController.*?)```", page, re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["controller"].done
    assert found["loss"].item() < 0.3
