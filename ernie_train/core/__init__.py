"""What every other package stands on: errors, settings, ranks, processor, processes, progress.

Nothing here knows of models, data or training, and nothing imports Paddle before it must: workers
and supervisors import this package in milliseconds. It exports no names of its own; import its
modules.
"""
