"""What the tests of sweeps share."""

from pathlib import Path
from typing import Any

import pytest

from tools.evidence import sweep
from tools.evidence.sweep import Step


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training is a note in this list and takes one second; the loss is the number of notes."""
    notes: list[str] = []

    def train(recipe: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
        notes.append(run_dir.name)
        run_dir.mkdir(parents=True, exist_ok=True)
        return {"wall_s": 2.0, "cpu_s": 1.0, "peak_gb": 0.1}

    def measured(run_dir: Path, step: Step) -> dict[str, Any]:
        return {"loss": float(len(notes))}

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "measured", measured)
    return notes
