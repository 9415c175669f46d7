"""Functions of tensors as captured CUDA graphs, which check themselves.

    graphs = graphs_for(device)                      None: run eagerly
    loss, y = graphs("window", function, (x, hidden, 0.1), written=lambda: weights)

A captured graph is one launch where eager torch needs hundreds. It reads and writes
memory that it was captured with, so that a mistake is silent: old inputs, results that
the next replay overwrites, weights that have moved. Here, in the order of the calls
with one form of inputs:

1. runs eagerly (optimisers make their moments, Triton compiles);
2. runs eagerly on inputs of its own (static buffers) and on a side stream, and is then
   captured; a capture computes nothing;
3. runs eagerly, is put back, and replayed: results, what it wrote and the state of its
   generators must agree. The one look at the device in a graph's life;
4. from here on: inputs are copied in, the graph is replayed, and results copied out.

If a capture raises or the results differ, a warning says so, and all functions of that
name run eagerly from then on. Has not run on a GPU yet; on a CPU `Recording`, which
obeys the same rules, takes the place of a graph in tests.
"""

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

SWITCH = "RLRNN_GRAPHS"  # environment variable: 0 for none, record for the stand-in
# Equal kernels on equal inputs give equal bits, but for additions in any order.
CLOSE, TINY = 1e-3, 1e-5  # of results: of their norm, and at all
CHANGE, ROUNDING = 1e-2, 1e-6  # of what is written: of its change, and of its norm

Run = Callable[[], tuple[list[Tensor], Any]]  # the tensors of a tree, and its form


class Captured:
    """A CUDA graph of `run`. Graphs of one pool may run in any order, as long as none
    depends on what another has left there: results are copied out at once."""

    def __init__(
        self, run: Run, generators: Sequence[torch.Generator], side: Any, pool: Any
    ) -> None:
        self.run = run  # and with it all memory that the graph reads
        self.graph: Any = torch.cuda.CUDAGraph()
        for generator in generators:
            # newer versions of torch register at first use, and are to drop this
            if hasattr(self.graph, "register_generator_state"):
                self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph, pool=pool, stream=side):
            self.outputs, self.form = run()

    def replay(self) -> None:
        self.graph.replay()


class Recording:
    """The stand-in on a CPU: `run` again, with results where they were before."""

    def __init__(self, run: Run, *_: Any) -> None:
        self.run = run
        outputs, self.form = run()
        self.outputs = _fresh(outputs)

    def replay(self) -> None:
        _copy(self.outputs, self.run()[0])


class _Saved:
    """Tensors and generators as they are now."""

    def __init__(
        self, tensors: list[Tensor], generators: Sequence[torch.Generator]
    ) -> None:
        self.tensors, self.generators = tensors, generators
        self.copies = [x.detach().clone() for x in tensors]
        self.drawn = [generator.get_state() for generator in generators]

    def restore(self) -> None:
        _copy(self.tensors, self.copies)
        for generator, drawn in zip(self.generators, self.drawn, strict=True):
            generator.set_state(drawn)


class Graphs:
    """The captured graphs of one owner, at most `limit`, the last used ones.

    A call gives what `function(*inputs)` gives; inputs and results are trees (tuples,
    lists, dicts) of tensors, None and, among inputs, floats, which become 0-dimensional
    float64 tensors. `written()` and `read()` list the tensors outside of them that the
    function writes, or only reads: where one has moved, the graph is captured anew. All
    else that it depends on is among `constants`, or never changes. `generators`: what
    it draws from. It may not look at the device, nor keep what it is given or makes.
    """

    def __init__(
        self,
        device: torch.device,
        make: type[Captured] | type[Recording],
        limit: int = 32,
    ) -> None:
        self.device, self.make, self.limit = device, make, limit
        self.entries: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()
        self.eager: set[str] = set()  # names that do not work
        self.side: Any = None
        self.pool: Any = None
        if device.type == "cuda":
            self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        name: str,
        function: Callable[..., Any],
        inputs: tuple[Any, ...],
        *,
        constants: tuple[Hashable, ...] = (),
        written: Callable[[], list[Tensor]] = list,
        read: Callable[[], list[Tensor]] = list,
        generators: tuple[torch.Generator, ...] = (),
    ) -> Any:
        if name in self.eager:
            return function(*inputs)
        leaves, tree = tree_flatten(inputs)
        key = name, constants, generators, tree, tuple(map(_form, leaves))
        entry = self.entries.pop(key, None)
        self.entries[key] = entry or _Entry(self, written, read, generators)
        if len(self.entries) > self.limit:
            self.entries.popitem(last=False)
        if entry is None:
            return function(*inputs)
        try:
            return _tree(*entry(function, leaves, tree))
        finally:
            if entry.failure:
                self._give_up(name, entry, entry.failure)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the side stream. What is allocated there may be used outside, and freed:
        it is only given out again on the side stream, which waits first."""
        if self.side is None:
            yield
            return
        here = torch.cuda.current_stream(self.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            yield
        here.wait_stream(self.side)

    def _give_up(self, name: str, entry: "_Entry", why: str) -> None:
        self.eager.add(name)
        generators = set(entry.generators)  # new inside, see `_clean_up`
        for key, other in list(self.entries.items()):
            if key[0] == name or generators & set(other.generators):
                del self.entries[key]
        warnings.warn(
            f"no captured graph of a {name}, which runs eagerly: {why}; "
            f"{SWITCH}=0 runs everything without graphs",
            stacklevel=4,
        )


def _outputs(
    function: Callable[..., Any], buffers: list[Any], tree: Any
) -> tuple[list[Tensor], Any]:
    return _tensors(function(*tree_unflatten(buffers, tree)))


class _Entry:
    """A function with one form of inputs, from its second call on."""

    def __init__(
        self,
        owner: Graphs,
        written: Callable[[], list[Tensor]],
        read: Callable[[], list[Tensor]],
        generators: tuple[torch.Generator, ...],
    ) -> None:
        self.owner, self.generators = owner, generators
        self.written, self.read = written, read
        self.buffers: list[Tensor | None] = []  # the static inputs
        self.graph: Captured | Recording | None = None
        self.places: list[int] = []  # of the tensors that it was captured with
        self.checked = False
        self.failure = ""

    def __call__(
        self, function: Callable[..., Any], leaves: list[Any], tree: Any
    ) -> tuple[list[Tensor], Any]:
        if not self.buffers:
            self.buffers = [_buffer(leaf, self.owner.device) for leaf in leaves]
        buffers = self.buffers
        _fill(buffers, leaves)
        run = partial(_outputs, function, buffers, tree)
        if self.graph is None or self.places != self._places():
            with self.owner.aside():
                outputs, form = run()
                results = _fresh(outputs)
            self._capture(run)
        elif self.checked:
            self.graph.replay()
            results, form = _fresh(self.graph.outputs), self.graph.form
        else:
            results, form = self._check(run, leaves)
        if isinstance(self.graph, Recording):
            _spoil([*buffers, *self.graph.outputs])
        return results, form

    def _places(self) -> list[int]:
        return [x.data_ptr() for x in (*self.written(), *self.read())]

    def _capture(self, run: Run) -> None:
        self.graph, self.checked, self.places = None, False, self._places()
        side = self.owner.side
        saved = _Saved(self.written(), self.generators)  # a recording does run
        # a failed capture would leave its stream the current one
        outside = nullcontext() if side is None else torch.cuda.stream(side)
        try:
            with outside:
                self.graph = self.owner.make(
                    run, self.generators, side, self.owner.pool
                )
            if self.places != self._places():
                raise RuntimeError("a tensor that it needs has moved")
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if side is not None:
                self._clean_up()
        saved.restore()

    def _clean_up(self) -> None:
        """What a failed capture can leave behind."""
        for generator in self.generators:  # may still count for the graph
            generator.graphsafe_set_state(torch.Generator(self.owner.device))
        # torch 2.11's allocator still takes from the pool (pytorch #180395); later ones
        # say that they do not
        index = self.owner.side.device.index
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, self.owner.pool)

    def _check(self, run: Run, leaves: list[Any]) -> tuple[list[Tensor], Any]:
        """The results, of a replay if it agrees with an eager run."""
        assert self.graph is not None
        before = _Saved(self.written(), self.generators)
        outputs, form = run()
        wanted, after = _fresh(outputs), _Saved(before.tensors, self.generators)
        before.restore()
        _fill(self.buffers, leaves)  # again: the function may write there
        self.graph.replay()
        found, now = _fresh(self.graph.outputs), _Saved(before.tensors, self.generators)
        near = [_near(a, b, CLOSE, TINY) for a, b in zip(found, wanted, strict=True)]
        for was, is_, is_to_be in zip(
            before.copies, now.copies, after.copies, strict=True
        ):
            near.append(_near(is_, is_to_be, CHANGE, 0.0, was))
        alike = all(map(torch.equal, now.drawn, after.drawn))  # these are on the host
        if alike and (not near or bool(torch.stack(near).all())):
            self.checked = True
            return found, form
        after.restore()
        self.failure = "its first replay differs from the eager result"
        return wanted, form


def graphs_for(device: torch.device, limit: int = 32) -> Graphs | None:
    """Those of one owner on this device; None to run eagerly."""
    asked = os.environ.get(SWITCH, "1")
    if asked == "record":
        return Graphs(device, Recording, limit)
    if asked == "0" or device.type != "cuda":
        return None
    return Graphs(device, Captured, limit)


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    assert leaf is None or isinstance(leaf, float), f"{type(leaf)} in a graph's inputs"
    return type(leaf)


def _buffer(leaf: Any, device: torch.device) -> Tensor | None:
    if isinstance(leaf, Tensor):
        return torch.empty_like(leaf, requires_grad=False)
    if leaf is None:
        return None
    return torch.zeros((), dtype=torch.float64, device=device)


def _fill(buffers: list[Tensor | None], leaves: list[Any]) -> None:
    into, out_of = [], []
    for buffer, leaf in zip(buffers, leaves, strict=True):
        if isinstance(leaf, Tensor):
            into.append(buffer)
            out_of.append(leaf)
        elif buffer is not None:
            buffer.fill_(leaf)  # a launch that carries the number: nothing waits
    _copy(into, out_of)


@torch.no_grad()
def _copy(targets: Sequence[Any], sources: Sequence[Tensor]) -> None:
    """One launch for each type of numbers."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, out_of = kinds.setdefault(target.dtype, ([], []))
        into.append(target)
        out_of.append(source)
    for into, out_of in kinds.values():
        torch._foreach_copy_(into, out_of)


def _fresh(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(x) for x in tensors]
    _copy(copies, tensors)
    return copies


def _tensors(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, and what `_tree` needs to put others in their places."""
    leaves, form = tree_flatten(tree)
    there = [leaf is not None for leaf in leaves]
    return [leaf.detach() for leaf in leaves if leaf is not None], (form, there)


def _tree(tensors: list[Tensor], form: Any) -> Any:
    tree, there = form
    following = iter(tensors)
    return tree_unflatten([next(following) if is_ else None for is_ in there], tree)


def _spoil(tensors: Sequence[Tensor | None]) -> None:
    """Whoever still looks at static memory is to see it."""
    for x in tensors:
        if x is not None:
            x.fill_(float("nan") if x.is_floating_point() else 1)


def _near(
    a: Tensor, b: Tensor, share: float, least: float, origin: Tensor | None = None
) -> Tensor:
    """Whether |a - b| is at most a share of |b - origin|, on the device. What is not a
    number has to be alike."""
    alike = (a == b) | ((a != a) & (b != b))
    a, b = a.double(), b.double()
    far: Tensor = torch.where(alike, 0.0, a - b).norm()
    size: Tensor = b.nan_to_num(0.0, 0.0, 0.0).norm()
    if origin is not None:
        least = least + ROUNDING * size  # type: ignore[assignment]
        size = (b - origin.double()).nan_to_num(0.0, 0.0, 0.0).norm()
    return far <= share * size + least
