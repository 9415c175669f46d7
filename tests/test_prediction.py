"""Predictions: what is drawn, and that streaming gives what whole sequences give."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from rlrnn import checkpoint
from rlrnn.data.chunks import Features, Symbols
from rlrnn.data.files import DataError, Paths
from rlrnn.data.labelled import (
    LabelledOptions,
    encode_labelled,
    labelled_problem,
    read_labelled,
)
from rlrnn.data.music import KEYS, Roll, encode_music, write_music
from rlrnn.finished import Finished, load_model
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes, Labels
from rlrnn.prediction import (
    chosen,
    continue_roll,
    continue_text,
    label,
    predict,
    sample,
    score_text,
)
from rlrnn.tasks import build_model

VOCABULARY = "\ufffdabcde \n"
FORMAT = {"kind": "text", "level": "characters", "vocabulary": VOCABULARY}


@pytest.fixture(scope="module")
def text_model() -> Finished:
    torch.manual_seed(0)
    count = len(VOCABULARY)
    model = SequenceModel(Symbols(count), count, ModelConfig(hidden_size=16)).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)  # sure of itself, so that choices differ
    return Finished(model, Symbols(count), Classes(count), FORMAT, {})


def frequencies(logits: torch.Tensor, **options: object) -> torch.Tensor:
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **options}
    generator = torch.Generator().manual_seed(0)
    drawn = [
        chosen(logits, generator=generator, **settings)  # type: ignore[arg-type]
        for _ in range(4000)
    ]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / len(drawn)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    shares = frequencies(logits)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.03, rtol=0)
    cold = frequencies(logits, temperature=0.5)
    torch.testing.assert_close(cold, (2 * logits).softmax(-1), atol=0.03, rtol=0)
    assert frequencies(logits, temperature=0)[2] == 1


def test_top_k_and_the_nucleus() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    two = frequencies(logits, top_k=2)
    torch.testing.assert_close(
        two, torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=0.03, rtol=0
    )
    # 0.7 is held by two; 0.71 needs the third; a tiny share leaves the likeliest
    assert frequencies(logits, top_p=0.7).count_nonzero() == 2
    assert frequencies(logits, top_p=0.71).count_nonzero() == 3
    assert frequencies(logits, top_p=1e-9)[0] == 1


def test_streaming_draws_what_the_whole_sequence_says(text_model: Finished) -> None:
    """The likeliest symbols, one at a time, are those that one pass over prompt and
    continuation has at each place."""
    prompt = torch.tensor([1, 2, 3, 4] * 100)  # longer than a piece
    drawn = list(sample(text_model.model, prompt, 50, lambda out: int(out.argmax())))
    everything = torch.cat((prompt, torch.tensor(drawn))).unsqueeze(1)
    with torch.no_grad():
        out, _ = text_model.model(everything, text_model.model.initial_state(1))
    assert drawn == out[len(prompt) - 1 : -1, 0].argmax(-1).tolist()


def test_continuing_a_text(text_model: Finished) -> None:
    once = continue_text(text_model, "abc", 40, seed=1)
    assert once == continue_text(text_model, "abc", 40, seed=1)
    assert once != continue_text(text_model, "abc", 40, seed=2)
    assert len(once) == 40 and VOCABULARY[0] not in once
    with pytest.raises(DataError, match="the prompt has 'x'"):
        continue_text(text_model, "abx", 5)
    with pytest.raises(ValueError, match="top_p 0"):
        continue_text(text_model, "abc", 5, top_p=0.0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        continue_text(text_model, "", 5)


def test_the_score_of_a_text_is_its_mean_cross_entropy(text_model: Finished) -> None:
    text = "abcde dcb\n" * 60
    symbols = torch.tensor([VOCABULARY.index(c) for c in text])
    with torch.no_grad():
        state = text_model.model.initial_state(1)
        logits, _ = text_model.model(symbols[:-1].unsqueeze(1), state)
    nats = float(F.cross_entropy(logits[:, 0], symbols[1:]))
    figures = score_text(text_model, text, "a.txt")
    assert figures["nats"] == pytest.approx(nats, rel=1e-5)
    assert figures["bits"] == pytest.approx(nats / np.log(2), rel=1e-5)


def run_of(folder: Path, kind: str, **format: Any) -> Path:
    """A run folder with a fresh model of a text."""
    count = 256 if kind == "bytes" else len(format["vocabulary"])
    model = SequenceModel(Symbols(count), count, ModelConfig(hidden_size=8))
    inputs = {"type": "Symbols", "count": count}
    tree = {
        "model": dict(model.state_dict()),
        "inputs": inputs,
        "objective": {"type": "Classes", "count": count, "names": ()},
        "format": {"kind": "text", "level": kind, **format},
        "config": {"model": asdict(model.config), "data": {"kind": "text"}},
    }
    checkpoint.save(folder / "model.zip", tree, {"kind": "model"})
    return folder


def test_words_stand_apart_from_the_prompt(tmp_path: Path) -> None:
    run = run_of(tmp_path, "words", vocabulary=["<unk>", "<eol>", "one", "two"])
    known = {"", "one", "two"}
    for prompt in ("one two", "one two ", "one two\n"):
        text = predict(run, prompt, length=9)["text"]
        assert text.startswith(prompt)
        assert {word for line in text.split("\n") for word in line.split(" ")} <= known


def test_bytes_of_any_file_are_scored(tmp_path: Path) -> None:
    run = run_of(tmp_path, "bytes")
    path = tmp_path / "some.bin"
    raw = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8).tobytes()
    path.write_bytes(raw)
    figures = predict(run, str(path), score=True)
    assert figures["symbols"] == 500
    model = load_model(run).model
    x = torch.tensor(list(raw))
    with torch.no_grad():
        out, _ = model(x[:-1, None], model.initial_state(1))
    expected = float(F.cross_entropy(out[:, 0], x[1:]))
    assert figures["nats"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_labels_of_sequences_are_the_model_s(
    tmp_path: Path, bidirectional: bool
) -> None:
    """One at a time and without padding, as in a padded batch."""
    rng = np.random.default_rng(0)
    rows = [
        {"label": "xyz"[i % 3], **{f"t{t}": rng.normal() for t in range(12)}}
        for i in range(60)
    ]
    path = tmp_path / "a.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    options = LabelledOptions()
    problem = labelled_problem(Paths(str(path)), [0.7, 0.1, 0.2], 4, 0, options)
    config = ModelConfig(hidden_size=8, bidirectional=bidirectional, readout="mean")
    model = build_model(problem, config, 0).eval()
    objective = problem.objective
    finished = Finished(model, problem.inputs, objective, problem.format, {})
    read = read_labelled(path, options, labels=False)
    inputs = [encode_labelled(one, problem.format) for one in read]
    frame = label(finished, [one.where for one in read], inputs)
    assert list(frame.columns) == ["name", "label", "x", "y", "z"]
    np.testing.assert_allclose(frame[["x", "y", "z"]].sum(axis=1), 1, rtol=1e-5)
    x = torch.from_numpy(np.stack(inputs, 1))
    with torch.no_grad():
        out, _ = model(x, model.initial_state(len(read)))
    shares = out[-1].softmax(-1).numpy()
    np.testing.assert_allclose(frame[["x", "y", "z"]], shares, atol=1e-5)


# --- music ----------------------------------------------------------------------------


def music_model(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    model = SequenceModel(Features(KEYS), KEYS, ModelConfig("gru", 16, **options))
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model.eval()


def rolls(count: int = 3) -> list[Roll]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 9, count)
    return [(rng.random((n, KEYS)) < 0.05).astype(np.float32) for n in sizes]


def music_run(folder: Path, model: SequenceModel) -> Path:
    tree = {
        "model": dict(model.state_dict()),
        "inputs": {"type": "Features", "width": KEYS},
        "objective": {"type": "Labels", "count": KEYS},
        "format": {"kind": "music", "options": {"transpose": 0}},
        "config": {"model": asdict(model.config)},
    }
    folder.mkdir()
    checkpoint.save(folder / "model.zip", tree, {"kind": "model"})
    return folder


def test_streamed_music_is_what_the_whole_sequence_says() -> None:
    model, (roll, *_) = music_model(), rolls()
    whole = np.concatenate((roll, continue_roll(model, roll, 12, temperature=0)))
    x = torch.from_numpy(whole).unsqueeze(1)
    with torch.no_grad():
        out, _ = model(x, model.initial_state(1))
    expected = (out[len(roll) - 1 : -1, 0] > 0).float().numpy()
    np.testing.assert_array_equal(whole[len(roll) :], expected)
    assert expected.any() and not (expected == expected[0]).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_keys_sound_as_often_as_they_are_likely(temperature: float) -> None:
    model, (roll, *_) = music_model(), rolls()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.linspace(-4, 4, KEYS))
    drawn = continue_roll(model, roll, 300, temperature)
    expected = torch.linspace(-4, 4, KEYS).div(temperature).sigmoid().numpy()
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.12)
    assert drawn.mean() == pytest.approx(expected.mean(), abs=0.01)
    few = [continue_roll(model, roll, 5, temperature, seed) for seed in (0, 1)]
    assert np.array_equal(few[0], drawn[:5]) and not np.array_equal(few[0], few[1])


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_music_goes_on_in_a_file_that_can_be_read(tmp_path: Path, suffix: str) -> None:
    run = music_run(tmp_path / "run", music_model())
    given, path = tmp_path / "given.json", tmp_path / f"more{suffix}"
    write_music(given, rolls())
    made = predict(run, str(given), path, length=5, temperature=1.0, seed=3)
    assert (made["pieces"], made["new_frames"], made["file"]) == (3, 5, str(path))
    for roll, more in zip(rolls(), encode_music(path), strict=True):
        np.testing.assert_array_equal(more[:-5], roll)
    again = predict(run, str(path), length=1)
    assert again["file"] == str(run / "continued.json")


def test_the_score_of_music_is_the_loss_of_its_frames(tmp_path: Path) -> None:
    model = music_model()
    run = music_run(tmp_path / "run", model)
    given = tmp_path / "given.npz"
    write_music(given, rolls())
    made = predict(run, str(given), score=True)
    table = pd.read_csv(made["file"])
    assert made["nats_per_frame"] == pytest.approx(table["nats"].mean())
    for piece, roll in enumerate(rolls()):
        x = torch.from_numpy(roll).unsqueeze(1)
        with torch.no_grad():
            out, _ = model(x[:-1], model.initial_state(1))
        rows = table[table["piece"] == piece]
        assert rows["frame"].tolist() == list(range(1, len(roll)))
        total = float(Labels(KEYS).total(out, x[1:], None))
        assert rows["nats"].sum() == pytest.approx(total, rel=1e-5)


def test_what_does_not_fit_music_is_one_line(tmp_path: Path) -> None:
    run = music_run(tmp_path / "run", music_model())
    given = tmp_path / "given.json"
    write_music(given, rolls())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"output": tmp_path / "a.mid"}, "a.mid ends in .mid, expected .json or .npz"),
        ({"output": tmp_path / "no" / "a.json"}, "cannot write .*: No such file"),
        ({"top_k": 3}, "top_k is 3 and top_p 1.0, which are for text: leave them out"),
        ({"temperature": -1.0}, "length is 4 and temperature -1.0: expected at least"),
    ]
    for options, says in wrong:
        with pytest.raises(ValueError, match=says):
            predict(run, str(given), **{"length": 4, **options})
    both = music_run(tmp_path / "both", music_model(bidirectional=True))
    with pytest.raises(ValueError, match="the model is bidirectional"):
        predict(both, str(given), length=4)
