import gc
import os
import shutil
import sys

import pytest
import torch
from huggingface_hub import constants

from hub_server import HubServer
from servers import redis_server


if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and so do the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if os.environ.get("ELASTIC_HF_LONG_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.skip(reason="a long test: ELASTIC_HF_LONG_TESTS=1 asks for it"))


def pytest_collection_finish():
    gc.freeze()  # each training collects garbage, which would look at all that was imported every time


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that this process and its children take for the only one there is, as ada."""
    with HubServer() as server:
        # Constants are read from the environment once, when huggingface_hub is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def redis_url():
    """The URL of an empty Redis server."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("needs the program redis-server, as in Debian's package of that name")
    with redis_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "redis"])
def store_name(request, tmp_path):
    """The name of an empty store of users' states."""
    return str(tmp_path / "users.sqlite") if request.param == "sqlite" else request.getfixturevalue("redis_url")


@pytest.fixture(scope="session")
def ray_cluster():
    """A cluster of Ray on this machine with room for two workers, whose processes import what the tests do."""
    ray = pytest.importorskip("ray", reason="needs Ray, the extra [ray]")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=120 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()
