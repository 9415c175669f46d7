"""A model that begins with another's weights: which rows, and which parts learn."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlrnn.control import Knobs
from rlrnn.data.chunks import Features, Problem, Streams, Symbols
from rlrnn.finished import Finished
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes, Numbers
from rlrnn.training import Trainer
from rlrnn.transfer import transfer

CONFIG = ModelConfig(hidden_size=8, layers=2, embedding_size=6)


def model_of(count: int, config: ModelConfig = CONFIG, seed: int = 0) -> SequenceModel:
    torch.manual_seed(seed)
    return SequenceModel(Symbols(count), count, config)


def text_format(vocabulary: str) -> dict[str, Any]:
    return {"kind": "text", "level": "characters", "vocabulary": vocabulary}


def finished(vocabulary: str, config: ModelConfig = CONFIG) -> Finished:
    count = len(vocabulary)
    model = model_of(count, config, seed=1)
    objective = Classes(count)
    return Finished(model, Symbols(count), objective, text_format(vocabulary), {})


def test_symbols_that_both_know_keep_their_rows() -> None:
    source, model = finished("?abcd"), model_of(4)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    taken = transfer(model, text_format("?dxa"), source)
    old, new = source.model.state_dict(), model.state_dict()
    for key in ("encoder.weight", "head.weight", "head.bias"):
        torch.testing.assert_close(new[key][[0, 1, 3]], old[key][[0, 4, 1]])
        torch.testing.assert_close(new[key][2], fresh[key][2])  # x is new
    for key in (key for key in new if key.startswith("cores.")):
        torch.testing.assert_close(new[key], old[key])
    assert taken == {"encoder": "3 of 4 symbols", "cores": "all", "head": taken["head"]}


def test_a_head_for_something_else_is_fresh() -> None:
    source = finished("?abcd")
    torch.manual_seed(0)
    model = SequenceModel(Symbols(5), 2, CONFIG)
    fresh = model.head.weight.detach().clone()
    taken = transfer(model, text_format("?abcd"), source)
    assert taken["encoder"] == "5 of 5 symbols" and taken["head"] == "nothing"
    torch.testing.assert_close(model.head.weight, fresh)


def test_layers_of_another_form_are_refused() -> None:
    wide = replace(CONFIG, hidden_size=9)
    with pytest.raises(ValueError, match="model.hidden_size is 8, but the run"):
        transfer(model_of(5), text_format("?abcd"), finished("?abcd", wide))
    model = SequenceModel(Features(3), 1, replace(CONFIG, embedding_size=None))
    with pytest.raises(ValueError, match="the first layer reads 3 numbers"):
        transfer(model, {"kind": "series"}, finished("?abcd"))


def trainer_of(**options: Any) -> Trainer:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(400, 4, 3)))
    streams = Streams(x, x.sum(-1, keepdim=True))
    problem = Problem(Features(3), Numbers(1), streams, streams, streams, streams)
    torch.manual_seed(0)
    model = SequenceModel(Features(3), 1, CONFIG).double()
    config = TrainingConfig(20_000.0, optimizer="sgd", decisions=6, clip=1e9, **options)
    return Trainer(model, problem, config)


def knobs(lr: float) -> Knobs:
    return Knobs(np.array([lr]), np.array([lr]), np.array([16]))


def moved(trainer: Trainer, lr: float = 0.01) -> dict[str, float]:
    """How far each part goes in one interval."""
    before = {n: [p.detach().clone() for p in ps] for n, ps in trainer.model.parts()}
    trainer.step(knobs(lr))
    return {
        name: sum(float((p - q).norm()) for p, q in zip(ps, before[name], strict=True))
        for name, ps in trainer.model.parts()
    }


def test_parts_are_all_parameters_once() -> None:
    for config in (CONFIG, replace(CONFIG, layer_norm=True, projection=5)):
        model = model_of(7, config)
        flat = [id(p) for _, parameters in model.parts() for p in parameters]
        assert sorted(flat) == sorted(id(p) for p in model.parameters())
    tied = model_of(7, replace(CONFIG, embedding_size=8, tied=True))
    flat = [id(p) for _, parameters in tied.parts() for p in parameters]
    assert len(set(flat)) == len(flat) == len(list(tied.parameters()))


def test_frozen_parts_stay() -> None:
    trainer = trainer_of(frozen="core")
    trainer.start()
    far = moved(trainer)
    assert far["head"] > 0 and not any(far[n] for n in far if n != "head")
    trainer = trainer_of(frozen="encoder")
    trainer.start()
    far = moved(trainer)
    assert far["encoder"] == 0 and far["layer 1"] > 0


def test_layers_thaw_from_the_top() -> None:
    trainer = trainer_of(unfreeze=0.9)
    trainer.start()
    thawed = []
    while not trainer.done:
        thawed.append({name for name, far in moved(trainer).items() if far})
    assert thawed[0] == {"head"} and thawed[-1] == {
        "head",
        "layer 2",
        "layer 1",
        "encoder",
    }
    assert all(a <= b for a, b in zip(thawed, thawed[1:], strict=False))


def test_lower_layers_learn_slower() -> None:
    """Plain gradient descent moves in proportion to the rate, at first."""
    far = {}
    for decay in (1.0, 0.5):
        trainer = trainer_of(layer_decay=decay)
        trainer.start()
        far[decay] = moved(trainer, lr=1e-6)
    names = ["head", "layer 2", "layer 1", "encoder"]
    ratios = [far[0.5][name] / far[1.0][name] for name in names]
    np.testing.assert_allclose(ratios, [1, 0.5, 0.25, 0.125], rtol=0.05)
