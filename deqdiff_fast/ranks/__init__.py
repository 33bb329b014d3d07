"""One solve on several devices: the rows of every model call are shared out over the ranks of a process group."""

from __future__ import annotations

from .sharded import ShardedModel, sharded

__all__ = ["ShardedModel", "sharded"]
