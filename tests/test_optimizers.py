"""Schedule-Free and Prodigy in the trainer: the packages' own loops, and resuming."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from rlrnn import checkpoint
from rlrnn.control import Knobs
from rlrnn.evaluation import mean_loss
from rlrnn.ledger import FORWARD_COST, TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.optimizers import (
    Optimizer,
    evaluation_weights,
    light,
    make_optimizer,
    rate_power,
)
from rlrnn.tasks import DataConfig, Task, build_trainer
from rlrnn.training import Trainer

RIVALS: list[Optimizer] = ["schedulefree", "prodigy"]
rivals = pytest.mark.parametrize("name", RIVALS)


def trainer(name: Optimizer, **training: Any) -> Trainer:
    return build_trainer(
        Task(
            DataConfig("markov", batch=3, size=3000, symbols=4, memory=5),
            ModelConfig("lstm", 5),
            TrainingConfig(9000.0, name, decisions=6, **training),
        )
    )


def knobs(lr: float = 0.5, truncation: int = 8) -> Knobs:
    return Knobs(np.array([lr]), np.array([lr]), np.array([truncation]))


def vector(weights: list[Tensor]) -> Tensor:
    return torch.cat([w.detach().flatten() for w in weights])


def probe_loss(t: Trainer) -> float:
    objective = t.problem.objective
    return float(mean_loss(t.model, objective, t.problem.probe, t.probe_steps))


@rivals
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_interval_is_the_packages_own_loop(name: Optimizer, decay: float) -> None:
    # in float64: the package's way there and back moves last bits
    built = trainer(name, weight_decay=decay), trainer(name)
    ours, theirs = (Trainer(t.model.double(), t.problem, t.config) for t in built)
    if name == "schedulefree":
        peer: Any = AdamWScheduleFree(theirs.parameters, weight_decay=decay)
    else:
        peer = Prodigy(theirs.parameters, weight_decay=decay, use_bias_correction=True)
    ours.start()
    theirs.start()
    for _ in range(3):
        begin = ours.position
        ours.step(knobs())
        if name == "schedulefree":
            peer.train()
        for at in range(begin, ours.position, 8):
            theirs.position = at
            chunk = theirs.problem.train.window(at, 8)
            peer.param_groups[0]["lr"] = 0.5
            peer.zero_grad()
            theirs._gradient(chunk, 8)
            nn.utils.clip_grad_norm_(theirs.parameters, 1.0)
            peer.step()
        torch.testing.assert_close(vector(ours.parameters), vector(theirs.parameters))
        if name == "schedulefree":
            peer.eval()
        assert ours.last_probe == pytest.approx(probe_loss(theirs), rel=1e-9)


def test_schedule_free_is_evaluated_at_its_average() -> None:
    t = trainer("schedulefree", select="valid")
    assert torch.equal(
        vector(evaluation_weights(t.optimizer, t.parameters)), vector(t.parameters)
    ), "before the first step both are the initial weights"
    t.start()
    for _ in range(4):
        t.step(knobs())
    learning = vector(t.parameters)
    other = copy.deepcopy(t)
    other.optimizer.eval()  # type: ignore[attr-defined]
    average = vector(other.parameters)
    assert torch.equal(vector(evaluation_weights(t.optimizer, t.parameters)), average)
    assert (average - learning).norm() > 1e-3 * average.norm()
    assert t.last_probe == probe_loss(other)
    t.best, t.best_valid = [], math.inf
    with t.kept_weights():
        assert torch.equal(vector(t.parameters), average)
    t._select()
    assert torch.equal(vector(t.best), average)
    # and looking has changed no bit
    assert torch.equal(vector(t.parameters), learning)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "prodigy"])
def test_others_are_evaluated_where_they_learn(name: Optimizer) -> None:
    weight = nn.Parameter(torch.ones(2))
    made = make_optimizer(name, [{"params": [weight], "scale": 1.0}], 0.0)
    assert evaluation_weights(made, [weight]) == []


@rivals
@pytest.mark.parametrize("at", [0, 3])
def test_a_run_goes_on_to_the_same_bits(
    name: Optimizer, at: int, tmp_path: Path
) -> None:
    a = trainer(name)
    a.start()
    for _ in range(at):
        a.step(knobs())
    checkpoint.save(tmp_path / "run", a.state_dict())
    b = trainer(name)
    b.load_state_dict(checkpoint.load(tmp_path / "run"))
    while not a.done:
        one, two = a.step(knobs(0.3, 4)), b.step(knobs(0.3, 4))
        assert repr(one) == repr(two)
        assert torch.equal(vector(a.parameters), vector(b.parameters))


@rivals
def test_a_recovery_takes_everything_back(name: Optimizer) -> None:
    t = trainer(name)
    t.start()
    t.step(knobs())
    before = copy.deepcopy((t.state_dict()["optimizer"], vector(t.parameters)))
    loss = t._loss
    t._loss = lambda out, chunk: loss(out, chunk) * math.nan  # type: ignore[method-assign]
    assert t.step(knobs()).recovered[0]
    assert torch.equal(vector(t.parameters), before[1])
    assert repr(t.optimizer.state_dict()) == repr(before[0])
    t._loss = loss  # type: ignore[method-assign]
    assert not t.step(knobs()).recovered[0]


def test_powers_of_the_truncation() -> None:
    powers = [rate_power(name) for name in ("sgd", "momentum", "adam", *RIVALS)]
    assert powers == [1.0, 1.0, 0.5, 0.5, 0.5]


@rivals
def test_a_missing_package_is_one_line(
    name: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"prodigy": "prodigyopt"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^optimizer is '{name}', .*rlrnn\[rivals\]"):
        trainer(name)


def test_what_does_not_go_together_is_one_line() -> None:
    with pytest.raises(ValueError, match="^average is 0.1, expected 0"):
        TrainingConfig(optimizer="schedulefree", average=0.1)
    with pytest.raises(ValueError, match="^layer_decay is 0.5, expected 1"):
        TrainingConfig(optimizer="prodigy", layer_decay=0.5)


# --- the decay probe ----------------------------------------------------------------


def test_the_decay_probe_changes_no_update_and_is_charged() -> None:
    with_it, without = trainer("sgd", decay_probe=True), trainer("sgd")
    for t in (with_it, without):
        t.start()
    spans = [t.plan(knobs()).spans for t in (with_it, without)]
    one, two = with_it.step(knobs()), without.step(knobs())
    assert spans[0] == spans[1]
    torch.testing.assert_close(vector(with_it.parameters), vector(without.parameters))
    again = (1 - FORWARD_COST) * spans[0][-1] * with_it.batch
    assert with_it.spent - without.spent == pytest.approx(again)
    assert one.carried_grad == pytest.approx(two.carried_grad, rel=1e-3)
    assert one.grad_decay != pytest.approx(two.grad_decay, rel=0.1)


def test_the_decay_probe_sees_the_decay_of_a_linear_recurrence() -> None:
    """With a loss at each step too, where the whole gradient does not fade."""
    w = 0.8
    t = build_trainer(
        Task(
            DataConfig("markov", batch=3, size=3000, symbols=4, memory=5),
            ModelConfig("rnn", 5),
            TrainingConfig(9000.0, "sgd", decisions=6, decay_probe=True),
        )
    )
    with torch.no_grad():
        for p in t.parameters:
            p.mul_(1e-4)
        t.model.cores[0].weights(0)[1].copy_(w * torch.eye(5))  # type: ignore[operator]
    t.hidden = torch.full_like(t.hidden, 1e-3)
    _, watched = t._watched_gradient(t.problem.train.window(16, 16))
    assert float(watched["grad_decay"]) == pytest.approx(-math.log(w), rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop]
)
def test_a_light_optimiser_is_torchs_own(
    kind: type[torch.optim.Optimizer], fused: bool
) -> None:
    if kind is torch.optim.RMSprop and fused:
        pytest.skip("torch has no fused one")
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
    options |= {"fused": True} if fused else {}

    def train(make: Any, again: Any) -> tuple[Tensor, dict[str, Any]]:
        weight = nn.Parameter(torch.arange(6.0))
        optimizer = make([weight], **options)
        for _ in range(3):
            optimizer.zero_grad()
            (weight - 2).square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        other = again([weight], **options)  # which goes on from the first one's state
        other.load_state_dict(optimizer.state_dict())
        other.step()
        return weight.detach(), other.state_dict()

    (a, state), (b, other), (c, third) = (
        train(kind, kind),
        train(light(kind), light(kind)),
        train(light(kind), kind),
    )
    assert torch.equal(a, b) and torch.equal(a, c)
    assert state["param_groups"] == other["param_groups"] == third["param_groups"]
    assert isinstance(light(kind)([nn.Parameter(a)], lr=1.0), kind)


def test_a_light_optimiser_of_others_is_their_own() -> None:
    assert light(Prodigy) is Prodigy


def test_nothing_here_imports_torchs_compiler() -> None:
    program = """
import sys
from rlrnn.agents import RecurrentPPO
agent = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=32, device="cpu")
agent.learn(64)
agent.policy.optimizer.state_dict()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
