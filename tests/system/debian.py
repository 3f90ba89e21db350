"""A small Debian, copied out of this machine's own: the files of some packages and of what they need."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.system.processes import run

STATUS = Path("/var/lib/dpkg/status")
INFO = Path("/var/lib/dpkg/info")
LEFT_OUT = ("/usr/share/doc/", "/usr/share/locale/", "/usr/share/man/", "/usr/share/info/")
MERGED = ("bin", "lib", "lib64", "sbin")  # names of directories in /usr
SCRATCH = ("dev", "etc", "proc", "run", "sys", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates")
# Files that belong to no package. Who builds in there trusts whom this machine trusts.
SHARED = ("/etc/nsswitch.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


def installed() -> dict[str, str]:
    """Return what dpkg says of each installed package."""
    stanzas = STATUS.read_text().split("\n\n")
    return {
        stanza.splitlines()[0].removeprefix("Package: "): stanza
        for stanza in stanzas
        if "\nStatus: install ok installed\n" in stanza
    }


def names_in(stanza: str, *fields: str) -> Iterator[list[str]]:
    """Yield the names of each clause of such fields, without versions and architectures."""
    for value in re.findall(rf"^(?:{'|'.join(fields)}): (.*)$", stanza, re.MULTILINE):
        for clause in value.split(","):
            yield [re.split(r"[ (:]", name.strip())[0] for name in clause.split("|")]


def closure(*packages: str) -> dict[str, str]:
    """Return what dpkg says of these packages and of all that they depend on."""
    known = installed()
    providers = {
        virtual: name
        for name, stanza in known.items()
        for (virtual,) in names_in(stanza, "Provides")
    }
    found: dict[str, str] = {}
    waiting = list(packages)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = known[name]
        for alternatives in names_in(known[name], "Pre-Depends", "Depends"):
            one = [name if name in known else providers.get(name) for name in alternatives]
            waiting += [name for name in one if name][:1]
    return found


def make_root(target: Path, *packages: str) -> None:
    """Make a root directory in which these packages are installed, for dpkg too.

    Nothing in it is linked to this machine's files.
    """
    for name in MERGED:
        (target / "usr" / name).mkdir(parents=True)
        (target / name).symlink_to(f"usr/{name}")
    for name in SCRATCH:
        (target / name).mkdir(parents=True, exist_ok=True)
    chosen = closure("base-passwd", *packages)
    files = {file for name in chosen for file in files_of(name)}
    files |= {Path(name) for name in SHARED if Path(name).exists()}
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
    (database / "status").write_text("\n\n".join(chosen.values()) + "\n")
    for name in chosen:
        shutil.copy(list_of(name), database / "info")


def list_of(package: str) -> Path:
    """Return the file in which dpkg lists a package's files."""
    (listed,) = [*INFO.glob(f"{package}.list"), *INFO.glob(f"{package}:*.list")]
    return listed


def files_of(package: str) -> Iterator[Path]:
    """Yield where a package's files really are, but for those that only people read."""
    for line in list_of(package).read_text().splitlines():
        if line.startswith("/") and line != "/." and not line.startswith(LEFT_OUT):
            path = Path(line)
            real = path.parent.resolve() / path.name
            if real.is_symlink() or real.exists():
                yield real
