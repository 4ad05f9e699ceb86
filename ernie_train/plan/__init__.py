"""Does a recipe fit a cluster, laid out how, and how long does a step take?

All of it is arithmetic on the recipe: no weights, no data. docs/scaling.md explains it.
"""

from ernie_train.plan.command import PlanSettings, print_plan

__all__ = ["PlanSettings", "print_plan"]
