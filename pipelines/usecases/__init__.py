"""The reference use cases; each is one page of definitions named ``USE_CASE``."""

from __future__ import annotations

import importlib
import pkgutil

from pipelines.spec import UseCase


def names() -> list[str]:
    """The names of all pages in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> UseCase:
    """The use case ``name``; ``KeyError`` lists those that exist, ``ValueError`` names two views that are one."""
    if name not in names():
        raise KeyError(f"there is no use case {name!r} in pipelines/usecases; there are {names()}")
    use_case = importlib.import_module(f"{__name__}.{name}").USE_CASE
    if not isinstance(use_case, UseCase) or use_case.name != name:
        raise TypeError(f"pipelines/usecases/{name}.py must define USE_CASE, a UseCase named {name!r}")
    from pipelines.features.windows import pages  # compiled kernels, which a list of names does without

    pages(use_case)
    return use_case
