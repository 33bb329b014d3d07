"""What the constructors of schedules refuse, by name."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.schedule import Clip, Schedule, timesteps

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


BAD_DDIM = [
    ({"alphas_cumprod": [[0.5]]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.9, float("nan")]}, "alphas_cumprod"),
    ({"alphas_cumprod": [1.0, 0.5]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.9, -0.5]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.5, 0.9]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.9, 0.0]}, "zero terminal"),
    ({"timesteps": []}, "timesteps"),
    ({"timesteps": [0, 1]}, "descending"),
    ({"timesteps": [2, 0]}, "timesteps"),
    ({"timesteps": [1, -1]}, "timesteps"),
    ({"timesteps": [0.5]}, "integers"),
    ({"eta": -0.1}, "eta"),
    ({"eta": float("nan")}, "eta"),
    ({"eta": 40.0}, "eta"),
    ({"final_alpha_cumprod": 0.0}, "final_alpha_cumprod"),
    ({"final_alpha_cumprod": 1.5}, "final_alpha_cumprod"),
    ({"prediction_type": "flow"}, "prediction_type"),
    ({"prediction_type": "eps"}, "prediction_type"),
]


@pytest.mark.parametrize(("change", "named"), BAD_DDIM)
def test_bad_arguments_are_named(change, named):
    good = {"alphas_cumprod": [0.9, 0.5], "timesteps": [1, 0]}
    Schedule.ddim(**good)
    with pytest.raises(ValueError, match=named):
        Schedule.ddim(**good | change)
    if "eta" not in change:
        with pytest.raises(ValueError, match=named):
            Schedule.ddpm(**good | change)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (([1.0],), "sigmas"),
        (([1.0, 2.0],), "sigmas"),
        (([1.0, 1.0, 0.0],), "sigmas"),
        (([1.0, -0.1],), "sigmas"),
        (([float("inf"), 0.0],), "sigmas"),
        (([2.0, 0.0], "heun"), "method"),
    ],
)
def test_bad_sigmas_are_named(args, named):
    with pytest.raises(ValueError, match=named):
        Schedule.from_sigmas(*args)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="1 to 0"):
        Schedule.from_sigmas([2.0, 0.0], flow=True)
    with pytest.raises(ValueError, match="epsilon"):
        Schedule.from_sigmas([1.0, 0.0], flow=True, prediction_type="epsilon")
    with pytest.raises(ValueError, match="input_scale"):
        Schedule.from_sigmas([2.0, 1.0, 0.0], input_scale=[1.0])
    with pytest.raises(ValueError, match="input_scale"):
        Schedule.from_sigmas([2.0, 1.0, 0.0], timesteps=[1.0])
    with pytest.raises(ValueError, match="spacing"):
        timesteps(1000, 10, "even")
    for n in (0, 1001):
        with pytest.raises(ValueError, match="n: expected"):
            timesteps(1000, n)
    with pytest.raises(ValueError, match="variance"):
        Schedule.ddpm(ABAR, [1, 0], variance="learned")
    with pytest.raises(ValueError, match="variance"):
        Schedule.ddim(ABAR, [1, 0]).slope(-1.0)
    with pytest.raises(TypeError):
        Schedule.ddim(ABAR, [1, 0], etta=1.0)


BAD_TABLES = [
    ({"state_coef": torch.ones(3)}, "state_coef"),
    ({"state_coef": torch.ones(3, 0), "model_coef": torch.ones(3, 0)}, "lag"),
    ({"model_coef": torch.ones(3, 2)}, "model_coef"),
    ({"state_coef": torch.ones(3, 2), "model_coef": torch.zeros(3, 2)}, "i - l < 0"),
    ({"state_coef": torch.tensor([[1.0], [float("nan")], [1.0]])}, "state_coef.*finite"),
    ({"noise_coef": torch.ones(2)}, "noise_coef"),
    ({"signal": torch.ones(3)}, "signal"),
    ({"sigma": -torch.ones(4)}, "sigma"),
    ({"signal": torch.zeros(4), "sigma": torch.zeros(4)}, "signal"),
    ({"input_scale": torch.ones(3, 1)}, "input_scale"),
    ({"timesteps": torch.tensor([3.0, 2.0, float("inf")])}, "timesteps"),
    ({"noise_coef": torch.ones(3), "draws": torch.tensor([True, False, True])}, "draws"),
    ({"init_noise_sigma": 0.0}, "init_noise_sigma"),
    ({"x0_coef": torch.ones(3)}, "x0_coef"),
    ({"prediction_type": "noise"}, "prediction_type"),
    ({"clip": Clip(1.0, torch.ones(2))}, "clip.gain"),
]


@pytest.mark.parametrize(("change", "named"), BAD_TABLES)
def test_bad_tables_are_named(change, named):
    good = {"timesteps": torch.tensor([2, 1, 0]), "input_scale": torch.ones(3), "state_coef": torch.ones(3, 1),
            "model_coef": torch.ones(3, 1), "noise_coef": torch.zeros(3), "signal": torch.ones(4),
            "sigma": torch.ones(4)}  # fmt: skip
    Schedule(**good)
    with pytest.raises(ValueError, match=named):
        Schedule(**good | change)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="range"):
            Clip(bad, torch.ones(3))
