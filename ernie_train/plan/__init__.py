"""Plan a recipe on a cluster: layouts, memory of a rank, time of a step.

All of it is arithmetic on the recipe: no weights, no data. docs/scaling.md explains it.
"""

from ernie_train.plan.command import PlanSettings, print_plan

__all__ = ["PlanSettings", "print_plan"]
