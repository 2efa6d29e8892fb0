import pytest

from e88.models.config import E88Config, ModelConfig


@pytest.fixture(scope="session")
def corpus(text, tmp_path_factory):
    from e88.data.corpus import open_corpus

    return open_corpus(text, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny():
    return ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=2, n_state=8, gate=True, conv=4))
