"""One optimizer update of a stage: by one program, or in parts with other arrays in memory between.

The parts are the gradients and the optimizer. They are apart where each row has a guide of its own
(`guides`), and where the optimizer's slots wait on the host (`placement`): gradients are formed
without the slots in the devices' memory, and the slots come when nothing else needs it.
"""

from collections.abc import Callable

import numpy as np

from s2d_jax import guides, sharding
from s2d_jax.compiling import Programs
from s2d_jax.placement import Mover
from s2d_jax.roles import StageModels
from s2d_jax.rollouts import Batch
from s2d_jax.training import Metrics, Totals, TrainState

Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def of_step(programs: Programs, models: StageModels, mover: Mover,
            roles_of: Callable[[Batch], np.ndarray] | None) -> Update:
  """update(state, batch of the host) -> (state, metrics), as `training.jit_update`.

  It holds what the updates of one step share: drop it after the step.

  Args:
    programs: of the stage.
    models: of the stage.
    mover: of what waits on the host.
    roles_of: the role of the guide of each row of a batch; None: the stage has one guide, or none.
  """
  mesh = sharding.current_mesh()
  if programs.update is not None:
    guide_params = mover.guide(models)
    return lambda state, batch: programs.update(
        state, guide_params, sharding.put_batch(batch, mesh), models.non_trainable)

  if programs.routed is not None:
    apply = programs.routed.apply

    def totals(state: TrainState, batch: Batch) -> Totals:
      return guides.totals(programs.routed, models.guides, state.params, models.non_trainable,
                           batch, roles_of(batch))
  else:
    apply = programs.split.apply

    # The guide's copy is dropped before the slots come: the two together may not fit.
    def totals(state: TrainState, batch: Batch) -> Totals:
      return programs.split.totals(state.params, models.non_trainable, mover.guide(models),
                                   sharding.put_batch(batch, mesh))

  return lambda state, batch: mover.applied(apply, state, totals(state, batch))
