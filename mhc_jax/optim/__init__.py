"""The optimizer of a run: which parameters form a group, what rule updates each group, and the learning-rate schedule."""

from mhc_jax.optim.groups import Group, decays, groups, rule_of, table
from mhc_jax.optim.learning_rate import schedule
from mhc_jax.optim.optimizer import optimizer

__all__ = ["Group", "decays", "groups", "optimizer", "rule_of", "schedule", "table"]
