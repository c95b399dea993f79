"""The same in a test: the fixture comes with the package.

python -m pytest examples/test_port.py
"""

from typing import Any

import pytest
import torch
from quickstart import Classifier, ClassifierPort


@pytest.mark.mlx_parity(until="gradients")
def test_the_port_is_the_model(mlx_parity: Any):
    mlx_parity(Classifier(), ClassifierPort(), torch.randn(2, 3, 7, 9))


@pytest.mark.mlx_parity(until="forward")
def test_an_epsilon_is_not_a_detail(mlx_parity: Any):
    report = mlx_parity.check(Classifier(), ClassifierPort(eps=1e-3), torch.randn(2, 3, 7, 9))
    assert report.guilty[0].pair.reference_path == "bn1"
