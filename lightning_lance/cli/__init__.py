"""The command line tool ``lightning-lance``; it needs the extra ``cli``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from lightning_utilities.core.imports import RequirementCache

from lightning_lance import __version__

PROGRAM = "lightning-lance"

NEEDED = "jsonargparse[signatures]>=4.39"
"""The extra ``cli``."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the tool, and leave with a short message where a value is not allowed.

    Classes named in a configuration are also looked up in the current directory.

    Args:
        args: the arguments after the program name; those of the process by default.

    Raises:
        SystemExit: with 2 for an argument that is not allowed or a package that is missing, with 1 where the model
            and the options do not fit together.
    """
    if (sys.argv[1:] if args is None else list(args)) == ["--version"]:  # also where the extra is not installed
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return
    if not RequirementCache(NEEDED):  # also where jsonargparse is there, and not what it needs to read signatures
        _leave(f"the command line needs {NEEDED}; pip install 'lightning-lance[cli]' installs it.", 2)
    if os.getcwd() not in sys.path:  # "" would not do: a configuration is read from within its own folder
        sys.path.insert(0, os.getcwd())
    # Lightning's own calls of jsonargparse and torch: nothing that a user of the tool could change.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_lance.cli.app import run
    from lightning_lance.cli.messages import explain
    from lightning_lance.errors import ConfigError, LanceError

    try:
        run(None if args is None else list(args))
    except ImportError as error:
        if "lightning-lance[" not in str(error):  # one of ours names the extra to install
            raise
        _leave(str(error), 2)
    except ConfigError as error:
        _leave(str(error), 2)
    except LanceError as error:
        _leave(str(error), 1)
    except MisconfigurationException as error:  # Lightning's, which says what to do
        _leave(" ".join(str(error).split()), 1)
    except ValueError as error:
        found = explain(error)
        if found is None:
            raise
        _leave(found, 2)


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"{PROGRAM}: error: {message}\n")
    raise SystemExit(code)
