"""What a check costs, in processes of their own: CPU time, which others on the machine hardly
change, and the peak of memory, as ``/usr/bin/time -v`` reads it.
"""

import subprocess
import sys
from pathlib import Path

from mlx_parity.ladder import Climb
from tests.cases.mlp_gan import mlp_gan_case

ROOT = Path(__file__).parents[1]
GAN = {"batch": 2, "latent_dim": 3, "widths": (4, 8, 16), "image_size": (4, 6), "channels": 2}

START = """
import os, resource, sys
os.environ["MLX_ENABLE_TF32"] = "0"
sys.path.insert(0, "examples")
import mlx.core as mx, mlx.nn as mnn, numpy as np, torch
import mlx_parity

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss
"""

WIDE = """
class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3000, 3000) for _ in range(3)])
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

class WidePort(mnn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [mnn.Linear(3000, 3000) for _ in range(3)]
    def __call__(self, x):
        for layer in self.layers:
            x = mx.tanh(layer(x))
        return x

reference, port = Wide(), WidePort()
x = np.random.default_rng(0).standard_normal((2, 3000)).astype(np.float32)
"""


def measured(script: str) -> float:
    """What the script prints last."""
    done = subprocess.run(
        [sys.executable, "-c", START + script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def test_a_small_model_is_checked_in_seconds():
    """The whole ladder but training; 1.0 s of CPU time was measured."""
    seconds = measured("""
import quickstart
before = used()[0]
report = mlx_parity.check(quickstart.reference, quickstart.port, quickstart.inputs)
report.assert_ok()
print(used()[0] - before)
""")
    assert seconds < 10


def test_memory_stays_below_twice_what_a_step_of_both_models_takes():
    """27 million parameters: 108 MB a copy on each side, and their gradients."""
    step = measured(f"""{WIDE}
reference(torch.from_numpy(x)).sum().backward()
mx.eval(mnn.value_and_grad(port, lambda x: port(x).sum())(mx.array(x)))
print(used()[1])
""")
    check = measured(f"""{WIDE}
mlx_parity.check(reference, port, x, compiled=False, localised=False).assert_ok()
print(used()[1])
""")
    assert check < 2 * step


def test_a_side_that_waits_holds_no_gradients_and_no_moments():
    """Of the oracle, in float64, they are six times the weights of a port trained with Adam."""
    case = mlp_gan_case("002", (4, 8, 16))
    climb = Climb(case, GAN, 0)
    assert climb.structure()[0].ok
    assert all(rung.ok for rung in climb.training(1))
    for side in (climb.oracle, climb.usual):
        assert all(p.grad is None for m in side.system.modules.values() for p in m.parameters())
        assert not any(o.state for o in side.system.optimizers.values())
