"""Modules outside the package that register something: guidance rules, perturbations, model families, extractors.

A module is named as for `import`, or by the path of its file, in the option `--plugin` of every command, which may be
repeated, or in the environment variable SOFTCFG_PLUGINS, separated by commas. Installed packages may name modules in
the entry point group `softcfg.plugins` instead. All of them are imported before the command line is parsed, in every
process of a job.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from softcfg.errors import UserError

OPTION = "--plugin"
VARIABLE = "SOFTCFG_PLUGINS"
ENTRY_POINTS = "softcfg.plugins"

_loaded: dict[str, ModuleType] = {}  # by what `options` calls them


def load(name: str) -> ModuleType:
    """Import a plugin: "package.module", or the path of a Python file; a second call gives the same module.

    Raises:
        UserError: it cannot be imported, or the file has the name of another module.
    """
    is_file = name.endswith(".py")
    known = str(Path(name).resolve()) if is_file else name
    if known not in _loaded:
        try:
            _loaded[known] = _load_file(Path(known)) if is_file else imported(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the plugin {name} cannot be imported: {type(error).__name__}: {error}") from error
    return _loaded[known]


def imported(name: str) -> ModuleType:
    """Import a module that a user names; it may lie in the working directory, where an installed command does not look.

    Raises:
        ImportError: there is none of this name; and whatever it raises itself.
    """
    try:
        known = importlib.util.find_spec(name.partition(".")[0]) is not None
    except (ImportError, ValueError):
        known = False
    if not known and "" not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.append("")  # behind all others
    return importlib.import_module(name)


def load_all(words: Sequence[str] = ()) -> None:
    """Import the plugins of installed packages, of the environment and of a command line.

    Raises:
        UserError: one of the environment or the command line cannot be imported. An installed one that cannot is left
            out with a warning.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            importlib.import_module(entry.module)
        except Exception as error:
            print(f"softcfg: warning: the plugin {entry.module} cannot be imported: {error}", file=sys.stderr)
    for name in filter(None, (*_of_environment(), *named(words))):
        load(name)


def named(words: Sequence[str]) -> list[str]:
    """The plugins that a command line names."""
    found = []
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == OPTION and (equals or i + 1 < len(words)):
            found.append(value if equals else words[i + 1])
    return found


def options() -> list[str]:
    """The options with which a command started elsewhere has the plugins that were loaded here."""
    return [word for name in _loaded for word in (OPTION, name)]


def _of_environment() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def _load_file(path: Path) -> ModuleType:
    name = path.stem
    if name in sys.modules:
        module = sys.modules[name]
        if getattr(module, "__file__", None) != str(path):
            raise UserError(f"the plugin {path} has the name of another module, {name}; rename the file")
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"the plugin {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
