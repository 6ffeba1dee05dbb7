"""Pure tensor functions, without models, registries or OpenMMLab's packages."""
