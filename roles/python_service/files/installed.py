"""Print what is installed beside the Python that runs this, as JSON: name, version, license, page of each package."""

import json
from importlib.metadata import distributions

FREE_TEXT = 64  # a License field may hold the whole text instead of a name


def license_of(metadata):
    """Return the SPDX expression of a package, else its short License field or the classifier, else an empty text."""
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    said = metadata.get("License-Expression") or metadata.get("License") or ""
    return said if said and len(said) <= FREE_TEXT and "\n" not in said else ", ".join(classifiers)


def page_of(metadata):
    """Return a package's address: of its source, else of its home page."""
    pages = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL", []) if ", " in entry)
    named = {name.lower(): page for name, page in pages.items()}
    return next((named[n] for n in ("source", "repository", "homepage") if n in named), metadata.get("Home-page") or "")


print(
    json.dumps(
        sorted(
            (
                {
                    "name": package.metadata["Name"],
                    "version": package.version,
                    "license": license_of(package.metadata),
                    "page": page_of(package.metadata),
                }
                for package in distributions()
            ),
            key=lambda package: package["name"].lower(),
        )
    )
)
