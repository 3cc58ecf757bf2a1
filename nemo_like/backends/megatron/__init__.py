"""megatron-core: tensor, pipeline, context and expert parallelism, mixtures of experts."""
