"""One lock per base model: fast paths replace parts of a base's forward pass while they run."""

import threading
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


def base_lock(base: nn.Module) -> threading.RLock:
    """Held by whoever runs the forward pass of `base`, so that a thread that serves never meets another one's patches.

    A `PromptedCausalLM` takes it by itself. A thread that calls the base directly, beside another that trains on it,
    takes it too: `with base_lock(base): base.generate(…)`.
    """
    with _GUARD:
        return _LOCKS.setdefault(base, threading.RLock())
