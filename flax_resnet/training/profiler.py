"""JAX's profiler over a few steps of a run."""

from typing import Any

import jax

from flax_resnet.errors import short_reason
from flax_resnet.progress import warn
from flax_resnet.training.plan import Plan


class Profiler:
    """Traces the steps that `profile_steps` names, for the Profile tab of TensorBoard.

    Steps that are one call are traced together. Of several processes the first is traced: those
    of one machine would write one file.
    """

    def __init__(self, plan: Plan):
        self._folder = str(plan.workdir)
        steps = plan.config.profile_steps if jax.process_index() == 0 else None
        self._first, self._stop = steps or (0, 0)
        self._tracing = False

    def before(self, step: int, count: int) -> None:
        """Steps `step` to `step + count - 1`, counted from 0, are next."""
        if not self._tracing and step < self._stop and step + count > self._first:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, state: Any) -> None:
        """The step before `step` is begun, and gives this state."""
        if self._tracing and step >= self._stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace; says so where it cannot, which is no reason to end the run."""
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except (jax.errors.JaxRuntimeError, OSError) as error:
                warn(f"there is no profile: {short_reason(error)}")
