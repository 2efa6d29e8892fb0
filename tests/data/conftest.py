import random

import pytest


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def documents():
    """40 distinct documents of 100 to 1000 bytes, by name."""
    rng = random.Random(0)
    words = ["state", "value", "gate", "naïve", "über", "tanh", "\n", "decay", "日本語", "key = query", "  "]
    found = {}
    for i in range(40):
        text = f"document {i}\n"
        size = rng.randrange(100, 1000)
        while len(text.encode()) < size:
            text += rng.choice(words) + " "
        found[f"{'ab'[i % 2]}/{i:02}.txt"] = text.encode()
    return found


@pytest.fixture
def folder(tmp_path, documents):
    """The documents as files."""
    root = tmp_path / "folder"
    for name, content in documents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root
