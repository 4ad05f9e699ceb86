"""The JSON Schema of a recipe, by which editors complete and check it."""

from __future__ import annotations

import json
from typing import Any

from ernie_train.run.recipe import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe.

    It knows keys, types, bounds and defaults; what settings ask of each other `check` alone does.
    """
    return {"$schema": DRAFT, **Recipe.model_json_schema()}


def schema_text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"
