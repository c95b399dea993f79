"""Settings that must be in place before MLX is imported, and the one table of profiles."""

import os

os.environ["MLX_ENABLE_TF32"] = "0"  # 10-bit mantissas on CUDA and M5 otherwise
os.environ["MLX_ENABLE_CACHE_THRASHING_CHECK"] = "0"  # drawn shapes miss CUDA's graph cache

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
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.set_num_threads(1)  # the drawn tensors are tiny, and tests run one process per core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole ladder first: it takes minutes, and two processes should share it."""
    items.sort(key=lambda item: "test_every_rung" not in item.name)
