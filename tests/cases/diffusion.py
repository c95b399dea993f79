"""Document 004: the diffusion process, its samplers, and the denoiser that they train."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mlx_impl.diffusion
import reference.diffusion
from mlx_impl.training import compile_step
from mlx_parity import Case, Loss, System
from mlx_parity.case import Shape
from tests import strategies
from tests.cases.common import Arrays, Rng, normal

IMAGES = frozenset({"images", "x0", "x_t", "noise", "prediction", "cotangent", "output", "sample"})

linear_betas = st.tuples(st.floats(1e-4, 0.05), st.floats(0.05, 0.3))
schedules = st.one_of(
    st.builds(
        lambda steps, betas: {"schedule": "linear", "steps": steps, "betas": betas},
        st.integers(1, 50),
        linear_betas,
    ),
    st.just({"schedule": "linear", "steps": 1000, "betas": (1e-4, 0.02)}),
    st.builds(lambda steps: {"schedule": "cosine", "steps": steps}, st.integers(1, 1000)),
)
targets = st.sampled_from(["epsilon", "x0", "v"])


@st.composite
def shapes(draw: st.DrawFn, **more: st.SearchStrategy) -> dict[str, Any]:
    """Images, a schedule, a denoiser's sizes, and ``more``."""
    return {
        "batch": draw(strategies.batches),
        "width": draw(strategies.widths),
        "embedding_dim": draw(st.integers(4, 12)),
        **draw(strategies.images()),
        **draw(schedules),
        **{name: draw(strategy) for name, strategy in more.items()},
    }


def schedule(lib: Any, shape: Shape) -> Any:
    if shape["schedule"] == "cosine":
        return lib.cosine_schedule(shape["steps"])
    return lib.linear_schedule(shape["steps"], *shape["betas"])


def denoiser(lib: Any, shape: Shape) -> Any:
    return lib.Denoiser(shape["channels"], shape["width"], shape["embedding_dim"])


def _images(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.uniform(-1, 1, (shape["batch"], shape["channels"], *shape["image_size"]))


def _noise(rng: Rng, shape: Shape) -> np.ndarray:
    return normal(rng, shape["batch"], shape["channels"], *shape["image_size"])


def _timesteps(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.integers(0, shape["steps"], shape["batch"])


def training_inputs(shape: Shape, rng: Rng) -> Arrays:
    return {
        "images": _images(rng, shape),
        "timesteps": _timesteps(rng, shape),
        "noise": _noise(rng, shape),
    }


def case(
    name: str,
    shapes: st.SearchStrategy[Shape],
    build: Callable[[Any, Shape], System],
    inputs: Callable[[Shape, Rng], Arrays],
    **more: Any,
) -> Case:
    return Case(
        name=name,
        shapes=shapes,
        build=build,
        reference=reference.diffusion,
        port=mlx_impl.diffusion,
        inputs=inputs,
        **{"side": "canonical", "images": IMAGES, "cost": 10, **more},
    )


def projected(output: Callable[..., Any], **modules: Any) -> System:
    """A function of the inputs but one, and its output against that one, a drawn cotangent."""
    return System(
        modules=modules,
        forward=lambda cotangent, **x: {"output": output(**x)},
        losses={
            "projection": Loss(
                lambda cotangent, **x: (output(**x) * cotangent).sum(), tuple(modules)
            )
        },
    )


def _denoiser_alone(lib: Any, shape: Shape) -> System:
    model = denoiser(lib, shape)
    return projected(lambda x_t, timesteps: model(x_t, timesteps), denoiser=model)


def diffusion(lib: Any, shape: Shape) -> System:
    """The training system: the denoiser, L_simple, Ho's Algorithm 1."""
    s, model = schedule(lib, shape), denoiser(lib, shape)
    settings = {"schedule": s, "target": shape["target"]}

    def loss(images: Any, timesteps: Any, noise: Any) -> Any:
        return lib.loss(model, s, images, timesteps, noise, shape["target"])

    return System(
        modules={"denoiser": model},
        forward=lambda images, timesteps, noise: {"output": model(images, timesteps)},
        losses={"loss": Loss(loss, ("denoiser",))},
        optimizers={"denoiser": lib.make_optimizer(model)},
        step=lambda *state_and_inputs: (lib.train_step(*state_and_inputs, **settings),),
    )


def averaged(lib: Any, shape: Shape) -> System:
    """The same with the running average of the weights, which is what samples."""
    system = diffusion(lib, shape)
    model = system.modules["denoiser"]
    ema = lib.EMA(model, shape["decay"])
    settings = {"schedule": schedule(lib, shape), "target": shape["target"]}
    return System(
        modules={"denoiser": model, "ema": ema},
        forward=lambda images, timesteps, noise: {"output": ema(images, timesteps)},
        losses=system.losses,
        optimizers=system.optimizers,
        step=lambda *state_and_inputs: (lib.ema_train_step(*state_and_inputs, **settings),),
    )


def _q_sample(lib: Any, shape: Shape) -> System:
    return projected(partial(lib.q_sample, schedule(lib, shape)))


def _posterior(lib: Any, shape: Shape) -> System:
    s = schedule(lib, shape)

    def mean(x0: Any, x_t: Any, timesteps: Any) -> Any:
        return lib.posterior_mean_variance(s, x0, x_t, timesteps)[0]

    def outputs(cotangent: Any, **x: Any) -> dict[str, Any]:
        output, variance = lib.posterior_mean_variance(s, **x)
        return {"output": output, "variance": variance.reshape(-1)}

    system = projected(mean)
    return System(forward=outputs, losses=system.losses)


def _conversion(lib: Any, shape: Shape) -> System:
    return projected(
        partial(getattr(lib, shape["function"]), schedule(lib, shape), target=shape["target"])
    )


def _step_settings(shape: Shape) -> dict[str, Any]:
    names = ("variance", "eta", "target", "clip_x0")
    return {name: shape[name] for name in names if name in shape}


def _step(name: str, lib: Any, shape: Shape) -> System:
    s, model = schedule(lib, shape), denoiser(lib, shape)
    return projected(partial(getattr(lib, name), model, s, **_step_settings(shape)), denoiser=model)


def _chain(name: str, lib: Any, shape: Shape) -> System:
    """A sampler's whole loop, and the gradient through its steps taken one by one."""
    model, settings = denoiser(lib, shape), _step_settings(shape)
    s = schedule(lib, shape)
    s = s.respaced(min(shape["chain"], len(s)), shape["spacing"])

    def loop(noise: Any, timesteps: Any, cotangent: Any, **z: Any) -> dict[str, Any]:
        sample = getattr(lib, f"{name}_sample")
        return {"sample": sample(model, s, noise, z.values(), **settings)}

    def unrolled(noise: Any, timesteps: Any, cotangent: Any, **z: Any) -> Any:
        x = noise
        for i, t in enumerate(reversed(range(len(s)))):
            step = getattr(lib, f"{name}_step")
            x = step(model, s, x, 0 * timesteps + t, z.get(f"z{i}"), **settings)
        return (x * cotangent).sum()

    return System(
        modules={"denoiser": model},
        forward=loop,
        losses={"projection": Loss(unrolled, ("denoiser",))},
    )


def _chain_inputs(shape: Shape, rng: Rng) -> Arrays:
    steps = min(shape["chain"], shape["steps"])
    return {
        "noise": _noise(rng, shape),
        "timesteps": np.zeros(shape["batch"], int),  # lends its type and its length
        "cotangent": _noise(rng, shape),
        **{f"z{i}": _noise(rng, shape) for i in range(steps - 1)},
    }


def _embedding(lib: Any, shape: Shape) -> System:
    def embed(timesteps: Any, like: Any) -> dict[str, Any]:
        return {"embedding": lib.sinusoidal_embedding(timesteps, shape["dim"], like.dtype)}

    return System(forward=embed)


clips, variances = st.booleans(), st.sampled_from(["beta", "beta_tilde"])
etas = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
chains = {
    "chain": st.integers(1, 4),
    "spacing": st.sampled_from(["leading", "linspace", "trailing"]),
}
DOCUMENT = {
    "width": 128,
    "embedding_dim": 100,
    "image_size": (64, 64),
    "channels": 3,
    "schedule": "linear",
    "steps": 1000,
    "betas": (1e-4, 0.02),
    "target": "epsilon",
}

CASES = (
    case(
        "004 diffusion",
        shapes(target=targets),
        diffusion,
        training_inputs,
        side="documented",
        compile_step=compile_step,
        cost=12,
        full_size=DOCUMENT,
    ),
    case(
        "004 denoiser",
        shapes(),
        _denoiser_alone,
        lambda shape, rng: {
            "x_t": _noise(rng, shape),
            "timesteps": _timesteps(rng, shape),
            "cotangent": _noise(rng, shape),
        },
        side="documented",
        full_size=DOCUMENT,
    ),
    case(
        "diffusion with an average of the weights",
        shapes(target=targets, decay=st.sampled_from([0.0, 0.5, 0.99, 0.9999])),
        averaged,
        training_inputs,
        cost=25,
    ),
    case(
        "q_sample",
        shapes(),
        _q_sample,
        lambda shape, rng: {
            "x0": _images(rng, shape),
            "timesteps": _timesteps(rng, shape),
            "noise": _noise(rng, shape),
            "cotangent": _noise(rng, shape),
        },
    ),
    case(
        "posterior_mean_variance",
        shapes(),
        _posterior,
        lambda shape, rng: {
            "x0": _images(rng, shape),
            "x_t": _noise(rng, shape),
            "timesteps": _timesteps(rng, shape),
            "cotangent": _noise(rng, shape),
        },
    ),
    case(
        "x0, epsilon and v from each other",
        shapes(
            function=st.sampled_from(["predict_x0", "predict_epsilon", "predict_v"]),
            target=targets,
        ),
        _conversion,
        lambda shape, rng: {
            "x_t": _noise(rng, shape),
            "timesteps": _timesteps(rng, shape),
            "prediction": _noise(rng, shape),
            "cotangent": _noise(rng, shape),
        },
    ),
    *(
        case(
            f"{name} step",
            shapes(target=targets, clip_x0=clips, **more),
            partial(_step, f"{name.lower()}_step"),
            lambda shape, rng: {
                "x_t": _noise(rng, shape),
                "timesteps": _timesteps(rng, shape),
                "noise": _noise(rng, shape),
                "cotangent": _noise(rng, shape),
            },
            cost=12,
            samples=True,
            full_size={**DOCUMENT, "clip_x0": True, **usual},
        )
        for name, more, usual in (
            ("DDPM", {"variance": variances}, {"variance": "beta_tilde"}),
            ("DDIM", {"eta": etas}, {"eta": 0.0}),
        )
    ),
    *(
        case(
            f"{name} chain",
            shapes(target=targets, clip_x0=clips, **chains, **more),
            partial(_chain, name.lower()),
            _chain_inputs,
            images=IMAGES | {"z0", "z1", "z2"},
            cost=25,
        )
        for name, more in (("DDPM", {"variance": variances}), ("DDIM", {"eta": etas}))
    ),
    case(
        "sinusoidal_embedding",
        st.fixed_dictionaries({"batch": st.integers(1, 40), "dim": st.integers(4, 200)}),
        _embedding,
        lambda shape, rng: {
            "timesteps": rng.integers(0, 1000, shape["batch"]),
            "like": np.ones(1),
        },
    ),
)
