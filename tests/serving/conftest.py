import pytest

from elastic_hf.serving.stores import open_store


@pytest.fixture
def store(store_name):
    opened = open_store(store_name)
    yield opened
    opened.close()
