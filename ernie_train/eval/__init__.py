"""Evaluation on held-out problems, and the gates between stages that read it."""
