"""The recurrence in Triton beside the readable loop.

Without a GPU, Triton's interpreter runs the kernels on the CPU. It has to be asked for
before Triton is imported, so that it gets a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlrnn import recurrent, stacked
from rlrnn.data.chunks import Symbols
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes
from rlrnn.recurrent import Cell, Recurrent, together
from rlrnn.stacked import Stack, Windows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CELLS: list[Cell] = ["lstm", "gru", "rnn"]
RESTARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "some": lambda luck: luck < 0.3,
    "first": lambda luck: torch.arange(len(luck))[:, None].expand_as(luck) == 0,
    "all": lambda luck: luck < 2,
    "none": lambda luck: luck > 2,
}
Case = tuple[Recurrent, Tensor, Tensor, Tensor]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
cells = pytest.mark.parametrize("cell", CELLS)
# Weights that stay on the multiprocessor, or are read again at every step.
ways = pytest.mark.parametrize("way", ["held", "tiled"])


@pytest.fixture(
    params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> torch.device:
    if INTERPRETED:
        monkeypatch.setattr(recurrent, "compiles", lambda x: False)
        monkeypatch.setattr(recurrent, "fuses", lambda x: x.dtype == torch.float32)
    return torch.device(request.param)


def force(monkeypatch: pytest.MonkeyPatch, way: str, processors: int = 1) -> None:
    from rlrnn import kernels_cuda

    shared = 2**17 if way == "held" else 0
    monkeypatch.setattr(kernels_cuda, "_resources", lambda _: (processors, shared))


def case(
    device: torch.device,
    cell: Cell,
    size: int,
    columns: int,
    steps: int,
    layers: int = 1,
    restarts: str = "some",
    seed: int = 0,
) -> Case:
    """A core, and inputs, a state and restarts for it."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core = Recurrent(3, size, layers, cell)
    x = torch.randn(steps, columns, 3, generator=g)
    state = torch.randn(core.initial_state(columns).shape, generator=g)
    starts = RESTARTS[restarts](torch.rand(steps, columns, generator=g))
    return core.to(device), x.to(device), state.to(device), starts.to(device)


def gradients(
    core: Recurrent, run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *rest: Tensor
) -> list[Tensor]:
    """Outputs and last state, and the gradients of inputs, state and weights."""
    state, starts = rest
    x, state = x.detach().requires_grad_(), state.detach().requires_grad_()
    y, end = run(x, state, starts)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    loss = (y * weights).sum() + end.square().sum()
    return [y, end, *torch.autograd.grad(loss, [x, state, *core.parameters()])]


def exact(core: Recurrent, x: Tensor, state: Tensor, starts: Tensor) -> list[Tensor]:
    """The readable loop in float64."""
    core.double()
    results = gradients(core, core.reference, x.double(), state.double(), starts)
    core.float()
    return results


def check(ours: list[Tensor], reference: list[Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        size = b.nan_to_num().abs().max().item()
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=1e-5 * max(size, 1), equal_nan=True
        )


@ways
@cells
@pytest.mark.parametrize(
    ("size", "columns", "steps", "layers"),
    [(5, 1, 4, 2), (24, 3, 1, 1), (24, 17, 3, 1), (40, 33, 2, 1)],
)
def test_equals_the_reference(
    device: torch.device,
    cell: Cell,
    size: int,
    columns: int,
    steps: int,
    layers: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, way)
    core, *given = case(device, cell, size, columns, steps, layers)
    check(gradients(core, core, *given), exact(core, *given))


@ways
@cells
@pytest.mark.parametrize("restarts", ["first", "all", "none"])
def test_restarts_at_0_and_everywhere(
    device: torch.device,
    cell: Cell,
    restarts: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, way)
    core, *given = case(device, cell, 8, 3, 4, restarts=restarts)
    ours = gradients(core, core, *given)
    check(ours, exact(core, *given))
    if restarts != "none":  # no gradient crosses, not even a small one
        assert not ours[3].any()


@cells
@pytest.mark.parametrize("processors", [1, 1000])
def test_several_tiles_of_units_and_of_columns(
    device: torch.device,
    cell: Cell,
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H beyond what one tile holds; columns that fill one program, and several."""
    force(monkeypatch, "tiled", processors)
    core, *given = case(device, cell, 70, 65, 2)
    check(gradients(core, core, *given), exact(core, *given))


@ways
@cells
def test_networks_side_by_side(
    device: torch.device, cell: Cell, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, way)
    (one, x, state, starts), (two, x_2, state_2, _) = (
        case(device, cell, 20, 5, 2, layers=2, seed=seed) for seed in (0, 1)
    )
    heads = [nn.Sequential(nn.Linear(20, 2)).to(device) for _ in range(2)]
    pairs = together([one, two], heads, [x, x_2], [state, state_2], starts)
    grads = torch.autograd.grad(
        torch.stack([y.sum() + after.sum() for y, after, _ in pairs]).sum(),
        [*one.parameters(), *two.parameters()],
    )
    singly = [one(x, state, starts), two(x_2, state_2, starts)]
    expected = torch.autograd.grad(
        torch.stack(
            [h(y).sum() + a.sum() for h, (y, a) in zip(heads, singly, strict=True)]
        ).sum(),
        [*one.parameters(), *two.parameters()],
    )
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for (_, after, latent), (y, end) in zip(pairs, singly, strict=True):
        torch.testing.assert_close(latent, y)
        torch.testing.assert_close(after, end)


@ways
@cells
def test_stacked_models(
    device: torch.device, cell: Cell, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rlrnn.stacked`: each with its own restarts."""
    force(monkeypatch, way)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ModelConfig(cell, 20, 2, 3)
        models = [SequenceModel(Symbols(5), 5, config).to(device) for _ in range(3)]
    stack = Stack(models, Classes(5), ["adam"] * 3, [0.0] * 3)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(5, (2, 3, 3, 4), generator=g).to(device)
    starts = (torch.rand(3, 3, 4, generator=g) < 0.3).to(device)
    windows = Windows(x, y, starts, None, torch.full((3,), 12.0, device=device))
    state = torch.randn(stack.initial_state(4).shape, generator=g).to(device)
    rates = torch.full((3,), 1e-2, device=device), torch.ones(3, device=device)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(stacked, "fuses", lambda x, fused=fused: fused)
        done = stack.reference(windows, state, *rates, watch=True, keep=True)
        results.append([*done, stack.grads.clone()])
        stack.weights = torch.stack([stacked._flat(model) for model in models])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@ways
@cells
def test_trace(
    device: torch.device, cell: Cell, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, way)
    core, x, state, starts = case(device, cell, 20, 5, 4, layers=2)
    states = core.trace(x, state, starts)
    for t in range(len(x)):
        _, state = core.reference(x[t : t + 1], state, starts[t : t + 1])
        torch.testing.assert_close(states[t], state, rtol=1e-4, atol=1e-5)


@ways
@cells
def test_equal_inputs_give_equal_bits(
    device: torch.device, cell: Cell, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, way)
    core, *given = case(device, cell, 24, 33, 3)
    first, second = (gradients(core, core, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@ways
@cells
def test_nan_shows(
    device: torch.device, cell: Cell, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its step on, in its column, until a restart."""
    force(monkeypatch, way)
    core, x, state, starts = case(device, cell, 8, 3, 5, restarts="none")
    x[1, 2] = torch.nan
    starts[3] = True
    y, _ = core(x, state, starts)
    expected = torch.zeros_like(starts)
    expected[1:3, 2] = True
    assert torch.equal(y.isnan().all(-1), expected)
    assert torch.equal(y.isnan().any(-1), expected)


if not INTERPRETED:

    def test_in_tritons_interpreter() -> None:
        """Everything above, on the CPU."""
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout

    @cells
    @pytest.mark.parametrize(
        ("size", "columns", "capability"),
        [(24, 16, 90), (100, 8192, 100)],
    )
    def test_compiles_for_a_device(
        cell: Cell,
        size: int,
        columns: int,
        capability: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """H100 and B200, with the shared memory of smaller ones, in full float32."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from rlrnn import kernels_cuda

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        shared = 99 * 1024
        plan = kernels_cuda.plan(cell, size, columns, 132, shared)
        assert plan.held == (size == 24)
        for direction in ("forward", "backward"):
            kernel = getattr(
                kernels_cuda, f"_{direction}_{'held' if plan.held else 'tiled'}"
            )
            kinds = {name: "*fp32" for name in kernel.arg_names}
            kinds |= {"starts": "*u8", "steps": "i32", "columns": "i32"}
            kinds["apart"] = "i32"
            kinds |= {name: "constexpr" for name in plan.constants}
            source = ASTSource(kernel, signature=kinds, constexprs=plan.constants)
            target = GPUTarget("cuda", capability, 32)
            binary = triton.compile(source, target=target, options=plan.options)
            assert binary.asm["cubin"] and "tf32" not in binary.asm["ptx"]
            assert binary.metadata.shared <= shared

    def test_without_triton_the_loop_and_a_warning(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        recurrent._triton.cache_clear()
        monkeypatch.setitem(sys.modules, "triton.runtime", None)
        with pytest.warns(UserWarning, match="no fused recurrence on CUDA"):
            assert not recurrent._triton()
        recurrent._triton.cache_clear()


@pytest.mark.gpu
def test_what_is_fused() -> None:
    x = torch.zeros(2, 1, 3, device="cuda")
    assert recurrent.fuses(x)
    assert not recurrent.fuses(x.double()) and not recurrent.fuses(x.cpu())
    core, *given = case(x.device, "gru", 5, 3, 4)
    core.double()
    y, _ = core(given[0].double(), given[1].double(), given[2])
    reference = core.reference(given[0].double(), given[1].double(), given[2])[0]
    assert torch.equal(y, reference)


@pytest.mark.gpu
@cells
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("columns", [16, 2048, 8192])
def test_usual_sizes_on_a_gpu(cell: Cell, size: int, columns: int) -> None:
    core, *given = case(torch.device("cuda"), cell, size, columns, 32)
    ours, again = (gradients(core, core, *given) for _ in range(2))
    check(ours, exact(core, *given))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.gpu
@cells
@pytest.mark.parametrize("size", [40, 128])
def test_a_captured_graph_gives_the_eager_result(cell: Cell, size: int) -> None:
    core, *static = case(torch.device("cuda"), cell, size, 33, 7)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(core, core, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(core, core, *static)
    for seed in (1, 2):
        _, *given = case(torch.device("cuda"), cell, size, 33, 7, seed=seed)
        for old, new in zip(static, given, strict=True):
            old.copy_(new)
        graph.replay()
        eager = gradients(core, core, *given)
        for ours, theirs in zip(captured, eager, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@cells
@pytest.mark.parametrize("size", [40, 128])
def test_nothing_waits_for_the_device(cell: Cell, size: int) -> None:
    core, *given = case(torch.device("cuda"), cell, size, 33, 7)
    gradients(core, core, *given)  # compiled
    core.trace(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(core, core, *given)
        core.trace(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
