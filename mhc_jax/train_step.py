"""One optimizer step, one validation step and one diagnostics step, as pure functions of (state, batch)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import connection_module
from mhc_jax.layers.moe import balanced_bias, router_health
from mhc_jax.model import Decoder
from mhc_jax.optim import optimizer, schedule
from mhc_jax.remat_plan import resolve
