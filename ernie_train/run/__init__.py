"""From a recipe to a finished run: stage after stage, evaluation, gates, export and its proof."""
