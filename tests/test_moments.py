"""Running moments: those of all the data at once."""

import torch

from rlrnn.moments import RunningMoments


def test_moments_of_parts_are_those_of_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    x = 3 + 5 * torch.randn(1000, 4, generator=g)
    seen = RunningMoments(4)
    for part in (x[:1], x[1:10], x[10:100], x[100:]):
        seen.update(part)
    assert int(seen.count) == 1000
    torch.testing.assert_close(seen.mean, x.mean(0))
    torch.testing.assert_close(seen.var, x.var(0, correction=0))
    scaled = seen.normalize(x)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(4))
    assert seen.normalize(x * 1e6).abs().max() == 10


def test_before_the_first_update_nothing_changes() -> None:
    x = torch.tensor([[0.5, -2.0]])
    torch.testing.assert_close(RunningMoments(2).normalize(x), x)
