"""Settings that must be in place before MLX is imported, and the one table of profiles."""

import os
import secrets
import zlib

os.environ["MLX_ENABLE_TF32"] = "0"  # 10-bit mantissas on CUDA and M5 otherwise
os.environ["MLX_ENABLE_CACHE_THRASHING_CHECK"] = "0"  # drawn shapes miss CUDA's graph cache

import mlx.core as mx
import pytest
import torch
from hypothesis import HealthCheck, settings

PROFILES = {"dev": 20, "ci": 200, "nightly": 2000}
for name, examples in PROFILES.items():
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name == "ci",
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
settings.load_profile(PROFILE)

# What a test draws without Hypothesis, a layer's first weights say, is repeatable as what it draws
# with it is: the same in each run in ci, new in every other, by this number. Workers inherit it.
SEED = os.environ.setdefault("TEST_SEED", "0" if PROFILE == "ci" else str(secrets.randbits(32)))


def pytest_report_header() -> str:
    return f"random draws: TEST_SEED={SEED}"


def seed(name: str) -> None:
    number = zlib.crc32(f"{SEED} {name}".encode())
    torch.manual_seed(number)
    mx.random.seed(number)


seed("collection")  # what modules draw as they are imported


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    seed(request.node.nodeid)


torch.set_num_threads(1)  # the drawn tensors are tiny, and tests run one process per core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole ladder first: it takes minutes, and two processes should share it."""
    items.sort(key=lambda item: "test_every_rung" not in item.name)
