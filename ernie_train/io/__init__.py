"""Write files atomically, read and write safetensors, log metrics, and lock run directories.

Files are written under a temporary name and renamed, so that a reader sees the old content or the
new, even after a power cut. Metrics are appended. Import the modules of this package directly.
"""
