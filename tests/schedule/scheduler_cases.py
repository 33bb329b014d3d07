"""Schedulers of diffusers, and the configurations of each that are tried; `from scheduler_cases import CASES`."""

from __future__ import annotations

# Step counts, set_timesteps/step arguments and configurations that are tried; classes that are not listed get DEFAULT.
# A class that a newer diffusers adds is therefore walked, too: it must agree with its serial loop or be refused.
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DEFAULT: list[dict] = [{}]
KINDS = [{"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")]
SPACINGS = [{"timestep_spacing": s} for s in ("leading", "trailing", "linspace")]
NOISE = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
FLOW = [{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}]
ZERO_SNR = [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}]
DDIM = [*KINDS, *SPACINGS, *ZERO_SNR, {"clip_sample": False}, {"clip_sample": False, "eta": 0.7}, {"eta": 1.0},
        {"clip_sample_range": 2.0, "prediction_type": "v_prediction", "eta": 0.5}, {"use_clipped_model_output": True},
        {"set_alpha_to_one": False, "steps_offset": 1}]  # fmt: skip
DDPM = [*KINDS, *SPACINGS, *ZERO_SNR, {"clip_sample": False}, {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"}, {"clip_sample_range": 0.5}]  # fmt: skip
DPM = [{"algorithm_type": a, "solver_order": o, "prediction_type": k, "final_sigmas_type": f}
       for a, f in (("dpmsolver++", "zero"), ("dpmsolver", "sigma_min"))
       for o in (1, 2, 3) for k in ("epsilon", "v_prediction", "sample")]  # fmt: skip
SDE = [{"algorithm_type": "sde-dpmsolver++", "solver_order": o, "prediction_type": k}
       for o in (1, 2, 3) for k in ("epsilon", "v_prediction")]  # fmt: skip
CASES: dict[str, list[dict]] = {
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDPMScheduler": [*DDPM, {"timesteps": [999, 500, 100, 20, 0]}],
    "DDPMParallelScheduler": DDPM,
    "PNDMScheduler": [{}, {"skip_prk_steps": True}, {"skip_prk_steps": True, "prediction_type": "v_prediction"},
                      {"skip_prk_steps": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}],
    "EulerDiscreteScheduler": [*KINDS, *SPACINGS, *NOISE, *ZERO_SNR, {"s_churn": 3.0, "s_noise": 1.1},
                               {"sigmas": [10.0, 3.0, 1.0, 0.3]}, {"final_sigmas_type": "sigma_min"}],
    "EulerAncestralDiscreteScheduler": [*KINDS[:2], *SPACINGS],
    "HeunDiscreteScheduler": [*KINDS, *NOISE, {"clip_sample": True, "clip_sample_range": 1.5}],
    "LMSDiscreteScheduler": [*KINDS, NOISE[0], {"order": 2}],
    "KDPM2DiscreteScheduler": [*KINDS[:2], NOISE[0]],
    "KDPM2AncestralDiscreteScheduler": [*KINDS[:2], NOISE[0]],
    "DPMSolverMultistepScheduler": [*DPM, *SDE, *NOISE, *FLOW, *ZERO_SNR, {"euler_at_final": True},
                                    {"solver_type": "heun"}, {"use_lu_lambdas": True},
                                    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}],
    "DPMSolverSinglestepScheduler": [*DPM, {"algorithm_type": "sde-dpmsolver++"}, *NOISE, *FLOW],
    "UniPCMultistepScheduler": [*KINDS, {"solver_order": 3}, {"solver_order": 1},
                                {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
                                {"predict_x0": False, "final_sigmas_type": "sigma_min"},
                                {"disable_corrector": [0, 1]}, *NOISE, *FLOW],
    "DEISMultistepScheduler": [*KINDS, {"solver_order": 3}, {"solver_order": 1}, *NOISE, *FLOW],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}, {"stochastic_sampling": True}, NOISE[0], {"s_churn": 2.0},
                                        {"use_dynamic_shifting": True, "mu": 0.8}],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}, {"s_churn": 2.0}],
    "SASolverScheduler": [{}, {"prediction_type": "v_prediction"}],
    "EDMEulerScheduler": [*KINDS[:2], {"sigma_schedule": "exponential"}],
    "EDMDPMSolverMultistepScheduler": [{}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}],
    "SCMScheduler": [{"intermediate_timesteps": None}],
    "TCDScheduler": [{}, {"eta": 0.0}],
    "RFD4ProteinaScheduler": [{"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0}],
    "AmusedScheduler": [{"mask_token_id": 1}],
    "VQDiffusionScheduler": [{"num_vec_classes": 8}],
}  # fmt: skip
MUST_ACCEPT = {  # named in the documentation as supported; a refusal of any of them is a failure
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
}  # fmt: skip
OPTIONAL = {"LMSDiscreteScheduler": "scipy", "CosineDPMSolverMultistepScheduler": "torchsde",
            "DPMSolverSDEScheduler": "torchsde"}  # fmt: skip
LATER = {"stochastic_sampling"}  # options that the oldest supported diffusers does not have; any other one it must know
