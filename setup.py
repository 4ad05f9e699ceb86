"""Adds the recipes and their data to the package; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

SHARED = {f"ernie_train.share.{name}": name for name in ("recipes", "data")}

setup(
    packages=[*find_packages(include=["ernie_train", "ernie_train.*"]), *SHARED],
    package_dir=SHARED,
    package_data={name: ["**/*"] for name in SHARED}
    | {"ernie_train": ["py.typed", "data/templates/*.jinja", "report/assets/*"]},
)
