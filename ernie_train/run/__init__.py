"""Recipes and the pipeline that runs them: stages, evaluation, gates, export and its proof."""
