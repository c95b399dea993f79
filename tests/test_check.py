"""The one call: what it infers, what it refuses and whose fault it says that is."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as mnn
import mlx.optimizers as optim
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from torch import nn as tnn

import mlx_parity
from mlx_parity import NotProven, check
from mlx_parity.layers import port_modules
from tests.foreign import resnet

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


class Net(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = tnn.Linear(4, 5), tnn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Port(mnn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = mnn.Linear(4, 5), mnn.Linear(5, 2, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(mx.tanh(self.fc1(x)))


def test_three_lines_prove_a_port():
    report = check(Net(), Port(), X)
    report.assert_ok()
    assert report.ok
    assert report.exit_code == 0
    assert [r.name for r in report.rungs[:4]] == ["structure", "forward", "loss", "gradients"]
    assert "Net → Port: equal" in str(report)


def test_training_too_when_optimizers_are_given():
    optimizers = (
        lambda p: torch.optim.Adam(p, 1e-2),
        optim.Adam(1e-2, bias_correction=True),
    )
    report = check(Net(), Port(), X, optimizer=optimizers)
    report.assert_ok()
    assert {"optimizer step", "trajectory"} <= {r.name for r in report.rungs}
    wrong = check(Net(), Port(), X, optimizer=(optimizers[0], optim.Adam(1e-2)))
    assert wrong.failed is not None
    assert wrong.failed.name == "optimizer step"
    assert "adam-bias-correction" in {d.trap_id for d in wrong.diagnoses}


def test_a_loss_of_the_output_and_its_targets():
    labels = np.array([0, 1, 1])
    losses = (
        tnn.functional.cross_entropy,
        lambda y, t: mnn.losses.cross_entropy(y, t, reduction="mean"),
    )
    check(Net(), Port(), X, loss=losses, targets=labels).assert_ok()
    summed = (losses[0], lambda y, t: mnn.losses.cross_entropy(y, t, reduction="sum"))
    report = check(Net(), Port(), X, loss=summed, targets=labels)
    assert report.failed is not None
    assert report.failed.name == "loss"


def test_plain_functions_need_no_module():
    def theirs(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.softmax(-1) * y, (x * y).sum()

    def ours(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        return mx.softmax(x, -1) * y, (x * y).sum()

    check(theirs, ours, (X, X[::-1].copy())).assert_ok()
    wrong = check(theirs, lambda x, y: (mx.softmax(x, 0) * y, (x * y).sum()), (X, X + 1))
    assert wrong.verdict == "different"
    assert "forward 0" in str(wrong)


def test_weights_go_through_the_ports_own_sanitize():
    class Sanitized(mnn.Module):
        def __init__(self, swapped: bool = False) -> None:
            super().__init__()
            self.up, self.down = mnn.Linear(4, 5), mnn.Linear(5, 2)
            self.swapped = swapped

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            names = {"fc1": "up", "fc2": "down"}
            made = {f"{names[k[:3]]}{k[3:]}": v for k, v in weights.items()}
            if self.swapped:
                made["down.bias"] = made["down.bias"][::-1]
            return made

        def __call__(self, x: mx.array) -> mx.array:
            return self.down(mx.tanh(self.up(x)))

    report = check(Net(), Sanitized(), X)
    report.assert_ok()
    assert report.carried == "carried through the port's sanitize"
    assert check(Net(), Sanitized(swapped=True), X).verdict == "different"


def test_both_sides_may_hold_their_weights_already():
    reference, port = Net(), Port()
    mlx_parity.carry(reference, port)
    check(reference, port, X, carry=False).assert_ok()
    port.fc1.weight = port.fc1.weight * 1.0001
    report = check(reference, port, X, carry=False)
    assert report.verdict == "different"
    assert report.guilty[0].pair.reference_path == "fc1"


def test_images_are_found_by_the_first_convolution_or_declared():
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 5))

    def conv(x: mx.array) -> mx.array:
        return mnn.relu(x)

    class Same(mnn.Module):
        """Takes and gives NCHW, as some ports do."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = mnn.Conv2d(3, 4, 3)

        def __call__(self, x: mx.array) -> mx.array:
            return conv(self.conv(x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)

    class Theirs(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = tnn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x))

    class Last(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = mnn.Conv2d(3, 4, 3)

        def __call__(self, x: mx.array) -> mx.array:
            return conv(self.conv(x))

    assert check(Theirs(), Last(), x).layouts.keys() == {"x", "output"}
    report = check(Theirs(), Same(), x)
    report.assert_ok()
    assert not report.layouts
    declared = check(Theirs(), Last(), x, images=["x", "output"])
    declared.assert_ok()
    assert "images names y" in check(Theirs(), Last(), x, images=["y"]).problem


def test_a_port_without_gradients_is_a_finding():
    class Stuck(Port):
        def __call__(self, x: mx.array) -> mx.array:
            return mx.array(np.array(super().__call__(x)))

    report = check(Net(), Stuck(), X)
    assert report.verdict == "different"
    assert report.failed is not None
    assert report.failed.name == "gradients"
    check(Net(), Port(), X, until="forward").assert_ok()


def test_a_bias_that_the_port_lacks_is_a_difference_of_structure():
    report = check(Net(), Port(bias=False), X)
    assert report.verdict == "different"
    assert "fc2 [Linear] has no bias" in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_that_was_not_asked_for_is_compared_too(training: bool):
    """A momentum shows in training only; batch statistics in evaluation show there only."""
    x = np.random.default_rng(0).standard_normal((3, 3, 6, 9))
    report = check(resnet.ResNet().train(training), resnet.ResNetPort(), x)
    report.assert_ok()
    assert f"forward in {'evaluation' if training else 'training'}" in str(report)
    fault = "statistics" if training else "momentum"
    wrong = check(resnet.ResNet().train(training), resnet.ResNetPort(fault), x, explain=False)
    assert wrong.failed is not None
    assert wrong.failed.name.startswith("forward in")
    assert wrong.guilty[0].pair.reference_path == "layer1.1.bn2"


def test_discrete_outputs_are_equal_wherever_pytorch_is_sure():
    class Theirs(Net):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return y, y.argmax(-1)

    check(Theirs(), broken(lambda y: (y, mx.argmax(y, -1))), X).assert_ok()
    wrong = check(Theirs(), broken(lambda y: (y, mx.argmin(y, -1))), X)
    assert wrong.failed is not None
    assert "1: 3 of 3 elements differ" in str(wrong)


# ----------------------------------------------------------------------- whose fault it is


def broken(change: Any) -> Port:
    class Broken(Port):
        def __call__(self, x: mx.array) -> mx.array:
            return change(super().__call__(x))

    return Broken()


class Raising(mnn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return x.reshape(7, 7)


def test_a_port_that_raises_is_named_with_the_module_it_raises_in():
    port = Port()
    port.fc2 = mnn.Sequential(port.fc2, Raising())
    report = check(Net(), port, X, map={"fc2": "fc2.layers.0"})
    assert (report.verdict, report.fault, report.exit_code) == ("undecided", "port", 2)
    assert "the port raises ValueError" in report.problem
    assert "in fc2.layers.1" in report.problem


def test_a_reference_that_raises_is_at_fault_itself():
    report = check(Net(), Port(), X[:, :3])
    assert (report.verdict, report.fault) == ("undecided", "reference")
    assert "in fc1" in report.problem


def test_a_reference_that_draws_is_not_deterministic():
    class Noisy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.randn(1)

    report = check(Noisy(), Port(), X)
    assert report.fault == "reference"
    assert "not deterministic" in report.problem


def test_a_port_that_draws_differs_from_a_reference_that_does_not():
    report = check(Net(), broken(lambda y: y + mx.random.normal(y.shape)), X)
    assert report.verdict == "different"
    assert "the port is not deterministic" in str(report)


def test_nan_in_the_reference_is_its_own_fault():
    reference = Net()
    with torch.no_grad():
        reference.fc2.bias[0] = torch.nan
    report = check(reference, Port(), X)
    assert report.fault == "reference"
    assert "NaN in fc2.bias" in report.problem


def test_weights_without_a_place_are_listed_with_what_to_do():
    class Wide(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = mnn.Linear(4, 9)

        def __call__(self, x: mx.array) -> mx.array:
            return self.fc1(x)

    report = check(Net(), Wide(), X)
    assert (report.verdict, report.fault) == ("undecided", "weights")
    for part in ("fc2.weight [2, 5]", "map=", "sanitize=", "carry=False"):
        assert part in report.problem


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (np.full((3, 4), np.nan), "input 'x' holds NaN"),
        (np.zeros((0, 4)), "at least 1"),
    ],
)
def test_bad_inputs_are_refused_by_name(inputs: np.ndarray, said: str):
    report = check(Net(), Port(), inputs)
    assert report.fault == "inputs"
    assert said in report.problem


def test_the_order_of_the_two_models_matters():
    assert "PyTorch's model comes first" in check(Port(), Net(), X).problem


def test_assert_ok_raises_with_the_whole_report():
    with pytest.raises(NotProven, match="different in forward"):
        check(Net(), broken(lambda y: y * 1.001), X).assert_ok()
    with pytest.raises(AssertionError, match="could not be judged"):
        check(Net(), broken(lambda y: y.reshape(99)), X).assert_ok()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": [[0.0, 1.0]]}, "inputs holds no array"),
        ({"inputs": X.astype(np.complex64)}, "input 'x' is complex"),
        ({"reference": Net}, "reference is the class Net: give an instance"),
        ({"port": lambda x: x}, "reference is a module and port a function"),
        ({"reference": lambda x: x}, "port is a module and reference a function"),
        ({"loss": lambda y: y * y}, "loss gives an array of shape [3, 2]: it has to give a scalar"),
        ({"optimizer": torch.optim.Adam}, "optimizer is a pair"),
        ({"optimizer": (torch.optim.Adam, optim.Adam)}, "Adam, which is no instance"),
        ({"map": {"fc": "fc1"}}, "has nothing called 'fc'; did you mean 'fc"),
        ({"map": {"fc1": "fx1"}}, "the port has nothing called 'fx1'; did you mean 'fc1'?"),
        ({"until": "backward"}, "the rungs are structure, forward"),
        ({"steps": 99}, "a trajectory has 1 to 20"),
    ],
)
def test_what_was_asked_wrongly_is_said(options: dict[str, Any], said: str):
    given = {"reference": Net(), "port": Port(), "inputs": X, **options}
    report = check(**given)
    assert report.fault in ("inputs", "weights")
    assert said in report.problem


def test_a_quantized_port_is_told_from_a_wrong_one():
    class Wide(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = tnn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    class WidePort(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = mnn.Linear(64, 64)

        def __call__(self, x: mx.array) -> mx.array:
            return self.fc(x)

    port = WidePort()
    mnn.quantize(port)
    problem = check(Wide(), port, np.ones((2, 64))).problem
    assert "fc of the port is quantized" in problem


class Tokens(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = tnn.Embedding(7, 4), tnn.Linear(4, 3)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        h = self.table(ids)
        return scale * self.out(h if mask is None else h * mask[..., None])


class TokensPort(mnn.Module):
    """Other names, and the mask by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = mnn.Embedding(7, 4), mnn.Linear(4, 3)

    def __call__(
        self, tokens: mx.array, *, mask: mx.array | None = None, scale: float = 1.0
    ) -> mx.array:
        h = self.wte(tokens)
        return scale * self.head(h if mask is None else h * mask[..., None])


IDS, MASK = np.array([[0, 6, 2], [5, 1, 1]]), np.array([[True, True, False], [True] * 3])


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [
        ((IDS, MASK), {"scale": 2.0}),
        (IDS, {"mask": MASK, "scale": 2.0}),
        ({"ids": IDS, "mask": MASK}, {}),
        ({"ids": IDS, "mask": MASK, "scale": 0.5}, None),
    ],
)
def test_arguments_go_by_name_or_position_as_each_side_takes_them(inputs: Any, kwargs: Any):
    report = check(Tokens(), TokensPort(), inputs, kwargs=kwargs, compiled=False)
    report.assert_ok()
    otherwise = any("otherwise than the reference" in note for note in report.notes)
    assert otherwise == isinstance(inputs, tuple | dict)


def test_a_port_that_gives_numpy_is_right_forward_and_has_no_gradient():
    class Given(Port):
        def __call__(self, x: mx.array) -> Any:
            return np.array(super().__call__(x))

    report = check(Net(), Given(), X, explain=False)
    assert report.failed is not None
    assert report.failed.name == "gradients"
    assert check(Net(), Given(), X, until="forward", compiled=False).ok


# ------------------------------------------------------------------------- left as it was found


def state(module: mnn.Module) -> list[Any]:
    arrays = [(k, np.array(v)) for k, v in tree_flatten(module.parameters())]
    classes = [(p, type(m), id(m), m.training) for p, m in port_modules(module).items()]
    return [[(k, a.tolist()) for k, a in arrays], classes]


@pytest.mark.parametrize("error", [False, True], ids=["", "after an error"])
def test_both_models_and_both_random_states_are_left_as_they_were(error: bool):
    reference, port = resnet.ResNet(), resnet.ResNetPort()
    port.eval()
    if error:
        port.out = Raising()
    x = torch.randn(2, 3, 5, 6)
    tensors = {k: v.clone() for k, v in reference.state_dict().items()}
    before = state(port)
    torch_random = torch.get_rng_state()
    identities = [id(v) for _, v in tree_flatten(port.parameters())]
    report = check(reference, port, x)
    assert report.ok is not error
    assert state(port) == before
    assert [id(v) for _, v in tree_flatten(port.parameters())] == identities
    assert all(torch.equal(v, tensors[k]) for k, v in reference.state_dict().items())
    assert all(p.grad is None for p in reference.parameters())
    assert all(not m._forward_hooks for m in reference.modules())
    assert torch.equal(torch.get_rng_state(), torch_random)


# ------------------------------------------------------------------------------- what it writes


def test_json_and_html_say_the_same_and_need_no_network(tmp_path: Any):
    report = check(Net(), broken(lambda y: y * 1.001), X)
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert data["verdict"] == "different"
    assert data["guilty"][0]["reference"] == ""
    assert {"forward", "backward", "isolated"} <= data["modules"][0].keys()
    page = report.to_html(tmp_path / "report.html")
    assert page == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", "")
    for path in ("fc1", "fc2"):
        assert path in page


def test_a_port_that_is_called_by_another_name_is_the_one_that_is_checked():
    port = Port()
    before = state(port)
    check(Net(), port, X, call_port=lambda model, x: port(x)).assert_ok()
    assert state(port) == before


# ---------------------------------------------------------------------------------- the interface


def test_every_public_name_is_said_what_for():
    """In the package's docstring, and in one of its own."""
    guide = mlx_parity.__doc__ or ""
    for name in mlx_parity.__all__:
        assert name in guide, name
        value = getattr(mlx_parity, name)
        assert not callable(value) or (value.__doc__ or "").strip(), name
        assert type(value).__name__ != "module", name


@pytest.mark.parametrize("frozen", ["both", "reference"])
def test_a_model_that_is_frozen_on_both_sides_is_equal(frozen):
    """A feature extractor is; what is frozen in the reference alone still has its gradients."""
    reference = tnn.Sequential(tnn.Linear(3, 4), tnn.Tanh(), tnn.Linear(4, 2)).requires_grad_(False)
    port = mnn.Sequential(mnn.Linear(3, 4), mnn.Tanh(), mnn.Linear(4, 2))
    if frozen == "both":
        port.freeze()
    report = mlx_parity.check(reference, port, np.ones((2, 3), np.float32))
    assert report.ok, str(report)
    assert bool(tree_flatten(port.trainable_parameters())) == (frozen == "reference")
    assert ("all the same" in str(report)) == (frozen == "reference")


def test_frozen_layers_of_tokens_have_no_gradient_to_compare():
    reference = tnn.Embedding(5, 3).requires_grad_(False)
    port = mnn.Embedding(5, 3)
    port.freeze()
    report = mlx_parity.check(reference, port, np.array([[0, 4, 2]]))
    assert report.ok, str(report)
