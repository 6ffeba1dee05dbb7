"""Pure tensor functions: no models, no registries, no mm-packages."""
