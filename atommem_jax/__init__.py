"""Agents that learn to manage their own memory, in JAX. Start at `rollout` and `memory`."""
