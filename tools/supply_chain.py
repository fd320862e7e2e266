"""What is installed in this environment: whether its licences are accepted, and whether a weakness of it is known.

    python tools/supply_chain.py [AUDIT]

Licences are in the packages' own metadata. AUDIT is what `pip-audit --format json` wrote; a database that it could not
reach is no failure. Each package that is refused is named, and the status is 1.
"""

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

# As SPDX identifiers, and as classifiers and free texts of packages that have no SPDX expression.
ACCEPTED = {
    *(
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "LLVM-exception",
    ),
    *("MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
    *(
        "Apache Software License",
        "Apache 2.0 License",
        "Apache 2.0",
        "BSD",
        "BSD License",
        "3-Clause BSD License",
        "ISC License (ISCL)",
        "MIT License",
    ),
    *("Mozilla Public License 2.0 (MPL 2.0)", "Python Software Foundation License", "The Unlicense (Unlicense)"),
}
# What is used unmodified, is not handed on with this project, and why it is there.
EXCEPTIONS = {
    r"chardet": "LGPL; lm_eval's tables import it",
    r"nvidia-.*|cuda-.*": "NVIDIA's terms; torch's builds for its devices load them",
}


def licences(package: Distribution) -> list[str]:
    """The alternatives that a package offers, each as an SPDX expression without `OR`, or as a text."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return re.split(r"\s+OR\s+", expression.strip("()"))
    found = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    named = [name for name in found if name != "OSI Approved"]
    text = (metadata.get("License") or "").strip()
    return named or [re.sub(r"^The MIT License \(MIT\).*", "MIT", text, flags=re.DOTALL)]


def is_accepted(package: Distribution) -> bool:
    if any(re.fullmatch(name, package.metadata["Name"], re.IGNORECASE) for name in EXCEPTIONS):
        return True
    return any(
        alternative in ACCEPTED
        or {part.strip("() ") for part in re.split(r"\s+(?:AND|WITH)\s+", alternative)} <= ACCEPTED
        for alternative in licences(package)
    )


def refused_licences() -> list[str]:
    refused = [package for package in distributions() if not is_accepted(package)]
    print(f"{len(list(distributions()))} packages, {len(refused)} with a licence that is not accepted")
    return [f"{package.metadata['Name']}: {' or '.join(licences(package))[:80] or 'no licence'}" for package in refused]


def known_weaknesses(report: str) -> list[str]:
    packages = json.loads(report or "{}").get("dependencies", [])
    audited = [package for package in packages if "skip_reason" not in package]
    said = f"{len(audited)} of {len(packages)} packages audited"
    print(said if audited else "not audited: the database of pip-audit cannot be reached")
    found = [(package, weakness) for package in audited for weakness in package["vulns"]]
    return [
        f"{p['name']} {p['version']}: {w['id']}, mended in {', '.join(w['fix_versions']) or 'none'}" for p, w in found
    ]


if __name__ == "__main__":
    problems = refused_licences()
    problems += [line for file in sys.argv[1:] for line in known_weaknesses(Path(file).read_text())]
    sys.exit("\n".join(problems) or None)
