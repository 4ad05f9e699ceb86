"""The lowest package: errors, settings, ranks, processor, processes and progress.

It knows nothing of models, data or training. No module imports Paddle outside a function, so that
workers and supervisors start in milliseconds. The package itself exports no names: import its
modules.
"""
