"""What returns and advantages must be, at limits and against a textbook double loop."""

import pytest
import torch
from torch import Tensor

from rlrnn.returns import gae, next_values, running

T, B = 12, 5


def _case(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ends = torch.rand(T, B, generator=g)
    return {
        "rewards": normal(T, B),
        "values": normal(T, B),
        "last_values": normal(B),
        "final_values": normal(T, B),
        "terminated": ends < 0.15,
        "truncated": (ends > 0.1) & (ends < 0.3),  # some are both
    }


def _advantages(case: dict[str, Tensor], gamma: float, lam: float) -> Tensor:
    following = next_values(
        case["values"],
        case["last_values"],
        case["terminated"],
        case["truncated"],
        case["final_values"],
    )
    dones = case["terminated"] | case["truncated"]
    return gae(case["rewards"], case["values"], following, dones, gamma, lam)


def _textbook(case: dict[str, Tensor], gamma: float, lam: float) -> Tensor:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, until the episode ends."""
    advantages = torch.zeros(T, B, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                v = float(case["values"][k, b])
                if case["terminated"][k, b]:
                    after = 0.0
                elif case["truncated"][k, b]:
                    after = float(case["final_values"][k, b])
                elif k == T - 1:
                    after = float(case["last_values"][b])
                else:
                    after = float(case["values"][k + 1, b])
                delta = float(case["rewards"][k, b]) + gamma * after - v
                advantages[t, b] += weight * delta
                weight *= gamma * lam
                if case["terminated"][k, b] or case["truncated"][k, b]:
                    break
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_equals_a_textbook_double_loop(gamma: float, lam: float) -> None:
    for seed in range(5):
        case = _case(seed)
        torch.testing.assert_close(
            _advantages(case, gamma, lam), _textbook(case, gamma, lam)
        )


def test_lambda_one_is_monte_carlo() -> None:
    """With episodes that end, values cancel but for the baseline of the first."""
    case = _case()
    case["truncated"] = torch.zeros(T, B, dtype=torch.bool)
    case["terminated"] = torch.zeros(T, B, dtype=torch.bool)
    case["terminated"][-1] = True
    discounts = 0.9 ** torch.arange(T, dtype=torch.float64)
    monte_carlo = (discounts[:, None] * case["rewards"]).sum(0)
    returns = _advantages(case, 0.9, 1.0) + case["values"]
    torch.testing.assert_close(returns[0], monte_carlo)


def test_lambda_zero_is_one_step_td() -> None:
    case = _case()
    nothing = torch.zeros(T, B, dtype=torch.bool)
    case |= {"terminated": nothing, "truncated": nothing}
    after = torch.cat((case["values"][1:], case["last_values"][None]))
    expected = case["rewards"] + 0.9 * after - case["values"]
    torch.testing.assert_close(_advantages(case, 0.9, 0.0), expected)


def test_what_follows_an_end() -> None:
    """Hand-computed: termination is worth 0, truncation its final value."""
    one = torch.ones(3, 1)
    no = torch.zeros(3, 1, dtype=torch.bool)
    at_1 = no.clone()
    at_1[1] = True
    values, final, last = 2 * one, 5 * one, torch.tensor([7.0])

    def after(terminated: Tensor, truncated: Tensor) -> list[float]:
        found = next_values(values, last, terminated, truncated, final)
        return [float(x) for x in found[:, 0]]

    assert after(no, no) == [2, 2, 7]
    assert after(at_1, no) == [2, 0, 7]
    assert after(no, at_1) == [2, 5, 7]
    assert after(at_1, at_1) == [2, 0, 7]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_an_endless_reward_of_one_is_worth_one_over_one_minus_gamma(lam: float) -> None:
    """Running on or truncated: the right values are a fixed point."""
    gamma = 0.99
    worth = torch.full((T, B), 1 / (1 - gamma), dtype=torch.float64)
    truncated = torch.zeros(T, B, dtype=torch.bool)
    truncated[4, 2] = truncated[7] = True
    no = torch.zeros_like(truncated)
    following = next_values(worth, worth[0], no, truncated, worth)
    advantages = gae(torch.ones_like(worth), worth, following, truncated, gamma, lam)
    torch.testing.assert_close(advantages + worth, worth)


def test_nothing_crosses_the_end_of_an_episode() -> None:
    case = _case()
    case["terminated"][5, 1] = True
    before = _advantages(case, 0.99, 0.95)
    case["rewards"][6:, 1] += 100
    after = _advantages(case, 0.99, 0.95)
    assert torch.equal(before[:6, 1], after[:6, 1])
    assert not torch.equal(before[6:, 1], after[6:, 1])


def test_running_sums_are_a_loop_and_start_anew_after_the_end() -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(9, 3, generator=g, dtype=torch.float64)
    dones = torch.rand(9, 3, generator=g) < 0.3
    before = torch.randn(3, generator=g, dtype=torch.float64)
    found = running(rewards, dones, before, 0.9)
    for b in range(3):
        total = float(before[b])
        for t in range(9):
            total = 0.9 * total + float(rewards[t, b])
            assert float(found[t, b]) == pytest.approx(total)
            if dones[t, b]:
                total = 0.0
