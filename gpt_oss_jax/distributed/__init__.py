"""Several processes, mostly one a host, that run one model over all their devices.

All of them run the same program and take the same steps; `distributed_init` brings them together,
before anything touches a device, and ends all when one is lost. Knows nothing of models.
"""

from gpt_oss_jax.distributed.join import (
    await_news as await_news,
    broadcast as broadcast,
    count as count,
    distributed_init as distributed_init,
    index as index,
    leave as leave,
    once as once,
)
