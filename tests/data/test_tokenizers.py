"""Tokenizers: every byte of the text is accounted for, or the account says that it is not."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from e88.data import tokens
from e88.data.codec import Codec
from e88.data.corpus import open_corpus
from e88.data.loader import heldout_windows
from e88.data.tokenizer import Tokenizer
from e88.errors import UserError

TEXT = [
    "the state is a matrix and the matrix is a state\n",
    "décroître, naïveté, über, 日本語 and emoji 🙂🙃\n",
    "    indented = code(with, 2 + 2)\n\n\n\ttabs\r\n",
] * 20
MARK = "\u2581"


def byte_level():
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    made.enable_truncation(8)
    made.enable_padding()
    return made


def byte_fallback():
    """Laid out as SentencePiece BPE models are converted: a prepended mark, bytes for unknown characters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [MARK, *"thesaimrx", "th", "the", f"{MARK}the", f"{MARK}a"]
    merges = [("t", "h"), ("th", "e"), (MARK, "the"), (MARK, "a")]
    made = Library(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    made.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def unigram():
    made = Library(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = sorted({*"".join(TEXT), "\x1e"} - {" "})
    made.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(vocab_size=150, initial_alphabet=alphabet, unk_token="<unk>", special_tokens=["<unk>"],
                                show_progress=False),
    )  # fmt: skip
    return made


def word_piece():
    made = Library(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return made


EXACT = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}
MADE = {name: make().to_str() for name, make in {**EXACT, "word_piece": word_piece}.items()}


@pytest.fixture
def files(tmp_path):
    for name, text in MADE.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def texts(tmp_path):
    """A folder of 30 distinct documents of the characters that the tokenizers know."""
    root = tmp_path / "texts"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        (root / f"{i}.txt").write_text("".join(rng.permutation(TEXT)) + i * " the", encoding="utf-8", newline="")
    return root


@pytest.mark.parametrize("name", EXACT)
def test_bytes_of_tokens_are_the_bytes_of_the_text(files, texts, cache, name):
    plain = open_corpus(texts, cache=cache)
    corpus = open_corpus(texts, tokenizer=files / f"{name}.json", cache=cache)
    assert "exact" in corpus.tokenizer and corpus.meta.tokenizer.exact
    for split, text in zip(corpus.splits, plain.splits, strict=True):
        counted = corpus.bytes_of(split[:])
        assert counted.dtype == np.int64 and counted.shape == (len(split),)
        assert counted.sum() == split.bytes == text.bytes
        assert corpus.decode(split[:]) == text[:].tobytes()
        assert split.documents == text.documents and split.sha256 == text.sha256
    for path in texts.iterdir():
        content = path.read_bytes()
        ids = corpus.encode(content)
        assert corpus.bytes_of(ids).sum() == len(content) and corpus.decode(ids) == content
    assert corpus.bytes_per_token == plain.valid.bytes / len(corpus.valid)
    assert corpus.vocab_size > corpus.train[:].max() and corpus.train[:].dtype == np.uint16
    assert corpus.hash != plain.hash
    assert open_corpus(texts, tokenizer=files / f"{name}.json", cache=cache).hash == corpus.hash
    windows = heldout_windows(corpus.valid, 32, max_bytes=2000).rows
    assert 1500 < corpus.bytes_of(windows[:, 1:]).sum() < 2500
    corpus.verify()


# A word mark in the text itself is the one character that such vocabularies turn into another.
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters=MARK), max_size=60))
@settings(max_examples=50)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_surfaces_of_any_text_are_the_text(name, text):
    tokenizer = Tokenizer(MADE[name], name)
    (ids,) = tokenizer.encode([text])
    assert tokenizer.join(ids) == text.encode()
    assert int(tokenizer.lengths[ids].sum()) == len(text.encode())
    assert tokenizer.decode(ids) == text.encode()


def test_inexact_tokenizer_says_so_and_adds_up_on_the_validation_split(files, texts, cache):
    plain = open_corpus(texts, cache=cache)
    corpus = open_corpus(texts, tokenizer=files / "word_piece.json", cache=cache)
    assert "scaled" in corpus.tokenizer and not corpus.meta.tokenizer.exact
    assert corpus.bytes_of(corpus.valid[:]).sum() == pytest.approx(corpus.valid.bytes, rel=1e-12)
    # It has no token for the separator, so no token stands for those bytes.
    assert corpus.valid.bytes == plain.valid.bytes - plain.valid.separators
    assert corpus.bytes_of(corpus.test[:]).sum() == pytest.approx(corpus.test.bytes, rel=0.02)
    assert corpus.decode(corpus.encode(b"the matrix")) == b"the matrix"


def test_one_unknown_character_makes_the_account_inexact(files, texts, cache):
    (texts / "0 odd.txt").write_text("\N{GREEK SMALL LETTER OMEGA} unknown to the vocabulary")
    corpus = open_corpus(texts, tokenizer=files / "unigram.json", cache=cache)
    assert not corpus.meta.tokenizer.exact


@given(st.binary(max_size=300), st.integers(1, 40))
def test_pieces_cover_everything_once(content, size):
    data = np.frombuffer(content, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", size)
        pieces = [piece for batch in tokens._batches(data) for piece in batch]
    joined = b"".join(content[p.start : p.stop] + b"\x1e" * p.separated for p in pieces)
    assert joined == content
    assert not any(b"\x1e" in content[p.start : p.stop] for p in pieces)


@given(st.text(alphabet="aé日🙂\x1e\n", max_size=200), st.integers(4, 40))
def test_pieces_end_between_characters(text, size):
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE", size)
        for piece in tokens._pieces(data):
            data[piece.start : piece.stop].tobytes().decode()


def test_large_vocabulary_takes_four_bytes(texts, cache, tmp_path):
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"the": 70_000, "[UNK]": 70_001}
    made = Library(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    corpus = open_corpus(texts, tokenizer=tmp_path / "words.json", cache=cache)
    assert corpus.train[:].dtype == np.uint32 and corpus.vocab_size == 70_002
    assert set(np.unique(corpus.train[:])) == {70_000, 70_001}


def test_exported_tokens_need_neither_source_nor_tokenizer_file(files, texts, cache, tmp_path, monkeypatch):
    corpus = open_corpus(texts, tokenizer=files / "byte_level.json", cache=cache)
    corpus.export(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    opened = open_corpus(tmp_path / "out")
    assert opened.hash == corpus.hash
    assert np.array_equal(opened.bytes_of(opened.test[:]), corpus.bytes_of(corpus.test[:]))
    assert opened.decode(opened.valid[:]) == corpus.decode(corpus.valid[:])
    with pytest.raises(UserError, match="pip install tokenizers"):
        opened.encode(b"text")


def test_prepared_bytes_can_be_tokenised_later(files, texts, cache, tmp_path):
    open_corpus(texts, cache=cache).export(tmp_path / "out")
    corpus = open_corpus(tmp_path / "out", tokenizer=files / "unigram.json", cache=cache)
    assert corpus.hash == open_corpus(texts, tokenizer=files / "unigram.json", cache=cache).hash
    corpus.export(tmp_path / "tokens")
    with pytest.raises(UserError, match="already holds tokens of unigram.json"):
        open_corpus(tmp_path / "tokens", tokenizer=files / "unigram.json", cache=cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the tokenizer"),
        (b"not json", "not a tokenizer file"),
        (b"\xff\xfe", "not a tokenizer file"),
        (b"[]", "not a tokenizer file"),
        (b'{"model": {"vocab": {"a": "b"}}}', "not a tokenizer file"),
        (b'{"model": {"vocab": {}}}', "empty vocabulary"),
        (b'{"model": {"vocab": {"a": 0}}}', "cannot be read"),
    ],
)
def test_bad_tokenizer_files_are_refused_in_one_line(texts, cache, tmp_path, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_corpus(texts, tokenizer=path, cache=cache)
    assert "\n" not in str(error.value)
    assert not list(cache.glob("*.tmp-*"))


def test_text_that_is_not_utf8_is_named(files, texts, cache):
    (texts / "latin.txt").write_bytes("café ".encode("latin-1") * 500)
    with pytest.raises(UserError, match="of the train split is not UTF-8"):
        open_corpus(texts, tokenizer=files / "byte_level.json", cache=cache)
    (texts / "latin.txt").unlink()
    corpus = open_corpus(texts, tokenizer=files / "byte_level.json", cache=cache)
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        corpus.encode(b"ab\xff")


def test_missing_package_is_named(files, texts, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        open_corpus(texts, tokenizer=files / "byte_level.json", cache=cache)


def test_random_and_limiting_settings_of_the_file_are_off(texts):
    config = json.loads(MADE["byte_level"])
    config["model"]["dropout"] = 0.5
    tokenizer = Tokenizer(json.dumps(config), "dropout.json")
    text = "the state is a matrix " * 20
    first, second = tokenizer.encode([text, text])
    assert first == second and tokenizer.join(first) == text.encode()


def test_codec_travels_without_the_corpus(files, texts, cache):
    text = TEXT[1].encode()
    for name in (None, *EXACT):
        corpus = open_corpus(texts, tokenizer=name and files / f"{name}.json", cache=cache)
        saved = json.loads(json.dumps(corpus.codec.to_dict()))
        codec = Codec.from_dict(saved)
        assert np.array_equal(codec.encode(text), corpus.encode(text)) and codec.decode(codec.encode(text)) == text
    assert Codec().decode([104, 105, 256, 300]) == b"hi"
