"""Texts: files, splits, vocabularies, and symbols in memory and on disk."""

import builtins
import errno
import gzip
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.data import symbols, text, vocabulary
from rlrnn.data.chunks import next_symbol_streams, training_part
from rlrnn.data.files import DataError, find, read_utf8
from rlrnn.data.symbols import NextSymbols, Part
from rlrnn.data.text import (
    Text,
    TextOptions,
    decode_text,
    divide,
    encode_text,
    open_text,
    read_text,
    standard_library,
    text_problem,
)
from rlrnn.data.vocabulary import END_OF_LINE, UNKNOWN, UNKNOWN_WORD
from rlrnn.ledger import TrainingConfig
from rlrnn.tasks import DataConfig, Task, build_problem, build_trainer

LEVELS: tuple[vocabulary.Level, ...] = ("characters", "bytes", "words", "bpe")
SHARES = [0.9, 0.05, 0.05]


def problem_of(whole: str, batch: int = 1, options: TextOptions | None = None) -> Any:
    level = options.level if options else "characters"
    parts = divide(Text.of(whole, "my.txt", level), None, None, SHARES)
    return text_problem(parts, batch, options)


def symbols_of(source: Any) -> NDArray[np.int64]:
    chunk = source.window(0, source.length)
    flat: NDArray[np.int64] = chunk.x.T.flatten().numpy()
    return flat


def build(path: Path, **options: Any) -> Any:
    return build_problem(Task(DataConfig(path=str(path), **options)))


def prose(words: int, seed: int = 0) -> str:
    """Some words more often than others, in lines."""
    rng = np.random.default_rng(seed)
    known = ["the", "naïve", "fox", "€", "jumps,", "over", "dogs", "\U0001f600"]
    known += [f"word{i}" for i in range(30)]
    chosen = rng.zipf(1.5, words) % len(known)
    ends = rng.choice(["  ", "\n", " ", " ", " ", " "], words)
    return "".join(known[i] + end for i, end in zip(chosen, ends, strict=True))


def needs(level: str) -> None:
    if level == "bpe":
        pytest.importorskip("tokenizers", reason="level bpe needs rlrnn[text]")


# --- splits ---------------------------------------------------------------------------


def test_parts_of_a_text_are_its_shares() -> None:
    whole = Text.of("0123456789" * 10, "t")
    train, valid, test = divide(whole, None, None, SHARES)
    assert [len(part) for part in (train, valid, test)] == [90, 5, 5]
    joined = "".join("".join(part.blocks()) for part in (train, valid, test))
    assert joined == "0123456789" * 10
    train, valid, test = divide(whole, None, None, [0.9, 0.1, 0.0])
    assert (len(train), len(valid)) == (90, 10) and test is valid


def test_a_part_with_a_text_of_its_own_is_that_text() -> None:
    whole, other, third = (Text.of(c * 100, c) for c in "abc")
    assert divide(whole, other, third, SHARES) == (whole, other, third)
    assert divide(whole, other, None, SHARES) == (whole, other, other)
    train, valid, test = divide(whole, None, third, [0.6, 0.2, 0.2])
    assert (len(train), len(valid), test) == (75, 25, third)


@pytest.mark.parametrize(
    "shares", [[], [1.0], [0.9, 0.1], [0.9, 0.2, 0.1], [1.0, 0.0, 0.0]]
)
def test_shares_that_are_none_are_one_line(shares: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^data.split is \[.*\], expected .*$"):
        DataConfig(split=shares)


def test_the_probe_is_the_end_of_the_training_part() -> None:
    whole = "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))
    problem = problem_of(whole)
    a, b, _ = training_part(len(whole))
    known = problem.format["vocabulary"]
    assert known == UNKNOWN + whole[:b]
    assert symbols_of(problem.train).tolist() == list(range(1, a))
    probe = symbols_of(problem.probe)
    assert probe.min() == a + 1 and len(probe) == (b - a - 1) // 4 * 4


# --- vocabularies ---------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_text_survives_its_symbols(level: vocabulary.Level) -> None:
    needs(level)
    whole = prose(2000)
    problem = problem_of(whole, options=TextOptions(level, 300))
    given = "the naïve fox\njumps, over € \U0001f600"
    seen = encode_text(problem.format, given)
    assert decode_text(problem.format, seen.tolist()) == given
    assert seen.max() < problem.inputs.count == problem.objective.count


@pytest.mark.parametrize("level", LEVELS)
def test_validation_and_test_part_leave_the_vocabulary_alone(
    level: vocabulary.Level,
) -> None:
    needs(level)
    train, options = Text.of(prose(3000), "train", level), TextOptions(level, 300)
    other = Text.of(prose(400, seed=1), "other", level)
    strange = Text.of("Ωmega zebra " * 200, "strange", level)
    a = text_problem((train, other, other), 1, options)
    b = text_problem((train, strange, strange), 1, options)
    assert a.format == b.format
    assert np.array_equal(symbols_of(a.train), symbols_of(b.train))
    unknown = symbols_of(b.valid) == 0
    if level == "words":
        assert unknown.all()
    if level == "characters":  # "zebra" has z and b, which no word above has
        assert unknown.any() and not (symbols_of(a.train) == 0).any()


def test_characters_of_any_plane_are_symbols() -> None:
    whole = ("a\U0001f600\r\n\x7f" * 600)[:2000]
    problem = problem_of(whole)
    known = problem.format["vocabulary"]
    assert sorted(known[1:]) == sorted(set(whole))
    decoded = decode_text(problem.format, symbols_of(problem.train).tolist())
    assert whole.startswith(decoded)


def test_words_are_the_most_frequent_ones() -> None:
    whole = "a " * 1000 + "b " * 500 + "c\n" * 300 + "d " * 10
    known = vocabulary.learn("words", [whole[:777], whole[777:]], 5)
    assert known.format["vocabulary"] == [UNKNOWN_WORD, END_OF_LINE, "a", "b", "c"]
    assert known.encode("d c\n\na").tolist() == [0, 4, 1, 1, 2]
    assert known.decode([0, 4, 1, 1, 2]) == f"{UNKNOWN_WORD} c\n\na"


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_no_word_is_cut_by_a_block(size: int) -> None:
    whole = prose(200) + "   \n end"
    blocks = [whole[i : i + size] for i in range(0, len(whole), size)]
    pieces = list(vocabulary.whole_words(blocks))
    assert "".join(pieces) == whole
    assert [word for piece in pieces for word in piece.split()] == whole.split()


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_do_not_change_the_symbols(
    level: vocabulary.Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(level)
    whole, options = prose(3000), TextOptions(level, 300)
    a = problem_of(whole, options=options)
    monkeypatch.setattr(text, "BLOCK", 97)
    b = problem_of(whole, options=options)
    assert a.format == b.format
    for part in ("train", "probe", "valid", "test"):
        assert np.array_equal(
            symbols_of(getattr(a, part)), symbols_of(getattr(b, part))
        )


def test_symbols_take_the_smallest_type() -> None:
    few, many = (
        "".join(map(chr, range(0x4E00, 0x4E00 + count))) * (3000 // count + 1)
        for count in (200, 2000)
    )
    assert problem_of(few).train.part.symbols.dtype == torch.uint8
    assert problem_of(many).train.part.symbols.dtype == torch.uint16


def test_a_prompt_that_the_model_cannot_read_is_one_line() -> None:
    problem = problem_of("abc\n" * 1000)
    with pytest.raises(DataError) as caught:
        encode_text(problem.format, "ab\ncab é")
    told = str(caught.value)
    assert told.startswith("the prompt has ' ' (line 2, column 4)") and "\n" not in told
    # a character that only comes after the training part was never learned
    with pytest.raises(DataError, match="'\ufffd'"):
        encode_text(problem.format, UNKNOWN)


def test_a_missing_tokenizer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"^data.text.level is bpe.*rlrnn\[text\]`$"):
        problem_of(prose(2000), options=TextOptions("bpe", 300))


@pytest.mark.parametrize("level", ["words", "bpe"])
def test_bits_per_character_are_the_loss_over_characters(
    level: vocabulary.Level,
) -> None:
    needs(level)
    whole = prose(3000)
    problem = problem_of(whole, options=TextOptions(level, 300))
    trainer = build_trainer(Task(DataConfig("markov", size=4000, batch=2)))
    model = trainer.model.__class__(
        problem.inputs, problem.objective.outputs, trainer.model.config
    )
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert problem.judge is not None
    figures = problem.judge(model, "valid")
    found = figures["bits_per_character"]
    # of the words that have no number of their own, nobody says the letters
    assert ("unknown" in figures) == (level == "words")
    if level == "words":
        unknown = (symbols_of(problem.valid) == 0).mean()
        assert 0 < figures["unknown"] == pytest.approx(float(unknown), abs=0.01)
    # the same chance for all symbols, and a text that is about as dense everywhere
    dense = len(symbols_of(problem.train)) / (0.95 * 0.9 * len(whole))
    expected = np.log2(problem.inputs.count) * dense
    assert found == pytest.approx(expected, rel=0.1)
    assert problem_of(whole).judge is None  # where the objective says it


# --- windows --------------------------------------------------------------------------

DTYPES = [(np.uint8, 200), (np.uint16, 60_000), (np.uint32, 100_000)]


@pytest.mark.parametrize(("dtype", "count"), DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_windows_are_those_of_streams(dtype: Any, count: int, batch: int) -> None:
    """Of the plain source, with one int64 row for inputs and one for targets."""
    given = np.random.default_rng(0).integers(0, count, 41).astype(dtype)
    source = NextSymbols(Part(torch.from_numpy(given)), batch)
    plain = next_symbol_streams(given, batch)
    assert (source.length, source.batch) == (plain.length, plain.batch)
    for t in range(2 * source.length + 1):
        for k in (1, 4, source.length - 1, source.length, 3 * source.length + 2):
            a, b = source.window(t, k), plain.window(t, k)
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y), (t, k)
            assert (a.scale, a.due, a.mask) == (b.scale, b.due, None)
            assert (a.starts is None) == (b.starts is None), (t, k)
            if a.starts is not None and b.starts is not None:
                assert torch.equal(a.starts, b.starts), (t, k)


def test_a_part_of_the_symbols_has_its_own_windows() -> None:
    given = torch.arange(100, dtype=torch.uint8)
    part = Part(given).cut(20, 60)
    chunk = NextSymbols(part, 3).window(0, 13)
    assert chunk.x.T.flatten().tolist() == list(range(20, 59))
    assert torch.equal(chunk.y, chunk.x + 1)


# --- long texts -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, in which every file is long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "LARGE", 0)
    monkeypatch.setattr(text, "BLOCK", 1000)
    return tmp_path / "cache" / "rlrnn"


@pytest.mark.parametrize("level", LEVELS)
def test_a_mapped_text_equals_the_one_in_memory(
    level: vocabulary.Level, cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    needs(level)
    path = tmp_path / "some.txt"
    path.write_text(prose(4000), "utf-8")
    given: dict[str, Any] = {
        "batch": 1,
        "skip": 10,
        "size": 15_000,
        "text": TextOptions(level, 300),
    }
    mapped = build(path, **given)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(text, "LARGE", 1 << 30)
    plain = build(path, **given)
    assert mapped.format == plain.format
    for name in ("train", "probe", "valid", "test"):
        a, b = getattr(mapped, name), getattr(plain, name)
        assert a.length == b.length and a.part.mapped and not b.part.mapped
        for t in (0, 5, a.length - 3, 2 * a.length):
            left, right = a.window(t, 7), b.window(t, 7)
            assert torch.equal(left.x, right.x) and torch.equal(left.y, right.y)


def test_the_cache_is_used_again_for_the_same_content(
    cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "some.txt"
    path.write_text(prose(2000), "utf-8")
    first = build(path, batch=2)
    made = {entry: entry.stat().st_mtime_ns for entry in cache.rglob("*")}
    assert build(path, batch=2).train.fingerprint() == first.train.fingerprint()
    other = path.rename(tmp_path / "other.txt")
    build(other, batch=1)  # neither names nor batches matter
    assert made == {entry: entry.stat().st_mtime_ns for entry in cache.rglob("*")}


def test_the_cache_is_made_anew_for_anything_else(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(prose(3000), "utf-8")
    seen = set()
    for options in (
        {},
        {"size": 12_000},
        {"skip": 1},
        {"split": [0.8, 0.1, 0.1]},
        {"text": TextOptions("bytes")},
        {"text": TextOptions("words", 20)},
        {"text": TextOptions("words", 30)},
    ):
        seen.add(build(path, batch=1, **options).train.fingerprint())
        assert len(list(cache.iterdir())) == len(seen)
    path.write_text(prose(3000, seed=1), "utf-8")
    seen.add(build(path, batch=1).train.fingerprint())
    assert len(list(cache.iterdir())) == len(seen) == 8


def test_a_full_disk_is_one_line_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.txt"
    path.write_text(prose(2000), "utf-8")

    def full(*_: Any) -> Iterator[Any]:
        yield np.zeros(3, np.uint8)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(symbols, "_encoded", full)
    with pytest.raises(DataError, match=r"^.*some.txt.* no room is left; .*$"):
        build(path, batch=1)
    assert not list(cache.iterdir())


def test_a_mapped_text_trains_as_one_in_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.txt"
    path.write_text(prose(3000), "utf-8")
    task = Task(DataConfig(path=str(path), batch=4), training=TrainingConfig(60_000.0))
    mapped = float(build_trainer(task).start().probe_loss[0])
    monkeypatch.setattr(text, "LARGE", 1 << 30)
    assert float(build_trainer(task).start().probe_loss[0]) == mapped


# --- files ----------------------------------------------------------------------------


def test_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    parts = [prose(800, seed) for seed in range(3)]
    (tmp_path / "a.txt").write_text(parts[0], "utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(parts[1].encode()))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.txt").write_text(parts[2], "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    whole = "".join(parts)

    def read(path: Path) -> str:
        return "".join(open_text(str(path)).blocks())

    assert read(tmp_path) == whole
    assert read(tmp_path / "**" / "*.txt*") == whole
    assert read(tmp_path / "b.txt.gz") == parts[1]
    assert read(tmp_path / "*.txt") == parts[0]


def test_validation_and_test_files_are_read(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "valid", "test")):
        (tmp_path / f"{name}.txt").write_text(chr(97 + number) * 5000)
    problem = build(
        tmp_path / "train.txt",
        batch=2,
        valid=str(tmp_path / "valid.txt"),
        test=str(tmp_path / "test.txt"),
    )
    assert problem.format["vocabulary"] == UNKNOWN + "a"
    assert symbols_of(problem.train).all() and not symbols_of(problem.test).any()
    assert problem.valid.length == problem.test.length == 4999 // 4


def test_the_folder_of_data_sets_is_an_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.txt").write_text("text")
    monkeypatch.setenv("RLRNN_DATA", str(tmp_path))
    assert find("$RLRNN_DATA/some.txt") == [tmp_path / "some.txt"]
    assert read_text("$RLRNN_DATA/some.txt") == "text"
    assert find("$RLRNN_DATA/*.txt") == [tmp_path / "some.txt"]
    monkeypatch.delenv("RLRNN_DATA")
    with pytest.raises(DataError, match="^.RLRNN_DATA/some.txt.* is not set; .*$"):
        find("$RLRNN_DATA/some.txt")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"abc\0def", "binary (a zero byte at offset 3)"),
        (b"caf\xe9 au lait", "not UTF-8 (line 1: byte 0xe9 at offset 3)"),
        (b"\xef\xbb\xbfcaf\xe9 au lait", "(line 1: byte 0xe9 at offset 6)"),
        (b"cut \xe2\x82", "not UTF-8 (line 1: byte 0xe2 at offset 4)"),
        (b"a\n\nb\xe9\n", "not UTF-8 (line 3: byte 0xe9 at offset 4)"),
        (b"a\nb\n\xe2\x82", "not UTF-8 (line 3: byte 0xe2 at offset 4)"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 4, 1 << 20])
def test_a_file_that_is_no_text_is_one_line(
    tmp_path: Path, raw: bytes, says: str, block: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(text, "BLOCK", block)
    path = tmp_path / "some.txt"
    path.write_bytes(raw)
    whole = (read_utf8,) if "UTF-8" in says else ()  # of tables
    for read in (read_text, lambda path: open_text(str(path)), *whole):
        with pytest.raises(DataError) as caught:
            read(path)
        assert says in str(caught.value) and str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bytes_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    raw = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8).tobytes()
    path.write_bytes(raw)
    problem = build(path, batch=1, text=TextOptions("bytes"))
    assert raw.startswith(bytes(symbols_of(problem.train).tolist()))


def test_a_path_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    packed = tmp_path / "packed" / "damaged.txt.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(b"text" * 100)[:-12])
    (tmp_path / "bare").mkdir()
    for path, says in (
        (tmp_path / "none", "no such"),
        (tmp_path / "none*", "no such"),
        (tmp_path / "bare", "no .txt files in the folder"),
        (packed, "no gzip file"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            build(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_that_is_too_short_is_one_line(tmp_path: Path) -> None:
    for batch in (1, 3):
        least = 20 * 64 * batch
        with pytest.raises(DataError, match=r"^my.txt \(training part\) has .*$"):
            problem_of("a" * (least - 1), batch)
        problem = problem_of("ab" * (least // 2), batch)
        assert min(problem.train.length, problem.valid.length) >= 15
    for name, count in (("train", 5000), ("valid", 5000), ("test", 20)):
        (tmp_path / f"{name}.txt").write_text("a" * count)
    valid, test = (str(tmp_path / f"{name}.txt") for name in ("valid", "test"))
    with pytest.raises(DataError, match=r"test.txt has 20 characters, .* 4 streams.*$"):
        build(tmp_path / "train.txt", batch=2, valid=valid, test=test)


def test_a_text_keeps_its_characters_and_loses_its_byte_order_mark(
    tmp_path: Path,
) -> None:
    path = tmp_path / "some.txt"
    for whole in ("naïve €\r\n\t", "a"):
        path.write_bytes(whole.encode())
        assert read_text(path) == whole
        path.write_bytes(whole.encode("utf-8-sig"))
        assert read_text(path) == whole


def test_size_and_skip_cut_a_text(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    whole = "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))
    path.write_text(whole, "utf-8")
    known = build(path, batch=1, size=2000, skip=1000).format["vocabulary"]
    assert known == UNKNOWN + whole[1000 : 1000 + training_part(2000)[1]]


# --- the standard library -------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A standard library of our own."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    standard_library.cache_clear()
    yield tmp_path
    standard_library.cache_clear()


def test_halves_of_the_standard_library_share_no_module(library: Path) -> None:
    for i in range(21):
        path = library / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{i}>\n")
    for name in ("test", "tests", "site-packages", "__pycache__"):
        (library / "package0" / name).mkdir()
        (library / "package0" / name / "left_out.py").write_text("<99>\n")
    (library / "latin.py").write_bytes(b"caf\xe9")
    (library / "data.txt").write_text("<99>\n")
    halves = [standard_library(half).split() for half in (0, 1)]
    assert set(halves[0]).isdisjoint(halves[1])
    assert sorted(halves[0] + halves[1]) == sorted(f"<{i}>" for i in range(21))
    assert abs(len(halves[0]) - len(halves[1])) <= 2
    # neighbours by name lie apart: the order is neither that of names nor of folders
    numbers = [int(word.strip("<>")) for word in halves[0]]
    assert numbers != sorted(numbers)


def test_no_standard_library_is_one_line(library: Path) -> None:
    with pytest.raises(DataError, match=r"^no Python sources in .* --data.path FILE$"):
        standard_library(0)


def test_tinyshakespeare() -> None:
    """The figures that its users know: 1,115,394 characters, 65 different ones."""
    path = Path(os.environ.get("RLRNN_DATA", ""), "tinyshakespeare", "input.txt")
    if not path.is_file():
        pytest.skip("RLRNN_DATA names no folder with tinyshakespeare/input.txt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest.startswith("86c4e6aa9db7c042ec79f339dcb96d42")
    assert len(read_text(path)) == 1_115_394
    problem = build(path, batch=32)
    assert problem.inputs.count == 1 + 65
    assert (symbols_of(problem.test) > 0).all()  # training has seen every character
