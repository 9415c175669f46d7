"""Recordings as they are, features against a slow oracle, parts, joined strings."""

import io
import math
import os
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.baselines import Constant
from rlrnn.data.audio import FLOOR, Reader, log_mel, resample, with_deltas
from rlrnn.data.augment import Augmented
from rlrnn.data.chunks import Batches
from rlrnn.data.files import DataError, Paths
from rlrnn.data.speech import (
    SpeechOptions,
    decode_text,
    encode_speech,
    encode_text,
    joined,
    read_recordings,
    speech_problem,
)
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.objectives import Classes, Ctc
from rlrnn.tasks import DataConfig, Task, build_trainer

soundfile = pytest.importorskip("soundfile")
RATE = 8000
SPLIT = [0.8, 0.1, 0.1]
NAMED = SpeechOptions(pattern="{label}_{speaker}_{index}", rate=RATE)


def tone(
    hz: float | int, seconds: float = 0.1, rate: int = RATE
) -> NDArray[np.float32]:
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def wav(wave: NDArray[np.float32], rate: int = RATE, **more: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=more.get("format", "WAV"))
    return file.getvalue()


def folder(place: Path, count: int = 10) -> Path:
    """Two digits, two speakers, `count` takes of each."""
    place.mkdir(exist_ok=True)
    for label, hz in (("0", 500), ("1", 1500)):
        for speaker in ("ann", "bob"):
            for index in range(count):
                pitch = hz + 10 * index + 5 * (speaker == "bob")
                wave = tone(pitch, 0.08 + 0.01 * (index % 3))
                name = f"{label}_{speaker}_{index}.wav"
                (place / name).write_bytes(wav(wave))
    return place


# --- waves --------------------------------------------------------------------------


def test_wav_and_flac_say_the_same() -> None:
    wave = tone(440)
    a, b = (Reader(RATE)("x", wav(wave, format=name)) for name in ("WAV", "FLAC"))
    np.testing.assert_allclose(a, b, atol=2**-15)
    np.testing.assert_allclose(a, wave, atol=2**-14)


def test_channels_are_averaged_and_rates_converted_and_that_is_said_once() -> None:
    reader = Reader(RATE)
    both = np.stack((tone(440), np.zeros_like(tone(440))), 1)
    np.testing.assert_allclose(reader("a", wav(both)), tone(440) / 2, atol=1e-4)
    for name, rate in (("b", 11025), ("c", 44100)):
        wave = reader(name, wav(tone(440, rate=rate), rate))
        inside = slice(100, -100)  # ends ring
        np.testing.assert_allclose(wave[inside], tone(440)[inside], atol=0.01)
    with pytest.warns(UserWarning) as told:
        reader.tell()
    assert [str(t.message) for t in told] == [
        "1 of 3 recordings have several channels, which are averaged; the first is a",
        "2 of 3 recordings have another rate, and are resampled to 8000 Hz; the first "
        "is b",
    ]


@pytest.mark.parametrize("rate", [4000, 7999, 8000, 16000])
def test_resampling_keeps_what_both_rates_can_hold(rate: int) -> None:
    hz = 1000  # a whole number of periods: no edge
    wave = resample(tone(hz, 1), RATE, rate)
    assert len(wave) == rate
    t = np.arange(rate) / rate
    np.testing.assert_allclose(wave, 0.5 * np.sin(2 * np.pi * hz * t), atol=1e-4)
    high = resample(tone(3000, 1), RATE, 4000)
    np.testing.assert_allclose(high, 0, atol=1e-4)  # beyond half the new rate
    # another length: what is added is silence, and time is not stretched
    short = resample(tone(hz), RATE, rate)
    np.testing.assert_allclose(short[50:-50], wave[50 : len(short) - 50], atol=0.02)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is no audio file"),
        (b"hello" * 99, "is no audio file"),
        (wav(tone(440))[:-100], "is truncated: 1500 bytes of 1600"),
        (wav(tone(440))[:40], "is truncated: it has no samples"),
        (wav(tone(440, 0.0)), "has no samples"),
    ],
)
def test_what_is_no_whole_recording_is_one_line(raw: bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        Reader(RATE)("some.wav", raw)
    assert str(caught.value).startswith(f"some.wav {says}")
    assert "\n" not in str(caught.value)


def test_a_truncated_flac_is_refused() -> None:
    rng = np.random.default_rng(0)
    raw = wav(rng.uniform(-0.5, 0.5, 20_000).astype(np.float32), format="FLAC")
    with pytest.raises(DataError, match="^x is truncated or damaged: "):
        Reader(RATE)("x", raw[: len(raw) // 2])


def test_without_soundfile_a_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match=r"needs soundfile: pip install 'rlrnn\[speech"):
        Reader(RATE)("x", b"")


# --- features -----------------------------------------------------------------------


def slow_log_mel(
    wave: NDArray[np.float32], rate: int, bands: int, window: float, hop: float
) -> NDArray[np.float64]:
    """Frame by frame and bin by bin, from the definitions."""
    size, step = round(rate * window / 1000), round(rate * hop / 1000)
    bins = 1
    while bins < size:
        bins *= 2
    mel = [2595 * math.log10(1 + rate / 2 / 700) * i / (bands + 1) for i in range(99)]
    edges = [700 * (10 ** (m / 2595) - 1) for m in mel]
    rows = []
    for begin in range(0, len(wave) - size + 1, step):
        frame = [
            float(wave[begin + n]) * (0.5 - 0.5 * math.cos(2 * math.pi * n / size))
            for n in range(size)
        ]
        power = []
        for k in range(bins // 2 + 1):
            angle = -2 * np.pi * k * np.arange(size) / bins
            power.append(abs(np.sum(np.array(frame) * np.exp(1j * angle))) ** 2)
        row = []
        for band in range(bands):
            low, top, high = edges[band : band + 3]
            total = 0.0
            for k, p in enumerate(power):
                hz = k * rate / bins
                if low < hz <= top:
                    total += p * (hz - low) / (top - low)
                elif top < hz < high:
                    total += p * (high - hz) / (high - top)
            row.append(math.log(max(total, FLOOR)))
        rows.append(row)
    return np.array(rows)


def test_log_mel_is_what_its_definition_says() -> None:
    rng = np.random.default_rng(0)
    wave = (tone(700, 0.1) + 0.1 * rng.normal(size=800)).astype(np.float32)
    slow = slow_log_mel(wave, RATE, 12, 20.0, 15.0)
    fast = log_mel(torch.from_numpy(wave), RATE, 12, 20.0, 15.0)
    np.testing.assert_allclose(fast, slow, rtol=1e-3, atol=1e-3)


def test_a_tone_is_loudest_in_its_band_and_silence_at_the_floor() -> None:
    mel = 2595 * math.log10(1 + 4000 / 700) / 41
    for band in (5, 20, 35):
        hz = 700 * (10 ** (mel * (band + 1) / 2595) - 1)
        x = log_mel(torch.from_numpy(tone(hz)), RATE, 40, 25.0, 10.0)
        assert abs(int(x.mean(0).argmax()) - band) <= 1
    silence = log_mel(torch.zeros(800), RATE, 40, 25.0, 10.0)
    assert torch.equal(silence, torch.full((8, 40), math.log(FLOOR)))
    assert log_mel(torch.zeros(7), RATE, 40, 25.0, 10.0).shape == (1, 40)


def test_a_wave_twice_as_loud_is_log_4_higher() -> None:
    wave = torch.from_numpy(tone(900))
    a, b = (log_mel(w, RATE, 20, 25.0, 10.0) for w in (wave, 2 * wave))
    loud = a > math.log(FLOOR) + 0.1
    torch.testing.assert_close((b - a)[loud], torch.full_like(a[loud], math.log(4)))


def test_deltas_are_slopes() -> None:
    x = torch.arange(9.0).unsqueeze(1) * torch.tensor([1.0, -3.0])
    slopes = with_deltas(x)[:, 2:]
    torch.testing.assert_close(slopes[2:-2], torch.tensor([1.0, -3.0]).expand(5, 2))
    assert torch.equal(with_deltas(torch.ones(3, 2))[:, 2:], torch.zeros(3, 2))


# --- files --------------------------------------------------------------------------


def test_folders_archives_and_manifests_say_the_same(tmp_path: Path) -> None:
    flat = folder(tmp_path / "flat", 2)
    archive = tmp_path / "some.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(flat, "recordings")
    classes = tmp_path / "classes"
    rows = ["path,label,speaker"]
    for path in sorted(flat.iterdir()):
        label, speaker, _ = path.stem.split("_")
        (classes / label).mkdir(parents=True, exist_ok=True)
        (classes / label / path.name).write_bytes(path.read_bytes())
        rows.append(f"flat/{path.name},{label},{speaker}")
    manifest = tmp_path / "all.csv"
    manifest.write_text("\n".join(rows) + "\n", "utf-8")
    plain = SpeechOptions(rate=RATE)
    reads = [
        read_recordings(str(flat), NAMED),
        read_recordings(str(archive), NAMED),
        read_recordings(str(manifest), plain),
        read_recordings(str(classes), plain),
    ]
    for read in reads:
        for one, other in zip(read, reads[0], strict=True):
            assert one.fields["label"] == other.fields["label"]
            np.testing.assert_array_equal(one.wave, other.wave)
    assert [r.fields for r in reads[0]] == [r.fields for r in reads[1]]
    assert {r.fields["speaker"] for r in reads[2]} == {"ann", "bob"}


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "seven.wav").write_bytes(wav(tone(440)))
    with pytest.raises(DataError, match=r"seven.wav: its name does not fit .*index"):
        read_recordings(str(tmp_path), NAMED)
    manifest = tmp_path / "all.csv"
    for text, says in (
        ("file,label\na,b\n", "has no column path, only file, label"),
        ("path,label\nseven.wav\n", "line 2 has not the 2 cells"),
        ("path,label\nnine.wav,9\n", "line 2: no such file"),
        ("path,label\nseven.wav,\n", "seven.wav has no label"),
    ):
        manifest.write_text(text, "utf-8")
        with pytest.raises(DataError) as caught:
            read_recordings(str(manifest), SpeechOptions())
        assert says in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="bad.tar.gz is no tar archive"):
        read_recordings(str(tmp_path / "bad.tar.gz"), NAMED)


# --- the problem --------------------------------------------------------------------


def test_parts_are_told_apart_by_a_field(tmp_path: Path) -> None:
    place = Paths(str(folder(tmp_path / "a")))
    by_index = SpeechOptions(
        pattern=NAMED.pattern, rate=RATE, hold_out="index", test=["0"], valid=["1"]
    )
    problem = speech_problem(place, SPLIT, 4, 0, by_index)
    assert problem.objective == Classes(2, ("0", "1"))
    counts = [len(getattr(problem, name).lengths) for name in ("valid", "test")]
    assert counts == [4, 4]
    rest = [len(getattr(problem, name).lengths) for name in ("train", "probe")]
    assert sum(rest) == 32 and rest[1] == 2
    by_speaker = SpeechOptions(
        pattern=NAMED.pattern, rate=RATE, hold_out="speaker", test=["bob"]
    )
    problem = speech_problem(place, SPLIT, 4, 0, by_speaker)
    assert len(problem.test.lengths) == 20  # type: ignore[attr-defined]
    for changed, says in (
        ({"test": ["eve"]}, "have no speaker eve; there is ann, bob"),
        ({"test": ["ann", "bob"]}, "have no other speaker"),
        ({"hold_out": "room"}, "has no room, only label, speaker, index"),
    ):
        options = SpeechOptions(**{**vars(by_speaker), **changed})
        with pytest.raises(DataError, match=says):
            speech_problem(place, SPLIT, 4, 0, options)


def test_training_features_are_normalised_and_a_prediction_has_the_same(
    tmp_path: Path,
) -> None:
    place = folder(tmp_path / "a")
    for more in ({}, {"deltas": True, "center": True}):
        options = SpeechOptions(pattern=NAMED.pattern, rate=RATE, **more)  # type: ignore[arg-type]
        problem = speech_problem(Paths(str(place)), SPLIT, 4, 0, options)
        train = problem.train
        assert isinstance(train, Batches)
        np.testing.assert_allclose(train.x.mean(0), 0, atol=1e-4)
        spread = train.x.std(0).numpy()
        loud = spread > 0.01  # two tones do not reach all bands
        np.testing.assert_allclose(spread[loud], 1, atol=0.01)
        assert loud.sum() > 20
        seen = {
            tuple(x.flatten().tolist())
            for x in torch.split(train.x, train.lengths.tolist())
        }
        again = [x for _, x in encode_speech(str(place), problem.format)]
        found = [tuple(x.flatten().tolist()) in seen for x in again]
        assert sum(found) == len(train.lengths)


@pytest.mark.parametrize(
    "options",
    [
        replace(NAMED, band_masks=2),
        replace(NAMED, time_masks=9),
        replace(NAMED, warp=0.2, deltas=True),
    ],
)
def test_training_alone_is_heard_otherwise(
    tmp_path: Path, options: SpeechOptions
) -> None:
    path = Paths(str(folder(tmp_path / "a")))
    problem = speech_problem(path, SPLIT, 64, 0, options)
    deltas = replace(NAMED, deltas=options.deltas)
    other = speech_problem(path, SPLIT, 64, 0, deltas)
    for name in ("train", "probe", "valid", "test"):
        source, plain = getattr(problem, name), getattr(other, name)
        steps = plain.span(0, 8)
        x, y = source.window(0, steps).x, plain.window(0, steps).x
        assert isinstance(source, Augmented if name == "train" else Batches)
        assert torch.equal(x, y) == (name != "train")


def test_top_db_hides_loudness_and_what_is_far_below(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = 1e-3 * rng.normal(size=800).astype(np.float32)
    seen = []
    for i, wave in enumerate((tone(440), 0.1 * tone(440), tone(440) + noise)):
        place = tmp_path / str(i)
        place.mkdir()
        soundfile.write(place / "x.wav", wave, RATE, "FLOAT")
        options = {"rate": RATE, "top_db": 30.0}
        format = {"options": options, "mean": np.float32(0), "scale": np.float32(1)}
        ((_, x),) = encode_speech(str(place), format)
        assert x.max() == 0 and x.min() == pytest.approx(-3 * math.log(10))
        seen.append(x)
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-2)
    np.testing.assert_allclose(seen[0], seen[2], atol=0.3)


def test_joined_strings_are_their_clips_end_to_end(tmp_path: Path) -> None:
    clips = read_recordings(str(folder(tmp_path / "a", 3)), NAMED)
    strings = joined(clips, 4, np.random.default_rng(0))
    assert len(strings) == len(clips)
    by_name = {clip.name: clip for clip in clips}
    for string in strings:
        parts = [by_name[name] for name in string.name.split("+")]
        assert 1 <= len(parts) <= 4
        assert string.fields["text"].split() == [p.fields["label"] for p in parts]
        np.testing.assert_array_equal(
            string.wave, np.concatenate([p.wave for p in parts])
        )
    again = joined(clips, 4, np.random.default_rng(0))
    assert [s.name for s in again] == [s.name for s in strings]


def test_strings_of_a_part_are_made_of_its_own_clips(tmp_path: Path) -> None:
    options = SpeechOptions(
        "transcription",
        pattern=NAMED.pattern,
        rate=RATE,
        hold_out="index",
        test=["0"],
        unit="words",
        join=3,
    )
    place = Paths(str(folder(tmp_path / "a")))
    problem = speech_problem(place, SPLIT, 4, 0, options)
    assert problem.objective == Ctc(2, ("0", "1"))
    test = problem.test
    assert isinstance(test, Batches)
    # takes number 0 have 0.08 s: all strings of the test part are multiples of that
    frames = {1 + (640 * n - 200) // 80 for n in (1, 2, 3)}
    assert set(test.lengths.tolist()) <= frames
    assert decode_text([0, 1, 1], problem.format) == "0 1 1"


def test_characters_and_words_are_units_of_a_text(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.wav").write_bytes(wav(tone(440)))
    rows = "".join(f"{name}.wav,one two\n" for name in "abcde")
    manifest = tmp_path / "all.csv"
    manifest.write_text(f"path,text\n{rows}f.wav,two one\n", "utf-8")
    for unit, labels in (("characters", list(" enotw")), ("words", ["one", "two"])):
        options = SpeechOptions("transcription", unit=unit, rate=RATE)  # type: ignore[arg-type]
        problem = speech_problem(Paths(str(manifest)), SPLIT, 2, 0, options)
        assert problem.format["labels"] == labels
        (first, *_) = read_recordings(str(manifest), options)
        numbers = encode_text(first, problem.format).tolist()
        assert decode_text(numbers, problem.format) == "one two"


def test_a_prediction_reads_a_manifest(tmp_path: Path) -> None:
    place = folder(tmp_path / "a")
    options = SpeechOptions(pattern=NAMED.pattern, rate=RATE)
    problem = speech_problem(Paths(str(place)), SPLIT, 4, 0, options)
    expected = encode_speech(str(place), problem.format)
    manifest = tmp_path / "all.csv"
    rows = "\n".join(name for name, _ in expected)  # nobody needs a label here
    manifest.write_text(f"path\n{rows.replace(str(tmp_path) + '/', '')}\n", "utf-8")
    found = encode_speech(str(manifest), problem.format)
    assert [Path(a) for a, _ in found] == [Path(a) for a, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("text", "frames"), [("ab", 2), ("aab", 4)])
def test_texts_that_have_no_alignment_are_told(
    tmp_path: Path, text: str, frames: int
) -> None:
    """A frame for each label, and a blank between two that are the same."""
    rows = ""
    for number in range(20):
        # frames of 25 ms each 10 ms
        wave = tone(440, (25 + 10 * (frames - 1)) / 1000 + 1e-4)
        (tmp_path / f"{number}.wav").write_bytes(wav(wave))
        rows += f"{number}.wav,{text}\n"
    manifest = tmp_path / "all.csv"
    options = SpeechOptions("transcription", rate=RATE)
    manifest.write_text(f"path,text\n{rows}", "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speech_problem(Paths(str(manifest)), SPLIT, 2, 0, options)
    manifest.write_text(f"path,text\n{rows.replace(text, text + 'c')}", "utf-8")
    with pytest.warns(UserWarning, match="^1. of 1. training recordings have fewer"):
        speech_problem(Paths(str(manifest)), SPLIT, 2, 0, options)


@pytest.mark.slow
def test_a_few_updates_learn_to_tell_two_tones_apart(tmp_path: Path) -> None:
    data = DataConfig(
        "speech", str(folder(tmp_path / "a")), split=SPLIT, batch=8, speech=NAMED
    )
    model = ModelConfig("gru", 8, readout="mean", bidirectional=True)
    training = TrainingConfig(epochs=40.0, decisions=6)
    trainer = build_trainer(Task(data, model, training))
    controller = Constant(0.02, 1024)
    signals, state = trainer.start(), controller.init(1)
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)
    assert trainer.score("test")["accuracy"] == 1


def test_the_word_error_rate_counts_words(tmp_path: Path) -> None:
    options = SpeechOptions(
        "transcription", pattern=NAMED.pattern, rate=RATE, unit="words"
    )
    place = str(folder(tmp_path / "a", 3))
    data = DataConfig("speech", place, split=SPLIT, batch=4, speech=options)
    trainer = build_trainer(Task(data, ModelConfig(hidden_size=4), TrainingConfig()))
    with torch.no_grad():
        for parameter in trainer.model.head.parameters():
            parameter.zero_()
        trainer.model.head.bias[1] = 5  # always the first label
    figures = trainer.score("valid")
    # one word each, and it is said to be the first: both rates are the share of others
    assert figures["word_error_rate"] == figures["label_error_rate"]
    valid = trainer.problem.valid
    assert isinstance(valid, Batches)
    wrong = float((valid.y != 0).double().mean())
    assert figures["word_error_rate"] == pytest.approx(wrong)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"join": 2}, "data.speech.join is 2, but data.speech.task is"),
        ({"hold_out": "speaker"}, "expected both or neither"),
        ({"speeds": [3.0]}, "data.speech.speeds has 3.0"),
        ({"mels": 0}, "data.speech.mels is 0"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        SpeechOptions(**options)  # type: ignore[arg-type]
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_spoken_digits() -> None:
    path = Path(os.environ.get("RLRNN_DATA", ""), "fsdd", "fsdd_recordings.tar.gz")
    if not path.is_file():
        pytest.skip("RLRNN_DATA names no folder with fsdd/fsdd_recordings.tar.gz")
    read = read_recordings(str(path), NAMED)
    assert len(read) == 3000
    assert len({r.fields["speaker"] for r in read}) == 6
    seconds = sum(len(r.wave) for r in read) / RATE
    assert seconds == pytest.approx(1312, abs=1)
