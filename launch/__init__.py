"""The two README commands and what they run."""
