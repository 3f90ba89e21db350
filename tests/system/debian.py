"""Makes a small Debian root from this machine's: the files of some packages and of their dependencies."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.system.processes import run

STATUS = Path("/var/lib/dpkg/status")
INFO = Path("/var/lib/dpkg/info")
EXCLUDED = ("/usr/share/doc/", "/usr/share/locale/", "/usr/share/man/", "/usr/share/info/")
MERGED_USR = ("bin", "lib", "lib64", "sbin")  # links to these directories of /usr
EMPTY_DIRECTORIES = (
    "dev",
    "etc",
    "proc",
    "run",
    "sys",
    "tmp",
    "var/lib/dpkg/info",
    "var/lib/dpkg/updates",
)
# Files that belong to no package. Builds in the root trust the same authorities as this machine.
EXTRA_FILES = ("/etc/nsswitch.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


def installed_packages() -> dict[str, str]:
    """Return the stanza of each installed package in dpkg's status file, by name."""
    stanzas = STATUS.read_text().split("\n\n")
    return {
        stanza.splitlines()[0].removeprefix("Package: "): stanza
        for stanza in stanzas
        if "\nStatus: install ok installed\n" in stanza
    }


def alternatives_in(stanza: str, *fields: str) -> Iterator[list[str]]:
    """Yield the alternative packages of each clause of these fields, without versions."""
    for value in re.findall(rf"^(?:{'|'.join(fields)}): (.*)$", stanza, re.MULTILINE):
        for clause in value.split(","):
            yield [re.split(r"[ (:]", name.strip())[0] for name in clause.split("|")]


def with_dependencies(*packages: str) -> dict[str, str]:
    """Return the stanzas of these packages and of all that they depend on, by name."""
    installed = installed_packages()
    providers = {
        virtual: name
        for name, stanza in installed.items()
        for (virtual,) in alternatives_in(stanza, "Provides")
    }
    stanzas: dict[str, str] = {}
    pending = list(packages)
    while pending:
        name = pending.pop()
        if name in stanzas:
            continue
        stanzas[name] = installed[name]
        for alternatives in alternatives_in(installed[name], "Pre-Depends", "Depends"):
            real = [name if name in installed else providers.get(name) for name in alternatives]
            pending += [name for name in real if name][:1]
    return stanzas


def make_root(target: Path, *packages: str) -> None:
    """Make a root directory in which these packages are installed, also according to its dpkg.

    All files are copies, so that nothing in the root can change this machine's files.
    """
    for name in MERGED_USR:
        (target / "usr" / name).mkdir(parents=True)
        (target / name).symlink_to(f"usr/{name}")
    for name in EMPTY_DIRECTORIES:
        (target / name).mkdir(parents=True, exist_ok=True)
    stanzas = with_dependencies("base-passwd", *packages)
    files = {file for name in stanzas for file in files_of(name)}
    files |= {Path(name) for name in EXTRA_FILES if Path(name).exists()}
    listing = target / "tmp" / "files"
    listing.write_text("\n".join(sorted(str(file).lstrip("/") for file in files)))
    archive = target / "tmp" / "files.tar"
    run("tar", "-C", "/", "--no-recursion", "-cf", archive, "-T", listing)
    run("tar", "-C", target, "-xpf", archive)
    listing.unlink()
    archive.unlink()
    (target / "tmp").chmod(0o1777)
    (target / "dev" / "null").touch()
    for name in ("passwd", "group"):
        shutil.copy(
            target / "usr" / "share" / "base-passwd" / f"{name}.master", target / "etc" / name
        )
    database = target / "var" / "lib" / "dpkg"
    (database / "status").write_text("\n\n".join(stanzas.values()) + "\n")
    for name in stanzas:
        shutil.copy(file_list_of(name), database / "info")


def file_list_of(package: str) -> Path:
    """Return dpkg's file with the list of a package's files."""
    (file_list,) = [*INFO.glob(f"{package}.list"), *INFO.glob(f"{package}:*.list")]
    return file_list


def files_of(package: str) -> Iterator[Path]:
    """Yield the resolved paths of a package's files, without documentation and translations."""
    for line in file_list_of(package).read_text().splitlines():
        if line.startswith("/") and line != "/." and not line.startswith(EXCLUDED):
            path = Path(line)
            real = path.parent.resolve() / path.name
            if real.is_symlink() or real.exists():
                yield real
