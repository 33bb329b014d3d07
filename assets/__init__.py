"""The bundled models, in diffusers format."""
