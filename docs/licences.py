"""Writes docs/licences.md: the licence that each package of requirements.lock declares; `make licences`.

The metadata of installed packages is read. The lock also names packages for other Pythons and systems: their rows stay
as long as the lock keeps their version, and `--beside FOLDER` reads new ones from an installation in that folder.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PAGE = ROOT / "docs" / "licences.md"
ASKING = re.compile(r"\b(A?L?GPL|MPL|EPL|CDDL|Proprietary|NVIDIA)", re.IGNORECASE)
SHORT = {
    "MIT": ("MIT", "MIT License", "The MIT License", "The MIT License (MIT)"),
    "Apache-2.0": ("Apache 2.0", "Apache License 2.0", "Apache Software License", "Apache License, Version 2.0"),
    "BSD": ("BSD", "BSD License"),
    "MPL-2.0": ("Mozilla Public License 2.0 (MPL 2.0)", "MPL 2.0"),
    "PSF-2.0": ("Python Software Foundation License", "PSF"),
}
NAMES = {name: spdx for spdx, names in SHORT.items() for name in names}


def locked() -> dict[str, list[str]]:
    """The versions that the lock has of each package, oldest first."""
    versions: dict[str, set[str]] = defaultdict(set)
    for name, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE):
        versions[name].add(version)
    return {name: sorted(found, key=Version) for name, found in sorted(versions.items())}


def licence(package: Distribution) -> str:
    """What a package declares: its SPDX expression, else its classifiers or licence field, else its licence's title."""
    said = {field: package.metadata.get_all(field, []) for field in ("License-Expression", "Classifier", "License")}
    if said["License-Expression"]:
        return str(said["License-Expression"][0])
    classifiers = [text.split(" :: ")[-1] for text in said["Classifier"] if text.startswith("License")]
    classes = sorted(NAMES.get(name, name) for name in classifiers if name != "OSI Approved")
    field = " ".join(" ".join(said["License"]).split())
    if field and len(field) < 80 and classes in ([], ["BSD"]):  # the field may say which BSD
        return NAMES.get(field, field)
    if classes:
        return " or ".join(classes)
    texts = [file.read_text() for file in package.files or [] if file.name.upper().startswith("LICEN")]
    return "MIT" if any("Permission is hereby granted, free of charge" in text for text in texts) else "not declared"


def rows_of(packages: Iterable[Distribution], versions: dict[str, list[str]]) -> dict[str, str]:
    """Licences by name of those packages whose version is the newest in the lock."""
    found = {}
    for package in packages:
        name = re.sub(r"[-_.]+", "-", package.name).lower()
        if name in versions and package.version == versions[name][-1]:
            found[name] = licence(package)
    return found


def kept(versions: dict[str, list[str]]) -> dict[str, str]:
    """The page's present rows, of packages whose newest version is still the row's."""
    text = PAGE.read_text() if PAGE.is_file() else ""
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return {name: what for name, at, what in rows if versions.get(name, [""])[-1] == at.split(", ")[-1]}


def page(versions: dict[str, list[str]], licences: dict[str, str]) -> str:
    """The page as Markdown."""
    asking: dict[str, list[str]] = defaultdict(list)
    for name in versions:
        if ASKING.search(licences[name]):
            asking[licences[name]].append(name)
    lines = [
        "# Which licences do the dependencies have?",
        "",
        "RerankVPR at scale is under the MIT licence and contains none of the packages below. `make env` installs them",
        f"from requirements.lock: {len(versions)} packages, each with the licence that its metadata declares. Several",
        "versions are for several Pythons, some packages are for other systems. Weights have their own licences.",
        "`make licences` writes this page, and a test holds it to the lock.",
        "",
        "These ask for more than to keep a notice:",
        "",
        *(f"- {what}: {', '.join(names)}" for what, names in sorted(asking.items())),
        "",
        "| package | version | licence |",
        "| --- | --- | --- |",
        *(f"| {name} | {', '.join(at)} | {licences[name]} |" for name, at in versions.items()),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Writes the page, or with --check says what is not true of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if the page is not as it would be"
    )
    parser.add_argument("--beside", type=Path, action="append", default=[], help="folder of further installed packages")
    arguments = parser.parse_args(argv)
    versions = locked()
    beside = distributions(path=[str(folder) for folder in arguments.beside])
    licences = kept(versions) | rows_of(beside, versions) | rows_of(distributions(), versions)
    missing = [f"{name}=={at[-1]}" for name, at in versions.items() if name not in licences]
    if missing:
        sys.exit(
            f"docs/licences.py: not installed here: {' '.join(missing)}; install them in a folder, --beside FOLDER"
        )
    text = page(versions, licences)
    if not arguments.check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        sys.exit("docs/licences.md is not what the lock and the installed packages say; write it by `make licences`")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
