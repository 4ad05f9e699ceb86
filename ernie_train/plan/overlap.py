"""How many seconds of communication computation may hide, where the backend works beside it.

NCCL does; gloo waits. Rows travel to experts while shared experts compute, in both directions, and
gradients leave layer after layer in the last backward pass before an update.
"""

from __future__ import annotations

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.cost import StepCost, mean_context, token_flops
from ernie_train.plan.layout import Layout, moe_layers
from ernie_train.plan.work import Work


def hidden_seconds(config: Ernie4_5_MoeConfig, layout: Layout, work: Work, cost: StepCost) -> float:
    """At most so much of a step's communication stands behind computation.

    Of the exchanges one in two is to experts (or brings their gradients home), so half of their
    time may go behind that of the shared experts; the way back of results waits. Of the gradients,
    what a micro-batch's backward pass lasts in each update; those of routers and of a tied
    embedding, which leave after it, are not taken out. Updated weights are waited for.
    """
    compute = cost.seconds["compute"]
    flops = token_flops(config, mean_context(work.job.micro_batch.document_tokens))
    shared = config.moe_num_shared_experts * config.moe_intermediate_size
    shared_flops = moe_layers(config) * 6.0 * config.hidden_size * shared
    exchanges = min(cost.seconds["all-to-all"] / 2, compute * shared_flops / flops.forward)
    micro_batches = work.updates * -(-work.micro_batches // layout.ranks)
    backward = 1 - flops.forward / cost.flops_per_token
    last_passes = compute * backward * work.updates / micro_batches
    return exchanges + min(cost.seconds["gradients"], last_passes)
