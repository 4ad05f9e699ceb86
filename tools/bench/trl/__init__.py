"""Whole runs of ours and of TRL's trainers on the same model, rows and settings."""
