"""A certificate authority of a fleet, for an hour: a server's and devices' certificates with their keys."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def certificates(folder: Path, devices: Mapping[str, str | None] | None = None) -> None:
    """Write NAME.pem and NAME.key of `ca`, `server` (127.0.0.1) and every device, by the group (OU) that it belongs to."""
    now = dt.datetime.now(dt.UTC)
    authority = ec.generate_private_key(ec.SECP256R1())

    def name_of(common: str, unit: str | None = None) -> x509.Name:
        parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
        parts += [] if unit is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)]
        return x509.Name(parts)

    issuer = name_of("fleet")

    def write(file: str, key: ec.EllipticCurvePrivateKey, subject: x509.Name, extension: x509.ExtensionType) -> None:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=file == "ca")
        builder = builder.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(hours=1))
        certificate = builder.sign(authority, hashes.SHA256())
        (folder / f"{file}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{file}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    write("ca", authority, issuer, x509.BasicConstraints(ca=True, path_length=0))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for name, unit in {"server": None, **(devices or {"device": None})}.items():
        write(name, ec.generate_private_key(ec.SECP256R1()), name_of(name, unit), names)
