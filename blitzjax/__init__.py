"""blitzjax: a JAX serving engine for Flax models with fast, live autoscaling. Importing it imports nothing else."""

__version__ = "0.1.0"
