"""What a check costs, in processes of their own: CPU time, which others on the machine hardly
change, and the peak of memory, as ``/usr/bin/time -v`` reads it.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_parity.ladder import Climb
from tests.cases.mlp_gan import mlp_gan_case

ROOT = Path(__file__).parents[1]
GAN = {"batch": 2, "latent_dim": 3, "widths": (4, 8, 16), "image_size": (4, 6), "channels": 2}

START = """
import copy, os, pathlib, resource, sys
os.environ["MLX_ENABLE_TF32"] = "0"
sys.path.insert(0, "examples")
import mlx.core as mx, mlx.nn as mnn, mlx.optimizers as optim, numpy as np, torch
import mlx_parity

def used():
    # Seconds of processor time, and the most memory held so far.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak, status = usage.ru_maxrss, pathlib.Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss begins at what the process held that started this one
        peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    return usage.ru_utime + usage.ru_stime, peak
"""

WIDE = """
SIZE = 3000

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(SIZE, SIZE) for _ in range(3)])
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

class WidePort(mnn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [mnn.Linear(SIZE, SIZE) for _ in range(3)]
    def __call__(self, x):
        for layer in self.layers:
            x = mx.tanh(layer(x))
        return x

reference, port = Wide(), WidePort()
x = np.random.default_rng(0).standard_normal((2, SIZE)).astype(np.float32)
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


LESS_WIDE = WIDE.replace("3000", "1500")
"""7 million parameters, of which training is compared kind by kind."""

IMPORTED = """
torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports much by itself
imports = used()[1]
"""

STEP_IN_BOTH = """
oracle = copy.deepcopy(reference).double()
theirs, ours = torch.optim.Adam(oracle.parameters()), optim.Adam(1e-3, bias_correction=True)
oracle(torch.from_numpy(x).double()).sum().backward()
if trained:
    theirs.step()
gradients = mnn.value_and_grad(port, lambda x: port(x).sum())(mx.array(x))[1]
mx.eval(gradients)
if trained:
    ours.update(port, gradients)
    mx.eval(port.state, ours.state)
print(used()[1] - imports)
"""

CHECK = """
mlx_parity.check(
    reference,
    port,
    x,
    optimizer=(torch.optim.Adam, optim.Adam(1e-3, bias_correction=True)) if trained else None,
    steps=2,
    compiled=False,
    localised=False,
).assert_ok()
print(used()[1] - imports)
"""


@pytest.mark.parametrize("trained", [False, True])
def test_memory_stays_below_twice_what_both_models_and_the_oracle_take(trained: bool):
    """Beyond the imports, and a step with all that it leaves, of the oracle and of the port."""
    start = f"trained = {trained}\n{IMPORTED}{LESS_WIDE}"
    step, check = measured(start + STEP_IN_BOTH), measured(start + CHECK)
    assert check < 2 * step


def test_a_side_that_waits_holds_no_gradients_and_no_moments_and_the_port_no_weights():
    """Of the oracle, in float64, they are six times the weights of a port trained with Adam."""
    case = mlp_gan_case("002", (4, 8, 16))
    climb = Climb(case, GAN, 0)
    assert climb.structure()[0].ok
    assert all(rung.ok for rung in climb.training(1))
    for side in (climb.oracle, climb.usual):
        assert all(p.grad is None for m in side.system.modules.values() for p in m.parameters())
        assert not any(o.state for o in side.system.optimizers.values())
    assert all(np.isnan(a).all() for a in climb.port.tensors().values())
