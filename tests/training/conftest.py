import pytest

from e88.models.config import E88Config, ModelConfig


@pytest.fixture(scope="session")
def corpus(text, tmp_path_factory):
    from e88.data.corpus import open_corpus

    return open_corpus(text, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny():
    return ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=2, n_state=8, gate=True, conv=4))


@pytest.fixture
def runs(monkeypatch):
    """Every Run that training starts, as it starts."""
    from e88.training import state

    found, start = [], state.start
    monkeypatch.setattr(state, "start", lambda *a, **k: found.append(start(*a, **k)) or found[-1])
    return found
