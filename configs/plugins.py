"""Plug-ins: files and modules that a recipe or `--plugins` names, which register what a recipe may then name.

A plug-in runs with the user's rights, so only those are run that the user names: what a checkpoint or an export records
of its training's plug-ins is never run by itself (`note_recorded`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from configs.files import partial_of, remove, remove_abandoned, write_whole
from configs.names import nearest
from configs.reading import read_regular, reading, reason, shown
from configs.registry import NOT_RUN, REGISTRIES

ENTRY_POINTS = "rerankvpr.plugins"
MODULE = "rerankvpr_plugin_"  # and the stem of a file: its module's name
METADATA = "plugins"  # the key of an exported file's metadata that holds digests by name, as JSON
ORDER = "order.txt"  # beside kept plug-ins: what to load, one a line


class PluginError(ValueError):
    """A plug-in that cannot be used; the text is one line that names it, and file and line where there is one."""


@dataclass(frozen=True)
class Plugin:
    """A plug-in that this process has run."""

    name: str  # of the file, without its folder; of the module or entry point
    module: str
    root: Path  # the file, or the folder of the module's outermost package
    sha256: str  # of its code
    adds: tuple[str, ...]  # what it registered: "aggregator mean"

    @property
    def is_file(self) -> bool:
        """Whether it was named as a file, not as a module."""
        return self.name.endswith(".py")

    def has(self, module: str) -> bool:
        """Whether a module is of this plug-in: the file, or anything in the outermost package of a module."""
        package = self.module.partition(".")[0]
        return module == self.module or (not self.is_file and f"{module}.".startswith(f"{package}."))


_loaded: dict[str, Plugin] = {}


def load_plugins(named: Iterable[str]) -> list[Plugin]:
    """Runs the plug-ins that a user names, each once, and returns them in their order.

    `my_vpr.py` and whatever has a `/` is a file; all else is an entry point of the group `rerankvpr.plugins`, or a
    module that Python finds. A file that has changed since is run anew, and what it registered before is forgotten.
    Raises PluginError; what a plug-in that fails has registered is forgotten.
    """
    return [_load(one) for one in named]


def loaded(named: Iterable[str] | None = None) -> list[Plugin]:
    """The plug-ins that this process has run: all, or those that a recipe names."""
    if named is None:
        return list(_loaded.values())
    return [_loaded[name] for name in map(name_of, named) if name in _loaded]


def name_of(named: str) -> str:
    """What a plug-in is called wherever it lies: a file's name without its folder, or a module's."""
    return Path(named).name if _is_file(named) else named


def digests(named: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of the code of `loaded(named)`, by name."""
    return {plugin.name: plugin.sha256 for plugin in loaded(named)}


def plugins_of_network(network: Any) -> list[Plugin]:
    """The plug-ins of this process that a network (an `nn.Module`) has parts of: they decide what it computes."""
    homes = {type(part).__module__ for part in network.modules()} | set(getattr(network, "origins", ()))
    return [plugin for plugin in loaded() if any(plugin.has(home) for home in homes)]


def digests_of_network(network: Any) -> dict[str, str]:
    """SHA-256 of the code of `plugins_of_network`, by name."""
    return {plugin.name: plugin.sha256 for plugin in plugins_of_network(network)}


def note_recorded(recorded: Mapping[str, str], where: Path, kept: Path | None = None) -> str:
    """A line on plug-ins that `where` records, by digest, and that were not run or are other ones; empty for none.

    An unknown name is explained by those that were not run, from here on. `kept` is the folder with their copies.
    """
    missing = {name: sha for name, sha in recorded.items() if name not in _loaded}
    others = [name for name, sha in recorded.items() if name in _loaded and _loaded[name].sha256 != sha]
    lines = []
    if missing:
        copies = [kept / sha[:8] / name for name, sha in missing.items()] if kept else []
        words = " ".join(str(copy) if copy.exists() else name for copy, name in zip(copies, missing, strict=False))
        remedy = f"--plugins {words or ' '.join(missing)}"
        NOT_RUN[str(where)] = f"plug-in {', '.join(missing)} of {where} was not run; {remedy} runs it"
        lines.append(
            f"{where} was made with plug-in {', '.join(missing)}, which is code and was not run; {remedy} runs it"
        )
    if others:
        said = ", ".join(f"{name} {recorded[name][:8]} (here {_loaded[name].sha256[:8]})" for name in others)
        lines.append(f"{where} was made with another plug-in {said}")
    return "; ".join(shown(line) for line in lines)


def note_exported(metadata: Mapping[str, str], file: Path) -> str:
    """`note_recorded` of what the metadata of an exported file records. Raises PluginError for no digests by name."""
    text = metadata.get(METADATA)
    return note_recorded(read_digests(text, file), file) if text else ""


def read_digests(text: str | bytes, file: Path) -> dict[str, str]:
    """Digests by name, from JSON. Raises PluginError naming the file."""
    with reading(file, "digests of plug-ins by name", PluginError):
        content = json.loads(text)
        if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
            raise ValueError("expected a mapping of names to digests")
        return content


def keep(plugins: Iterable[Plugin], folder: Path) -> list[Path]:
    """Copies plug-ins to `folder`/<first digits of the digest>/, for `load_kept`; returns the copies.

    A file is copied, or all of the package that a module is in.
    """
    copies, order = [], []
    for plugin in plugins:
        copy = folder / plugin.sha256[:8] / plugin.root.name
        copies.append(copy)
        order.append(str(copy.relative_to(folder)) if plugin.is_file else plugin.module)
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(copy)
        partial = partial_of(copy)
        if plugin.root.is_dir():
            shutil.copytree(plugin.root, partial, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(plugin.root, partial)
        try:
            partial.rename(copy)
        except OSError:  # another process has put the folder there, of the same bytes
            remove(partial)
            if not copy.exists():
                raise
    if order:
        write_whole(folder / ORDER, "\n".join(order) + "\n")
    return copies


def load_kept(folder: Path) -> None:
    """Runs what `keep` copied last to a folder, which the user trusts. Raises PluginError."""
    for named in (folder / ORDER).read_text().splitlines():
        if _is_file(named):
            load_plugins([str(folder / named)])
            continue
        package = named.partition(".")[0]
        homes = [str(home.parent) for name in (package, f"{package}.py") for home in folder.glob(f"*/{name}")]
        sys.path[:0] = [home for home in homes if home not in sys.path]
        load_plugins([named])


def _is_file(named: str) -> bool:
    return named.endswith(".py") or "/" in named


def _load(named: str) -> Plugin:
    name = name_of(named)
    before = _loaded.get(name)
    if _is_file(named):
        path = Path(named).absolute()
        try:
            code = read_regular(path)
        except OSError as error:
            where = "" if Path(named).is_absolute() else f" in {Path.cwd()}"
            raise PluginError(f"plug-in {named}: {error.strerror or error}{where}") from error
        sha256 = hashlib.sha256(code).hexdigest()
        if before and before.sha256 == sha256:
            return before
        if before and before.root != path and before.root.exists():
            raise PluginError(f"plug-in {named}: {before.root} has the same name and other code; rename one of them")
        _forget(name)
        try:
            adds = _registered_by(named, lambda: _run(MODULE + path.stem, path, code))
        except PluginError:
            del sys.modules[MODULE + path.stem]
            raise
        plugin = Plugin(name, MODULE + path.stem, path, sha256, adds)
    else:
        if before:
            return before
        module_name = _module_name(named)
        present = module_name in sys.modules
        adds = _registered_by(named, lambda: importlib.import_module(module_name), module_name if present else None)
        root, sha256 = _code_of(named, sys.modules[module_name.partition(".")[0]])
        plugin = Plugin(name, module_name, root, sha256, adds)
    _loaded[name] = plugin
    return plugin


def _run(module_name: str, path: Path, code: bytes) -> None:
    """Runs the bytes that were digested; Python's own import may take an older compiled copy."""
    module = ModuleType(module_name)
    module.__file__ = str(path)
    sys.modules[module_name] = module  # dataclasses and pickle look there
    exec(compile(code, str(path), "exec", dont_inherit=True), vars(module))


def _registered_by(named: str, run: object, imported_before: str | None = None) -> tuple[str, ...]:
    """What `run()` registers, or what a module that is imported already has; forgotten if it raises."""
    assert callable(run)
    before = [registry.names() for registry in REGISTRIES]
    try:
        run()
    except (Exception, SystemExit) as error:
        _forget_all_but(before)
        raise PluginError(f"plug-in {named}: {_where(named, error)}{_what(error)} ({MORE})") from error
    adds = [
        f"{registry.kind} {name}"
        for registry, names in zip(REGISTRIES, before, strict=True)
        for name in registry
        if name not in names or (imported_before and f"{registry.origin(name)}.".startswith(f"{imported_before}."))
    ]
    if not adds:
        raise PluginError(
            f'plug-in {named} registers nothing; expected a line such as @AGGREGATORS.register("name") '
            "(docs/extending.md)"
        )
    return tuple(adds)


MORE = "RERANKVPR_TRACEBACK=1 shows all of it"


def _what(error: BaseException) -> str:
    text = reason(error)
    if isinstance(error, SyntaxError):
        text = shown(error.msg)
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def _where(named: str, error: BaseException) -> str:
    """`file:line: ` of the last line on the way to an error that is no library's of Python or ours."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    stem = Path(named).name if _is_file(named) else named.split(".")[0]
    own = [f for f in frames if f.filename.endswith(f"{os.sep}{stem}") or f"{os.sep}{stem}{os.sep}" in f.filename]
    return f"{own[-1].filename}:{own[-1].lineno}: " if own else ""


def described(error: BaseException) -> str:
    """An error in one line: its kind and text, and before them file and line of the plug-in that raised it, if any."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(plugin.root) for plugin in _loaded.values())
    ]
    return (f"{own[-1].filename}:{own[-1].lineno}: " if own else "") + _what(error)


def _forget(name: str) -> None:
    """Frees the names that a plug-in registered."""
    plugin = _loaded.pop(name, None)
    for added in plugin.adds if plugin else ():
        kind, _, registered = added.partition(" ")
        next(registry for registry in REGISTRIES if registry.kind == kind).forget(registered)


def _forget_all_but(names: Sequence[Sequence[str]]) -> None:
    for registry, known in zip(REGISTRIES, names, strict=True):
        for name in registry.names():
            if name not in known:
                registry.forget(name)


def _module_name(named: str) -> str:
    """The module that an entry point of that name is for, or `named` itself if Python finds it."""
    points = {point.name: point.module for point in metadata.entry_points(group=ENTRY_POINTS)}
    if named in points:
        return points[named]
    try:
        found = importlib.util.find_spec(named) is not None
    except (ImportError, ValueError):
        found = False  # its parent is not there, or it is no name of a module
    if not found and named not in sys.modules:
        known = f"; {nearest(named, points)}" if points else ""
        raise PluginError(
            f"plug-in {named}: Python finds no module of that name; a file is named with its ending, my_vpr.py{known}"
        )
    return named


def _code_of(named: str, module: ModuleType) -> tuple[Path, str]:
    """An outermost module's file or folder, and the digest of its Python files, by name within it."""
    if not module.__file__:
        raise PluginError(f"plug-in {named}: {module.__name__} has no __init__.py, which a package of a plug-in needs")
    file = Path(module.__file__)
    if file.name != "__init__.py":
        return file, hashlib.sha256(file.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for part in sorted(file.parent.rglob("*.py")):
        content = part.read_bytes()
        digest.update(f"{part.relative_to(file.parent)} {len(content)}\n".encode() + content)
    return file.parent, digest.hexdigest()
