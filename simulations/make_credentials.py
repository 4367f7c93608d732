"""Certificates and keys for a federation on trial: TLS of the SuperLink, a key for every site.

    python make_credentials.py credentials --sites hospital-a hospital-b --host 127.0.0.1

What is there already stays as it is, so that a site can be added later. For patients' data have
your own authority sign the SuperLink's certificate, and let every site make its own key.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = timedelta(days=365)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--sites", nargs="+", required=True, metavar="NAME", help="names of sites")
    parser.add_argument(
        "--host",
        nargs="+",
        default=["127.0.0.1", "localhost"],
        help="names and addresses that the sites reach the SuperLink by",
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if (arguments.folder / "server.pem").exists():
        print(f"{arguments.folder / 'server.pem'} is there already, and keeps its names")
    else:
        write_server_certificate(arguments.folder, arguments.host)
    for site in arguments.sites:
        if (arguments.folder / site).exists():
            print(f"{arguments.folder / site} is there already")
        else:
            write_site_key(arguments.folder, site)


def write_server_certificate(folder: Path, hosts: list[str]) -> None:
    """Write ``ca.crt``, which sites need, and ``server.pem`` and ``server.key`` for the SuperLink.

    The authority's key is thrown away: nobody can sign another certificate with it.
    """
    authority_key, server_key = new_key(), new_key()
    authority = name("flwr_fusion development authority")
    authority_certificate = (
        certificate(authority, authority, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    server_certificate = (
        certificate(name(hosts[0]), authority, server_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([alternative(host) for host in hosts]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    write(folder / "ca.crt", authority_certificate.public_bytes(pem))
    write_secret(
        folder / "server.key",
        server_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
    # Last: where it is there, all is.
    write(folder / "server.pem", server_certificate.public_bytes(pem))


def write_site_key(folder: Path, site: str) -> None:
    """Write a site's private key, and beside it ``.pub``, which the SuperLink gets to know."""
    key = new_key()
    write_secret(
        folder / site,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write(folder / f"{site}.pub", public)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of sites differ.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + VALID)
    )


def key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    print(f"wrote {path}")


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    print(f"wrote {path} (keep it secret)")


if __name__ == "__main__":
    main()
