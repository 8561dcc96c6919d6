"""A release's software bill of materials in CycloneDX's format (ECMA-424), from what is installed in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def sbom(installed: Iterable[Mapping[str, str]], name: str, version: str) -> str:
    """Return the SBOM, as JSON, of the application `name`; `installed` is what files/installed.py prints."""
    # Not at the top: Ansible loads all filters in the process of each task, which would take half a second longer.
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    licenses = LicenseFactory()
    bom = Bom()
    bom.metadata.component = root = Component(
        type=ComponentType.APPLICATION, name=name, version=version, bom_ref=f"{name}@{version}"
    )
    components = []
    for package in installed:
        purl = PackageURL("pypi", name=package["name"].lower().replace("_", "-"), version=package["version"])
        pages = [ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(package["page"]))]
        components.append(
            Component(
                type=ComponentType.LIBRARY,
                name=package["name"],
                version=package["version"],
                purl=purl,
                bom_ref=str(purl),
                licenses=[licenses.make_from_string(package["license"])] if package["license"] else (),
                external_references=pages if package["page"] else (),
            )
        )
    bom.components.update(components)
    bom.register_dependency(root, components)
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    return text


class FilterModule:
    """Ansible's way to find them."""

    def filters(self) -> dict[str, object]:
        """Return the filters by name."""
        return {"python_service_sbom": sbom}
