import pytest

from elastic_hf import load_histories


@pytest.fixture
def load(tmp_path):
    """load_histories with a cache of its own and, unless said otherwise, no k-core filter."""

    def load(source, **kwargs):
        return load_histories(source, **{"k_core": 0, "cache_dir": tmp_path / "cache", **kwargs})

    return load
