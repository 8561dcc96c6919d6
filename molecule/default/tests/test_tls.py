"""Mozilla's modern TLS profile, as sslyze reads it, asked of the deployed servers."""

import json

import pytest
from conftest import Run

# Runs on the host in sslyze's own environment; prints what is not compliant, an empty object when all is.
SCAN = r"""
import json, sys
from pathlib import Path
from sslyze import (CertificateInfoExtraArgument, ProtocolWithOpportunisticTlsEnum, Scanner, ServerNetworkConfiguration,
                    ServerNetworkLocation, ServerScanRequest, ScanCommandsExtraArguments)
from sslyze.mozilla_tls_profile.tls_config_checker import (
    SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER, MozillaTlsConfiguration, ServerNotCompliantWithTlsConfiguration,
    TlsConfigurationEnum, check_server_against_tls_configuration)

address, port, starttls, authority = sys.argv[1:]
configuration = ServerNetworkConfiguration(
    tls_server_name_indication=address,
    tls_opportunistic_encryption=ProtocolWithOpportunisticTlsEnum.POSTGRES if starttls == "postgres" else None)
trust = ScanCommandsExtraArguments(certificate_info=CertificateInfoExtraArgument(custom_ca_file=Path(authority)))
scanner = Scanner()
scanner.queue_scans([ServerScanRequest(
    ServerNetworkLocation(address, int(port), ip_address=address), network_configuration=configuration,
    scan_commands=SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER, scan_commands_extra_arguments=trust)])
(result,) = scanner.get_results()
profile = MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_MODERN)
try:
    check_server_against_tls_configuration(result, profile)
    print("{}")
except ServerNotCompliantWithTlsConfiguration as error:
    print(json.dumps(error.issues))
"""


@pytest.mark.parametrize(
    ("port", "starttls", "authority"),
    [("5432", "postgres", "/etc/postgresql/17/main/tls/ca.crt"), ("443", "none", "/etc/haproxy/tls/ca.crt")],
    ids=["postgresql", "haproxy"],
)
def test_mozillas_modern_profile(port: str, starttls: str, authority: str, run: Run, address: str) -> None:
    command = ("/opt/sslyze-venv/bin/python", "-", address, port, starttls, authority)
    assert json.loads(run(*command, input=SCAN)) == {}
