"""SequenceModel: steps, restarts, directions, readouts, dropout; torch beside it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlrnn import checkpoint
from rlrnn.data.chunks import Features, Symbols
from rlrnn.models import ModelConfig, SequenceModel, activation_penalty
from rlrnn.recurrent import Cell, Recurrent

STEPS, BATCH, SYMBOLS, WIDTH, OUTPUTS = 9, 3, 6, 4, 6
CELLS: list[Cell] = ["lstm", "gru", "rnn", "mingru"]
SMALL = ModelConfig("lstm", 5, embedding_size=5)
OPTIONS: list[dict[str, Any]] = [
    {"layers": 3},
    {"layers": 2, "residual": True},
    {"layers": 2, "layer_norm": True},
    {"projection": 7},
    {"readout": "mean"},
]
ALL: dict[str, Any] = {
    "layers": 3,
    "residual": True,
    "layer_norm": True,
    "projection": 5,
    "readout": "mean",
    "tied": True,
}
STREAMING = [
    *(replace(SMALL, cell=cell) for cell in CELLS),
    *(replace(SMALL, **options) for options in OPTIONS),
    *(replace(SMALL, cell=cell, **ALL) for cell in CELLS),
]


def said(config: ModelConfig) -> str:
    """How it differs from SMALL."""
    usual = vars(SMALL)
    return "-".join(
        f"{name}={value}"
        for name, value in vars(config).items()
        if value != usual[name]
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(
    config: ModelConfig,
    inputs: Symbols | Features | None = None,
    outputs: int = OUTPUTS,
) -> SequenceModel:
    """In float64, with weights that are far from zero."""
    made = SequenceModel(inputs or Symbols(SYMBOLS), outputs, config).double()
    g = generator(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.6)
    made.seed(generator(2))
    return made


def symbols(steps: int = STEPS, batch: int = BATCH) -> Tensor:
    return torch.randint(SYMBOLS, (steps, batch), generator=generator(3))


def features(steps: int = STEPS, batch: int = BATCH) -> Tensor:
    shape = (steps, batch, WIDTH)
    return torch.randn(shape, generator=generator(3), dtype=torch.float64)


def restarts() -> Tensor:
    """In the middle, twice in a row, at the first and at the last step."""
    starts = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    starts[4, 0] = starts[3, 1] = starts[4, 1] = starts[0, 2] = starts[-1, 2] = True
    return starts


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# --- steps and restarts -------------------------------------------------------------


@pytest.mark.parametrize("config", STREAMING, ids=said)
@pytest.mark.parametrize("restarted", [False, True])
def test_many_steps_are_many_times_one_step(
    config: ModelConfig, restarted: bool
) -> None:
    net, x = model(config), symbols()
    starts = restarts() if restarted else None
    state = net.initial_state(BATCH)
    y, out, after = net.read(x, state, starts)
    for t in range(STEPS):
        now = None if starts is None else starts[t : t + 1]
        y_t, out_t, state = net.read(x[t : t + 1], state, now)
        close(y_t[0], y[t])
        close(out_t[0], out[t])
    close(state, after)
    # `forward` is the same without the last layer
    again, last = net(x, net.initial_state(BATCH), starts)
    assert torch.equal(again, out) and torch.equal(last, after)


@pytest.mark.parametrize("config", STREAMING, ids=said)
def test_a_restart_makes_two_sequences(config: ModelConfig) -> None:
    net, x, cut = model(config), symbols(), 4
    starts = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    starts[cut] = True
    # whatever came before the window, too
    g = generator(4)
    state = torch.randn(net.initial_state(BATCH).shape, generator=g).double()
    if config.readout == "mean":
        state[-1] = 3.0  # the number of steps that were summed
    out, after = net(x, state, starts)
    first, _ = net(x[:cut], state)
    second, last = net(x[cut:], net.initial_state(BATCH))
    close(out, torch.cat((first, second)))
    close(after, last)


@pytest.mark.parametrize("config", STREAMING, ids=said)
def test_no_gradient_crosses_a_restart(config: ModelConfig) -> None:
    net = model(replace(config, tied=False), Features(WIDTH))
    x = features().requires_grad_()
    starts = restarts()
    out, _ = net(x, net.initial_state(BATCH), starts)
    (gradient,) = torch.autograd.grad(out[-2].sum(), x)
    for b, begin in enumerate((4, 4, 0)):  # of the sequence that goes on there
        assert (gradient[:begin, b] == 0).all()
        assert (gradient[begin:-1, b] != 0).any(-1).all()
    assert (gradient[-1] == 0).all()


@pytest.mark.parametrize("restarted", [False, True])
def test_the_mean_is_that_of_all_outputs_since_the_sequence_began(
    restarted: bool,
) -> None:
    """In two windows, beside a model that reads out each step."""
    net = model(replace(SMALL, layers=2, readout="mean"))
    steps = model(replace(SMALL, layers=2))
    steps.load_state_dict(net.state_dict())
    x, starts = symbols(), restarts()
    if not restarted:
        starts = torch.zeros_like(starts)
    y, _, _ = steps.read(x, steps.initial_state(BATCH), starts)
    expected = torch.empty_like(y)
    for b in range(BATCH):
        begin = 0
        for t in range(STEPS):
            begin = t if starts[t, b] else begin
            expected[t, b] = y[begin : t + 1, b].mean(0)
    state, outs = net.initial_state(BATCH), []
    for window in (slice(0, 4), slice(4, STEPS)):
        given = starts[window] if starts[window].any() else None
        out, state = net(x[window], state, given)
        outs.append(out)
    close(torch.cat(outs), net.head(expected))


# --- beside torch -------------------------------------------------------------------


def test_options_are_what_they_say() -> None:
    """An embedding, two layers with norms and a residual, a projection, a head."""
    config = replace(SMALL, layers=2, residual=True, layer_norm=True, projection=7)
    net, x = model(config), symbols()
    assert isinstance(net.encoder, nn.Embedding) and net.projection is not None
    y: Tensor = net.encoder(x)
    for layer, (core, norm) in enumerate(zip(net.cores, net.norms, strict=True)):
        assert isinstance(core, Recurrent)
        out, _ = core.stack(y)
        y = norm(out + y if layer else out)
    last, out, _ = net.read(x, net.initial_state(BATCH))
    close(last, y)
    close(out, net.head(torch.relu(net.projection(y))))


def test_features_may_pass_a_dense_layer() -> None:
    x = features()
    for size in (None, 8):
        net = model(replace(SMALL, embedding_size=size), Features(WIDTH))
        y = x
        if size is not None:
            assert isinstance(net.encoder, nn.Sequential)
            linear = net.encoder[0]
            assert isinstance(linear, nn.Linear) and linear.out_features == size
            y = torch.relu(linear(x))
        core = net.cores[0]
        assert isinstance(core, Recurrent)
        close(net(x, net.initial_state(BATCH))[0], net.head(core.stack(y)[0]))


KINDS: dict[Cell, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def both_ways(net: SequenceModel, width: int) -> Any:
    """torch's own bidirectional stack, with the weights of `net`."""
    config = net.config
    theirs = KINDS[config.cell](
        width, config.hidden_size, config.layers, bidirectional=True
    ).double()
    with torch.no_grad():
        for number, core in enumerate(net.cores):
            assert isinstance(core, Recurrent)
            layer, back = divmod(number, 2)
            for name, weight in core.stack.named_parameters():
                its = name.replace("_l0", f"_l{layer}") + "_reverse" * back
                getattr(theirs, its).copy_(weight)
    return theirs


def padded(x: Tensor, lengths: list[int]) -> Tensor:
    """Where sequences of these lengths begin in x, and their padding."""
    starts = torch.zeros(x.shape[:2], dtype=torch.bool)
    starts[0] = True
    for b, length in enumerate(lengths):
        if length < len(x):
            starts[length, b] = True
    return starts


@pytest.mark.parametrize("cell", list(KINDS))
@pytest.mark.parametrize("layers", [1, 2])
def test_both_directions_are_those_of_torch_on_packed_sequences(
    cell: Cell, layers: int
) -> None:
    config = replace(SMALL, cell=cell, layers=layers, bidirectional=True)
    net, x, lengths = model(config, Features(WIDTH)), features(), [9, 1, 5]
    net = model(replace(config, embedding_size=None), Features(WIDTH))
    y, _, _ = net.read(x, net.initial_state(BATCH), padded(x, lengths))
    theirs = both_ways(net, WIDTH)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0])
    for b, length in enumerate(lengths):
        close(y[:length, b], expected[:length, b])
    whole, _, _ = net.read(x, net.initial_state(BATCH))
    close(whole, theirs(x)[0])


BOTH_WAYS = [
    replace(SMALL, cell=cell, bidirectional=True, **options)
    for cell in CELLS
    for options in OPTIONS
]


@pytest.mark.parametrize("config", BOTH_WAYS, ids=said)
def test_padding_does_not_leak(config: ModelConfig) -> None:
    """Each sequence of a padded batch has the outputs that it has alone."""
    net, x, lengths = model(config), symbols(), [9, 1, 5]
    state, starts = net.initial_state(BATCH), padded(x, lengths)
    out, _ = net(x, state, starts)
    other = torch.where(starts.cumsum(0) > 1, (x + 1) % SYMBOLS, x)
    same, _ = net(other, state, starts)
    for b, length in enumerate(lengths):
        alone, _ = net(x[:length, b : b + 1], net.initial_state(1))
        close(out[:length, b], alone[:, 0])
        assert torch.equal(same[:length, b], out[:length, b])


@pytest.mark.parametrize("cell", CELLS)
def test_time_reversed_with_the_directions_swapped_is_the_same(cell: Cell) -> None:
    net = model(replace(SMALL, cell=cell, bidirectional=True))
    swapped = model(net.config)
    swapped.load_state_dict(net.state_dict())
    swapped.cores[0].load_state_dict(net.cores[1].state_dict())
    swapped.cores[1].load_state_dict(net.cores[0].state_dict())
    x, state = symbols(), net.initial_state(BATCH)
    y, _, _ = net.read(x, state)
    forward, backward = y.chunk(2, -1)
    y, _, _ = swapped.read(x.flip(0), state)
    close(y.flip(0), torch.cat((backward, forward), -1))
    assert not torch.allclose(forward, backward)


# --- tied weights -------------------------------------------------------------------


def test_tied_weights_are_one(tmp_path: Path) -> None:
    net, free = model(replace(SMALL, tied=True)), model(SMALL)
    assert isinstance(net.encoder, nn.Embedding)
    assert net.head.weight is net.encoder.weight
    count = [sum(p.numel() for p in m.parameters()) for m in (net, free)]
    assert count[1] - count[0] == net.head.weight.numel()
    # its gradient is the sum of both places
    free.load_state_dict(net.state_dict())
    x = symbols()
    for m in (net, free):
        m(x, m.initial_state(BATCH))[0].square().sum().backward()
    assert isinstance(free.encoder, nn.Embedding)
    parts = free.encoder.weight.grad, free.head.weight.grad
    assert parts[0] is not None and parts[1] is not None
    assert net.head.weight.grad is not None
    close(net.head.weight.grad, parts[0] + parts[1])
    # and they are still one after a checkpoint
    checkpoint.save(tmp_path / "model", dict(net.state_dict()))
    other = model(replace(SMALL, tied=True))
    other.head.weight.data.zero_()
    other.load_state_dict(checkpoint.load(tmp_path / "model"))
    assert isinstance(other.encoder, nn.Embedding)
    assert other.head.weight is other.encoder.weight
    assert torch.equal(other.head.weight, net.head.weight)


# --- dropout ------------------------------------------------------------------------


DROPPED = [
    replace(SMALL, layers=2, dropout=0.5),
    replace(SMALL, layers=2, input_dropout=0.5),
    replace(SMALL, layers=2, weight_drop=0.5),
]


@pytest.mark.parametrize("config", DROPPED, ids=said)
def test_dropout_is_off_in_evaluation_and_drawn_from_the_generator(
    config: ModelConfig,
) -> None:
    net, x = model(config), symbols()
    plain = model(replace(SMALL, layers=2))
    plain.load_state_dict(net.state_dict())
    state = net.initial_state(BATCH)

    def outs(seed: int) -> list[Tensor]:
        net.seed(generator(seed))
        return [net(x, state)[0] for _ in range(2)]

    before = torch.random.get_rng_state()
    first, second = outs(0)
    assert not torch.allclose(first, second)  # two windows, two masks
    again = outs(0)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.allclose(first, outs(1)[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    net.eval()
    close(net(x, state)[0], plain(x, state)[0])


def test_dropout_has_one_mask_for_all_steps_of_a_window() -> None:
    net = model(replace(SMALL, dropout=0.25))
    y = torch.ones(STEPS, 200, 50, dtype=torch.float64)
    dropped = net._drop(y, 0.25)
    assert (dropped == dropped[0]).all()  # at each step the same
    assert not (dropped[0] == dropped[0, 0]).all()  # but not for all streams
    assert set(dropped.flatten().tolist()) == {0.0, 1 / 0.75}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_dropout_lies_between_the_layers_and_before_the_head() -> None:
    """What all masks are drawn for: the outputs of each layer, once."""
    net = model(replace(SMALL, layers=3, dropout=0.5, input_dropout=0.25))
    seen: list[tuple[float, tuple[int, ...]]] = []
    drop = net._drop

    def noted(y: Tensor, share: float) -> Tensor:
        seen.append((share, tuple(y.shape)))
        return drop(y, share)

    net._drop = noted  # type: ignore[method-assign]
    last, out, _ = net.read(symbols(), net.initial_state(BATCH))
    size = (STEPS, BATCH, SMALL.hidden_size)
    assert seen == [(0.25, size), (0.5, size), (0.5, size), (0.5, size)]
    assert not torch.allclose(net.head(last), out)  # `read` gives it before dropout


# --- penalties, errors --------------------------------------------------------------


def test_activation_penalty_by_hand() -> None:
    y = features()
    expected, changed = 0.0, 0.0
    for t in range(STEPS):
        expected += float(y[t].square().sum()) / y.numel()
        if t:
            changed += float((y[t] - y[t - 1]).square().sum()) / y[1:].numel()
    found = activation_penalty(y, 0.3, 0.7)
    assert float(found) == pytest.approx(0.3 * expected + 0.7 * changed)
    # one step has no change
    assert float(activation_penalty(y[:1], 0.3, 0.7)) == pytest.approx(
        0.3 * float(y[0].square().mean())
    )


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"hidden_size": 0}, "model.hidden_size is 0, expected at least 1"),
        ({"layers": 0}, "model.layers is 0, expected at least 1"),
        ({"projection": 0}, "model.projection is 0, expected at least 1"),
        ({"dropout": 1.0}, "model.dropout is 1.0, expected 0 to below 1"),
        ({"input_dropout": -0.1}, "model.input_dropout is -0.1, expected 0 to"),
        ({"weight_drop": 1.5}, "model.weight_drop is 1.5, expected 0 to below 1"),
    ],
)
def test_a_wrong_option_is_one_line(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(SMALL, **setting)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "inputs", "outputs", "says"),
    [
        (replace(SMALL, tied=True), Features(WIDTH), OUTPUTS, "next symbol"),
        (replace(SMALL, tied=True), Symbols(SYMBOLS), OUTPUTS + 1, "next symbol"),
        (
            replace(SMALL, tied=True, embedding_size=3),
            Symbols(SYMBOLS),
            OUTPUTS,
            "embeddings have 3 numbers and the head reads 5; set model.embedding_size",
        ),
        (
            replace(SMALL, cell="mingru", weight_drop=0.5),
            Symbols(SYMBOLS),
            OUTPUTS,
            "no hidden-to-hidden weights",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(
    config: ModelConfig, inputs: Symbols | Features, outputs: int, says: str
) -> None:
    with pytest.raises(ValueError) as caught:
        SequenceModel(inputs, outputs, config)
    assert says in str(caught.value) and "\n" not in str(caught.value)
