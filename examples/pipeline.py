"""A diffusers pipeline whose denoising loop is solved in parallel."""

import torch
from diffusers import StableDiffusionPipeline

import deqdiff_fast as dq

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to(device)
dq.integrations.diffusers.parallelize(pipe)
image = pipe("a photo of a cat", num_inference_steps=50, generator=torch.Generator().manual_seed(0)).images[0]
image.save("cat.png")
print(pipe.last_solution.stats.solver, pipe.last_solution.stats.rounds)
