"""Which Python, code and libraries made a figure: what every record of one keeps.

The code's own version is the one it says itself. A clone that was not installed has no other, and where another clone
is installed, that one's would be wrong.
"""

from __future__ import annotations

import platform
from importlib import metadata

from moe_train import __version__


def versions_with(*libraries: str) -> dict[str, str]:
    """By name: of Python, of this code and of `libraries`, which are installed."""
    of_libraries = {name: metadata.version(name) for name in libraries}
    return {"python": platform.python_version(), "moe_train": __version__, **of_libraries}
