"""Files that are whole or absent, safetensors, metrics, and who owns a run directory.

Everything is written to a sibling and renamed, so that a reader, also one after a power cut, sees
the old content or the new. Import its modules.
"""
